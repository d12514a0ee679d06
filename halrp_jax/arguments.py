"""Command lines -> flags and config. Every mistake is a UserError."""

import argparse
import re
from collections.abc import Iterable

from absl import flags
from ml_collections import config_flags

from halrp_jax import keys, methods
from halrp_jax.types import UserError


def parse_config(
  argv: list[str],
  texts: dict[str, str],
  switches: dict[str, str],
  required: tuple[str, ...] = (),
  example: str = "",
) -> flags.FlagValues:
  """Flags of a command line with a config.

  Args:
    argv: program name first.
    texts: flags with a value: name -> help.
    switches: flags without: name -> help.
    required: flags that must be given, unless --help is.
    example: what stands after the verb in a command line that works, for the error message.

  Returns:
    The flags; `config` is locked and not yet checked (`config.resolve`), None if not given.
  """
  # config_flags wants the file before its keys
  argv = [argv[0], *sorted(argv[1:], key=lambda a: not re.match(r"--?config=", a))]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config",
    None,
    "FILE.py, FILE.py:METHOD or FILE.py:METHOD,KEY=VALUE",
    flag_values=values,
    sys_argv=argv,
  )
  for name, text in texts.items():
    flags.DEFINE_string(name, "", text, flag_values=values)
  for name, text in switches.items():
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
  missing = [f"--{name}" for name in required if not getattr(values, name)]
  if missing and not values.help:
    text = f"the following arguments are required: {', '.join(missing)}"  # argparse's words
    raise UserError(f"{argv[0]}: {text}{_for_example(argv[0], example)}")
  return values


def load_config(file: str, method: str = "", overrides: Iterable[str] = ()):
  """Loads the config of a file.

  Args:
    file: its path.
    method: what stands after the colon.
    overrides: as on a command line, --config.KEY=VALUE.
  """
  name = f"{file}:{method}" if method else file
  return parse_config(["sweep", f"--config={name}", *overrides], {}, {}).config


def _check_key_names(argv: list[str]) -> None:
  """Raises UserError for an unknown key, which config_flags would not name well."""
  arguments = (a.rpartition(":")[2] for a in argv if re.match(r"--?config=.*:", a))
  name = next(arguments, "").partition(",")[0]  # keys may follow the method
  known_methods = [methods.METHODS[name]] if name in methods.METHODS else methods.METHODS.values()
  known = {"method.name"}.union(*(keys.keys_of(m.Config) for m in known_methods))
  for arg in argv:
    key = re.match(r"--?(?:no)?config\.([^=]*)", arg)
    if key and key[1] not in known:
      raise UserError(f"--config.{key[1]} is not a config key{keys.nearest(key[1], known)}")


def _for_example(verb: str, example: str) -> str:
  return f"; for example: python -m halrp_jax {verb} {example}" if example else ""


class _Parser(argparse.ArgumentParser):
  example = ""

  def error(self, message):
    raise UserError(f"{self.prog}: {message}{_for_example(self.prog, self.example)}")


def parser(verb: str, doc: str | None, example: str = "") -> argparse.ArgumentParser:
  """Returns an argparse parser whose mistakes are UserErrors, for the verbs without a config.

  Args:
    verb: its name.
    doc: its module's docstring.
    example: what stands after the verb in a command line that works, for the error messages.
  """
  made = _Parser(
    prog=verb,
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  made.example = example
  return made


def filled(text: str) -> str:
  """Returns the text of a required argument; an empty one, as of an unset variable, is refused."""
  if not text:
    raise argparse.ArgumentTypeError("a value is missing")
  return text
