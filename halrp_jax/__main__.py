"""python -m halrp_jax VERB ...: see halrp_jax/commands/."""

import sys

from halrp_jax.devices import allocator

if __name__ == "__main__":  # before jax is imported
  allocator.tune()


from halrp_jax.commands import COMMANDS, program
from halrp_jax.types import UserError


def main(argv: list[str]) -> int:
  """Runs one verb; returns the exit code."""
  return program.run(lambda: _main(argv))


def _main(argv: list[str]) -> int:
  verb, *arguments = argv[1:] or [""]
  if verb in ("--help", "-h"):
    print(f"{__doc__}\n")
    for name, command in COMMANDS.items():
      summary, *_ = (command.__doc__ or "").splitlines() or [""]  # python -OO has none
      print(f"  {name:<12}{summary}")
    return 0
  if verb not in COMMANDS:
    raise UserError(f"unknown verb {verb!r}; known: {', '.join(COMMANDS)}")
  return COMMANDS[verb].main(arguments)


if __name__ == "__main__":
  program.prepare()
  sys.exit(main(sys.argv))
