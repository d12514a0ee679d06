"""Measures the seconds of a whole sequence of tasks: HALRP and STL on CIFAR100-Split, order A.

  python benchmarks/sequence.py --data_dir=DIR --workdir=RUNS [--config.train_fraction=0.05 ...]

Runs both methods one after the other; finished runs in RUNS are not run again. Prints the
accumulated seconds after each task in units of STL's first task (paper, Fig. 3b), the seconds by
kind of work, and whether epochs get slower from task to task.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def learn(method: str, data_dir: str, folder: pathlib.Path, more: list[str]) -> None:
  """Runs a method in a folder, unless its record is there. `more`: further flags."""
  if (folder / "record.json").exists():
    return
  config = f"--config={ROOT}/configs/cifar100_split.py:{method}"
  command = [sys.executable, "-m", "halrp_jax.main", config, f"--config.data_dir={data_dir}"]
  subprocess.run([*command, f"--workdir={folder}", "--overwrite", *more], check=True)


def total(seconds: dict[str, float]) -> float:
  """Returns the sum of the seconds of all kinds of work."""
  return sum(seconds.values())


def step_seconds(folder: pathlib.Path) -> dict[str, float]:
  """Returns the median seconds of an epoch of each phase, such as "task03/finetune".

  The first epoch of each phase is left out.
  """
  phases = {}
  for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
    event = json.loads(line)
    if event["event"] == "epoch" and event["epoch"] > 1:
      phases.setdefault(event["phase"], []).append(event["seconds"])
  return {phase: statistics.median(seconds) for phase, seconds in phases.items()}


def main() -> int:
  """Runs both methods and prints their times; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--workdir", required=True, type=pathlib.Path)
  args, more = parser.parse_known_args()
  records = {}
  for method in ("stl", "halrp"):
    learn(method, args.data_dir, args.workdir / method, more)
    records[method] = json.loads(
      (args.workdir / method / "record.json").read_text(encoding="utf-8")
    )
  unit = total(records["stl"]["seconds"][0])
  print(f"unit: STL's first task, {unit:.1f} s")
  for method, record in records.items():
    sums, so_far = [], 0.0
    for seconds in record["seconds"]:
      so_far += total(seconds)
      sums.append(so_far / unit)
    num_tasks = len(sums)
    print(f"{method}: ACC {record['average_accuracy']:.2f}, {so_far:.0f} s")
    print("  accumulated  " + " ".join(f"{x:6.2f}" for x in sums))
    print(f"  the last over the number of tasks {sums[-1] / num_tasks:.3f}")
    for kind in record["seconds"][0]:
      print(f"  {kind:<12} {sum(s[kind] for s in record['seconds']):7.1f} s")
    epochs = list(step_seconds(args.workdir / method).items())
    later = [x for x in epochs if x[0].startswith(("task01", f"task{num_tasks - 1:02d}"))]
    (first, a), (last, b) = later[0], later[-1]
    print(f"  an epoch: {first} {a:.3f} s, {last} {b:.3f} s, ratio {b / a:.3f}")
    print(f"  peak memory {record['peak_memory_bytes'] / 2**20:.0f} MiB")
  return 0


if __name__ == "__main__":
  sys.exit(main())
