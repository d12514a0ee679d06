"""Runs a verb: python -m halrp_jax VERB (halrp_jax/commands/). Lists them without importing JAX."""

import sys

from halrp_jax import commands
from halrp_jax.commands import COMMANDS, program
from halrp_jax.devices import allocator
from halrp_jax.keys import nearest
from halrp_jax.types import UserError

_USAGE = """\
halrp VERB ...                       one of the verbs below; VERB --help says more
halrp --version                      prints the version
python -m halrp_jax VERB ...         the same as halrp VERB ...
python -m halrp_jax.main --help      learns a run
"""


def main(argv: list[str]) -> int:
  """Runs one verb; returns the exit code."""
  return program.run(lambda: _main(argv))


def _main(argv: list[str]) -> int:
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
  return commands.load(verb).main(arguments)


def script() -> int:
  """Runs the verb of this process's command line, as `halrp` and `python -m halrp_jax` do."""
  allocator.tune()  # JAX is not imported yet: the module of the verb does that
  program.prepare()
  return main(sys.argv)


if __name__ == "__main__":
  sys.exit(script())
