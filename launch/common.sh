# Functions that the scripts in this folder share. They source this file.
# shellcheck shell=bash

export STOPPED=75 # exit code of a run that was stopped, as in halrp_jax/devices/stop.py

# Prints an error message and ends the script with exit code 2.
die() { # MESSAGE
  echo "error: $*" >&2
  exit 2
}

# Prints the comment at the top of a script, without its #! and #SBATCH lines.
help_text() { # SCRIPT
  awk '!/^#/ {exit} !/^#(!|SBATCH)/ {sub(/^# ?/, ""); print}' "$1"
}

# Prints a command quoted so that it can be pasted into a shell.
print_command() { # WORDS
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Splits a command line into the variables `shards`, `processes`, `python`, `dry_run`, `flags` (all
# other flags) and `arguments` (everything after --).
# shellcheck disable=SC2034 # the scripts read these variables
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
      *) die "'$1' is not a flag of $script; the arguments of halrp_jax stand after --" ;;
    esac
    shift
  done
  python=${python:-$ROOT/.venv/bin/python}
}

# Stops the script if the value of a flag is not a whole number from 1 to 99999.
require_count() { # FLAG VALUE
  [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || die "$1=$2: expected a whole number from 1 to 99999"
}

# Stops the script if there is no Python at a path.
require_python() { # PATH
  [ -x "$1" ] || die "$1: no such program; install it (BUILD.md) or name another with --python="
}

# Forwards signals to programs in the background as SIGTERM, on which they end with exit code 75.
forward_signals() { # PIDS
  # shellcheck disable=SC2064  # the ids must be expanded now
  trap "signalled=yes; kill -TERM $* 2>/dev/null || true" TERM INT HUP
}

# Waits for a program in the background and puts its exit code into `code`. A signal interrupts
# `wait` before the program has ended, so the loop waits again.
await() { # PID
  while
    signalled="" code=0
    wait "$1" || code=$?
    [ -n "$signalled" ] && [ "$code" -gt 128 ]
  do :; done
}
