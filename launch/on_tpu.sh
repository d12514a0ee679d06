#!/usr/bin/env bash
# What launch/tpu.sh does on the TPU VM itself.
#
#   on_tpu.sh install DATA   DATA: gs://... to copy to data/, or empty
#   on_tpu.sh run BUCKET WORKDIR MODULE ARGUMENTS...   BUCKET: gs://... for the workdir, or empty
#
# A run goes on without the connection that started it; `run` while it is at work only follows it.
# WORKDIR.log, .busy, .pid and .code belong to it. HALRP_PUSH_SECONDS: from one copy to the next.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

PYTHON=.venv/bin/python

find_python() { # the program's: 3.11 or newer
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

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

run() { # BUCKET WORKDIR MODULE ARGUMENTS...
  local workdir=$2
  mkdir -p "$(dirname "$workdir")"
  if flock --nonblock "$workdir.busy" true; then # else it is at work
    rm -f "$workdir.code"
    : >"$workdir.log" # there before `tail` looks
    setsid nohup launch/on_tpu.sh work "$@" >>"$workdir.log" 2>&1 </dev/null &
    echo $! >"$workdir.pid"
  fi
  tail -n +1 -f --pid="$(<"$workdir.pid")" "$workdir.log"
  # no code: killed, as when the machine goes down
  exit "$(cat "$workdir.code" 2>/dev/null || echo "$STOPPED")"
}

host_number() { # of a slice, from 0
  local attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  curl -fsS -H "Metadata-Flavor: Google" "$attributes/agent-worker-number"
}

work() { # as `run`, without a connection
  local bucket=$1 workdir=$2 module=$3 pusher="" number
  shift 3
  exec 9>"$workdir.busy"
  flock 9 # until the last process that has it is gone
  if [[ " $* " == *" --coordinator=auto "* ]]; then
    if ! number=$(host_number) || [ -z "$number" ]; then
      echo "error: which host of the slice this is can't be told"
      echo "$STOPPED" >"$workdir.code"
      return
    fi
    [ "$number" = 0 ] || bucket="" # the first alone has a workdir
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
      echo "error: $workdir could not be copied to $bucket"
      code=$STOPPED
    fi
  fi
  echo "$code" >"$workdir.code"
}

# --- the bucket -----------------------------------------------------------------------

# The workdir as it was last kept. A copy that was cut short, or a bucket that can't be read, must
# not look like a run that has not begun: the next push would delete what it did.
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

push_regularly() { # BUCKET WORKDIR; SIGTERM ends it between two copies
  local pause=""
  trap 'kill "$pause" 2>/dev/null || true; exit' TERM
  while :; do
    sleep "${HALRP_PUSH_SECONDS:-120}" &
    pause=$!
    wait "$pause"
    push "$1" "$2" || echo "warning: a copy to $1 failed; the next may do"
  done
}

# The machine may vanish between any two files, so: configs, without which checkpoints are refused;
# then checkpoints, each good only with its manifest; then the events they count, the records, and
# the deletions.
push() { # BUCKET WORKDIR
  local unfinished='(^|.*/)\.writing-.*' later='(^|.*/)(metrics\.jsonl|record\.json)$'
  copy "$2" "$1" --exclude="$unfinished|$later|(^|.*/)checkpoints/.*" &&
    copy "$2" "$1" --exclude="$unfinished|$later" &&
    copy "$2" "$1" --exclude="$unfinished" --delete-unmatched-destination-objects
}

copy() { # FROM TO FLAGS
  gcloud storage rsync --recursive "$@" >/dev/null 2>&1
}

case ${1:-} in
  install | run | work) "$@" ;;
  *) die "unknown verb '${1:-}'; known: install run" ;;
esac
