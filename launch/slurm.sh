#!/usr/bin/env bash
#SBATCH --job-name=halrp
#SBATCH --output=slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Runs a sweep as a Slurm job array, one shard per task of the array. The script submits itself.
#
#   launch/slurm.sh --shards=N [--python=PATH] [--dry_run] [SBATCH FLAGS] -- ARGUMENTS OF SWEEP
#   launch/slurm.sh --shards=8 --gres=gpu:1 --time=4:00:00 -- --config=configs/cifar100_split.py \
#     --config.data_dir=/data --methods=halrp,stl --orders=all --workdir=/shared/split
#
# All nodes must share the workdir. Two minutes before its time limit a task stops with exit code 75
# and is requeued; it then resumes where it stopped. A preempted task stops in the same way and is
# requeued by Slurm itself. A cancelled task is not requeued. With --array=... among the flags only
# some of the shards are run.
set -euo pipefail

in_job=""
if [ "${1:-}" = in_job ]; then # Slurm runs a copy of this file from another folder
  in_job=yes ROOT=$2
  shift 2
else
  ROOT=$(cd "$(dirname "$0")/.." && pwd)
fi
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

parse_arguments launch/slurm.sh "$@"
[ -z "$processes" ] ||
  die "--processes=$processes is not supported; use srun and --coordinator=auto (docs/clusters.md)"
[ -n "$shards" ] || die "--shards=N is missing; launch/slurm.sh --help"
require_count --shards "$shards"
[ ${#arguments[@]} -gt 0 ] || die "no arguments of sweep after --; launch/slurm.sh --help"

if [ -z "$in_job" ]; then
  submit=(sbatch "--array=0-$((shards - 1))" "${flags[@]}" "$ROOT/launch/slurm.sh" in_job "$ROOT"
    "--shards=$shards" "--python=$python" -- "${arguments[@]}")
  if [ -n "$dry_run" ]; then
    print_command "${submit[@]}"
    exit 0
  fi
  type -P sbatch >/dev/null ||
    die "sbatch is not installed; start this script on a login node of a Slurm cluster"
  require_python "$python"
  exec "${submit[@]}"
fi

"$python" -m halrp_jax sweep "${arguments[@]}" "--shard=$SLURM_ARRAY_TASK_ID/$shards" &
sweep=$! time_is_up=""
forward_signals "$sweep"
trap 'signalled=yes time_is_up=yes; kill -TERM "$sweep" 2>/dev/null || true' USR1
await "$sweep"
if [ "$code" = "$STOPPED" ] && [ -n "$time_is_up" ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
