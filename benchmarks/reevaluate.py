"""Accuracies of a finished run's model, evaluated in another way than it was recorded with.

  python benchmarks/reevaluate.py --workdir=RUN --data_dir=DIR --batch_norm=batch \\
      --batch_sizes=16,240

Training doesn't depend on what BatchNorm evaluates with, so this is what a run with that setting
would have ended with.
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from halrp_jax import experiment, train, validate, workdir


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name in ("workdir", "data_dir", "batch_norm", "batch_sizes"):
    parser.add_argument(f"--{name}", required=True)
  args = parser.parse_args()
  values = json.loads((pathlib.Path(args.workdir) / "config.json").read_text(encoding="utf-8"))
  values["method"]["batch_norm"] = args.batch_norm
  config = experiment.resolve(config_dict.ConfigDict(_completed(values, args.data_dir)))
  benchmark, _, method = experiment.build(config)
  _, state, _ = workdir.inspect(args.workdir)
  predict = functools.partial(method.predict, jax.tree.map(jnp.asarray, state))
  for size in map(int, args.batch_sizes.split(",")):
    accuracy = train.evaluate(predict, benchmark.tasks, "test", size)
    lowest = ", ".join(f"{a:.1f}" for a in sorted(accuracy)[:5])
    print(f"{args.batch_norm} {size}: ACC {np.mean(accuracy):.2f}, lowest tasks {lowest}")


def _completed(values: dict, data_dir: str) -> dict:
  """Keys that came after the run was made, at their defaults."""
  for section, keys in (("", validate.KEYS), *validate.SECTIONS.items()):
    target = values[section] if section else values
    for name, key in keys.items():
      target.setdefault(name, key.default)
  return values | {"data_dir": data_dir}


if __name__ == "__main__":
  main()
