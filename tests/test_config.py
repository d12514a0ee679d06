"""What stands after the colon of a config, and config files made from one another."""

import shutil

import pytest

from halrp_jax import arguments
from halrp_jax.config import make_config, parse, resolve, sibling
from halrp_jax.types import UserError

from .conftest import ROOT

FIRST = {  # what stands first after the colon, where it is no method
  "ablation_table6": "lrp",
  "ablation_lambda_split": "0_1e-4",
  "ablation_lambda_superclass": "0_1e-4",
}


@pytest.mark.parametrize(
  ("argument", "expected"),
  [
    ("halrp", ("halrp", {})),
    ("halrp,alpha=0.75,warmup_epochs=1", ("halrp", {"alpha": 0.75, "warmup_epochs": 1})),
    ("halrp,l1=0,l2=1e-4", ("halrp", {"l1": 0.0, "l2": 1e-4})),
    ("halrp,prune_bound=none", ("halrp", {"prune_bound": "none"})),
    ("halrp,prune_bound=0.6", ("halrp", {"prune_bound": 0.6})),
    ("halrp,variant=paper,crossing=false", ("halrp", {"variant": "paper", "crossing": False})),
    ("stl,l2_half=True", ("stl", {"l2_half": True})),
    ("iru,batch_norm=running,factors=2", ("iru", {"batch_norm": "running", "factors": 2})),
  ],
)
def test_the_method_and_its_keys_are_read(argument, expected):
  found = parse(argument)
  assert found == expected
  assert [type(x) for x in found[1].values()] == [type(x) for x in expected[1].values()]


@pytest.mark.parametrize(
  ("argument", "says"),
  [
    ("", "unknown method ''; known: halrp, stl"),
    ("halpr", "unknown method 'halpr' (did you mean halrp?); known"),
    (",alpha=0.5", "unknown method ''"),
    ("halrp,", "'' is not KEY=VALUE"),
    ("halrp,alpha", "'alpha' is not KEY=VALUE"),
    ("halrp,alhpa=0.5", "halrp has no key 'alhpa' (did you mean alpha?)"),
    ("stl,alpha=0.5", "stl has no key 'alpha'"),
    ("halrp,name=stl", "halrp has no key 'name'"),
    ("halrp,=1", "halrp has no key ''"),
    ("halrp,alpha=0.5,alpha=0.6", "alpha is given twice"),
    ("halrp,alpha=", "alpha must be a number >= 0 and <= 1, got ''"),
    ("halrp,alpha=much", "alpha must be a number >= 0 and <= 1, got 'much'"),
    ("halrp,alpha=1.5", "alpha must be a number >= 0 and <= 1, got '1.5'"),
    ("halrp,alpha=nan", "alpha must be a number >= 0 and <= 1, got 'nan'"),
    ("halrp,warmup_epochs=1.0", "warmup_epochs must be a whole number >= 0, got '1.0'"),
    ("halrp,crossing=maybe", "crossing must be true or false, got 'maybe'"),
    ("halrp,prune_bound=some", "prune_bound must be a number >= 0, or none, got 'some'"),
    ("halrp,variant=mine", "variant must be one of code, published, best, paper, got 'mine'"),
  ],
)
def test_what_is_wrong_after_the_colon_is_said_in_one_line(argument, says):
  with pytest.raises(UserError) as error:
    parse(argument)
  assert says in str(error.value) and "\n" not in str(error.value)


def test_all_that_is_wrong_after_the_colon_is_said_at_once():
  with pytest.raises(UserError, match="no key 'alhpa'.*l1 must be a number >= 0"):
    parse("halrp,alhpa=0.5,l1=-1")


def test_keys_after_the_colon_go_before_the_files_and_after_the_command_lines():
  config = make_config("halrp,l1=0.5", protocol={}, methods_={"halrp": {"l1": 0.1, "alpha": 0.8}})
  assert (config.method.name, config.method.l1, config.method.alpha) == ("halrp", 0.5, 0.8)
  more = ["--config.method.alpha=0.6"]
  config = arguments.load_config(f"{ROOT}/configs/digits.py", "halrp,alpha=0.7,l1=0.5", more)
  assert (config.method.alpha, config.method.l1) == (0.6, 0.5)


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
def test_every_config_takes_keys_after_the_colon_from_any_folder(name, tmp_path, monkeypatch):
  file = f"{ROOT}/configs/{name}.py"
  first = FIRST.get(name, "halrp")
  plain = resolve(arguments.load_config(file, first)).to_dict()
  monkeypatch.chdir(tmp_path)
  found = resolve(arguments.load_config(file, f"{first},min_rank=3,sigma=kept")).to_dict()
  assert found == plain | {"method": plain["method"] | {"min_rank": 3, "sigma": "kept"}}


def test_the_network_of_gpms_setting_does_not_depend_on_its_keys():
  file = f"{ROOT}/configs/saha_superclass.py"
  assert arguments.load_config(file, "gpm,threshold=0.97").network == "saha_lenet"


def test_a_config_whose_sibling_is_missing_says_so(tmp_path):
  shutil.copy(f"{ROOT}/configs/tinyimagenet40.py", tmp_path)
  with pytest.raises(UserError, match="tinyimagenet40_resnet18.py, which is missing"):
    arguments.load_config(str(tmp_path / "tinyimagenet40.py"))


def test_siblings_are_found_by_a_relative_path(monkeypatch):
  monkeypatch.chdir(ROOT)
  split = sibling("configs/ablation_table6.py", "cifar100_split")
  assert split.get_config("stl").benchmark == "cifar100_split"
  assert arguments.load_config("configs/tinyimagenet40.py").network == "resnet18"


def test_a_config_is_found_where_it_is_installed(tmp_path, monkeypatch):
  """Beside the package's modules (a wheel), beside the package (the source tree)."""
  monkeypatch.chdir(tmp_path)
  for name in ("configs/digits.py", "./configs/digits.py"):
    assert arguments.load_config(name, "stl").benchmark == "digits"
  package = tmp_path / "site" / "halrp_jax"
  package.mkdir(parents=True)
  monkeypatch.setattr(arguments, "__file__", str(package / "arguments.py"))
  with pytest.raises(UserError, match="configs/digits.py: no such file here, and no config"):
    arguments.load_config("configs/digits.py")
  shutil.copytree(ROOT / "configs", package / "configs")
  assert arguments.load_config("configs/tinyimagenet40.py").network == "resnet18"


def test_a_config_of_the_current_folder_goes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").mkdir()
  text = (ROOT / "configs" / "digits.py").read_text().replace("epochs=30", "epochs=31")
  (tmp_path / "configs" / "digits.py").write_text(text)
  assert arguments.load_config("configs/digits.py").epochs == 31
  assert arguments.load_config("configs/pmnist.py").benchmark == "pmnist"


@pytest.mark.parametrize(
  ("file", "says"),
  [
    ("configs/digit.py", "no config of this name is installed (did you mean digits.py?)"),
    ("configs/nothing_like_it.py", "no config of this name is installed"),
    ("digits.py", "--config=digits.py: no such file"),
    ("", "--config=: no such file"),
  ],
)
def test_a_config_that_is_nowhere(file, says, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError) as error:
    arguments.load_config(file)
  assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("x = 1", "mine.py: the file defines no function get_config"),
    ("def get_config(): return {}", "mine.py: get_config() must return a ConfigDict, got dict"),
    ("def get_config(): raise KeyError('alpha')", "mine.py: KeyError: 'alpha'"),
    ("def get_config(", "mine.py: SyntaxError: "),
    ("import nowhere_at_all", "mine.py: ModuleNotFoundError: No module named 'nowhere_at_all'"),
  ],
)
def test_a_config_file_that_is_wrong(text, says, tmp_path):
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(UserError) as error:
    arguments.load_config(str(tmp_path / "mine.py"))
  assert says in str(error.value) and "\n" not in str(error.value)


def test_a_broken_reference_between_keys_is_one_line(tmp_path):
  text = (
    "from ml_collections import config_dict\n"
    "def get_config():\n"
    "  c = config_dict.ConfigDict({'epochs': 2, 'seed': 0})\n"
    "  c.batch_size = c.get_ref('epochs') // c.get_ref('seed')\n"
    "  return c\n"
  )
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(
    UserError, match="mine.py: ZeroDivisionError: integer division or modulo by zero"
  ):
    arguments.load_config(str(tmp_path / "mine.py"))


def test_a_config_file_may_define_a_dataclass_and_have_any_name(tmp_path):
  """Dataclasses look for their module among the imported ones."""
  text = (ROOT / "configs" / "digits.py").read_text()
  text = f"""from __future__ import annotations
import dataclasses
{text}
@dataclasses.dataclass
class Own:
  width: int = 3
"""
  (tmp_path / "mine.txt").write_text(text)
  config = arguments.load_config(str(tmp_path / "mine.txt"))
  assert config.benchmark == "digits" and config.is_locked
