"""How parity is measured: the relative error of a whole tensor."""

import json
import os

import numpy as np


def error(got, want) -> float:
  """Returns ||got - want|| / ||want||."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check(network: str, case: str, got, want, tolerance: float) -> None:
  """Asserts the error; also notes it in the file $PARITY_REPORT names."""
  found = error(got, want)
  if report := os.environ.get("PARITY_REPORT"):
    with open(report, "a", encoding="utf-8") as file:
      row = {"network": network, "case": case, "error": found}
      file.write(json.dumps(row) + "\n")
  assert found <= tolerance, f"{network}, {case}: {found:.2e} > {tolerance}"
