"""Accuracies of a finished run's model, evaluated in several ways.

  python benchmarks/reevaluate.py --workdir=RUN --data_dir=DIR [--kinds=population,batch] \\
      [--images=mixed,sorted] [--batch_sizes=128]

Training does not depend on whether BatchNorm evaluates with population statistics or with those of
the test batch (but for what validation decides inside it), so one run shows both. `sorted` orders
each task's test images by class, as a folder of images is; with population statistics this changes
nothing.
"""

import argparse
import json
import pathlib

import numpy as np

from halrp_jax import keys, methods, models
from halrp_jax.config import resolve
from halrp_jax.runs import experiment, identity, states
from halrp_jax.training import networks, population
from halrp_jax.training.evaluate import evaluate


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--kinds", default="population,batch")
  parser.add_argument("--images", default="mixed,sorted")
  parser.add_argument("--batch_sizes", default="128")
  parser.add_argument("--json", help="file that gets the accuracies")
  args = parser.parse_args()
  sizes = [int(size) for size in args.batch_sizes.split(",")]
  found = accuracies(
    args.workdir, args.data_dir, args.kinds.split(","), args.images.split(","), sizes
  )
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found), encoding="utf-8")


def accuracies(path: str, data_dir: str, kinds, images_orders, sizes) -> dict[str, list[float]]:
  """Returns accuracies in percent by task, by "KIND IMAGES SIZE"; prints their means."""
  values = _completed(identity.read_config(path), data_dir)
  config = resolve(values)
  benchmark, model, *_ = experiment.build(config)
  state, _ = states.newest_state(path)
  state = methods.restore(config.method.name, state)
  state = population.complete(state, networks.statistics_of(model, benchmark.image_shape))
  found = {}
  for kind in kinds:
    stored = "running" if kind == "population" else kind  # what is stored was taken in the run
    model = models.make(config.network, benchmark.max_classes, stored, config.precision)
    predict = methods.make(config, model, benchmark).predict
    for images in images_orders:
      tasks = [_by_class(task) if images == "sorted" else task for task in benchmark.tasks]
      for size in sizes:
        accuracy = evaluate(lambda t, x, p=predict: p(state, t, x), tasks, "test", size)
        found[f"{kind} {images} {size}"] = accuracy
        lowest = ", ".join(f"{a:.1f}" for a in sorted(accuracy)[:5])
        print(f"{kind} {images} {size}: ACC {np.mean(accuracy):.2f}, lowest tasks {lowest}")
  return found


def _by_class(task):
  """Returns the task with its test images ordered by class."""
  order = np.argsort(np.asarray(task.test.label), kind="stable")
  test = task.test._replace(index=task.test.index[order], label=task.test.label[order])
  return task._replace(test=test)


def _completed(values: dict, data_dir: str) -> dict:
  """Adds keys that came after the run was made, at their defaults."""
  for section, known in (("", keys.Config), *keys.SECTIONS.items()):
    target = values[section] if section else values
    for name, key in keys.spec(known).items():
      target.setdefault(name, key.default)
  return values | {"data_dir": data_dir}


if __name__ == "__main__":
  main()
