"""Command lines -> flags and config. Every mistake is a UserError."""

import argparse
import importlib.machinery
import importlib.util
import pathlib
import re
import sys
from collections.abc import Iterable
from types import ModuleType

from absl import flags
from ml_collections import config_dict, config_flags

from halrp_jax import keys, methods
from halrp_jax.types import UserError, brief


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
  values["config"].parser = _ConfigParser()
  for name, text in texts.items():
    flags.DEFINE_string(name, "", text, flag_values=values)
  for name, text in switches.items():
    flags.DEFINE_boolean(name, False, text, flag_values=values)
  _check_key_names(argv)
  try:
    rest = values(argv)[1:]
  except UserError:
    raise
  except Exception as e:  # absl and config_flags raise whatever they like
    file = next((a for a in argv if re.match(r"--?config=", a)), "arguments")
    raise UserError(f"{file}: {e}") from e
  if rest:
    raise UserError(f"arguments: {rest[0]!r} is not a flag; flags start with --")
  missing = [f"--{name}" for name in required if not getattr(values, name)]
  if missing and not values.help:
    text = f"the following arguments are required: {', '.join(missing)}"  # argparse's words
    raise UserError(f"{argv[0]}: {text}{_for_example(argv[0], example)}")
  return values


def load_config(
  file: str, method: str = "", overrides: Iterable[str] = ()
) -> config_dict.ConfigDict:
  """Loads the config of a file.

  Args:
    file: its path. A configs/X.py that is not in the current folder is the one installed with us.
    method: what stands after the colon.
    overrides: as on a command line, --config.KEY=VALUE.
  """
  name = f"{file}:{method}" if method else file
  return parse_config(["sweep", f"--config={name}", *overrides], {}, {}).config


def configs_folder() -> pathlib.Path:
  """Returns the folder configs/ of the package, if it is installed, or of its source tree."""
  package = pathlib.Path(__file__).parent
  folders = (package / "configs", package.parent / "configs")
  return next((folder for folder in folders if folder.is_dir()), folders[0])


class _ConfigParser(flags.ArgumentParser):
  """Parser of FILE.py:ARGUMENT: calls get_config(ARGUMENT) of the file.

  The one of ml_collections 1.1 loads files with `load_module`, which Python 3.15 drops, and knows
  no installed configs.
  """

  def parse(self, argument: str) -> config_dict.ConfigDict:
    """Returns the config, locked.

    Raises:
      UserError: if the file is missing, or fails, or makes no config.
    """
    file, *method = argument.split(":", 1)
    path = _find_config(file)
    try:
      module = _load(path)
      if not hasattr(module, "get_config"):
        raise UserError(f"--config={file}: the file defines no function get_config")
      config = module.get_config(*method)
    except UserError:
      raise
    except Exception as e:  # the file is the user's own
      raise UserError(f"--config={argument}: {type(e).__name__}: {brief(e)}") from e
    if not isinstance(config, config_dict.ConfigDict):
      kind = type(config).__name__
      raise UserError(f"--config={argument}: get_config() must return a ConfigDict, got {kind}")
    config.lock()
    return config


def _find_config(file: str) -> pathlib.Path:
  """Returns the path of a config file; configs/X.py may also be one that is installed with us.

  Raises:
    UserError: if there is neither.
  """
  path = pathlib.Path(file)
  if path.is_file():
    return path
  if path.parent != pathlib.Path("configs"):
    raise UserError(f"--config={file}: no such file")
  installed = configs_folder() / path.name
  if installed.is_file():
    return installed
  hint = keys.nearest(path.stem, sorted(p.stem for p in installed.parent.glob("*.py")))
  raise UserError(
    f"--config={file}: no such file here, and no config of this name is installed{hint}"
  )


def _load(path: pathlib.Path) -> ModuleType:
  """Executes a Python file and returns it as a module."""
  name = "config_file"
  loader = importlib.machinery.SourceFileLoader(name, str(path))  # whatever the file's suffix
  spec = importlib.util.spec_from_loader(name, loader)
  assert spec is not None  # it is None for names alone
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # where dataclasses of the file look for their module
  loader.exec_module(module)
  return module


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
