"""The verbs of `python -m halrp_jax VERB`: one module each with `main(arguments) -> exit code`."""

from halrp_jax.commands import check_data, compare, doctor, tune

COMMANDS = {"compare": compare, "check_data": check_data, "doctor": doctor, "tune": tune}
