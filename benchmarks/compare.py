"""Compares the speed of training steps of this working tree with those of another revision.

  python benchmarks/compare.py b65a6b0 [--rounds=5] [--runs=lenet-stl,lenet-halrp]
      [--always_compile] [--json=FILE]

It ends with exit code 1 if the step of some run is more than 10 % slower in at least 80 % of the
rounds. Run it on an idle machine before each release, with the revision of the last one.

Prints the median seconds of a step and of compiling for the revision (base) and for the working
tree (new), and the ratio new / base: the median over the rounds of the ratio within a round, and
its spread. Each round starts a process of `python -m halrp_jax.main` per tree and run, on random
images in CIFAR-100's format. The two trees follow each other directly and take turns in being
first. The time of a step is the time of an epoch divided by its steps; the first epoch does not
count, because it compiles or loads programs. The first two rounds compile everything. Later rounds
load the programs of the second round, which saves minutes, unless --always_compile is given. The
revision is checked out into a temporary git worktree. Only the command line, metrics.jsonl and
record.json are used, so the revisions may differ in everything else.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
BATCH, STEPS = 128, 8
TRAINED, OTHERS = 20, 80  # number of classes of the first two tasks, and of the others
PER_CLASS = BATCH * STEPS // 8  # images per class: 10 classes, a fifth is held out for validation
RUNS = {  # name: (method, network, tasks, epochs); the last task is measured
  "lenet-stl": ("stl", "lenet", "0", 6),
  "lenet-halrp": ("halrp", "lenet", "0,1", 6),
  "alexnet-stl": ("stl", "alexnet", "0", 4),
  "resnet18-stl": ("stl", "resnet18", "0", 3),
}
SLOWER, SHARE = 1.1, 0.8  # a step is slower if this ratio is exceeded in this share of the rounds


def write_images(folder: pathlib.Path) -> None:
  """Writes random images as CIFAR-100's binary files: many of the first classes, few of others."""
  rng, to = np.random.default_rng(0), folder / "cifar-100-binary"
  to.mkdir(parents=True)
  for name, many, few in (("train.bin", PER_CLASS, 5), ("test.bin", 10, 1)):
    fine = np.repeat(np.arange(TRAINED + OTHERS, dtype=np.uint8), [many] * TRAINED + [few] * OTHERS)
    fine = rng.permutation(fine)
    pixels = rng.integers(0, 256, (len(fine), 3072), np.uint8)
    (to / name).write_bytes(np.column_stack([fine // 5, fine, pixels]).tobytes())
  for kind, count in (("fine", 100), ("coarse", 20)):
    lines = "".join(f"{kind}{i}\n" for i in range(count))
    (to / f"{kind}_label_names.txt").write_text(lines, encoding="utf-8")


@contextlib.contextmanager
def checked_out(revision: str):
  """Yields a folder with the files of a revision, for as long as it is needed."""

  def git(*args):
    return subprocess.run(
      ["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout.strip()

  with tempfile.TemporaryDirectory(prefix="compare-") as folder:
    tree = pathlib.Path(folder) / "base"
    git("worktree", "add", "--detach", str(tree), revision)
    try:
      yield tree
    finally:
      git("worktree", "remove", "--force", str(tree))


def measure(tree: pathlib.Path, name: str, data: pathlib.Path, cache: pathlib.Path) -> dict:
  """Runs one training in a process; returns the seconds of a step and, if it compiles, of that."""
  compiles = not cache.exists()
  method, network, order, epochs = RUNS[name]
  env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  with tempfile.TemporaryDirectory(prefix="compare-") as folder:
    done = subprocess.run(
      [
        *(sys.executable, "-m", "halrp_jax.main", f"--config=configs/cifar100_split.py:{method}"),
        *(f"--config.data_dir={data}", f"--config.order={order}", f"--config.network={network}"),
        *(f"--config.epochs={epochs}", f"--config.batch_size={BATCH}", "--config.data.cache=off"),
        *("--config.allow_partial=True", f"--workdir={folder}/run", f"--compile_cache={cache}"),
      ],
      cwd=tree,
      env=env | {"PYTHONPATH": str(tree)},
      capture_output=True,
      text=True,
      encoding="utf-8",
    )
    if done.returncode:
      sys.exit(f"error: {name} of {tree} failed:\n{done.stderr[-2000:]}")
    run = pathlib.Path(folder) / "run"
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    events = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    epoch = [e for e in events if e["event"] == "epoch"]
  measured = [e["seconds"] for e in epoch if e["phase"] == epoch[-1]["phase"]][1:]
  compiling = {"compile": sum(task["compile"] for task in record["seconds"])} if compiles else {}
  return {"step": statistics.median(measured) / STEPS} | compiling


def compare(trees: dict[str, pathlib.Path], runs: list[str], rounds: int, compiled: int) -> dict:
  """Measures all runs of both trees; returns all seconds, {run: {tree: {quantity: [seconds]}}}.

  Every tree compiles in the first `compiled` rounds; later rounds load the programs of the last of
  these.
  """
  found = {name: {t: {"step": [], "compile": []} for t in trees} for name in runs}
  with tempfile.TemporaryDirectory(prefix="compare-") as folder:
    data = pathlib.Path(folder)
    write_images(data)
    for i in range(rounds):
      for name in runs:
        for t in list(trees)[:: 1 if i % 2 == 0 else -1]:
          cache = data / f"compiled-{name}-{t}-{min(i + 1, compiled)}"
          for quantity, seconds in measure(trees[t], name, data, cache).items():
            found[name][t][quantity].append(seconds)
      print(f"round {i + 1} of {rounds} done", file=sys.stderr, flush=True)
  return found


def summary(found: dict) -> list[dict]:
  """Returns a row for each run and quantity: medians, the median ratio and its spread."""
  rows = []
  for name, by_tree in found.items():
    for quantity in ("step", "compile"):
      base, new = by_tree["base"][quantity], by_tree["new"][quantity]
      ratios = sorted(b / a for a, b in zip(base, new, strict=True))
      row = {"run": name, "quantity": quantity, "ratio": statistics.median(ratios)}
      row |= {"least": ratios[0], "most": ratios[-1]}
      rows.append(row | {"base": statistics.median(base), "new": statistics.median(new)})
  return rows


def slower(found: dict) -> list[str]:
  """Returns the runs whose step is slower than that of the base in nearly all rounds."""

  def is_slower(by_tree):
    pairs = list(zip(by_tree["base"]["step"], by_tree["new"]["step"], strict=True))
    return sum(b > SLOWER * a for a, b in pairs) >= SHARE * len(pairs)

  return [name for name, by_tree in found.items() if is_slower(by_tree)]


def main(argv: list[str]) -> int:
  """Measures and prints a table; returns the exit code: 1 if a step has become slower."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("base", help="revision of git to compare with")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--runs", default=",".join(RUNS))
  parser.add_argument(
    "--always_compile", action="store_true", help="compile in every round, not in two"
  )
  parser.add_argument("--json", help="file for all numbers")
  args = parser.parse_args(argv)
  runs = args.runs.split(",")
  if unknown := sorted(set(runs) - RUNS.keys()):
    parser.error(f"--runs: {unknown[0]} is not one of {', '.join(RUNS)}")
  if args.rounds < 1:
    parser.error(f"--rounds={args.rounds}: expected at least 1")
  load = os.getloadavg()[0]
  print(f"load of the machine at the start: {load:.1f}, {os.cpu_count()} cores")
  compiled = args.rounds if args.always_compile else 2
  with checked_out(args.base) as tree:
    found = compare({"base": tree, "new": ROOT}, runs, args.rounds, compiled)
  rows = summary(found)
  print(f"{'run':12} {'seconds of':10} {'base':>8} {'new':>8} {'new/base':>9}  spread")
  for row in rows:
    print(
      f"{row['run']:12} {row['quantity']:10} {row['base']:8.4f} {row['new']:8.4f}"
      f" {row['ratio']:9.2f}  {row['least']:.2f} to {row['most']:.2f}"
    )
  if args.json:
    report = {"base": args.base, "rounds": args.rounds, "load": load, "rows": rows, "all": found}
    pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
  if names := slower(found):
    print(f"slower than {args.base}: {', '.join(names)}", file=sys.stderr)
  return int(bool(names))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
