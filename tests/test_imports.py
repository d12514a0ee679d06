"""The plan of the code: folders are rooms, imports go strictly down, siblings stand alone."""

import ast
import functools
import inspect
import pathlib
import subprocess
import sys

import pytest

from halrp_jax import commands
from halrp_jax.commands import COMMANDS, STOPPABLE

PACKAGE = pathlib.Path(__file__).parents[1] / "halrp_jax"
# A room is a folder or a module at the top. It imports rooms of later lines alone.
ROOMS = (
  {"main", "__main__"},
  {"commands"},
  {"deploy"},
  {"runs"},
  {"arguments"},
  {"config"},
  {"methods"},
  {"training"},
  {"models", "weights"},
  {"nn"},
  {"devices"},
  {"data", "reports"},
  {"keys", "files", "packing", "metrics"},
  {"types"},
)
FLOOR = {name: i for i, names in enumerate(ROOMS) for name in names}
MOST_FLOORS = 12
MOST_AT_THE_TOP = 10
# folders whose files stand side by side, and those of them that the others may import
SIBLINGS = {
  "commands": {"program", "terminal"},
  "data": {
    *(
      "archives",
      "cache",
      "decoding",
      "folders",
      "formats",
      "mnist_family",
      "orders",
      "prepared",
      "residence",
      "sources",
      "tasks",
    ),
  },
  "methods": {"additive", "anchored", "branches", "dictionary", "rank_rules"},
  "models": set(),
}


def _modules():
  for path in sorted(PACKAGE.rglob("*.py")):
    yield path, path.relative_to(PACKAGE).with_suffix("").parts


def _imports(path):
  """Yields what a file imports of ours when it runs, as parts of dotted names."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  for_types = set()  # nodes below `if TYPE_CHECKING:`
  for block in ast.walk(tree):
    if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING":
      for_types.update(node for line in block.body for node in ast.walk(line))
  for node in ast.walk(tree):
    if node in for_types:
      continue
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "halrp_jax":
      parts = node.module.split(".")[1:]
      for alias in node.names:
        is_module = not parts or (PACKAGE.joinpath(*parts) / f"{alias.name}.py").exists()
        yield tuple([*parts, alias.name] if is_module else parts)
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith("halrp_jax."):
          yield tuple(alias.name.split(".")[1:])


def _arrows() -> dict[str, set[str]]:
  """Returns the rooms that each room imports."""
  found = {name: set() for name in FLOOR}
  for path, parts in _modules():
    if parts[0] != "__init__":
      found[parts[0]] |= {target[0] for target in _imports(path)} - {parts[0]}
  return found


def test_every_room_has_a_floor():
  names = {parts[0] for _, parts in _modules()} - {"__init__"}
  assert names == FLOOR.keys()


def test_imports_go_down():
  for path, parts in _modules():
    for target in _imports(path) if parts[0] != "__init__" else ():
      if target[0] != parts[0]:
        assert FLOOR[target[0]] > FLOOR[parts[0]], f"{path} imports {'.'.join(target)}"


def test_the_longest_chain_of_imports():
  arrows = _arrows()

  @functools.cache
  def chain(name):
    return [name, *max(map(chain, arrows[name]), key=len, default=[])]

  longest = max(map(chain, arrows), key=len)
  assert len(longest) <= MOST_FLOORS, " > ".join(longest)


def test_few_modules_are_at_the_top():
  assert len(list(PACKAGE.glob("*.py"))) <= MOST_AT_THE_TOP


def test_siblings_do_not_import_one_another():
  for path, parts in _modules():
    if len(parts) < 2 or parts[-1] == "__init__" or parts[0] not in SIBLINGS:
      continue
    for target in _imports(path):
      if target[0] == parts[0] and len(target) > 1:
        assert target[1] in SIBLINGS[parts[0]], f"{path} imports {'.'.join(target)}"


def test_inside_a_folder_there_is_no_circle():
  """Also where a module is imported inside a function."""
  arrows = {}
  for path, parts in _modules():
    arrows[parts] = {t for t in _imports(path) if t[0] == parts[0] and t != parts}
  done = set()
  while ready := {
    m for m, to in arrows.items() if m not in done and not (to & arrows.keys()) - done
  }:
    done |= ready
  assert not arrows.keys() - done


def test_reports_know_metrics_and_types_alone():
  for path, parts in _modules():
    if parts[0] == "reports":
      assert {target[0] for target in _imports(path)} <= {"reports", "metrics", "types"}, path


@pytest.mark.parametrize(
  ("program", "arguments"),
  [("halrp_jax", ["doctor", "--help"]), ("halrp_jax", ["--help"]), ("halrp_jax.main", ["--help"])],
)
def test_the_allocator_is_tuned_before_jax_is_loaded(program, arguments):
  code = f"""
import runpy, sys
from halrp_jax.devices import allocator
allocator.tune = lambda: sys.exit(print("jax" in sys.modules))
sys.argv = ["program", *{arguments}]
runpy.run_module({program!r}, run_name="__main__")
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
  ("program", "arguments"),
  [("halrp_jax.main", ["--help"]), *(("halrp_jax", [v, "--help"]) for v in sorted(STOPPABLE))],
)
def test_signals_are_taken_over_before_any_library_starts_a_thread(program, arguments):
  """The system gives a signal to any thread that does not block it, as NumPy's would not."""
  code = f"""
import os, runpy, sys
from halrp_jax.devices import stop
stop.listen = lambda: sys.exit(print(len(os.listdir("/proc/self/task")), "numpy" in sys.modules))
sys.argv = ["program", *{arguments}]
runpy.run_module({program!r}, run_name="__main__")
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout == "1 False\n", done.stderr


def test_verbs_that_can_be_stopped_are_listed():
  for verb in COMMANDS:
    parameters = inspect.signature(commands.load(verb).main).parameters
    assert ("stop_asked" in parameters) == (verb in STOPPABLE), verb


@pytest.mark.parametrize(
  ("program", "arguments", "code", "says"),
  [
    ("halrp_jax", [], 0, "  predict     Classifies new images"),
    ("halrp_jax", ["-h"], 0, "  doctor      Checks this machine"),
    ("halrp_jax", ["--help"], 0, "  compare     Prints finished runs"),
    ("halrp_jax", ["--version"], 0, "halrp_jax "),
    ("halrp_jax.main", ["--version"], 0, "halrp_jax "),
    ("halrp_jax.main", ["--overwrite", "--version"], 0, "halrp_jax "),
    ("halrp_jax", ["repotr"], 2, "error: unknown verb 'repotr' (did you mean report?); known: com"),
  ],
)
def test_what_needs_no_jax_does_not_import_it(program, arguments, code, says):
  """It would take seconds."""
  heavy = {"jax", "numpy", "absl", "ml_collections", "flax", "matplotlib", "rich"}
  script = f"""
import runpy, sys
sys.argv = ["program", *{arguments}]
try:
  runpy.run_module({program!r}, run_name="__main__")
finally:
  print("imported:", *sorted({heavy} & sys.modules.keys()))
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert done.returncode == code and done.stdout.endswith("imported:\n"), done.stderr
  assert says in done.stdout + done.stderr and done.stderr.count("\n") == (code != 0)


def test_only_checkpoint_knows_orbax():
  for path, parts in _modules():
    text = path.read_text()
    assert parts[-1] == "checkpoint" or "import orbax" not in text, path


def test_core_needs_neither_tensorflow_nor_pytorch():
  for path, _ in _modules():
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [a.name for a in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
      assert not {n.split(".")[0] for n in names} & {"tensorflow", "torch"}, path


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def test_nothing_in_the_package_can_run_what_it_reads():
  """No pickle in any form, no eval, no exec, no yaml.load."""
  for path, _ in _modules():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        assert not FORBIDDEN & {a.name.split(".")[0] for a in node.names}, path
      elif isinstance(node, ast.ImportFrom):
        assert (node.module or "").split(".")[0] not in FORBIDDEN, path
      elif isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        assert name not in ("eval", "exec", "compile") or isinstance(node.func, ast.Attribute), path
        owner = getattr(getattr(node.func, "value", None), "id", "")
        assert not (owner == "yaml" and name == "load"), path
      elif isinstance(node, ast.keyword):
        assert node.arg != "allow_pickle" or node.value.value is False, path


def test_texts_are_utf8_whatever_the_locale():
  """Every file that is opened as text, and every program whose output is read, has an encoding."""
  root = PACKAGE.parent
  folders = ("halrp_jax", "benchmarks", "examples", "configs", "launch")
  for path in (p for folder in folders for p in sorted((root / folder).rglob("*.py"))):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Call) and _is_text(node):
        place = f"{path.relative_to(root)}:{node.lineno}"
        assert any(k.arg == "encoding" for k in node.keywords), f"{place}: encoding is missing"


def _is_text(call: ast.Call) -> bool:
  name = getattr(call.func, "id", getattr(call.func, "attr", ""))
  owner = getattr(getattr(call.func, "value", None), "id", "")
  keywords = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
  if name in ("read_text", "write_text"):
    return isinstance(call.func, ast.Attribute) and owner != "files"  # whose own function it is
  if name in ("run", "Popen", "check_output"):
    return bool(keywords.get("text") or keywords.get("universal_newlines"))
  if name == "open" and owner not in ("gzip", "tarfile", "Image", "os", "zipfile"):
    modes = [a.value for a in call.args[:2] if isinstance(a, ast.Constant)]
    return "b" not in str(keywords.get("mode") or (modes or [""])[-1])
  return False
