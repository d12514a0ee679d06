# Sourced by the scripts here.
# shellcheck shell=bash

export STOPPED=75 # halrp_jax/devices/stop.py

die() { # MESSAGE
  echo "error: $*" >&2
  exit 2
}

# The comment at the top of a script, without its #! and #SBATCH lines.
help_text() { # SCRIPT
  awk '!/^#/ {exit} !/^#(!|SBATCH)/ {sub(/^# ?/, ""); print}' "$1"
}

# A command as it could be typed.
print_command() { # WORDS
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# A command line into `shards`, `processes`, `python`, `dry_run`, `flags` (all others), and
# `arguments`: what stands after --.
# shellcheck disable=SC2034 # the scripts read them
parse_arguments() { # SCRIPT ARGUMENTS
  local script=$1
  shift
  shards="" processes="" python="" dry_run="" flags=() arguments=()
  while [ $# -gt 0 ]; do
    case $1 in
      --shards=*) shards=${1#*=} ;;
      --processes=*) processes=${1#*=} ;;
      --python=*) python=${1#*=} ;;
      --dry_run) dry_run=yes ;;
      --help | -h)
        help_text "$ROOT/$script"
        exit 0
        ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      -*) flags+=("$1") ;;
      *) die "'$1' is not a flag of $script; the arguments of the program stand after --" ;;
    esac
    shift
  done
  python=${python:-$ROOT/.venv/bin/python}
}

require_count() { # FLAG TEXT
  [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || die "$1=$2: a whole number from 1 on"
}

require_python() { # PATH
  [ -x "$1" ] || die "$1: no such program; make it (BUILD.md) or name one with --python="
}

# Hands signals on to programs in the background, which end on SIGTERM with exit code 75.
forward_signals() { # PIDS
  # shellcheck disable=SC2064  # the pids of now
  trap "signalled=yes; kill -TERM $* 2>/dev/null || true" TERM INT HUP
}

# The exit code of a program in the background, into `code`; a signal ends `wait` before it does.
await() { # PID
  while
    signalled="" code=0
    wait "$1" || code=$?
    [ -n "$signalled" ] && [ "$code" -gt 128 ]
  do :; done
}
