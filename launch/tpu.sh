#!/usr/bin/env bash
# Manages Cloud TPU VMs and runs halrp_jax on them. The Google Cloud CLI must be installed and
# logged in.
#
#   launch/tpu.sh VERB --name=NAME --zone=ZONE [FLAGS] [-- MODULE ARGUMENTS]
#
#   create   creates a TPU VM of --type= and --version= [--spot] [--queued: as a queued resource; waits
#            for it]
#   install  copies this working tree to the VM and installs Python and JAX [--data=gs://...: the
#            folder to copy to data/]
#   run      runs python -m MODULE ARGUMENTS on the VM with --workdir=runs/NAME, shows the output.
#            The run continues if the connection ends; the same command shows it again.
#   resume   creates, installs and runs as far as necessary, and again whenever the VM is taken
#            away; the workdir then comes from --bucket
#   fetch    copies the workdir of NAME to --to=DIR, from --bucket or else from the VM
#   status   prints the state of the VM
#   delete   deletes the VM; the bucket is not changed
#
#   --bucket=gs://BUCKET/FOLDER  while the run is working, its workdir is copied to FOLDER/NAME
#   --shards=N   applies the verb to NAME-0 ... NAME-(N-1); run and resume work on all at once, with
#                --shard=I/N
#   --all_hosts  install, run, resume: uses all hosts of a larger slice, which share the batches of
#                a run of halrp_jax.main
#   --project=P  Google Cloud project
#   --attempts=20  resume: how often a VM is created or looked for
#   --wait=60    seconds between two looks at the VM
#   --dry_run    prints the commands without running them
#
# Types with one host: v5litepod-1 to -8, v6e-1 to -8, v4-8. Exit codes: those of the run (0, 1, 2,
# 75); 2 for a mistake in the arguments; 75 also if all attempts are used up. Needs bash 4.4 or
# newer.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"
VERBS="create install run resume fetch status delete"

# Prints a message to the user.
say() { echo "$*" >&2; }

# Runs a command, or prints it with --dry_run.
call() { # COMMAND
  if [ -n "$dry_run" ]; then
    print_command "$@"
  else
    "$@"
  fi
}

# Runs gcloud compute tpus in the zone and project.
tpu() { # ARGUMENTS
  call gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"}
}

# Runs a command in the shell of the VM.
on_vm() { # TEXT
  tpu tpu-vm ssh "$name" "--command=$1" ${all_hosts:+--worker=all}
}

# Prints words quoted for the shell of the VM.
quoted() { # WORDS
  printf ' %q' "$@"
}

# --- verbs ----------------------------------------------------------------------------

create() {
  if [ -n "$queued" ]; then
    tpu queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$version" ${spot:+--spot} || return
    [ -n "$dry_run" ] || await_queue
  else
    tpu tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
  fi
}

# Waits for a queued resource; fails if it will not become active.
await_queue() {
  local now
  while now=$(state) && [ "$now" != ACTIVE ]; do
    say "$name: $now"
    case $now in
      MISSING | FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    sleep "$wait"
  done
}

# Prints the state of the VM: READY (of a queued resource: ACTIVE), PREEMPTED, SUSPENDED, ...; or
# MISSING if there is no VM.
state() {
  local kind=tpu-vm field=state
  if [ -n "$queued" ]; then
    kind=queued-resources field=state.state
  fi
  tpu "$kind" describe "$name" "--format=value($field)" 2>/dev/null || echo MISSING
}

install() {
  local code=0 tree=/tmp/halrp_jax.tar.gz
  if [ -z "$dry_run" ]; then
    tree=$(mktemp) || return
  fi
  call tar -czf "$tree" --exclude=./.git --exclude=./.venv --exclude='./.venv-*' --exclude=./runs \
    --exclude=./data --exclude=./site --exclude=./dist --exclude=./build --exclude=./.whl \
    --exclude=./.test-cache -C "$ROOT" . &&
    tpu tpu-vm scp "$tree" "$name:halrp_jax.tar.gz" ${all_hosts:+--worker=all} || code=$?
  [ -n "$dry_run" ] || rm -f "$tree"
  [ "$code" = 0 ] || return "$code"
  on_vm "mkdir -p halrp_jax && tar -xzf halrp_jax.tar.gz -C halrp_jax && \
halrp_jax/launch/on_tpu.sh install$(quoted "$data")"
}

run() {
  on_vm "halrp_jax/launch/on_tpu.sh run$(quoted "${bucket:+$bucket/$name}" "runs/$name" \
    "${command[@]}" ${all_hosts:+--coordinator=auto})"
}

resume() {
  if [ -n "$dry_run" ]; then
    say "# resume runs those of these commands that are necessary, all if the VM was taken away:"
    delete && create && install && run
    return
  fi
  local attempt now
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    now=$(state)
    say "$name: $now (attempt $attempt of $attempts)"
    if make_ready "$now"; then
      if finished; then
        say "$name: exit code $code; the VM is still there: launch/tpu.sh delete"
        return "$code"
      fi
    fi
    sleep "$wait"
  done
  say "$name: stopped after $attempts attempts; the same command resumes"
  return "$STOPPED"
}

# Makes sure that there is a VM with halrp_jax on it. A VM that was taken away is deleted first,
# because its name is still in use.
make_ready() { # STATE
  case $1 in
    MISSING) create || return ;;
    PREEMPTED | TERMINATED | STOPPED | SUSPENDING | SUSPENDED | FAILED)
      delete || return
      create || return
      ;;
  esac
  if [ -n "$queued" ]; then
    await_queue || return
  fi
  on_vm "test -e halrp_jax/.venv/installed" || install
}

# Runs the module; succeeds if the run came to an end, with its exit code in `code`. An exit code
# of ssh can mean that the connection failed, so a failure counts only if the VM has its exit code.
finished() {
  code=0
  run && return
  code=$(all_hosts="" on_vm "cat halrp_jax/runs/$name.code" 2>/dev/null) || code=""
  say "$name: the run ended with exit code ${code:-unknown}"
  [ "$code" = 1 ] || [ "$code" = 2 ]
}

fetch() {
  call mkdir -p "$to" || return
  if [ -n "$bucket" ]; then
    call gcloud storage rsync --recursive "$bucket/$name" "$to"
  else
    tpu tpu-vm scp --recurse "$name:halrp_jax/runs/$name/*" "$to"
  fi
}

status() {
  if [ -n "$dry_run" ]; then
    state
  else
    echo "$name: $(state)"
  fi
}

delete() {
  if [ -n "$queued" ]; then
    tpu queued-resources delete "$name" --force --quiet
  else
    tpu tpu-vm delete "$name" --quiet
  fi
}

do_verb() {
  case $verb in
    create) create ;;
    install) install ;;
    run) run ;;
    resume) resume ;;
    fetch) fetch ;;
    status) status ;;
    delete) delete ;;
  esac
}

# --- the command line -----------------------------------------------------------------

# Stops the script if one of the flags is not given.
need() { # FLAGS
  local flag
  for flag in "$@"; do
    [ -n "${!flag}" ] || die "$verb: --$flag=... is missing; launch/tpu.sh --help"
  done
}

# Stops the script if the command after -- does not fit the verb.
check_command() {
  local argument
  if [ "$verb" != run ] && [ "$verb" != resume ]; then
    [ ${#command[@]} = 0 ] || die "$verb: takes no command after --; only run and resume do"
    return
  fi
  [ ${#command[@]} -gt 0 ] ||
    die "$verb: nothing to run; for example -- halrp_jax.main --config=configs/digits.py"
  for argument in "${command[@]}"; do
    case $argument in
      --workdir*) die "$verb: leave $argument out; the workdir is always runs/NAME" ;;
      --overwrite*) die "$verb: $argument would start again each time; choose another --name" ;;
    esac
  done
  [[ -z $all_hosts || ${command[0]} == halrp_jax.main ]] ||
    die "$verb: --all_hosts is for halrp_jax.main; a sweep takes --shards"
  [[ -z $shards || ${command[1]:-} =~ ^(sweep|reproduce)$ ]] ||
    die "$verb: --shards divides a sweep; for example -- halrp_jax sweep --config=..."
}

# Applies the verb to every shard; run and resume work in the background.
for_shards() {
  local base=$name whole=("${command[@]}") pids=() worst=0 i pid
  for ((i = 0; i < shards; i++)); do
    name=$base-$i
    if [ ${#whole[@]} = 0 ]; then
      do_verb
      continue
    fi
    command=("${whole[@]}" "--shard=$i/$shards")
    if [ -n "$dry_run" ]; then
      do_verb
    else
      do_verb > >(sed -u "s/^/[$i] /") 2>&1 &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || worst=$?
  done
  return "$worst"
}

verb="" name="" zone="" type="" version="" spot="" queued="" bucket="" data="" project="" to=""
shards="" attempts=20 wait=60 dry_run="" all_hosts=""
command=()
while [ $# -gt 0 ]; do
  case $1 in
    --spot | --queued | --dry_run | --all_hosts) printf -v "${1#--}" yes ;;
    --name=* | --zone=* | --type=* | --version=* | --bucket=* | --data=* | --project=* | --to=* | \
      --shards=* | --attempts=* | --wait=*)
      flag=${1%%=*}
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    --help | -h)
      help_text "$0"
      exit 0
      ;;
    --)
      shift
      command=("$@")
      break
      ;;
    -*) die "$1 is not a flag of launch/tpu.sh; values are given as --FLAG=VALUE; see --help" ;;
    *)
      [ -z "$verb" ] || die "more than one verb: $verb, $1; the command of a run stands after --"
      verb=$1
      ;;
  esac
  shift
done
[ -n "$verb" ] || die "the verb is missing; known: $VERBS"
[[ " $VERBS " == *" $verb "* ]] || die "unknown verb '$verb'; known: $VERBS"
need name zone
case $verb in
  create) need type version ;;
  resume) need type version bucket ;;
  fetch) need to ;;
esac
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  die "--name=$name: expected small letters, digits and hyphens, with a letter first"
bucket=${bucket%/}
[[ -z $bucket || $bucket == gs://?* ]] ||
  die "--bucket=$bucket: expected gs://BUCKET or gs://BUCKET/FOLDER"
[ -z "$shards" ] || require_count --shards "$shards"
require_count --attempts "$attempts"
[[ $wait =~ ^[0-9]+$ ]] || die "--wait=$wait: expected a number of seconds"
check_command
if [ -z "$dry_run" ] && ! type -P gcloud >/dev/null; then
  die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
fi
if [ -n "$shards" ]; then
  for_shards
else
  do_verb
fi
