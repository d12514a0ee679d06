"""Runs one verb: python -m halrp_jax VERB. Lists the verbs without importing JAX."""

import sys

from halrp_jax.devices import allocator

if __name__ == "__main__":  # before jax is imported
  allocator.tune()


from halrp_jax import commands
from halrp_jax.commands import COMMANDS, program
from halrp_jax.keys import nearest
from halrp_jax.types import UserError

_USAGE = """\
python -m halrp_jax VERB ...         runs one of the verbs below; VERB --help explains it
python -m halrp_jax --version        prints the version
python -m halrp_jax.main --help      explains how to train: learns the tasks of a benchmark
"""


def main(argv: list[str]) -> int:
  """Runs one verb and returns the exit code. `argv` begins with the program's name."""
  return program.run(lambda: _main(argv))


def _main(argv: list[str]) -> int:
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
  return commands.load(verb).main(arguments)


if __name__ == "__main__":
  program.prepare()
  sys.exit(main(sys.argv))
