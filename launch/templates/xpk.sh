#!/usr/bin/env bash
# Start it: bash FILE. Stop it: bash FILE delete. See it: bash FILE list.
set -eu
name=@{name}
where=(--cluster=@{cluster} --zone=@{zone} --project=@{project})
case "${1:-create}" in
  create)
    exec xpk workload create --workload="$name" "${where[@]}" \
      --tpu-type=@{accelerator} --num-slices=@{slices} \
      --docker-image=@{image} --max-restarts=@{restarts} \
      --restart-on-exit-codes=75 \
      --termination-grace-period-seconds=@{grace} @{more} \
      --command=@{command}
    ;;
  list) exec xpk workload list "${where[@]}" --filter-by-job="$name" ;;
  delete) exec xpk workload delete --workload="$name" "${where[@]}" ;;
  *)
    echo "usage: bash $0 [create|list|delete]" >&2
    exit 2
    ;;
esac
