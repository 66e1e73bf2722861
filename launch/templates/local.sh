#!/usr/bin/env bash
# Runs on this machine: bash FILE. Ctrl-C saves and stops.
set -eu
cd @{root}
@{exports}
exec python3 launch/local.py --processes=@{processes} @{devices} \
  --restarts=@{restarts} -- @{command}
