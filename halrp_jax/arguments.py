"""Reads command lines: flags and configs. Every mistake on them raises UserError."""

import argparse
import pathlib
import re
from collections.abc import Iterable
from typing import NoReturn

from absl import flags
from ml_collections import config_dict, config_flags

from halrp_jax import keys, methods
from halrp_jax.config import load_file
from halrp_jax.types import UserError, brief


def parse_config(
  argv: list[str],
  texts: dict[str, str],
  switches: dict[str, str],
  required: tuple[str, ...] = (),
  example: str = "",
) -> flags.FlagValues:
  """Reads a command line that may have a config.

  Args:
    argv: the command line, the program's name first.
    texts: the flags that take a value, {name: help text}.
    switches: the flags that take none, {name: help text}.
    required: names of the flags that must be given, except with --help.
    example: arguments of the verb that work, for the error message.

  Returns:
    The flags. `config` is locked but not yet checked (`config.resolve` does that); it is None if
    it is not given.

  Raises:
    UserError: if a flag or a config key is unknown, a required flag is missing, or the config file
      can't be loaded.
  """
  # config_flags expects the file before its keys
  argv = [argv[0], *sorted(argv[1:], key=lambda a: not re.match(r"--?config=", a))]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config",
    None,
    "config file, as FILE.py, FILE.py:METHOD or FILE.py:METHOD,KEY=VALUE",
    flag_values=values,
    sys_argv=argv,
  )
  values["config"].parser = _ConfigParser()
  for name, text in texts.items():
    flags.DEFINE_string(name, "", text, flag_values=values)
  for name, text in switches.items():
    flags.DEFINE_boolean(name, False, text, flag_values=values)
  _check_key_names(argv)
  try:
    rest = values(argv)[1:]
    if values.config is not None:
      values.config.to_dict()  # resolves references between keys, which a flag can break
  except UserError:
    raise
  except Exception as e:  # absl and config_flags can raise anything
    file = next((a for a in argv if re.match(r"--?config=", a)), "arguments")
    raise UserError(f"{file}: {e}") from e
  if rest:
    raise UserError(f"arguments: {rest[0]!r} is not a flag; flags start with --")
  missing = [f"--{name}" for name in required if not getattr(values, name)]
  if missing and not values.help:
    text = f"the following arguments are required: {', '.join(missing)}"  # as in argparse
    raise UserError(f"{argv[0]}: {text}{_for_example(argv[0], example)}")
  return values


def load_config(
  file: str, method: str = "", overrides: Iterable[str] = ()
) -> config_dict.ConfigDict:
  """Loads a config file; the result is not yet checked (`config.resolve`).

  Args:
    file: path of the config file. If there is no configs/X.py in the current folder, the one that
      is installed with the package is loaded.
    method: METHOD or METHOD,KEY=VALUE, the text after the colon on a command line; "": none.
    overrides: arguments --config.KEY=VALUE.

  Raises:
    UserError: as `parse_config`.
  """
  name = f"{file}:{method}" if method else file
  return parse_config(["sweep", f"--config={name}", *overrides], {}, {}).config


def configs_folder() -> pathlib.Path:
  """Returns the folder configs/ of the installed package or of its source tree."""
  package = pathlib.Path(__file__).parent
  folders = (package / "configs", package.parent / "configs")
  return next((folder for folder in folders if folder.is_dir()), folders[0])


class _ConfigParser(flags.ArgumentParser):
  """Parses FILE.py:ARGUMENT by calling get_config(ARGUMENT) of the file.

  It replaces the parser of ml_collections 1.1, which loads files with `load_module`, a function
  that Python 3.15 drops, and which does not find installed configs.
  """

  def parse(self, argument: str) -> config_dict.ConfigDict:
    """Loads the config file and returns its locked config.

    Raises:
      UserError: if the file is missing, raises an error, or does not return a config.
    """
    file, *method = argument.split(":", 1)
    path = _find_config(file)
    try:
      module = load_file(path)
      if not hasattr(module, "get_config"):
        raise UserError(f"--config={file}: the file defines no function get_config")
      config = module.get_config(*method)
    except UserError:
      raise
    except Exception as e:  # the user's own file can raise anything
      raise UserError(f"--config={argument}: {type(e).__name__}: {brief(e)}") from e
    if not isinstance(config, config_dict.ConfigDict):
      kind = type(config).__name__
      raise UserError(f"--config={argument}: get_config() must return a ConfigDict, got {kind}")
    config.lock()
    return config


def _find_config(file: str) -> pathlib.Path:
  """Returns the path of a config file; configs/X.py can be one that is installed with the package.

  Raises:
    UserError: if there is no such file.
  """
  path = pathlib.Path(file)
  if path.is_file():
    return path
  if path.parent != pathlib.Path("configs"):
    raise UserError(f"--config={file}: no such file")
  installed = configs_folder() / path.name
  if installed.is_file():
    return installed
  hint = keys.nearest(path.name, sorted(p.name for p in installed.parent.glob("*.py")))
  raise UserError(
    f"--config={file}: no such file here, and no config of this name is installed{hint}"
  )


def _check_key_names(argv: list[str]) -> None:
  """Raises UserError for an unknown key; the message of config_flags would not name it clearly."""
  arguments = (a.rpartition(":")[2] for a in argv if re.match(r"--?config=.*:", a))
  name = next(arguments, "").partition(",")[0]  # cut off the keys that follow the method
  known_methods = [methods.METHODS[name]] if name in methods.METHODS else methods.METHODS.values()
  known = {"method.name"}.union(*(keys.keys_of(m.Config) for m in known_methods))
  for arg in argv:
    key = re.match(r"--?(?:no)?config\.([^=]*)", arg)
    if key and key[1] not in known:
      raise UserError(f"--config.{key[1]} is not a config key{keys.nearest(key[1], known)}")


def _for_example(verb: str, example: str) -> str:
  """Returns the end of an error message: a command line that works, or ""."""
  return f"; for example: python -m halrp_jax {verb} {example}" if example else ""


class _Parser(argparse.ArgumentParser):
  """An argparse parser that raises UserError, with an example of a command line that works."""

  example = ""

  def error(self, message: str) -> NoReturn:
    """Raises UserError with argparse's message."""
    raise UserError(f"{self.prog}: {message}{_for_example(self.prog, self.example)}")


def parser(verb: str, doc: str | None, example: str = "") -> argparse.ArgumentParser:
  """Returns an argparse parser that raises UserError, for a verb that takes no config.

  Args:
    verb: name of the verb.
    doc: docstring of the verb's module, the description in --help.
    example: arguments of the verb that work, for the error messages.
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
  """Returns a required argument unchanged.

  Raises:
    argparse.ArgumentTypeError: if it is empty, as an unset shell variable makes it.
  """
  if not text:
    raise argparse.ArgumentTypeError("a value is missing")
  return text
