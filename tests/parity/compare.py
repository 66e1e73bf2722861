"""How parity is measured: the relative error of a whole tensor."""

import json
import os

import numpy as np


def error(got, want) -> float:
  """Returns ||got - want|| / ||want||."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def note(network: str, case: str, value: float) -> None:
  """Appends a figure to the file that $PARITY_REPORT names, if it does."""
  if report := os.environ.get("PARITY_REPORT"):
    with open(report, "a", encoding="utf-8") as file:
      row = {"network": network, "case": case, "value": float(value)}
      file.write(json.dumps(row) + "\n")


def check(network: str, case: str, got, want, tolerance: float) -> None:
  """Asserts the error, and notes it."""
  found = error(got, want)
  note(network, case, found)
  assert found <= tolerance, f"{network}, {case}: {found:.2e} > {tolerance}"
