r"""Evaluates the model of a finished run in several ways.

  python benchmarks/reevaluate.py --workdir=RUN --data_dir=DIR [--kinds=population,batch] \
      [--images=mixed,sorted] [--batch_sizes=128]

Training does not depend on whether BatchNorm evaluates with population statistics or with those of
the test batch, except for decisions based on validation images. Hence one run can be evaluated with
both kinds. With --images=sorted the test images of each task are sorted by class, as they are in a
folder of images; this does not change the results with population statistics.
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
  """Evaluates and prints a line per way."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--kinds", default="population,batch")
  parser.add_argument("--images", default="mixed,sorted")
  parser.add_argument("--batch_sizes", default="128")
  parser.add_argument("--json", help="file for the accuracies")
  args = parser.parse_args()
  sizes = [int(size) for size in args.batch_sizes.split(",")]
  found = accuracies(
    args.workdir, args.data_dir, args.kinds.split(","), args.images.split(","), sizes
  )
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found), encoding="utf-8")


def accuracies(path: str, data_dir: str, kinds, images_orders, sizes) -> dict[str, list[float]]:
  """Returns {"KIND IMAGES SIZE": accuracies of the tasks in percent} and prints the means."""
  values = _completed(identity.read_config(path), data_dir)
  config = resolve(values)
  benchmark, model, *_ = experiment.build(config)
  state, _ = states.newest_state(path)
  state = methods.restore(config.method.name, state)
  state = population.complete(state, networks.statistics_of(model, benchmark.image_shape))
  found = {}
  for kind in kinds:
    # A model with running statistics evaluates with those that the run has stored.
    stored = "running" if kind == "population" else kind
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
  """Returns a task with its test images sorted by class."""
  order = np.argsort(np.asarray(task.test.label), kind="stable")
  test = task.test._replace(index=task.test.index[order], label=task.test.label[order])
  return task._replace(test=test)


def _completed(values: dict, data_dir: str) -> dict:
  """Returns a config with defaults for the keys that did not exist when the run was made."""
  for section, known in (("", keys.Config), *keys.SECTIONS.items()):
    target = values[section] if section else values
    for name, key in keys.spec(known).items():
      target.setdefault(name, key.default)
  return values | {"data_dir": data_dir}


if __name__ == "__main__":
  main()
