#!/usr/bin/env bash
# The part of launch/tpu.sh that runs on the TPU VM.
#
#   on_tpu.sh install DATA   DATA: gs://... to copy to data/, or empty
#   on_tpu.sh run BUCKET WORKDIR MODULE ARGUMENTS...   BUCKET: gs://... for the workdir, or empty
#
# A run continues when the connection that started it ends; another `run` meanwhile shows its output.
# The files WORKDIR.log, .busy, .pid and .code belong to the run. The variable HALRP_PUSH_SECONDS is
# the time between two copies to the bucket (default: 120).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

PYTHON=.venv/bin/python

# Prints the name of an installed Python that is 3.11 or newer; fails if there is none.
find_python() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

# Installs halrp_jax into .venv and copies the data.
install() { # DATA
  if [ ! -x "$PYTHON" ]; then
    if ! find_python >/dev/null; then
      sudo apt-get update -qq
      sudo apt-get install -y -qq python3.11 python3.11-venv
    fi
    "$(find_python)" -m venv .venv
  fi
  "$PYTHON" -m pip install --quiet --upgrade pip
  "$PYTHON" -m pip install --quiet --editable . "jax[tpu]"
  if [ -n "$1" ]; then
    mkdir -p data
    gcloud storage rsync --recursive "$1" data
  fi
  "$PYTHON" -m halrp_jax doctor
  touch .venv/installed
}

# --- a run ----------------------------------------------------------------------------

# Starts a run in the background, unless it is already running, and shows its output to the end.
run() { # BUCKET WORKDIR MODULE ARGUMENTS...
  local workdir=$2
  mkdir -p "$(dirname "$workdir")"
  if flock --nonblock "$workdir.busy" true; then # the lock is free: it is not running
    rm -f "$workdir.code"
    : >"$workdir.log" # `tail` below needs the file
    setsid nohup launch/on_tpu.sh work "$@" >>"$workdir.log" 2>&1 </dev/null &
    echo $! >"$workdir.pid"
  fi
  tail -n +1 -f --pid="$(<"$workdir.pid")" "$workdir.log"
  # Without this file the run was killed, as it is when the machine goes down.
  exit "$(cat "$workdir.code" 2>/dev/null || echo "$STOPPED")"
}

# Prints the number of this host within its slice, from 0.
host_number() {
  local attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  curl -fsS -H "Metadata-Flavor: Google" "$attributes/agent-worker-number"
}

# Does the work of `run`, and copies the workdir from and to the bucket.
work() { # BUCKET WORKDIR MODULE ARGUMENTS...
  local bucket=$1 workdir=$2 module=$3 pusher="" number
  shift 3
  exec 9>"$workdir.busy"
  flock 9 # held until the last process that inherits it has ended
  if [[ " $* " == *" --coordinator=auto "* ]]; then
    if ! number=$(host_number) || [ -z "$number" ]; then
      echo "error: the metadata server does not say which host of the slice this is; try again"
      echo "$STOPPED" >"$workdir.code"
      return
    fi
    [ "$number" = 0 ] || bucket="" # only host 0 has a workdir
  fi
  if [ -n "$bucket" ] && [ ! -e "$workdir" ] && ! pull "$bucket" "$workdir"; then
    echo "$STOPPED" >"$workdir.code"
    return
  fi
  mkdir -p "$workdir"
  "$PYTHON" -m "$module" "$@" "--workdir=$workdir" &
  local python=$!
  forward_signals "$python"
  if [ -n "$bucket" ]; then
    push_regularly "$bucket" "$workdir" 9>&- &
    pusher=$!
  fi
  await "$python"
  if [ -n "$bucket" ]; then
    kill "$pusher" 2>/dev/null || true
    wait "$pusher" 2>/dev/null || true
    if ! push "$bucket" "$workdir" && ! push "$bucket" "$workdir"; then
      echo "error: $workdir could not be copied to $bucket; the same command tries again"
      code=$STOPPED
    fi
  fi
  echo "$code" >"$workdir.code"
}

# --- the bucket -----------------------------------------------------------------------

# Copies the workdir from the bucket. An interrupted copy, or a bucket that can't be read, must not
# look like a run that has not started: the next push would delete the results in the bucket.
pull() { # BUCKET WORKDIR
  local found
  if ! found=$(gcloud storage ls "$1" 2>&1); then
    [[ $found == *"matched no objects"* ]] && return
    echo "error: $1 can't be read: $found"
    return 1
  fi
  rm -rf "$2.part"
  mkdir -p "$2.part"
  gcloud storage rsync --recursive "$1" "$2.part" && mv "$2.part" "$2"
}

# Copies the workdir to the bucket again and again. SIGTERM ends it between two copies.
push_regularly() { # BUCKET WORKDIR
  local pause=""
  trap 'kill "$pause" 2>/dev/null || true; exit' TERM
  while :; do
    sleep "${HALRP_PUSH_SECONDS:-120}" &
    pause=$!
    wait "$pause"
    push "$1" "$2" || echo "warning: a copy to $1 failed; it will be tried again"
  done
}

# Copies the workdir to the bucket. The machine may disappear between any two files, so the order
# matters: first the configs, without which checkpoints are refused; then the checkpoints, which are
# valid only with their manifests; last the events that checkpoints count, the records, and the
# deletions.
push() { # BUCKET WORKDIR
  local unfinished='(^|.*/)\.writing-.*' later='(^|.*/)(metrics\.jsonl|record\.json)$'
  copy "$2" "$1" --exclude="$unfinished|$later|(^|.*/)checkpoints/.*" &&
    copy "$2" "$1" --exclude="$unfinished|$later" &&
    copy "$2" "$1" --exclude="$unfinished" --delete-unmatched-destination-objects
}

# Copies a folder from or to the bucket.
copy() { # FROM TO FLAGS
  gcloud storage rsync --recursive "$@" >/dev/null 2>&1
}

case ${1:-} in
  install | run | work) "$@" ;;
  *) die "unknown verb '${1:-}'; known: install run" ;;
esac
