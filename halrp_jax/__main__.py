"""python -m halrp_jax VERB ...: see halrp_jax/commands/."""

import sys

from halrp_jax import allocator

if __name__ == "__main__":  # before jax is imported
  allocator.tune()

from halrp_jax import arguments
from halrp_jax.commands import COMMANDS
from halrp_jax.types import UserError


def main(argv: list[str]) -> int:
  """Runs one verb; returns the exit code."""
  verb, *arguments = argv[1:] or [""]
  try:
    if verb not in COMMANDS:
      known = "\n".join(f"  {n:<12}{c.__doc__.splitlines()[0]}" for n, c in COMMANDS.items())
      if verb in ("--help", "-h"):
        print(f"{__doc__}\n\n{known}")
        return 0
      raise UserError(f"unknown verb {verb!r}; known: {', '.join(COMMANDS)}")
    return COMMANDS[verb].main(arguments)
  except UserError as e:
    print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  arguments.plain_warnings()
  sys.exit(main(sys.argv))
