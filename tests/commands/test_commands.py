"""The verbs that look things over: what is wrong is said, and the exit code says so too."""

import shutil

import numpy as np
import pytest
from PIL import Image

from halrp_jax import __main__ as verbs
from halrp_jax.runs import experiment

from ..conftest import ROOT
from ..data.test_data import write_small_cifar
from ..test_environment import make_custom


def call(capsys, *arguments):
  code = verbs.main(["halrp_jax", *map(str, arguments)])
  out, err = capsys.readouterr()
  return code, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  cache = []

  def get(config):
    if not cache:
      folder = tmp_path_factory.mktemp("finished")
      experiment.run(config, str(folder))
      cache.append(folder)
    return cache[0]

  return get


@pytest.fixture
def run_folder(finished, digits_config, tmp_path):
  """A copy of a finished run."""
  config = digits_config("halrp", train_fraction=0.3, order="3,1,0")
  shutil.copytree(finished(config), tmp_path / "run")
  return tmp_path / "run"


# --- doctor ---------------------------------------------------------------------------


def test_doctor_alone_tests_the_devices(capsys):
  code, out, _ = call(capsys, "doctor")
  assert code == 0 and "convolution, relative error" in out and "all is well" in out


def test_doctor_finds_a_good_run_good(capsys, run_folder):
  code, out, _ = call(capsys, "doctor", f"--workdir={run_folder}")
  assert code == 0 and "the model is the one of the record" in out
  assert "task 3: " in out and "ranks fc1:" in out and "WRONG" not in out


@pytest.mark.parametrize("name", ["task02-*", "shared-*", "state-0003"])
def test_doctor_finds_one_flipped_bit(capsys, run_folder, name):
  (item,) = list((run_folder / "checkpoints").glob(name))[:1]
  path = max((p for p in item.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  code, out, _ = call(capsys, "doctor", f"--workdir={run_folder}")
  assert code == 1 and f"WRONG  {item.name}" in out and path.name in out


@pytest.mark.parametrize("name", ["config.json", "record.json"])
def test_doctor_finds_an_unreadable_file(capsys, run_folder, name):
  (run_folder / name).write_text("{")
  code, out, _ = call(capsys, "doctor", f"--workdir={run_folder}")
  assert code == 1 and f"{name}: can't be read" in out


def test_doctor_finds_a_record_of_another_model(capsys, run_folder):
  record = run_folder / "record.json"
  record.write_text(record.read_text().replace('"state_hash": "', '"state_hash": "0'))
  code, out, _ = call(capsys, "doctor", f"--workdir={run_folder}")
  assert code == 1 and "WRONG  the model is the one of the record" in out


def test_doctor_knows_an_unfinished_run(capsys, run_folder):
  (run_folder / "record.json").unlink()
  code, out, _ = call(capsys, "doctor", f"--workdir={run_folder}")
  assert code == 0 and "3 tasks learned, not finished" in out


def test_doctor_reads_the_data(capsys, tmp_path):
  write_small_cifar(tmp_path)
  code, out, _ = call(capsys, "doctor", f"--data_dir={tmp_path}")
  assert code == 0 and "mnist: not found" in out
  assert "cifar100_superclass: 20 tasks, 1,000 training and 200 test images, fewer" in out
  (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(b"12345")
  code, out, _ = call(capsys, "doctor", f"--data_dir={tmp_path}")
  assert code == 1 and "WRONG  cifar100_split: " in out and "train.bin" in out


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["--workdir=/nowhere"], "--workdir=/nowhere: holds no config.json"),
    (["--data_dir=/nowhere"], "--data_dir=/nowhere: no such folder"),
    (["--help_me"], "doctor: unrecognized arguments: --help_me"),
    (["run"], "unrecognized arguments: run"),
  ],
)
def test_doctor_refuses_mistakes(capsys, arguments, says):
  code, _, err = call(capsys, "doctor", *arguments)
  assert code == 2 and says in err and err.count("\n") == 1


# --- check_data -----------------------------------------------------------------------

CUSTOM = f"--config={ROOT}/configs/custom.py"


def test_check_data_prints_and_draws(capsys, tmp_path):
  make_custom(tmp_path / "data")
  sheet = tmp_path / "sheet.png"
  code, out, _ = call(
    capsys, "check_data", CUSTOM, f"--config.data_dir={tmp_path}/data", f"--sheet={sheet}"
  )
  assert code == 0
  assert "0 erste Aufgabe: 2 classes (Birnen, Äpfel); train 26 (12 to 14 a class), valid 6" in out
  pixels = np.asarray(Image.open(sheet))
  assert pixels.shape == (2 * 34, 33 * 34, 3)
  assert len(np.unique(pixels[:32, :32])) > 100 and (pixels[:, 16 * 34 : 17 * 34 - 2] == 255).all()


def test_check_data_says_what_is_odd(capsys, tmp_path):
  make_custom(tmp_path / "data")
  folder = tmp_path / "data" / "zweite" / "Birnen"
  for path in folder.glob("*.png"):
    Image.new("RGB", (32, 32), "red").save(path)
  code, out, _ = call(
    capsys, "check_data", CUSTOM, f"--config.data_dir={tmp_path}/data", f"--sheet={tmp_path}/s.png"
  )
  assert code == 1
  assert "WRONG  task 'zweite': 20 images have one colour only" in out
  assert "WRONG  task 'zweite': 4 test images are also training or validation images" in out


def test_check_data_lists_all_bad_files_and_what_is_not_used(capsys, tmp_path):
  make_custom(tmp_path / "data")
  flags = (CUSTOM, f"--config.data_dir={tmp_path}/data", f"--sheet={tmp_path}/s.png")
  Image.new("RGBA", (9, 9)).save(tmp_path / "data" / "zweite" / "Birnen" / "clear.webp")
  (tmp_path / "data" / "zweite" / "labels.csv").write_text("x")
  code, out, _ = call(capsys, "check_data", *flags)
  assert code == 1 and "note   data_dir=" in out  # one colour only
  assert "of 81 images 1 with transparency, put on white, 1 resized\n" in out
  assert "1 not used (.csv 1), for example zweite/labels.csv\n" in out
  for i in range(20):
    (tmp_path / "data" / ("erste Aufgabe", "zweite")[i % 2] / "Birnen" / f"{i}.png").write_bytes(
      b"?"
    )
  code, out, _ = call(capsys, "check_data", *flags)
  assert code == 1 and out.count("WRONG  ") == out.count("\n") == 20
  assert all(
    f"/Birnen/{i}.png: not an image that can be read (none of PNG, " in out for i in range(20)
  )


def test_check_data_says_what_lacks(capsys, tmp_path):
  write_small_cifar(tmp_path)
  arguments = [f"--config={ROOT}/configs/cifar100_split.py", f"--sheet={tmp_path}/s.png"]
  code, out, _ = call(capsys, "check_data", *arguments, f"--config.data_dir={tmp_path}")
  assert code == 1 and "4,900 fewer than the 5,000 of the protocol" in out and "more" in out


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([], "check_data: the following arguments are required: --config; for example: python -m "),
    ([CUSTOM], "data_dir is not set"),
    ([CUSTOM, "--config.data_dir=/nowhere"], "data_dir=/nowhere: No such file"),
    ([CUSTOM, "--config.epochs=0"], "epochs must be"),
    ([CUSTOM, "--sheets=x"], "sheets"),
  ],
)
def test_check_data_refuses_mistakes(capsys, tmp_path, monkeypatch, arguments, says):
  monkeypatch.chdir(tmp_path)
  code, _, err = call(capsys, "check_data", *arguments)
  assert code == 2 and says in err and err.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_a_sheet_that_can_not_be_written(capsys, tmp_path):
  make_custom(tmp_path / "data")
  more = (f"--config.data_dir={tmp_path}/data", "--sheet=/nowhere/s.png")
  code, _, err = call(capsys, "check_data", CUSTOM, *more)
  assert code == 2 and "--sheet=/nowhere/s.png: No such file" in err
