#!/usr/bin/env bash
# Runs a sweep as N shards, or a single run as N processes, on the cores of this machine. Each shard
# has cores of its own, and so has each process if there are at least two cores for each.
#
#   launch/local.sh --shards=N [--python=PATH] [--dry_run] -- ARGUMENTS OF SWEEP
#   launch/local.sh --shards=2 -- --config=configs/digits.py --methods=halrp,stl --seeds=0,1 \
#     --workdir=runs/digits
#
#   launch/local.sh --processes=N [--python=PATH] [--dry_run] -- ARGUMENTS OF halrp_jax.main
#   launch/local.sh --processes=2 -- --config=configs/digits.py --workdir=runs/digits
#
# Each shard does some runs of the sweep; processes share every batch of one run. SIGTERM and Ctrl-C
# stop all of them, and the same command resumes. Exit codes: 0 if all succeeded; 75 if one was
# stopped; otherwise the exit code of one that failed. If one of several processes fails, the others
# have to stop: then the exit code is 1 or 2 rather than 75.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

parse_arguments launch/local.sh "$@"
[ ${#flags[@]} = 0 ] ||
  die "'${flags[0]}' is not a flag of launch/local.sh; the arguments of halrp_jax stand after --"
[ -n "$shards$processes" ] || die "--shards=N or --processes=N is missing; launch/local.sh --help"
[ -z "$shards" ] || [ -z "$processes" ] || die "expected --shards or --processes, not both"
if [ -n "$shards" ]; then
  kind=shards count=$shards program=(halrp_jax sweep)
else
  kind=processes count=$processes program=(halrp_jax.main)
fi
require_count "--$kind" "$count"
[ ${#arguments[@]} -gt 0 ] || die "no arguments of ${program[*]} after --; launch/local.sh --help"

# Prints the numbers of the cores that this process may use, one per line: "0-1,4" -> 0 1 4
allowed_cores() {
  local ranges range
  IFS=, read -ra ranges < <(awk '/^Cpus_allowed_list/ {print $2}' /proc/self/status)
  for range in "${ranges[@]}"; do
    seq "${range%-*}" "${range#*-}"
  done
}

# Prints the number of a port on which nothing listens.
free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)) && (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; do :; done
  echo "$port"
}

# Prints the flags that make one shard or process differ from the others, one per line.
own_flags() { # NUMBER
  if [ "$kind" = shards ]; then
    echo "--shard=$1/$count"
  else
    printf '%s\n' "--coordinator=localhost:$port" "--num_processes=$count" "--process_id=$1"
  fi
}

mapfile -t cores < <(allowed_cores)
each=$((${#cores[@]} / count))
((each > 0)) || die "--$kind=$count: there are only ${#cores[@]} cores; choose a smaller number"
[ -n "$dry_run" ] || require_python "$python"
port=$(free_port)

pids=()
for ((i = 0; i < count; i++)); do
  mine=$(IFS=, && echo "${cores[*]:i*each:each}")
  if [ "$kind" = processes ] && [ "$each" = 1 ]; then
    # With a single core each, a process would wait for the scheduler at every sum over processes.
    mine=$(IFS=, && echo "${cores[*]}")
  fi
  mapfile -t own < <(own_flags "$i")
  command=(taskset -c "$mine" "$python" -m "${program[@]}" "${arguments[@]}" "${own[@]}")
  if [ -n "$dry_run" ]; then
    print_command "${command[@]}"
  else
    "${command[@]}" > >(trap '' INT TERM && exec sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done
[ -z "$dry_run" ] || exit 0
forward_signals "${pids[@]}"
result=0
for pid in "${pids[@]}"; do
  await "$pid"
  if [ "$kind" = processes ] && [ "$code" -gt 2 ]; then
    code=$STOPPED # killed, because another process has ended
  fi
  if [ "$result" = 0 ] || { [ "$kind" = shards ] && [ "$code" = "$STOPPED" ]; } ||
    { [ "$kind" = processes ] && [ "$result" = "$STOPPED" ] && [ "$code" != 0 ]; }; then
    result=$code
  fi
done
exit "$result"
