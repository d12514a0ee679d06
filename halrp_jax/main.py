"""Learns the tasks of a benchmark one after another.

  python -m halrp_jax.main --config=configs/digits.py --workdir=runs/digits-halrp
  python -m halrp_jax.main --config=configs/digits.py:stl --workdir=runs/digits-stl
  python -m halrp_jax.main --config=configs/cifar100_split.py --config.data_dir=DIR \\
      --config.order=B --config.train_fraction=0.05 --dry_run
  python -m halrp_jax.main --list

The method stands after the colon (default: halrp). Any key of the config can be set with
--config.KEY=VALUE. A run that was interrupted goes on with the same command. Exit codes: 0 done,
1 the loss is no number, 2 a mistake in config, data or arguments (one line), 75 stopped by SIGTERM
or SIGINT.
"""

import re
import sys

from halrp_jax import allocator, stop

if __name__ == "__main__":  # before jax is imported
  allocator.tune()
  stop_asked = stop.listen()

from absl import flags
from ml_collections import config_flags

from halrp_jax import compile_cache, data, experiment, methods, models, report, validate
from halrp_jax.types import Diverged, Stopped, UserError


def _parse(argv: list[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", None, "FILE.py or FILE.py:METHOD", flag_values=values, sys_argv=argv
  )
  flags.DEFINE_string("workdir", None, "folder for record.json and more", flag_values=values)
  flags.DEFINE_string(
    "compile_cache",
    "",
    "folder for compiled programs, or off; default: halrp_jax in $XDG_CACHE_HOME or ~/.cache",
    flag_values=values,
  )
  for name, text in (
    ("list", "name the benchmarks, networks and methods"),
    ("dry_run", "show what would be done; train nothing"),
    ("download", "fetch the original data files that data_dir lacks"),
    ("overwrite", "delete the run that is in workdir and start anew"),
    ("help", "show this text and all config keys"),
  ):
    flags.DEFINE_boolean(name, False, text, flag_values=values)
  _check_key_names(argv)
  try:
    rest = values(argv)[1:]
    if values.config is not None:
      values.config.to_dict()  # config_flags keeps the error of a bad file until it is used
  except UserError:
    raise
  except Exception as e:  # absl, config_flags and the user's own file raise whatever they like
    file = next((a for a in argv if re.match(r"--?config=", a)), "arguments")
    raise UserError(f"{file}: {str(e).rpartition('failure to load: ')[2]}") from e
  if rest:
    raise UserError(f"arguments: {rest[0]!r} is not a flag; flags start with --")
  return values


def _check_key_names(argv: list[str]) -> None:
  """config_flags names an unknown key badly, so look first."""
  name = next((a.rpartition(":")[2] for a in argv if re.match(r"--?config=.*:", a)), None)
  chosen = [methods.METHODS[name]] if name in methods.METHODS else methods.METHODS.values()
  known = {"method.name"}.union(*(validate.keys_of(m.KEYS) for m in chosen))
  for arg in argv:
    key = re.match(r"--?(?:no)?config\.([^=]*)", arg)
    if key and key[1] not in known:
      raise UserError(f"--config.{key[1]} is not a config key{validate.nearest(key[1], known)}")


def main(argv: list[str], stop_asked=lambda: False) -> int:
  """Runs the command line; returns the exit code. `stop_asked`: see `experiment.run`."""
  try:
    args = _parse(argv)
    if args.help:
      print(report.help_text(__doc__, args.get_help(), methods.METHODS))
    elif args.list:
      print(report.list_text(data.BENCHMARKS, models.NETWORKS, methods.METHODS))
    elif args.config is None:
      raise UserError("--config is missing: for example --config=configs/digits.py (or --list)")
    elif args.dry_run:
      print(report.plan_text(experiment.plan(args.config)))
    elif not args.workdir:
      raise UserError("--workdir is missing: the folder for the results, for example runs/digits")
    else:
      if args.download:
        data.download(experiment.resolve(args.config), print)
      compile_cache.use(args.compile_cache)
      with report.live_display(sys.stdout) as show:
        record = experiment.run(args.config, args.workdir, show, args.overwrite, stop_asked)
      print(report.record_text(record, args.workdir))
  except UserError as e:
    print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
    return 2
  except Diverged as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  except Stopped:
    print(f"stopped; the same command goes on from {args.workdir}", file=sys.stderr)
    return stop.EXIT_CODE
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv, stop_asked))
