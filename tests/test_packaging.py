"""What setup.cfg, the Makefile, pre-commit and the hosted workflow say of this tree is so."""

import configparser
import importlib
import re
import subprocess
import sys
from importlib import metadata

import pytest
import yaml

from .conftest import ROOT


def setup_cfg() -> configparser.ConfigParser:
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg", encoding="utf-8")
  return parser


def targets() -> set[str]:
  text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
  return set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())


def test_every_folder_of_the_package_is_installed():
  folders = [p.parent.relative_to(ROOT) for p in (ROOT / "halrp_jax").rglob("__init__.py")]
  expected = {".".join(folder.parts) for folder in folders} | {"halrp_jax.configs"}
  assert set(setup_cfg()["options"]["packages"].split()) == expected


def test_files_that_are_no_modules_are_installed():
  listed = setup_cfg()["options.package_data"]
  expected = {p for p in (ROOT / "halrp_jax").rglob("*.*") if p.suffix not in (".py", ".pyc")}
  found = {
    ROOT.joinpath(*package.split("."), name)
    for package, names in listed.items()
    for name in names.split(", ")
  }
  assert found == expected


def test_the_version_is_that_of_setup_cfg():
  assert metadata.version("halrp-jax") == setup_cfg()["metadata"]["version"]


def test_the_console_script_tunes_the_allocator_and_needs_no_jax_for_the_version():
  name, _, target = setup_cfg()["options.entry_points"]["console_scripts"].strip().partition(" = ")
  module, _, function = target.partition(":")
  assert name == "halrp" and callable(getattr(importlib.import_module(module), function))
  code = f"""
import sys
from {module} import {function}
from halrp_jax.devices import allocator
allocator.tune = lambda: print("tuned", "jax" in sys.modules)
sys.argv = ["/usr/bin/halrp", "--version"]
code = {function}()
print(code, "jax" in sys.modules)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  version = setup_cfg()["metadata"]["version"]
  assert done.stdout == f"tuned False\nhalrp_jax {version}\n0 False\n", done.stderr


def test_pre_commit_runs_what_the_test_extra_installs():
  """Repositories of others would be fetched from the network."""
  config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
  hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
  assert {repo["repo"] for repo in config["repos"]} == {"local"}
  assert {hook["language"] for hook in hooks} == {"system"}
  extra = setup_cfg()["options.extras_require"]["test"]
  installed = {line.split()[0] for line in extra.strip().splitlines()} | {"python"}
  programs = {re.match(r"\.venv/bin/(\w+) ", hook["entry"])[1] for hook in hooks}
  assert programs == {"ruff", "basedpyright", "python"} and programs <= installed
  assert "pre-commit" in installed


def test_the_hosted_workflow_calls_make_targets_alone():
  text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
  job = yaml.safe_load(text)["jobs"]["tests"]
  runs = [step["run"] for step in job["steps"] if "run" in step]
  assert runs == ["make ${{ matrix.target }}", "make forget-old-programs"]
  called = {(row["target"], row["python"]) for row in job["strategy"]["matrix"]["include"]}
  assert {target for target, _ in called} <= targets()
  python = set(re.findall(r":: (3\.\d+)", setup_cfg()["metadata"]["classifiers"]))
  assert {version for _, version in called} == python


@pytest.mark.parametrize("target", sorted(targets()))
def test_the_makefile_has_every_target_it_declares(target):
  text = (ROOT / "Makefile").read_text(encoding="utf-8")
  assert re.search(rf"^{target}:", text, re.M)
