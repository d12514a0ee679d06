r"""Compares a training step of one process with that of two processes that share its batch.

  python benchmarks/processes.py --config=configs/cifar100_split.py --config.data_dir=DIR \
      --config.order=0,1 --config.train_fraction=0.4 --config.epochs=4 \
      --config.method.warmup_epochs=2

Prints the milliseconds per step in the last epoch, for the first task (which trains the whole
network) and for the second (HALRP's fine-tuning). The time that two processes wait for each other
is the difference from a single process with half the batch. Every row is a run of `halrp_jax.main`;
the runs follow one another.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

from halrp_jax import arguments
from halrp_jax.config import resolve
from halrp_jax.runs import experiment

PHASES = {"whole network": "task00/base", "fine-tuning": "task01/finetune"}


def main(argv: list[str]) -> None:
  """Measures and prints a line per arrangement. `argv`: flags of halrp_jax.main."""
  cores = sorted(os.sched_getaffinity(0))[:2]
  batch = next((int(a.split("=")[1]) for a in argv if a.startswith("--config.batch_size=")), 128)
  rows = (
    ("1 process, 1 core", [cores[:1]], batch),
    ("1 process, 1 core, half the batch", [cores[:1]], batch // 2),
    ("2 processes, a core each", [cores[:1], cores[1:]], batch),
    ("2 processes, both on 2 cores", [cores, cores], batch),
    ("1 process, 2 cores", [cores], batch),
  )
  found = {}
  print(f"{'ms a step':36}" + "".join(f"{name:>16}" for name in PHASES))
  for name, cores_of, size in rows:
    found[name] = times = run([*argv, f"--config.batch_size={size}"], cores_of)
    print(f"{name:36}" + "".join(f"{times[p]:16.1f}" for p in PHASES), flush=True)
  one, half, _, two, _ = found.values()
  for phase in PHASES:
    print(
      f"{phase}: two processes on two cores take {two[phase] / one[phase]:.2f} of the time of one "
      f"on one; {half[phase]:.1f} ms of their step are computation, "
      f"{two[phase] - half[phase]:.1f} ms sums and waiting"
    )


def run(argv: list[str], cores_of: list[list[int]]) -> dict[str, float]:
  """Returns the milliseconds per step of each phase. `cores_of`: the cores of each process."""
  with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
  with tempfile.TemporaryDirectory(prefix="processes-") as folder:
    running = []
    for i, cores in enumerate(cores_of):
      command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "halrp_jax.main"]
      command += [*argv, f"--workdir={folder}"]
      if len(cores_of) > 1:
        command += [f"--coordinator=localhost:{port}", f"--num_processes={len(cores_of)}"]
        command += [f"--process_id={i}"]
      running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    if any([process.wait() for process in running]):
      sys.exit("error: a run failed")
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  epochs = [e for e in map(json.loads, lines) if e["event"] == "epoch"]
  config = arguments.parse_config(["", *argv], {}, {}).config
  tasks = experiment.plan(config)["tasks"]
  steps = [resolve(config).steps_per_epoch(task["train"]) for task in tasks]
  return {
    name: 1000 * [e["seconds"] for e in epochs if e["phase"] == phase][-1] / steps[int(phase[4:6])]
    for name, phase in PHASES.items()
  }


if __name__ == "__main__":
  main(sys.argv[1:])
