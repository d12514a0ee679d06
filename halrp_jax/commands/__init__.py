"""The verbs of `python -m halrp_jax VERB`: one module each with `main(arguments) -> exit code`."""

from halrp_jax.commands import (
  check_data,
  compare,
  doctor,
  export,
  extend,
  predict,
  report,
  reproduce,
  sweep,
  tune,
)

COMMANDS = {
  "compare": compare,
  "sweep": sweep,
  "report": report,
  "reproduce": reproduce,
  "tune": tune,
  "extend": extend,
  "predict": predict,
  "export": export,
  "check_data": check_data,
  "doctor": doctor,
}
