#!/usr/bin/env bash
# A sweep on this machine's cores: N processes, each with its shard and its own cores.
#
#   launch/local.sh --shards=N [--python=PATH] [--dry_run] -- ARGUMENTS OF SWEEP
#   launch/local.sh --shards=2 -- --config=configs/digits.py --methods=halrp,stl --seeds=0,1 \
#     --workdir=runs/digits
#
# SIGTERM and Ctrl-C stop all of them; the same command goes on. Exit codes: 0 all ended well, 75 one
# was stopped, otherwise that of one that failed.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

shards="" python="" dry_run="" arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --shards=*) shards=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --help | -h)
      help_text "$0"
      exit 0
      ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) die "'$1' is not a flag of launch/local.sh; the arguments of sweep stand after --" ;;
  esac
  shift
done
[ -n "$shards" ] || die "--shards=N is missing; launch/local.sh --help"
require_count --shards "$shards"
[ ${#arguments[@]} -gt 0 ] || die "no arguments of sweep after --; launch/local.sh --help"
python=${python:-$root/.venv/bin/python}

# The cores this process may use, one a line: "0-1,4" -> 0 1 4
allowed_cores() {
  local ranges range
  IFS=, read -ra ranges < <(awk '/^Cpus_allowed_list/ {print $2}' /proc/self/status)
  for range in "${ranges[@]}"; do
    seq "${range%-*}" "${range#*-}"
  done
}

mapfile -t cores < <(allowed_cores)
each=$((${#cores[@]} / shards))
((each > 0)) || die "--shards=$shards: there are ${#cores[@]} cores for them"
[ -n "$dry_run" ] || require_python "$python"

pids=()
for ((i = 0; i < shards; i++)); do
  mine=$(IFS=, && echo "${cores[*]:i*each:each}")
  shard=(taskset -c "$mine" "$python" -m halrp_jax sweep "${arguments[@]}" "--shard=$i/$shards")
  if [ -n "$dry_run" ]; then
    print_command "${shard[@]}"
  else
    "${shard[@]}" > >(trap '' INT TERM && exec sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done
[ -z "$dry_run" ] || exit 0
forward_signals "${pids[@]}"
result=0
for pid in "${pids[@]}"; do
  await "$pid"
  if [ "$code" = "$STOPPED" ] || [ "$result" = 0 ]; then
    result=$code
  fi
done
exit "$result"
