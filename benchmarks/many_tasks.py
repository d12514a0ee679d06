"""Learns a thousand tasks of permuted digits, killed twice on the way, and compares their costs.

  python benchmarks/many_tasks.py --workdir=DIR [--tasks=1000] [--epochs=2] [--kills=2]

A run of HALRP on `data.num_tasks` permutations is started, killed with SIGKILL after equal shares
of the tasks, and started again, until it is finished. Each task may add `method.task_bound` to the
model. Costs are those of 20 tasks, from the tenth on and the last ones: medians, of bytes the mean.
Prints one line of JSON:

  seconds      wall-clock seconds from one evaluation to the next, without compilation
  bytes        written by the process between two evaluations, checkpoints and events
  memory       peak of the process's memory while the task was learned, and of the whole process
               that has learned the last task, final hashes included, in bytes
  growth       of the model, as a fraction of the base
  ratios       last over tenth

Other programs that run beside it change the seconds. Needs /proc (Linux).
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

AROUND = 20  # tasks that a median is over
_CHILD = """
import json, os, sys, time
from halrp_jax import arguments
from halrp_jax.runs import experiment

def written():
  lines = open("/proc/self/io").read().splitlines()
  return int(dict(line.split(": ") for line in lines)["wchar"])

workdir, log, num_tasks, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = arguments.load_config(sys.argv[5])
config.order, config.epochs, config.data.num_tasks = "natural", epochs, num_tasks
config.method.variant, config.method.warmup_epochs = "published", 1
config.method.task_bound = 0.05

def show(event):
  if event["event"] == "evaluation":
    peak = [x for x in open("/proc/self/status") if x.startswith("VmHWM")][0].split()[1]
    line = {"t": event["t"], "time": time.monotonic(), "bytes": written(), "pid": os.getpid()}
    line |= {"memory": 1024 * int(peak), "growth": event["increment"]}
    line |= {"compile": event["seconds"]["compile"]}
    with open(log, "a", encoding="utf-8") as stream:
      stream.write(json.dumps(line) + "\\n")

record = experiment.run(config, workdir, show)
peak = [x for x in open("/proc/self/status") if x.startswith("VmHWM")][0].split()[1]
print(json.dumps({"memory": 1024 * int(peak), "state_hash": record["state_hash"]}))
"""


def learn(args: argparse.Namespace, log: pathlib.Path, until: int) -> str:
  """Starts the run, or resumes it, and kills it after `until` tasks; returns what it prints."""
  digits = str(pathlib.Path(__file__).parents[1] / "configs/digits.py")
  arguments = [args.workdir, str(log), str(args.tasks), str(args.epochs), digits]
  command = [sys.executable, "-c", _CHILD, *arguments]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
  while process.poll() is None:
    if until < args.tasks and len(read(log)) >= until:
      process.send_signal(signal.SIGKILL)
    time.sleep(0.5)
  assert process.stdout is not None
  if process.returncode != (0 if until >= args.tasks else -signal.SIGKILL):
    raise SystemExit(f"the run ended with exit code {process.returncode} before {until} tasks")
  return process.stdout.read()


def read(log: pathlib.Path) -> dict[int, dict]:
  """Returns the lines of the log by task; a task that was learned again counts as it was last."""
  if not log.exists():
    return {}
  lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
  return {x["t"]: x for x in (json.loads(line) for line in lines if line.endswith("\n"))}


def costs(found: dict[int, dict], around: range) -> dict[str, float]:
  """Returns the median costs of some tasks that one process has learned one after another."""
  pairs = [(found[t - 1], found[t]) for t in around if t - 1 in found and t in found]
  pairs = [(a, b) for a, b in pairs if a["pid"] == b["pid"]]
  seconds = [b["time"] - a["time"] - b["compile"] for a, b in pairs]
  return {
    "seconds": statistics.median(seconds),
    "bytes": statistics.mean(b["bytes"] - a["bytes"] for a, b in pairs),
    "memory": statistics.median(b["memory"] for _, b in pairs),
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--tasks", type=int, default=1000)
  parser.add_argument("--epochs", type=int, default=2)
  parser.add_argument("--kills", type=int, default=2)
  args = parser.parse_args()
  log = pathlib.Path(f"{args.workdir}.log")
  if log.exists() or pathlib.Path(args.workdir).exists():
    raise SystemExit(f"{args.workdir} or {log} exists: choose another --workdir")
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  printed = ""
  for kill in range(1, args.kills + 2):
    printed = learn(args, log, args.tasks * kill // (args.kills + 1))
  found, end = read(log), json.loads(printed)
  # the first tasks compile; so do those that a resumed process begins with
  early = costs(found, range(10, 10 + AROUND))
  late = costs(found, range(args.tasks - AROUND, args.tasks))
  result = {"tasks": args.tasks, "kills": args.kills, "early": early, "late": late}
  result |= {"ratios": {k: late[k] / early[k] for k in early}, "memory_to_the_end": end["memory"]}
  result |= {"growth": found[args.tasks - 1]["growth"], "state_hash": end["state_hash"]}
  print(json.dumps(result))


if __name__ == "__main__":
  main()
