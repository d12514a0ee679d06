#!/usr/bin/env bash
# A sweep, or one run, on this machine's cores: N processes, each with its own cores if there are two
# for each (shards: one).
#
#   launch/local.sh --shards=N [--python=PATH] [--dry_run] -- ARGUMENTS OF SWEEP
#   launch/local.sh --shards=2 -- --config=configs/digits.py --methods=halrp,stl --seeds=0,1 \
#     --workdir=runs/digits
#
#   launch/local.sh --processes=N [--python=PATH] [--dry_run] -- ARGUMENTS OF halrp_jax.main
#   launch/local.sh --processes=2 -- --config=configs/digits.py --workdir=runs/digits
#
# Shards have cells of their own, processes share every batch of one run. SIGTERM and Ctrl-C stop all
# of them; the same command goes on. Exit codes: 0 all ended well, 75 one was stopped, otherwise that
# of one that failed; of processes, where those that are left have to stop, 1 and 2 come before 75.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

parse_arguments launch/local.sh "$@"
[ ${#flags[@]} = 0 ] ||
  die "'${flags[0]}' is not a flag of launch/local.sh; the arguments of the program stand after --"
[ -n "$shards$processes" ] || die "--shards=N or --processes=N is missing; launch/local.sh --help"
[ -z "$shards" ] || [ -z "$processes" ] || die "--shards or --processes, not both"
if [ -n "$shards" ]; then
  kind=shards count=$shards program=(halrp_jax sweep)
else
  kind=processes count=$processes program=(halrp_jax.main)
fi
require_count "--$kind" "$count"
[ ${#arguments[@]} -gt 0 ] || die "no arguments of ${program[*]} after --; launch/local.sh --help"

# The cores this process may use, one a line: "0-1,4" -> 0 1 4
allowed_cores() {
  local ranges range
  IFS=, read -ra ranges < <(awk '/^Cpus_allowed_list/ {print $2}' /proc/self/status)
  for range in "${ranges[@]}"; do
    seq "${range%-*}" "${range#*-}"
  done
}

free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)) && (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; do :; done
  echo "$port"
}

# Flags that tell one of them from the others, a line each.
place_of() { # NUMBER
  if [ "$kind" = shards ]; then
    echo "--shard=$1/$count"
  else
    printf '%s\n' "--coordinator=localhost:$port" "--num_processes=$count" "--process_id=$1"
  fi
}

mapfile -t cores < <(allowed_cores)
each=$((${#cores[@]} / count))
((each > 0)) || die "--$kind=$count: there are ${#cores[@]} cores for them"
[ -n "$dry_run" ] || require_python "$python"
port=$(free_port)

pids=()
for ((i = 0; i < count; i++)); do
  mine=$(IFS=, && echo "${cores[*]:i*each:each}")
  if [ "$kind" = processes ] && [ "$each" = 1 ]; then
    mine=$(IFS=, && echo "${cores[*]}") # with one core the sums wait for its scheduler
  fi
  mapfile -t place < <(place_of "$i")
  one=(taskset -c "$mine" "$python" -m "${program[@]}" "${arguments[@]}" "${place[@]}")
  if [ -n "$dry_run" ]; then
    print_command "${one[@]}"
  else
    "${one[@]}" > >(trap '' INT TERM && exec sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done
[ -z "$dry_run" ] || exit 0
forward_signals "${pids[@]}"
result=0
for pid in "${pids[@]}"; do
  await "$pid"
  if [ "$kind" = processes ] && [ "$code" -gt 2 ]; then
    code=$STOPPED # what ends the others is one that was killed
  fi
  if [ "$result" = 0 ] || { [ "$kind" = shards ] && [ "$code" = "$STOPPED" ]; } ||
    { [ "$kind" = processes ] && [ "$result" = "$STOPPED" ] && [ "$code" != 0 ]; }; then
    result=$code
  fi
done
exit "$result"
