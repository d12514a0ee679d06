"""export: files that predict what the run does, when the run and its config are gone."""

import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy as safetensors

from halrp_jax import __main__ as verbs
from halrp_jax.config import make_config
from halrp_jax.deploy import export, export_folder, saved
from halrp_jax.methods import bn
from halrp_jax.runs import experiment
from halrp_jax.types import UserError

from ..conftest import ROOT, interrupt

NUM_TASKS = 3


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  """Three tasks of digits, ids 3, 1, 0; pruned."""
  folder = tmp_path_factory.mktemp("run")
  config = make_config(
    "halrp",
    benchmark="digits",
    order="3,1,0,2,4,5,6,7,8,9",
    network="mlp",
    epochs=3,
    protocol={},
    methods_={"halrp": {"prune_bound": 0.3, "sigma": "kept"}},
  )
  interrupt(config, folder, NUM_TASKS)
  return folder


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)


@pytest.fixture
def run(run_folder):
  return saved.open_run(str(run_folder))


def write(run, folder, format="safetensors", merged=False):
  return dict(export.write(run, str(folder), list(range(NUM_TASKS)), format, merged))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_what_is_loaded_predicts_what_the_run_does(run, images, tmp_path, format, merged):
  sizes = write(run, tmp_path / "out", format, merged)
  assert list(sizes) == ([] if merged else ["base"]) + ["task03", "task01", "task00"]
  shutil.move(tmp_path / "out", tmp_path / "elsewhere")
  for t, task in enumerate(run.learned):
    want = saved.make_classifier(run, t)(images)
    model = export.load(str(tmp_path / "elsewhere"), task.id)
    np.testing.assert_allclose(model.classify(images), want, atol=1e-5)
    assert (np.argmax(model.classify(images), 1) == want.argmax(1)).all()
    assert model.class_names == list(task.class_names) == [str(c) for c in range(10)]
    card = model.card
    assert card["test_accuracy_percent"] == run.results["accuracy"][NUM_TASKS - 1][t]
    assert card["network"]["name"] == "mlp" and not card["depends_on_batch"]
    plain = model.network.apply(model.variables, np.zeros((2, 8, 8, 1), np.float32))
    assert plain.shape == (2, 10)


def test_a_task_is_small_and_pruned_factors_are_sparse(run, tmp_path):
  """Fixed values, the low-rank values that are kept, a bit for each entry: and hardly more."""
  sizes = write(run, tmp_path)
  assert sizes["task01"] == (tmp_path / "task01.safetensors").stat().st_size
  arrays = safetensors.load_file(tmp_path / "task01.safetensors")
  masks = [k for k in arrays if k.endswith("/U.mask")]
  learned = run.state.tasks[1]
  assert masks and not any(k.removesuffix(".mask") in arrays for k in masks)
  kept = entries = 0
  for name, p in learned.perturbation.items():
    rank = int(learned.rank[name])
    assert json.loads((tmp_path / "task01.json").read_text())["ranks"][name] == rank
    kept += np.count_nonzero(p.U) + np.count_nonzero(p.V)
    entries += rank * (len(p.U) + len(p.V))
  fixed = sum(x.size for k, x in arrays.items() if not k.endswith((".values", ".mask")))
  assert sum(x.nbytes for x in arrays.values()) <= 4 * (fixed + kept) + entries // 8 + 4
  assert sizes["task00"] < sizes["base"] / 2


def test_packing_is_undone_whatever_is_smaller():
  rng = np.random.default_rng(0)
  for share in (0.0, 0.02, 0.5, 0.98, 1.0):
    x = rng.normal(size=(7, 5)).astype(np.float32) * (rng.random((7, 5)) < share)
    arrays = export_folder.pack("U", x)
    dense = np.count_nonzero(x) * 4 + 5 >= x.nbytes
    assert list(arrays) == (["U"] if dense else ["U.values", "U.mask"])
    np.testing.assert_array_equal(export_folder.unpack(arrays, "U", (7, 5), "file"), x)
    assert not arrays


def spoil(folder, how):
  file = folder / "task01.safetensors"
  if how == "base":
    arrays = safetensors.load_file(folder / "base.safetensors")
    arrays["params/fc1/kernel"][0, 0] += 1
    card = json.loads((folder / "base.json").read_text())
    safetensors.save_file(arrays, folder / "base.safetensors")
    (folder / "base.json").write_text(
      json.dumps(card | {"hash": export.checkpoint.fingerprint(arrays)})
    )
  elif how == "no file":
    file.unlink()
  elif how == "no base":
    (folder / "base.safetensors").unlink()
  elif how == "cut":
    file.write_bytes(file.read_bytes()[:-5])
  elif how == "flipped":
    content, weights = bytearray(file.read_bytes()), safetensors.load_file(file)["params/fc1/bias"]
    content[content.index(weights.tobytes())] ^= 1
    file.write_bytes(content)
  elif how == "card":
    (folder / "task01.json").write_text("[]")
  elif how == "schema":
    card = json.loads((folder / "task01.json").read_text())
    (folder / "task01.json").write_text(json.dumps(card | {"schema": 9}))
  elif how == "classes":
    card = json.loads((folder / "task01.json").read_text())
    card["network"]["num_classes"] = 9
    (folder / "task01.json").write_text(json.dumps(card))
  else:
    arrays = safetensors.load_file(file)
    if how.startswith("-"):
      del arrays[how[1:]]
    elif how.startswith("+"):
      arrays[how[1:]] = np.zeros(3, np.float32)
    else:
      arrays[how] = arrays[how][:-1].copy()
    safetensors.save_file(arrays, file)


@pytest.mark.parametrize(
  ("how", "says"),
  [
    ("base", r"task01.safetensors: belongs to the base \w{16}, and .*base.safetensors is \w{16}"),
    ("no file", "task01.safetensors: not found"),
    ("no base", "base.safetensors: not found"),
    ("cut", "task01.safetensors: can't be read"),
    ("flipped", "was changed after it was written"),
    ("card", "task01.json: was changed or damaged"),
    ("schema", "has schema 9, expected 1"),
    ("classes", r"params/head/bias is \(10,\), expected \(9,\)"),
    ("-perturbation/fc1/R", "perturbation/fc1/R is missing"),
    ("-perturbation/fc1/U.mask", "perturbation/fc1/U.mask is missing"),
    ("-params/fc2/bias", "params/fc2/bias is missing"),
    ("+params/fc3/bias", "unexpected params/fc3/bias: the network has no"),
    ("+perturbation/fc9/R", "unexpected perturbation/fc9/R: the network has no"),
    ("perturbation/fc1/S", r"fc1: S is \(63,\), expected \(64,\)"),
    ("perturbation/fc1/U.values", r"U.values has \d+ entries, but its mask has \d+"),
  ],
)
def test_what_does_not_fit_is_refused_by_name(run, tmp_path, how, says):
  write(run, tmp_path)
  spoil(tmp_path, how)
  with pytest.raises(UserError, match=says):
    export.load(str(tmp_path), 1)


def test_an_unknown_task_and_another_base_are_refused(run, tmp_path):
  write(run, tmp_path)
  with pytest.raises(UserError, match=r"task07.json: not found; .* base, task00, task01, task03"):
    export.load(str(tmp_path), 7)
  spoil(tmp_path, "base")
  with pytest.raises(UserError, match="base.json, which is there, is of another model"):
    write(run, tmp_path)


def test_arguments_of_another_kind_are_refused(run, tmp_path):
  write(run, tmp_path)
  with pytest.raises(UserError, match="expected the path of a folder, given None"):
    export.load(None, 1)
  with pytest.raises(UserError, match="id of a task: expected a whole number from 0 on, given '1'"):
    export.load(str(tmp_path), "1")
  model = export.load(tmp_path, np.int64(1))
  with pytest.raises(UserError, match=r"task01: classify: expected uint8 images .*, given float64"):
    model.classify(np.zeros((2, *model.card["image_shape"])))


@pytest.mark.parametrize("name", ["perturbation/fc1/R", "params/head/bias"])
def test_arrays_of_whole_numbers_are_refused(run, tmp_path, name):
  write(run, tmp_path)
  file = tmp_path / "task01.safetensors"
  arrays = safetensors.load(file.read_bytes())
  arrays[name] = arrays[name].astype(np.int32)
  file.write_bytes(safetensors.save(arrays))
  with pytest.raises(UserError, match="is int32, expected floating point"):
    export.load(str(tmp_path), 1)


def other_model(run, how):
  """What another run, or this one at another time, would export."""
  if how == "tasks":
    tasks = tuple(task._replace(id=task.id + 5) for task in run.benchmark.tasks)
    return run._replace(benchmark=run.benchmark._replace(tasks=tasks))
  if how == "classes":
    tasks = tuple(t._replace(class_names=t.class_names[::-1]) for t in run.benchmark.tasks)
    return run._replace(benchmark=run.benchmark._replace(tasks=tasks))
  *others, last = run.state.tasks
  last = last._replace(rest=jax.tree.map(lambda x: x + 1, last.rest))
  return run._replace(state=run.state._replace(tasks=(*others, last)))


def contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("how", ["tasks", "classes", "state"])
@pytest.mark.parametrize(("format", "merged"), [("safetensors", False), ("safetensors", True)])
def test_a_folder_of_another_model_is_refused(run, tmp_path, format, merged, how):
  write(run, tmp_path, format, merged)
  before = contents(tmp_path)
  with pytest.raises(UserError, match=r"task\d\d.json, which is there, is of another model"):
    write(other_model(run, how), tmp_path, format, merged)
  assert contents(tmp_path) == before
  write(run, tmp_path, format, merged)  # the same model again
  assert contents(tmp_path) == before


def test_a_folder_of_another_models_programs_is_refused(run, tmp_path):
  def export_one(run, t):
    return list(export.write(run, str(tmp_path), [t], "stablehlo", False))

  export_one(run, 0)
  before = contents(tmp_path)
  with pytest.raises(UserError, match="task.*, which is there, is of another model"):
    export_one(other_model(run, "tasks"), 1)
  assert contents(tmp_path) == before
  export_one(run, 1)
  assert before.items() < contents(tmp_path).items()


@pytest.mark.parametrize(
  ("second", "says"),
  [
    (
      ("orbax", False),
      r"base.json, which is there, was written with --format=safetensors \(kind: base\)",
    ),
    (("safetensors", True), r"base.json, which is there, is of another model"),
    (("stablehlo", False), r"base.json, which is there, is of another model"),
  ],
)
def test_another_form_in_the_same_folder_is_refused(run, tmp_path, second, says):
  write(run, tmp_path)
  before = contents(tmp_path)
  with pytest.raises(UserError, match=says):
    write(run, tmp_path, *second)
  assert contents(tmp_path) == before


def test_files_without_a_card_are_not_joined(run, tmp_path):
  (tmp_path / "README").write_text("not ours")
  (tmp_path / "task77.safetensors").write_bytes(b"")
  with pytest.raises(UserError, match="task77.safetensors, which is there, is not a file of this"):
    write(run, tmp_path)
  (tmp_path / "task77.safetensors").unlink()
  write(run, tmp_path)
  (tmp_path / "task00.stablehlo").write_bytes(b"")  # as an older version left it
  with pytest.raises(UserError, match="task00.stablehlo, which is there, is not a file of this"):
    write(run, tmp_path)


def test_a_program_predicts_what_the_run_does(run, images):
  """Any number of images, any platform."""
  program = export.program(run, 1)
  assert program.platforms == ("cpu", "cuda", "tpu")
  want = saved.make_classifier(run, 1)(images)
  for n in (1, 20):
    np.testing.assert_allclose(program.call(images[:n]), want[:n], atol=1e-5)


READER = """
import sys, jax, numpy as np
from jax import export
with open(sys.argv[1], "rb") as stream:
  program = export.deserialize(bytearray(stream.read()))
np.save(sys.argv[3], program.call(np.load(sys.argv[2])))
assert not [m for m in sys.modules if m.startswith(("halrp_jax", "flax"))]
"""


def test_a_program_runs_in_a_process_without_this_package(run, images, tmp_path):
  write(run, tmp_path / "out", "stablehlo")
  np.save(tmp_path / "x.npy", images)
  paths = [str(tmp_path / n) for n in ("out/task01.stablehlo", "x.npy", "y.npy")]
  subprocess.run([sys.executable, "-c", READER, *paths], check=True, cwd=tmp_path)
  want = saved.make_classifier(run, 1)(images)
  np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, atol=1e-5)
  with pytest.raises(UserError, match="is a program: jax.export.deserialize"):
    export.load(str(tmp_path / "out"), 1)


def only(folder, *packages):
  """A folder with these installed packages alone, as after `pip install` in a new environment."""
  folder.mkdir()
  for name in packages:
    for file in importlib.metadata.files(name):
      top, path = file.parts[0], pathlib.Path(file.locate())
      if top != ".." and not (folder / top).exists():
        (folder / top).symlink_to(path.parents[len(file.parts) - 2] if file.parts[1:] else path)
  return folder


JAX = (
  "jax",
  "jaxlib",
  "ml_dtypes",
  "numpy",
  "opt_einsum",
  "scipy",
)  # what `pip install jax` brings


def test_a_program_needs_the_packages_that_its_card_names_and_no_others(run, images, tmp_path):
  write(run, tmp_path / "out", "stablehlo")
  card = json.loads((tmp_path / "out" / "task01.json").read_text(encoding="utf-8"))
  assert card["needs"].keys() == {"jax", "flatbuffers"}
  np.save(tmp_path / "x.npy", images)
  paths = [str(tmp_path / n) for n in ("out/task01.stablehlo", "x.npy", "y.npy")]
  outcomes = {}
  for name, packages in (("jax", JAX), ("all", (*JAX, "flatbuffers"))):
    path = only(tmp_path / name, *packages)
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{READER}"
    command = [sys.executable, "-I", "-S", "-c", code, *paths]
    outcomes[name] = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path)
  assert outcomes["all"].returncode == 0, outcomes["all"].stderr
  want = saved.make_classifier(run, 1)(images)
  np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, atol=1e-5)
  assert outcomes["jax"].returncode and "flatbuffers" in outcomes["jax"].stderr
  for place in ("docs/commands.md", "docs/guide.md", "halrp_jax/commands/export.py"):
    (line,) = [
      x for x in (ROOT / place).read_text(encoding="utf-8").splitlines() if "flatbuffers" in x
    ]
    assert "jax" in line


def test_without_flatbuffers_the_error_names_it(run, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  for name in [m for m in sys.modules if m.startswith("jax._src.export.serialization")]:
    monkeypatch.delitem(sys.modules, name)
  with pytest.raises(UserError, match="needs the package flatbuffers .*pip install flatbuffers"):
    write(run, tmp_path / "out", "stablehlo")
  assert not list((tmp_path / "out").iterdir())


# --- the command ----------------------------------------------------------------------


def call(capsys, *arguments):
  code = verbs.main(["halrp_jax", "export", *map(str, arguments)])
  out, err = capsys.readouterr()
  return code, out, err


def test_the_command_prints_sizes(capsys, run_folder, tmp_path):
  code, out, _ = call(capsys, f"--workdir={run_folder}", f"--out={tmp_path}/out", "--task=1")
  assert code == 0 and not (tmp_path / "out" / "task00.json").exists()
  base, task, _ = out.splitlines()
  assert base.startswith("base ") and "task01" in task and "% of the base  permutation 1" in task


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["--format=pickle"], "--format=pickle: one of safetensors, orbax, stablehlo"),
    (["--task=9"], "has not learned it yet"),
    (["--task=../x"], "there is no such task"),
    (["--workdir="], "export: argument --workdir: a value is missing; for example: "),
    (["--out=/proc/x"], "--out=/proc/x"),
  ],
)
def test_mistakes(capsys, run_folder, tmp_path, arguments, says):
  flags = [f"--workdir={run_folder}", f"--out={tmp_path}/out", *arguments]
  code, _, err = call(capsys, *flags)
  assert code == 2 and says in err and err.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_methods_without_such_a_form_are_refused(run, tmp_path):
  plain = run._replace(method=run.method._replace(network=None))
  with pytest.raises(UserError, match="halrp: no ordinary network .* --format=stablehlo"):
    write(plain, tmp_path / "out", merged=True)
  learned = tuple(bn.TaskState(p.rest, p.stats, p.num_classes) for p in run.state.tasks)
  bare = run._replace(state=run.state._replace(tasks=learned))
  with pytest.raises(UserError, match="halrp has no perturbations of a base: use --merge"):
    write(bare, tmp_path / "out")


@pytest.mark.parametrize("variant", ["published", "best"])
def test_attention_and_patches_are_exported_with_their_matrices(images, tmp_path, variant):
  config = make_config(
    "halrp",
    benchmark="digits",
    order="3,1",
    network="vit_ti16,features=12,num_heads=3,num_blocks=1,patch=4",
    epochs=2,
    protocol={},
    methods_={"halrp": {"variant": variant, "task_bound": 0.6}},
  )
  experiment.run(config, str(tmp_path / "run"))
  run = saved.open_run(str(tmp_path / "run"))
  rows = {p.V.shape[0] // p.S.size for p in run.state.tasks[1].perturbation.values()}
  assert rows == ({1, 4 * 4} if variant == "best" else {1})  # the convolution of the patches
  list(export.write(run, str(tmp_path / "out"), [1], "safetensors", False))
  want = saved.make_classifier(run, 1)(images)
  found = export.load(tmp_path / "out", run.learned[1].id).classify(images)
  np.testing.assert_allclose(found, want, atol=1e-5)
