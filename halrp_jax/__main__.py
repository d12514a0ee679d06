"""Runs one verb: python -m halrp_jax VERB. Lists the verbs without importing JAX."""

import sys
from collections.abc import Callable

from halrp_jax import commands
from halrp_jax.commands import COMMANDS, STOPPABLE, program
from halrp_jax.devices import allocator, environment, stop
from halrp_jax.keys import nearest
from halrp_jax.types import UserError

_USAGE = """\
halrp VERB ...                       runs one of the verbs below; VERB --help explains it
halrp --version                      prints the version
python -m halrp_jax VERB ...         the same as halrp VERB ...
python -m halrp_jax.main --help      explains how to train: learns the tasks of a benchmark
"""


def main(argv: list[str], stop_asked: Callable[[], bool] = lambda: False) -> int:
  """Runs one verb and returns the exit code.

  Args:
    argv: the command line, which begins with the program's name.
    stop_asked: is asked by verbs that can stop and resume (`commands.STOPPABLE`).
  """
  return program.run(lambda: _main(argv, stop_asked))


def _main(argv: list[str], stop_asked: Callable[[], bool]) -> int:
  """Runs the command line as `main` does, but raises errors instead of printing them."""
  verb, *arguments = argv[1:] or ["--help"]
  if verb in ("--help", "-h"):
    print(_USAGE)
    for name, summary in COMMANDS.items():
      print(f"  {name:<12}{summary}")
    return 0
  if verb == "--version":
    print(program.version())
    return 0
  if verb not in COMMANDS:
    known = ", ".join(COMMANDS)
    raise UserError(f"unknown verb {verb!r}{nearest(verb, COMMANDS)}; known: {known}")
  if verb in STOPPABLE:
    return commands.load(verb).main(arguments, stop_asked)
  return commands.load(verb).main(arguments)


def script() -> int:
  """Runs the verb of this process's command line, as `halrp` and `python -m halrp_jax` do."""
  # All come before the module of the verb imports NumPy and JAX, whose threads inherit the mask of
  # signals: a thread that does not block SIGTERM would end the process.
  allocator.tune()
  environment.prepare()
  stop_asked = stop.listen() if STOPPABLE.intersection(sys.argv[1:2]) else lambda: False
  program.prepare()
  return main(sys.argv, stop_asked)


if __name__ == "__main__":
  sys.exit(script())
