"""launch/: the scripts, with stand-ins for gcloud, sbatch, scontrol and the program itself."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from halrp_jax.devices import stop

from .conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
VM = ("--name=vm", "--zone=us-west4-a")
KIND = ("--type=v5litepod-8", "--version=v2-alpha-tpuv5-lite")
RUN = ("--", "halrp_jax.main", "--config=configs/digits.py")

# Writes down how it was called. A VM is the folder vm/ and the state in the file `state`; ssh runs
# the command there; `run` of the VM may be scripted by lines of `runs`. gs://X is the folder X.
GCLOUD = f"""#!{sys.executable} -SE
import fcntl, json, os, pathlib, re, shutil, subprocess, sys
root, args = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
with open(root / "calls", "a") as f:
  f.write(json.dumps(args) + "\\n")
state, runs = root / "state", root / "runs"
place = lambda text: root / text[5:] if text.startswith("gs://") else pathlib.Path(text)

def ssh(command):
  if "on_tpu.sh run" in command and runs.exists():
    with open(root / "lock", "w") as lock:  # shards call at the same time
      fcntl.flock(lock, fcntl.LOCK_EX)
      now, *later = runs.read_text().split()
      runs.write_text("\\n".join(later))
    if now == "taken":
      state.write_text("SUSPENDED" if "queued" in state.read_text() else "PREEMPTED")
      return 255
    (root / "vm/halrp_jax/runs").mkdir(parents=True, exist_ok=True)
    (root / "vm/halrp_jax/runs/vm.code").write_text(now)
    return 0 if now == "0" else 1
  if "on_tpu.sh install" in command:
    (root / "vm/halrp_jax/.venv").mkdir(parents=True)
    (root / "vm/halrp_jax/.venv/installed").touch()
    return 0
  return subprocess.run(["bash", "-c", command], cwd=root / "vm").returncode

def rsync(source, target, exclude=None, delete=False):
  new = [p for p in place(source).rglob("*") if p.is_file()]
  new = [p.relative_to(place(source)) for p in new]
  new = [p for p in new if not (exclude and re.match(exclude, str(p)))]
  for p in new:
    (place(target) / p).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(place(source) / p, place(target) / p)
  for p in place(target).rglob("*") if delete else ():
    if p.is_file() and p.relative_to(place(target)) not in new:
      p.unlink()

flags = dict(a.partition("=")[::2] for a in args if a.startswith("--"))
verb = args[3] if args[:2] == ["compute", "tpus"] else args[1]
if verb == "describe":
  if not state.exists():
    sys.exit("not found")
  print(state.read_text().split()[0])
elif verb == "create":
  state.write_text("ACTIVE queued" if args[2] == "queued-resources" else "READY")
  (root / "vm").mkdir()
elif verb == "delete":
  state.unlink(missing_ok=True)
  shutil.rmtree(root / "vm", ignore_errors=True)
elif verb == "ssh":
  sys.exit(ssh(flags["--command"]))
elif verb == "ls":
  if (root / "broken").exists():
    sys.exit("ERROR: no connection")
  if not place(args[2]).exists():
    sys.exit("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
elif verb == "rsync":
  places = [a for a in args[2:] if not a.startswith("--")]
  rsync(*places, flags.get("--exclude"), "--delete-unmatched-destination-objects" in flags)
"""

# The program: prints its arguments one a line, waits for the file `go` if there is `wait`, leaves
# something in its workdir, ends with the code in the file `code`.
PROGRAM = """#!/usr/bin/env bash
trap 'echo stopping; exit 75' TERM
for a in "$@"; do echo "<$a>"; case $a in --workdir=*) workdir=${a#*=};; esac; done
grep Cpus_allowed_list /proc/self/status
echo started >>"$FAKE/started"
if [ -n "${workdir:-}" ]; then cat "$workdir/config.json" 2>/dev/null; fi
while [ -e "$FAKE/wait" ] && [ ! -e "$FAKE/go" ]; do sleep 0.05; done
if [ -n "${workdir:-}" ]; then mkdir -p "$workdir/checkpoints/state-0001"; \
  echo new >"$workdir/config.json"; echo x >"$workdir/checkpoints/state-0001/x"; \
  echo e >"$workdir/metrics.jsonl"; fi
exit "$(cat "$FAKE/code" 2>/dev/null || echo 0)"
"""
RECORDER = f"""#!{sys.executable} -SE
import json, os, sys
with open(os.environ["FAKE"] + "/calls", "a") as f:
  f.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return path


class Fake:
  """A folder with the stand-ins on PATH."""

  def __init__(self, root: pathlib.Path):
    self.root = root
    executable(root / "bin/gcloud", GCLOUD)
    executable(root / "bin/sbatch", RECORDER)
    executable(root / "bin/scontrol", RECORDER)
    self.python = executable(root / "the program/python", PROGRAM)
    path = f"{root / 'bin'}:{os.environ['PATH']}"
    self.env = os.environ | {"PATH": path, "FAKE": str(root), "HALRP_PUSH_SECONDS": "3600"}

  def start(self, script, *arguments, cwd=None, **env):
    return subprocess.Popen(
      ["bash", str(script), *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=cwd or self.root,
      env=self.env | env,
    )

  def run(self, script, *arguments, **env):
    process = self.start(LAUNCH / script, *arguments, **env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def calls(self):
    path = self.root / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def wait_for(self, name):
    deadline = time.monotonic() + 30
    while not (self.root / name).exists():
      assert time.monotonic() < deadline, f"{name} never came"
      time.sleep(0.02)


@pytest.fixture
def fake(tmp_path):
  return Fake(tmp_path)


@pytest.fixture
def vm(fake):
  """The program's folder on a VM: on_tpu.sh with the stand-in for Python."""
  folder = fake.root / "vm/halrp_jax"
  for name in ("on_tpu.sh", "common.sh"):
    (folder / "launch").mkdir(parents=True, exist_ok=True)
    shutil.copy(LAUNCH / name, folder / "launch")
  executable(folder / ".venv/bin/python", PROGRAM)
  (folder / ".venv/installed").touch()
  return folder


def test_shellcheck():
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  program = str(beside) if beside.exists() else shutil.which("shellcheck")
  if not program:
    pytest.skip("no shellcheck here: pip install -e '.[test]'")
  result = subprocess.run([program, "-x", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ["tpu.sh", "slurm.sh", "local.sh"])
def test_help_is_the_text_at_the_top(fake, script):
  code, out, err = fake.run(script, "--help")
  assert code == 0 and f"launch/{script} " in out and not err and "#" not in out
  assert "set -e" not in out and "SBATCH " not in out.replace("[SBATCH FLAGS]", "")


@pytest.mark.parametrize(
  ("script", "arguments", "says"),
  [
    ("tpu.sh", [], "the verb is missing; known: create install run resume fetch status delete"),
    ("tpu.sh", ["destroy", *VM], "unknown verb 'destroy'; known: create"),
    ("tpu.sh", ["create", "delete", *VM], "more than one verb: create, delete"),
    ("tpu.sh", ["delete", "--zone=z"], "delete: --name=... is missing"),
    ("tpu.sh", ["delete", "--name=vm"], "delete: --zone=... is missing"),
    ("tpu.sh", ["create", *VM, "--type=v4-8"], "create: --version=... is missing"),
    ("tpu.sh", ["create", *VM, "--version=x"], "create: --type=... is missing"),
    ("tpu.sh", ["create", *VM, *KIND, "--spott"], "--spott is not a flag of launch/tpu.sh"),
    (
      "tpu.sh",
      ["delete", "--name", "vm"],
      "--name is not a flag of launch/tpu.sh; values are given as",
    ),
    ("tpu.sh", ["delete", "--name=My_VM", "--zone=z"], "--name=My_VM: expected small letters"),
    ("tpu.sh", ["run", *VM], "run: nothing to run"),
    ("tpu.sh", ["run", *VM, *RUN, "--workdir=x"], "leave --workdir=x out"),
    ("tpu.sh", ["run", *VM, *RUN, "--overwrite"], "--overwrite would start again"),
    ("tpu.sh", ["run", *VM, "--bucket=s3://b", *RUN], "--bucket=s3://b: expected gs://BUCKET"),
    ("tpu.sh", ["run", *VM, "--shards=2", *RUN], "--shards divides a sweep"),
    ("tpu.sh", ["run", *VM, "--all_hosts", "--", "halrp_jax", "sweep"], "is for halrp_jax.main"),
    ("tpu.sh", ["resume", *VM, *KIND, *RUN], "resume: --bucket=... is missing"),
    ("tpu.sh", ["resume", *VM, *KIND, "--wait=x", "--bucket=gs://b", *RUN], "--wait=x: expected"),
    ("tpu.sh", ["delete", *VM, "--shards=0"], "--shards=0: expected a whole number"),
    ("tpu.sh", ["delete", *VM, *RUN], "delete: takes no command"),
    ("tpu.sh", ["fetch", *VM], "fetch: --to=... is missing"),
    ("on_tpu.sh", ["destroy"], "unknown verb 'destroy'; known: install run"),
    ("slurm.sh", [], "--shards=N is missing"),
    ("slurm.sh", ["--shards=many", "--", "--config=x"], "--shards=many: expected a whole number"),
    ("slurm.sh", ["--shards=2"], "no arguments of sweep after --"),
    ("slurm.sh", ["--shards=2", "sweep"], "'sweep' is not a flag of launch/slurm.sh"),
    ("slurm.sh", ["--shards=2", "--python=/no/python", "--", "x"], "/no/python: no such program"),
    ("local.sh", [], "--shards=N or --processes=N is missing"),
    ("local.sh", ["--shards=2", "--processes=2"], "not both"),
    ("local.sh", ["--processes=two", "--", "x"], "--processes=two: expected a whole number"),
    ("local.sh", ["--shards=2"], "no arguments of halrp_jax sweep after --"),
    ("local.sh", ["x", "--shards=2"], "'x' is not a flag of launch/local.sh"),
    ("slurm.sh", ["--processes=2"], "srun and --coordinator=auto"),
    ("local.sh", ["--shard=2"], "'--shard=2' is not a flag of launch/local.sh"),
    ("local.sh", ["--shards=99999", "--", "x"], "--shards=99999: there are only"),
    ("local.sh", ["--shards=1", "--python=/no/python", "--", "x"], "/no/python: no such program"),
  ],
)
def test_mistakes_are_one_line(fake, script, arguments, says):
  code, out, err = fake.run(script, *arguments)
  assert code == 2 and not out and not fake.calls()
  assert err.startswith("error: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize(
  ("script", "arguments"), [("tpu.sh", ["delete", *VM]), ("slurm.sh", ["--shards=2", "--", "x"])]
)
def test_a_tool_that_is_not_installed_is_one_line(fake, script, arguments):
  tools = fake.root / "tools"
  tools.mkdir()
  for name in ("bash", "dirname", "sed"):
    (tools / name).symlink_to(shutil.which(name))
  code, _, err = fake.run(script, *arguments, PATH=str(tools))
  assert code == 2 and "is not installed" in err and err.count("\n") == 1


# --- launch/tpu.sh --------------------------------------------------------------------


def test_create_names_zone_type_version_and_tier(fake):
  code, _, err = fake.run("tpu.sh", "create", *VM, *KIND, "--spot", "--project=my project")
  assert code == 0, err
  assert fake.calls() == [
    [
      *("compute", "tpus", "tpu-vm", "create", "vm", "--accelerator-type=v5litepod-8"),
      *("--version=v2-alpha-tpuv5-lite", "--spot", "--zone=us-west4-a", "--project=my project"),
    ]
  ]


def test_queued_resources_are_awaited_and_deleted_with_their_vm(fake):
  assert fake.run("tpu.sh", "create", *VM, *KIND, "--queued")[0] == 0
  assert fake.run("tpu.sh", "delete", *VM, "--queued")[0] == 0
  queue = ["compute", "tpus", "queued-resources"]
  zone = "--zone=us-west4-a"
  assert fake.calls() == [
    [
      *(*queue, "create", "vm", "--node-id=vm", "--accelerator-type=v5litepod-8"),
      *("--runtime-version=v2-alpha-tpuv5-lite", zone),
    ],
    [*queue, "describe", "vm", "--format=value(state.state)", zone],
    [*queue, "delete", "vm", "--force", "--quiet", zone],
  ]


def test_a_queue_that_failed_ends_the_wait(fake):
  (fake.root / "bin/gcloud").write_text("#!/bin/sh\ncase $* in *describe*) echo FAILED;; esac\n")
  code, _, err = fake.run("tpu.sh", "create", *VM, *KIND, "--queued", "--wait=0")
  assert code == 1 and "vm: FAILED" in err


AWKWARD = ("a b", "it's", "$HOME", "*", 'say "x"', "back\\slash", "ä;|&", "")


def test_arguments_reach_the_program_as_they_were(fake, vm):
  arguments = [f"--config.data_dir={text}" for text in AWKWARD]
  code, out, err = fake.run("tpu.sh", "run", *VM, *RUN, *arguments)
  assert code == 0, err
  printed = [line for line in out.splitlines() if line.startswith("<")]
  words = ["-m", *RUN[1:], *arguments, "--workdir=runs/vm"]
  assert printed == [f"<{word}>" for word in words]


def test_a_printed_command_is_the_one_that_is_called(fake, vm):
  arguments = ("run", *VM, *RUN, *AWKWARD)
  code, out, err = fake.run("tpu.sh", *arguments, "--dry_run")  # after --: the program's own
  assert code == 0, err
  (called,) = fake.calls()
  assert called[:4] == ["compute", "tpus", "tpu-vm", "ssh"]
  (fake.root / "calls").unlink()
  code, out, _ = fake.run("tpu.sh", "--dry_run", *arguments)
  assert code == 0 and not fake.calls()
  called = [a.replace(" --dry_run", "") for a in called]
  assert shlex.split(bash_words(out)) == ["gcloud", *called]


def bash_words(text):
  """$'...' is bash's own; let bash say what it means."""
  program = f'printf "%s\\0" {text.strip()}'
  out = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout
  return shlex.join(out.split("\0")[:-1])


@pytest.mark.parametrize(
  "verb", ["create", "install", "run", "resume", "fetch", "status", "delete"]
)
@pytest.mark.parametrize("more", [(), ("--queued",), ("--shards=2",)])
def test_a_dry_run_calls_nothing(fake, verb, more):
  command = ("--", "halrp_jax", "sweep", "--config=x") if verb in ("run", "resume") else ()
  flags = (*VM, *KIND, "--bucket=gs://b/f", f"--to={fake.root}/results", *more)
  before = sorted(fake.root.rglob("*"))
  code, out, err = fake.run("tpu.sh", "--dry_run", verb, *flags, *command)
  assert code == 0 and "gcloud " in out, err
  assert not fake.calls() and sorted(fake.root.rglob("*")) == before


def test_install_brings_the_tree_without_what_is_the_machines_own(fake):
  executable(fake.root / "bin/tar", RECORDER)
  assert fake.run("tpu.sh", "create", *VM, *KIND)[0] == 0
  code, _, err = fake.run("tpu.sh", "install", *VM, "--data=gs://b/my data")
  assert code == 0, err
  _, tar, copy, install = fake.calls()
  assert tar[0] == "tar" and {f"--exclude=./{p}" for p in (".git", ".venv", "runs")} <= set(tar)
  assert tar[-3:] == ["-C", str(ROOT), "."]
  assert copy[:4] == ["compute", "tpus", "tpu-vm", "scp"] and copy[4] == tar[2]
  assert copy[5:] == ["vm:halrp_jax.tar.gz", "--zone=us-west4-a"]
  assert not pathlib.Path(tar[2]).exists()
  assert "on_tpu.sh install gs://b/my\\ data" in install[5]


def steps(calls):
  """What was done, in short; without looking at states."""
  found = []
  for call in calls:
    text = " ".join(call)
    for name in ("create", "delete", "scp", "on_tpu.sh install", "on_tpu.sh run", "rsync"):
      if f" {name} " in f" {text.replace('halrp_jax/launch/', ' ')} ":
        found.append(name)
  return found


@pytest.mark.parametrize("queued", [pytest.param((), marks=pytest.mark.slow), ("--queued",)])
def test_a_vm_that_is_taken_away_is_made_again_and_goes_on_with_its_workdir(fake, queued):
  (fake.root / "runs").write_text("taken\ntaken\n0")
  flags = (*VM, *KIND, "--spot", "--bucket=gs://b/f", "--wait=0", *queued)
  code, _, err = fake.run("tpu.sh", "resume", *flags, *RUN)
  assert code == 0, err
  once = ["create", "scp", "on_tpu.sh install", "on_tpu.sh run"]
  assert steps(fake.calls()) == [*once, "delete", *once, "delete", *once]
  runs = [c[5] for c in fake.calls() if "on_tpu.sh run" in c[-2]]
  assert len(set(runs)) == 1 and " run gs://b/f/vm runs/vm halrp_jax.main " in runs[0]
  created = [c for c in fake.calls() if c[3] == "create"]
  assert created[0] == created[1] and "--spot" in created[0]
  assert "launch/tpu.sh delete" in err


def test_a_lost_connection_does_not_cost_the_vm(fake, vm):
  (fake.root / "state").write_text("READY")
  (fake.root / "runs").write_text("75\n0")
  code, _, err = fake.run("tpu.sh", "resume", *VM, *KIND, "--bucket=gs://b", "--wait=0", *RUN)
  assert code == 0 and steps(fake.calls()) == ["on_tpu.sh run"] * 2, err


@pytest.mark.parametrize("ended", [1, 2])
def test_a_run_that_failed_is_not_tried_again(fake, vm, ended):
  (fake.root / "state").write_text("READY")
  (fake.root / "runs").write_text(f"{ended}\n0")
  code, _, err = fake.run("tpu.sh", "resume", *VM, *KIND, "--bucket=gs://b", "--wait=0", *RUN)
  assert code == ended and steps(fake.calls()) == ["on_tpu.sh run"], err


def test_attempts_come_to_an_end(fake):
  (fake.root / "runs").write_text("taken\n" * 5)
  flags = (*VM, *KIND, "--bucket=gs://b", "--wait=0", "--attempts=2")
  code, _, err = fake.run("tpu.sh", "resume", *flags, *RUN)
  assert code == stop.EXIT_CODE and "the same command resumes" in err
  assert steps(fake.calls()).count("on_tpu.sh run") == 2


def test_a_sweep_has_a_vm_for_each_shard(fake):
  (fake.root / "state").write_text("READY")
  (fake.root / "vm/halrp_jax/.venv").mkdir(parents=True)
  (fake.root / "vm/halrp_jax/.venv/installed").touch()
  (fake.root / "runs").write_text("0\n0\n0\n0\n0\n0")
  flags = (*VM, *KIND, "--bucket=gs://b", "--shards=3")
  code, _, err = fake.run("tpu.sh", "resume", *flags, "--", "halrp_jax", "sweep", "--config=x")
  assert code == 0, err
  runs = sorted(c[5].partition("on_tpu.sh ")[2] for c in fake.calls() if "on_tpu.sh run" in c[-2])
  assert runs == [
    f"run gs://b/vm-{i} runs/vm-{i} halrp_jax sweep --config=x --shard={i}/3" for i in range(3)
  ]


def test_every_host_of_a_slice_is_told_and_finds_the_others(fake):
  (fake.root / "runs").write_text("75 2")
  flags = (*VM, *KIND, "--all_hosts", "--wait=0", "--bucket=gs://b/f")
  executable(fake.root / "bin/tar", RECORDER)
  code, _, err = fake.run("tpu.sh", "resume", *flags, *RUN)
  assert code == 2, err
  calls = [c for c in fake.calls() if c[:3] == ["compute", "tpus", "tpu-vm"]]
  everywhere = [c for c in calls if c[3] in ("ssh", "scp") and "/vm.code" not in str(c)]
  assert everywhere and all("--worker=all" in c for c in everywhere)
  runs = [c for c in everywhere if "on_tpu.sh run" in str(c)]
  assert len(runs) == 2 and all(
    "--config=configs/digits.py --coordinator=auto" in c[5] for c in runs
  )
  codes = [c for c in calls if "/vm.code" in str(c)]
  assert codes and not any("--worker=all" in c for c in codes)


def test_fetch_takes_the_bucket_or_else_the_vm(fake):
  (fake.root / "b/f/vm").mkdir(parents=True)
  (fake.root / "b/f/vm/record.json").write_text("{}")
  results = fake.root / "my results"
  code, _, err = fake.run("tpu.sh", "fetch", *VM, "--bucket=gs://b/f/", f"--to={results}")
  assert code == 0 and (results / "record.json").exists(), err
  assert fake.run("tpu.sh", "fetch", *VM, f"--to={results}")[0] == 0
  assert fake.calls()[-1] == [
    *("compute", "tpus", "tpu-vm", "scp", "--recurse", "vm:halrp_jax/runs/vm/*"),
    *(str(results), "--zone=us-west4-a"),
  ]


def test_status(fake):
  assert fake.run("tpu.sh", "status", *VM)[1] == "vm: MISSING\n"
  (fake.root / "state").write_text("PREEMPTED")
  assert fake.run("tpu.sh", "status", *VM)[1] == "vm: PREEMPTED\n"


# --- launch/on_tpu.sh -----------------------------------------------------------------


def on_vm(fake, vm, *arguments):
  process = fake.start("launch/on_tpu.sh", *arguments, cwd=vm)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def files(folder):
  return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# The system's Python: makes environments whose Python writes down how it is called.
SYSTEM_PYTHON = """#!/usr/bin/env bash
[ -e "$FAKE/python_is_old" ] && exit 1
[ "$1" = -c ] && exit 0
mkdir -p "$3/bin" && cp "$FAKE/environment_python" "$3/bin/python"
"""
NAMES = ("python3.13", "python3.12", "python3.11", "python3")


@pytest.mark.parametrize("old", [False, True])
def test_install_on_the_vm(fake, vm, old):
  shutil.rmtree(vm / ".venv")
  executable(fake.root / "environment_python", RECORDER)
  for name in NAMES:
    executable(fake.root / "bin" / name, SYSTEM_PYTHON)
  executable(
    fake.root / "bin/sudo", '#!/bin/sh\necho "$*" >>$FAKE/sudo; rm -f $FAKE/python_is_old\n'
  )
  if old:
    (fake.root / "python_is_old").touch()
  (fake.root / "b/data").mkdir(parents=True)
  (fake.root / "b/data/images").touch()
  code, _, err = on_vm(fake, vm, "install", "gs://b/data")
  assert code == 0, err
  assert (fake.root / "sudo").exists() == old and (vm / "data/images").exists()
  pip = ["python", "-m", "pip", "install", "--quiet"]
  assert [c for c in fake.calls() if c[0] == "python"] == [
    [*pip, "--upgrade", "pip"],
    [*pip, "--editable", ".", "jax[tpu]"],
    ["python", "-m", "halrp_jax", "doctor"],
  ]
  assert (vm / ".venv/installed").exists()


def test_an_install_that_failed_is_not_taken_for_done(fake, vm):
  (vm / ".venv/installed").unlink()
  (fake.root / "code").write_text("1")  # of every call of Python
  assert on_vm(fake, vm, "install", "")[0] == 1
  assert not (vm / ".venv/installed").exists()


RESULT = {"config.json", "metrics.jsonl", "checkpoints/state-0001/x"}


def test_a_run_is_kept_in_the_bucket_and_taken_up_from_there(fake, vm):
  (fake.root / "code").write_text("3")
  code, out, _ = on_vm(fake, vm, "run", "gs://b/vm", "runs/vm", "halrp_jax.main", "--x")
  assert code == 3 and "<--x>" in out
  assert files(fake.root / "b/vm") == files(vm / "runs/vm") == RESULT
  shutil.rmtree(vm / "runs")  # a new machine
  (fake.root / "b/vm/config.json").write_text("from the bucket")
  code, out, _ = on_vm(fake, vm, "run", "gs://b/vm", "runs/vm", "halrp_jax.main", "--x")
  assert code == 3 and "from the bucket" in out


def test_a_copy_to_the_bucket_is_whole_whenever_it_is_cut_short(fake, vm):
  on_vm(fake, vm, "run", "gs://b/vm", "runs/vm", "halrp_jax.main")
  (vm / "runs/vm/checkpoints/.writing-1").mkdir()
  (vm / "runs/vm/checkpoints/.writing-1/x").touch()
  (vm / "runs/vm/record.json").touch()
  (fake.root / "b/vm/old").touch()
  (fake.root / "calls").unlink()
  on_vm(fake, vm, "run", "gs://b/vm", "runs/vm", "halrp_jax.main")
  copies = [c for c in fake.calls() if c[1] == "rsync"]
  shutil.rmtree(fake.root / "b")
  seen = []
  for copy in copies:
    subprocess.run([fake.root / "bin/gcloud", *copy], env=fake.env, cwd=vm, check=True)
    seen.append(files(fake.root / "b/vm"))
  assert seen == [
    {"config.json"},
    {"config.json", "checkpoints/state-0001/x"},
    RESULT | {"record.json"},
  ]
  assert "--delete-unmatched-destination-objects" in copies[-1]


@pytest.mark.parametrize("number, code", [("0", 0), ("1", 0), ("", stop.EXIT_CODE)])
def test_the_first_host_alone_has_the_bucket(fake, vm, number, code):
  """One that can't tell which it is must neither start anew nor write over the copy."""
  executable(fake.root / "bin/curl", f'#!/bin/sh\necho "$*" >>$FAKE/asked; printf "{number}"\n')
  run = ("run", "gs://b/vm", "runs/vm", "halrp_jax.main", "--coordinator=auto")
  assert on_vm(fake, vm, *run)[0] == code
  assert (fake.root / "b/vm").exists() == (number == "0")
  assert (fake.root / "started").exists() == (code == 0)
  assert (fake.root / "asked").read_text().strip().endswith("/attributes/agent-worker-number")


def test_a_bucket_that_can_not_be_read_stops_the_run(fake, vm):
  (fake.root / "broken").touch()
  code, out, _ = on_vm(fake, vm, "run", "gs://b/vm", "runs/vm", "halrp_jax.main")
  assert code == stop.EXIT_CODE and "error: gs://b/vm can't be read" in out
  assert not (fake.root / "started").exists()


def test_a_run_goes_on_without_its_connection(fake, vm):
  (fake.root / "wait").touch()
  command = ("run", "", "runs/vm", "halrp_jax.main")
  first = fake.start("launch/on_tpu.sh", *command, cwd=vm)
  fake.wait_for("started")
  first.kill()
  second = fake.start("launch/on_tpu.sh", *command, cwd=vm)
  assert "<halrp_jax.main>" in [second.stdout.readline().strip() for _ in range(2)]
  (fake.root / "code").write_text("1")
  (fake.root / "go").touch()
  second.communicate(timeout=60)
  first.communicate(timeout=60)
  assert second.returncode == 1
  assert (fake.root / "started").read_text() == "started\n"  # once


def test_a_machine_that_goes_down_stops_the_run_and_keeps_it(fake, vm):
  (fake.root / "wait").touch()
  process = fake.start("launch/on_tpu.sh", "run", "gs://b/vm", "runs/vm", "x", cwd=vm)
  fake.wait_for("started")
  (vm / "runs/vm/config.json").write_text("{}")
  os.kill(int((vm / "runs/vm.pid").read_text()), signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == stop.EXIT_CODE and "stopping" in out
  assert files(fake.root / "b/vm") == {"config.json"}


def test_a_run_is_copied_while_it_is_at_work(fake, vm):
  (fake.root / "wait").touch()
  fake.env["HALRP_PUSH_SECONDS"] = "0.1"
  process = fake.start("launch/on_tpu.sh", "run", "gs://b/vm", "runs/vm", "x", cwd=vm)
  fake.wait_for("started")
  (vm / "runs/vm/config.json").write_text("{}")
  fake.wait_for("b/vm/config.json")
  (fake.root / "go").touch()
  process.communicate(timeout=60)
  assert process.returncode == 0 and files(fake.root / "b/vm") == RESULT


# --- launch/slurm.sh ------------------------------------------------------------------

SWEEP = ("--config=configs/digits.py", "--workdir=my runs")


def test_slurm_submits_an_array(fake):
  python = f"--python={fake.python}"
  flags = ("--shards=8", python, "--gres=gpu:1", "--array=2,5")
  code, _, err = fake.run("slurm.sh", *flags, "--", *SWEEP)
  assert code == 0, err
  script = [f"{LAUNCH}/slurm.sh", "in_job", str(ROOT), "--shards=8", python, "--", *SWEEP]
  submitted = ["sbatch", "--array=0-7", "--gres=gpu:1", "--array=2,5", *script]
  assert fake.calls() == [submitted]
  (fake.root / "calls").unlink()
  code, out, _ = fake.run("slurm.sh", "--dry_run", *flags, "--", *SWEEP)
  assert code == 0 and not fake.calls() and shlex.split(bash_words(out)) == submitted


def in_job(fake):
  """As Slurm runs it: a copy, elsewhere, in the folder it was submitted from."""
  copy = shutil.copy(LAUNCH / "slurm.sh", fake.root / "slurm_script")
  flags = ("in_job", str(ROOT), "--shards=8", f"--python={fake.python}", "--", *SWEEP)
  return fake.start(copy, *flags, SLURM_ARRAY_JOB_ID="42", SLURM_ARRAY_TASK_ID="3")


@pytest.mark.parametrize("ended", [0, 1, 75])
def test_an_array_task_does_its_shard(fake, ended):
  (fake.root / "code").write_text(str(ended))
  process = in_job(fake)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == ended and not fake.calls()  # nobody said that time is up
  words = ["-m", "halrp_jax", "sweep", *SWEEP, "--shard=3/8"]
  assert [line for line in out.splitlines() if line.startswith("<")] == [f"<{w}>" for w in words]


@pytest.mark.parametrize(
  ("number", "calls"), [(signal.SIGUSR1, [["scontrol", "requeue", "42_3"]]), (signal.SIGTERM, [])]
)
def test_only_the_time_limit_puts_a_task_back(fake, number, calls):
  (fake.root / "wait").touch()
  process = in_job(fake)
  fake.wait_for("started")
  process.send_signal(number)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == stop.EXIT_CODE and "stopping" in out
  assert fake.calls() == calls


# --- launch/local.sh ------------------------------------------------------------------

CORES = sorted(os.sched_getaffinity(0))
SHARDS = min(2, len(CORES))


def local(fake, *flags):
  flags = (f"--shards={SHARDS}", f"--python={fake.python}", *flags)
  return fake.start(LAUNCH / "local.sh", *flags, "--", *SWEEP)


def test_every_shard_has_cores_of_its_own(fake):
  out, err = local(fake).communicate(timeout=60)
  used = []
  for i in range(SHARDS):
    mine = [t.removeprefix(f"[{i}] ") for t in out.splitlines() if t.startswith(f"[{i}] ")]
    words = ["-m", "halrp_jax", "sweep", *SWEEP[:1], "--workdir=my runs", f"--shard={i}/{SHARDS}"]
    assert [line for line in mine if line.startswith("<")] == [f"<{w}>" for w in words], err
    used += [line.split()[-1] for line in mine if line.startswith("Cpus_allowed_list")]
  assert len(used) == len(set(used)) == SHARDS


def test_local_codes_and_dry_run(fake):
  (fake.root / "code").write_text("1")
  process = local(fake)
  process.communicate(timeout=60)
  assert process.returncode == 1
  (fake.root / "started").unlink()
  out, _ = local(fake, "--dry_run").communicate(timeout=60)
  assert out.count("taskset -c ") == SHARDS and not (fake.root / "started").exists()


def test_processes_of_one_run_meet_at_a_port(fake):
  flags = (f"--processes={SHARDS}", f"--python={fake.python}")
  out, err = fake.start(LAUNCH / "local.sh", *flags, "--", *SWEEP).communicate(timeout=60)
  places = set()
  for i in range(SHARDS):
    mine = [t.removeprefix(f"[{i}] ") for t in out.splitlines() if t.startswith(f"[{i}] <")]
    assert mine[:3] == ["<-m>", "<halrp_jax.main>", f"<{SWEEP[0]}>"], err
    assert mine[-2:] == [f"<--num_processes={SHARDS}>", f"<--process_id={i}>"]
    places.add(mine[-3])
  assert len(places) == 1 and re.fullmatch(r"<--coordinator=localhost:\d+>", places.pop())


def test_a_signal_stops_all_shards(fake):
  (fake.root / "wait").touch()
  process = local(fake)
  while (
    not (fake.root / "started").exists()
    or (fake.root / "started").read_text().count("started") < SHARDS
  ):
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == stop.EXIT_CODE and out.count("stopping") == SHARDS
