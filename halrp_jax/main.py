r"""Learns the tasks of a benchmark one after another.

  python -m halrp_jax.main --config=configs/digits.py --workdir=runs/digits-halrp
  python -m halrp_jax.main --config=configs/digits.py:stl --workdir=runs/digits-stl
  python -m halrp_jax.main --config=configs/cifar100_split.py --config.data_dir=DIR \
      --config.order=B --config.train_fraction=0.05 --dry_run
  python -m halrp_jax.main --list

The method stands after the colon of --config (default: halrp). Values of its keys may follow, as in
configs/digits.py:halrp,variant=published,alpha=0.75. Any key of the config can be set with
--config.KEY=VALUE. An interrupted run resumes with the same command.

Exit codes: 0 done; 1 the loss became NaN or infinite; 2 a mistake in config, data, arguments or
environment, described on one line; 75 stopped by SIGTERM or SIGINT, or because another process of
the run ended (134 if JAX noticed this first); 141 the output was closed.
"""

import sys
from collections.abc import Callable

from halrp_jax.commands import program
from halrp_jax.devices import allocator, environment, stop

if __name__ == "__main__":  # before jax is imported
  if "--version" in sys.argv[1:]:
    program.prepare()
    sys.exit(program.run(lambda: print(program.version()) or 0))
  allocator.tune()
  environment.prepare()
  stop_asked = stop.listen()


from halrp_jax import arguments, data, methods, models
from halrp_jax.commands import terminal
from halrp_jax.config import resolve
from halrp_jax.devices import compile_cache, determinism, processes
from halrp_jax.runs import experiment
from halrp_jax.types import Diverged, Stopped, UserError, one_line

FLAGS = {
  "workdir": "folder of the run: record.json, checkpoints and more",
  "compile_cache": "folder for compiled programs, or off; default: halrp_jax in $XDG_CACHE_HOME or "
  "~/.cache",
  "coordinator": "HOST:PORT of process 0, if several processes compute one run; auto: ask Cloud "
  "TPU, Slurm or Open MPI",
  "num_processes": "number of processes, with --coordinator",
  "process_id": "number of this process, from 0, with --coordinator",
}
SWITCHES = {
  "list": "list the benchmarks, networks and methods",
  "dry_run": "show what would be done, without training",
  "download": "download the original data files that are missing in data_dir",
  "overwrite": "delete the run in workdir and start again",
  "version": "print the version",
  "help": "show this text and all config keys",
}


def main(argv: list[str], stop_asked: Callable[[], bool] = lambda: False) -> int:
  """Runs the command line and returns the exit code.

  Args:
    argv: the command line, the program's name first.
    stop_asked: returns True as soon as the run is to stop (see `experiment.run`).
  """
  return program.run(lambda: _main(argv, stop_asked))


def _main(argv: list[str], stop_asked: Callable[[], bool]) -> int:
  """Runs the command line as `main` does, but raises errors instead of printing them."""
  args = arguments.parse_config(argv, FLAGS, SWITCHES)
  try:
    if args.help:
      print(terminal.help_text(__doc__ or "", args.get_help(), methods.METHODS))
    elif args.version:
      print(program.version())
    elif args.list:
      print(terminal.list_text(data.BENCHMARKS, models.NETWORKS, methods.METHODS))
    elif args.config is None:
      raise UserError("--config is missing; for example --config=configs/digits.py (or use --list)")
    elif args.dry_run:
      print(terminal.plan_text(experiment.plan(args.config)))
    elif not args.workdir:
      raise UserError(
        "--workdir, the folder for the results, is missing; for example --workdir=runs/digits"
      )
    else:
      config = resolve(args.config)
      if args.download:  # before the processes connect, because no process may wait long then
        data.download(config, print)
      if args.coordinator and config.deterministic:
        determinism.require()  # before `start`, which may initialise the backend
      processes.start(args.coordinator, args.num_processes, args.process_id)
      compile_cache.use(args.compile_cache)
      with terminal.live_display(sys.stdout if processes.is_leader() else None) as show:
        record = experiment.run(args.config, args.workdir, show, args.overwrite, stop_asked)
      if processes.is_leader():
        print(terminal.record_text(record, args.workdir))
  except Diverged as e:
    print(f"error: {one_line(e)}", file=sys.stderr)
    return 1
  except Stopped:
    same = "the same command without --overwrite" if args.overwrite else "the same command"
    print(f"stopped; {same} resumes from {args.workdir}", file=sys.stderr)
    return stop.EXIT_CODE
  return 0


if __name__ == "__main__":
  program.prepare()
  sys.exit(processes.run_to_end(lambda: main(sys.argv, stop_asked)))
