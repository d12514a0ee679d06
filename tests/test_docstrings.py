"""Every function of the package says in its docstring what it does; public ones have types."""

import ast
import re

import pytest

from .conftest import ROOT

FILES = sorted((ROOT / "halrp_jax").rglob("*.py"))
VERB = re.compile(r"[A-Z][a-z-]+s\b")  # "Returns", "Re-reads"
NO_VERBS = {"Always", "Less", "This", "Its", "Does"} | {"Arrays", "Images", "Names", "Steps"}


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
  """Functions at module level, and methods of its classes but the magic ones."""
  bodies = [tree.body] + [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
  found = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
  return [f for f in found if not (f.name.startswith("__") and f.name.endswith("__"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_function_says_what_it_does(path):
  """The docstring's first line is a sentence that begins with a verb."""
  wrong = []
  for f in functions(ast.parse(path.read_text(encoding="utf-8"))):
    first = (ast.get_docstring(f) or "").split("\n\n")[0]
    word = first.split(" ")[0]
    if not (VERB.match(word) and word not in NO_VERBS and first.endswith((".", ":"))):
      wrong.append(f"{path.name}:{f.lineno} {f.name}: {first[:60]!r}")
  assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_have_types(path):
  wrong = []
  for f in functions(ast.parse(path.read_text(encoding="utf-8"))):
    if f.name.startswith("_"):
      continue
    given = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, f.args.vararg, f.args.kwarg]
    untyped = [a.arg for a in given if a and not a.annotation and a.arg not in ("self", "cls")]
    untyped += [] if f.returns else ["the returned value"]
    wrong += [f"{path.name}:{f.lineno} {f.name}: {name}" for name in untyped]
  assert not wrong, "\n".join(wrong)
