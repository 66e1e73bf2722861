"""Prints how far each layout lies from one device.

python -m tests.parallel.table
"""

import sys

import jax

from tests.parallel import equality


def main() -> int:
  """Returns 1 if any cell is out of tolerance."""
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_disable_most_optimizations", True)
  worst = 0.0
  for job in ("sample", "train"):
    print(f"{job:22}" + "".join(f"{v:>12}" for v in equality.VARIANTS))
    for layout in equality.LAYOUTS:
      errors = [
        equality.Case(variant, layout, job).error()
        for variant in equality.VARIANTS
      ]
      cells = "".join(f"{error:12.1e}" for error in errors)
      print(f"{layout:22}{cells}", flush=True)
      worst = max(worst, *errors)
  print(f"worst {worst:.1e}, tolerance {equality.TOLERANCE:.0e}")
  return int(not worst <= equality.TOLERANCE)


if __name__ == "__main__":
  sys.exit(main())
