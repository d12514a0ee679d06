"""Counts the bytes that a training step sends between devices.

  python benchmarks/collectives.py --data_dir=DIR [--devices=4]

HALRP learns two tasks of CIFAR100-Split on several virtual devices of this CPU. For each compiled
training program the script prints the bytes that one step reduces over the devices. The first task
and the warm-up train the whole network; fine-tuning trains the perturbation.
"""

import argparse
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u8": 1, "pred": 1}
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute)\(")


def compiled_programs(data_dir: str, num_devices: int, folder: pathlib.Path) -> list[pathlib.Path]:
  """Trains and returns the files with the compiled training programs."""
  flags = f"--xla_force_host_platform_device_count={num_devices}"
  command = [sys.executable, "-m", "halrp_jax.main", "--config=configs/cifar100_split.py"]
  keys = {"data_dir": data_dir, "order": "0,1", "train_fraction": 0.05, "epochs": 2}
  subprocess.run(
    [
      *command,
      *(f"--config.{k}={v}" for k, v in keys.items()),
      f"--workdir={folder / 'run'}",
      "--compile_cache=off",
    ],
    check=True,
    stdout=subprocess.DEVNULL,
    env=os.environ | {"XLA_FLAGS": f"{flags} --xla_dump_to={folder} --xla_dump_hlo_as_text"},
  )
  return sorted(folder.glob("*many_steps*after_optimizations.txt"))


def sent(program: pathlib.Path) -> dict[str, int]:
  """Returns the bytes of the results of each kind of collective operation in a program."""
  total = {}
  for shapes, kind in _COLLECTIVE.findall(program.read_text(encoding="utf-8")):
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
      size = math.prod(map(int, filter(None, sizes.split(","))))
      total[kind] = total.get(kind, 0) + _BYTES[dtype] * size
  return total


def main() -> None:
  """Prints a line for each training program."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--devices", type=int, default=4)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    for program in compiled_programs(args.data_dir, args.devices, pathlib.Path(folder)):
      print(program.name.split(".")[0], sent(program))


if __name__ == "__main__":
  main()
