#!/usr/bin/env bash
# Start it and watch over it: bash FILE up. The other words: status, logs, stop
# (saves), delete (gives the machines back).
# What is quoted is for the workers' shells; one slice is one node.
# shellcheck disable=SC2016,SC2043
set -u
name=@{name}
where=(--zone=@{zone} --project=@{project})
queued() { gcloud compute tpus queued-resources "$@" "${where[@]}"; }

# The same command on every worker: ssh WORKERS COMMAND.
on() {
  local node
  for node in @{nodes}; do
    gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker="$1" \
      --command="$2" || return
  done
}

create() {
  queued create "$name" @{node_flags} --accelerator-type=@{accelerator} \
    --runtime-version=@{runtime} @{spot}
}

state() {
  queued describe "$name" --format='value(state.state)' 2>/dev/null
}

# A unit of systemd: SIGTERM when it, or the machine, is to stop; started again
# where the exit code is 75.
start() {
  on all @{prepare} && on all @{run}
}

up() {
  local started="" code
  for ((;;)); do
    case "$(state)" in
      ACTIVE)
        if [ -z "$started" ]; then
          start && started=1
        else
          code=$(on 0 @{code} | tail -n 1)
          if [ "${code#done }" != "$code" ]; then
            echo "launch: ended with exit code ${code#done }." >&2
            return "${code#done }"
          fi
        fi
        ;;
      "")
        started=""
        create || return
        ;;
      SUSPENDED | FAILED)
        # The machines are gone; the checkpoints are not.
        echo "launch: the machines were taken away; asking again." >&2
        queued delete "$name" --quiet --force || return
        ;;
    esac
    sleep 60
  done
}

case "${1:-}" in
  up) up ;;
  status) state && on all @{status} ;;
  logs) on 0 @{logs} ;;
  stop) on all @{stop} ;;
  delete) queued delete "$name" --quiet --force ;;
  *)
    echo "usage: bash $0 up|status|logs|stop|delete" >&2
    exit 2
    ;;
esac
