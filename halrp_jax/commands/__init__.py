"""The verbs of `python -m halrp_jax VERB`: one module each with `main(arguments) -> exit code`."""

from halrp_jax.commands import check_data, compare, doctor, sweep, tune

COMMANDS = {
  "compare": compare,
  "sweep": sweep,
  "tune": tune,
  "check_data": check_data,
  "doctor": doctor,
}
