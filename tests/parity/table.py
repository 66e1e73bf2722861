"""Prints the parity tables from what the tests noted.

python -m tests.parity.table parity.jsonl
"""

import json
import sys


def main() -> None:
  rows = {}
  with open(sys.argv[1], encoding="utf-8") as file:
    for line in file:
      row = json.loads(line)
      key = row["network"], row["case"]
      rows[key] = max(row["value"], rows.get(key, 0.0))
  print("| network | case | error |\n| --- | --- | --- |")
  for (network, case), value in sorted(rows.items()):
    text = f"{value:.1f} dB" if "PSNR" in network else f"{value:.1e}"
    print(f"| {network} | {case} | {text} |")


if __name__ == "__main__":
  main()
