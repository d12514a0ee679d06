"""Learns many runs, a folder each: several methods, orders and seeds.

  python -m halrp_jax sweep --config=FILE --methods=M,M --orders=all --seeds=0,1 --workdir=DIR
  python -m halrp_jax sweep --config=configs/cifar100_split.py --config.data_dir=DIR \\
      --methods=halrp,stl --orders=all --seeds=0,1,2 --workdir=runs/split
  python -m halrp_jax sweep ... --shard=$SLURM_ARRAY_TASK_ID/8

With --vectorize all orders and seeds of a method are one program with a leading axis, shared out
over the devices. It is for accelerators that one small run leaves idle, and holds all runs at once;
on a CPU it is no faster (docs/speed.md).

Every cell is a run of its own, DIR/METHOD_ORDER_SEED; a second start goes on where the first was
stopped, finished cells are left as they are; one whose data or JAX flags have changed since fails.
A cell in which another sweep is at work is looked at again at the end and is no failure. Any
--config.KEY=VALUE holds for all cells. What stands after the colon of an ablation's config is named
in --methods too. Exit codes: 0 all done, 1 a cell failed (the others are done), 2 a mistake, 75
stopped by SIGTERM or SIGINT.
"""

import sys

from halrp_jax import arguments
from halrp_jax.commands import terminal
from halrp_jax.devices import compile_cache, stop
from halrp_jax.runs import sweep
from halrp_jax.types import Stopped

_FLAGS = {
  "methods": "with commas; default: the one after the config's colon",
  "orders": "with commas, or all; default: the config's",
  "seeds": "with commas; default: the config's",
  "shard": "i/n: every n-th cell from the i-th on, i from 0 to n - 1",
  "workdir": "folder for the cells' folders",
  "compile_cache": "as in halrp_jax.main",
}
_SWITCHES = {
  "vectorize": "learn the orders and seeds of a method at once, as one program",
  "help": "show this text",
}

_EXAMPLE = "--config=configs/digits.py --methods=halrp,stl --seeds=0,1 --workdir=runs/sweep"


def main(argv: list[str]) -> int:
  """Runs the cells that are not finished; prints what became of them."""
  required = ("config", "workdir")
  args = arguments.parse_config(["sweep", *argv], _FLAGS, _SWITCHES, required, _EXAMPLE)
  if args.help:
    print(__doc__)
    return 0
  configs = _configs(argv, args.methods) or {args.config.method.name: args.config}
  cells = sweep.shard(sweep.cells(configs, args.orders, args.seeds), args.shard)
  compile_cache.use(args.compile_cache)
  stop_asked = stop.listen()
  try:
    with terminal.live_sweep(sys.stdout) as show:
      rows = sweep.run(cells, args.workdir, show, stop_asked, args.vectorize)
  except Stopped:
    print(f"stopped; the same command goes on from {args.workdir}", file=sys.stderr)
    return stop.EXIT_CODE
  print(terminal.sweep_text(rows))
  return int(sweep.failed(rows))


def _configs(argv: list[str], methods: str) -> dict[str, object]:
  """One config per name in --methods, each with all --config.KEY=VALUE of the command line."""
  named = next(a for a in argv if a.lstrip("-").startswith("config="))
  file = named.partition("=")[2].partition(":")[0]
  overrides = [a for a in argv if a.lstrip("-").startswith(("config.", "noconfig."))]
  names = [name for name in methods.split(",") if name]
  return {name: arguments.load_config(file, name, overrides) for name in names}
