r"""Learns many runs: several methods, orders and seeds, a folder for each run.

  python -m halrp_jax sweep --config=FILE --methods=M,M --orders=all --seeds=0,1 --workdir=DIR
  python -m halrp_jax sweep --config=configs/cifar100_split.py --config.data_dir=DIR \
      --methods=halrp,stl --orders=all --seeds=0,1,2 --workdir=runs/split
  python -m halrp_jax sweep ... --shard=$SLURM_ARRAY_TASK_ID/8

Each combination of method, order and seed is a cell: a run of its own in the folder
DIR/METHOD_ORDER_SEED. --methods takes whatever may stand after the colon of --config, also the
names of an ablation's variants. --config.KEY=VALUE holds for all cells.

If the sweep is stopped, the same command resumes it. Finished cells are not run again; they are
counted as "kept". A finished cell whose data or JAX flags have changed since then fails. A cell
that another process runs is tried once more at the end and does not count as a failure, so several
sweeps may work in one DIR; --shard divides the cells between them.

--vectorize learns all orders and seeds of a method at once, as one compiled program with an
additional leading axis that is sharded over the devices. It is meant for accelerators that one
small run leaves idle, and needs the memory of all these runs together; on a CPU it is no faster.

Exit codes: 0 all cells are done; 1 a cell failed (the others are done); 2 a mistake in config, data
or arguments; 75 stopped by SIGTERM or SIGINT.
"""

import sys
from collections.abc import Callable

from ml_collections import config_dict

from halrp_jax import arguments
from halrp_jax.commands import program, terminal
from halrp_jax.devices import compile_cache, stop
from halrp_jax.runs import sweep
from halrp_jax.types import Stopped

_FLAGS = {
  "methods": "names with commas; default: the one after the colon of --config",
  "orders": "names with commas, or all; default: as the config",
  "seeds": "numbers with commas; default: as the config",
  "shard": "i/n, with i from 0 to n - 1: run only every n-th cell, from cell i on",
  "workdir": "folder in which each cell gets a folder",
  "compile_cache": program.COMPILE_CACHE,
}
_SWITCHES = {
  "vectorize": "learn the orders and seeds of a method at once, as one compiled program",
  "help": "show this text",
}

_EXAMPLE = "--config=configs/digits.py --methods=halrp,stl --seeds=0,1 --workdir=runs/sweep"


def main(argv: list[str], stop_asked: Callable[[], bool] = lambda: False) -> int:
  """Runs the cells that are not finished, and prints how they ended."""
  required = ("config", "workdir")
  args = arguments.parse_config(["sweep", *argv], _FLAGS, _SWITCHES, required, _EXAMPLE)
  if args.help:
    print(terminal.verb_help_text(__doc__, _FLAGS | _SWITCHES))
    return 0
  configs = _configs(argv, args.methods) or {args.config.method.name: args.config}
  cells = sweep.shard(sweep.cells(configs, args.orders, args.seeds), args.shard)
  compile_cache.use(args.compile_cache)
  try:
    with terminal.live_sweep(sys.stdout) as show:
      rows = sweep.run(cells, args.workdir, show, stop_asked, args.vectorize)
  except Stopped:
    print(f"stopped; the same command resumes from {args.workdir}", file=sys.stderr)
    return stop.EXIT_CODE
  print(terminal.sweep_text(rows))
  return int(sweep.failed(rows))


def _configs(argv: list[str], methods: str) -> dict[str, config_dict.ConfigDict]:
  """Returns a config per name in --methods, with the --config.KEY=VALUE of the command line."""
  named = next(a for a in argv if a.lstrip("-").startswith("config="))
  file = named.partition("=")[2].partition(":")[0]
  overrides = [a for a in argv if a.lstrip("-").startswith(("config.", "noconfig."))]
  names = [name for name in methods.split(",") if name]
  return {name: arguments.load_config(file, name, overrides) for name in names}
