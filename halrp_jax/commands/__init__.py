"""The verbs of `python -m halrp_jax VERB`: one module each with `main(arguments) -> exit code`."""

from halrp_jax.commands import compare

COMMANDS = {"compare": compare}
