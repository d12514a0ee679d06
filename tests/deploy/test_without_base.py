"""Tasks on a pretrained network are written without it, and read with its file."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy as safetensors
from flax import traverse_util

from halrp_jax import __main__ as verbs
from halrp_jax import models
from halrp_jax.config import make_config
from halrp_jax.deploy import export, saved
from halrp_jax.runs import checkpoint, experiment
from halrp_jax.training import networks
from halrp_jax.types import UserError

from .test_extend import draw

VIT = "vit_ti16,features=24,num_blocks=2,patch=8"
# what the tasks have for themselves: the network, and what the base has beside the kernels
PRIVATE = {
  "all": (VIT, None),
  "norm": (VIT, {"params/positions", "params/block1/fc1/bias", "params/block0/attention/out/bias"}),
  "head": ("lenet", {"params/bn_fc1/scale", "batch_stats/bn_fc1/mean"}),
  "frozen": ("efficientnet_lite0", {"batch_stats/bn_stem/mean", "batch_stats/bn_head/var"}),
}


def write_base(path, network, seed=0):
  model = models.make(network, 7, "running")  # the tasks need a head of their own
  params, stats = networks.initialize(model, jax.random.key(seed), (32, 32, 1))
  flat = traverse_util.flatten_dict({"params": params, "batch_stats": stats}, sep="/")
  safetensors.save_file({k: np.asarray(x) for k, x in flat.items()}, path)
  return str(path)


def learn(folder, private, base_training="head"):
  """Learns two tasks of digits on a base; returns the folder of the run and the base's path."""
  network, _ = PRIVATE[private]
  base = write_base(folder / "base.safetensors", network)
  config = make_config(
    "halrp",
    benchmark="digits",
    order="3,1",
    network=network,
    base=base,
    base_training=base_training,
    train_fraction=0.1,
    epochs=2,
    protocol={},
    data_={"image_size": 32},
    every_method={"batch_norm": "frozen" if private == "frozen" else "running"},
    methods_={"halrp": {"upper_rank": 2, "private": private.replace("frozen", "all")}},
  )
  experiment.run(config, str(folder / "run"))
  return str(folder / "run"), base


@pytest.fixture(scope="module")
def of_norm(tmp_path_factory):
  return learn(tmp_path_factory.mktemp("norm"), "norm")


def write(run, folder, **more):
  return dict(export.write(run, str(folder), [0, 1], "safetensors", False, **more))


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  "private", [pytest.param(x, marks=[pytest.mark.slow] * (x == "frozen")) for x in PRIVATE]
)
def test_a_task_and_the_file_of_the_base_are_the_network(private, of_norm, tmp_path):
  folder, base = of_norm if private == "norm" else learn(tmp_path, private)
  run = saved.open_run(folder)
  whole, alone = (write(run, tmp_path / n, without_base=n == "alone") for n in ("whole", "alone"))
  assert list(alone) == ["task03", "task01"] and list(whole) == ["base", *alone]
  assert alone["task01"] == whole["task01"]
  shutil.copy(base, tmp_path / "moved.safetensors")
  shared = safetensors.load_file(tmp_path / "whole/base.safetensors")
  added = safetensors.load_file(tmp_path / "alone/task01.safetensors")
  besides = {k for k in shared if not k.endswith("/kernel")}
  assert besides >= (PRIVATE[private][1] or set()) and bool(besides) == (private != "all")
  assert not besides & added.keys(), "what all tasks have in common is stored once"
  image = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
  for t, task in enumerate((3, 1)):
    model = export.load(tmp_path / "alone", task, base=str(tmp_path / "moved.safetensors"))
    beside = export.load(tmp_path / "whole", task)
    equal(model.variables, beside.variables)
    equal(model.classify(image), beside.classify(image))
    equal(model.variables, export.load(tmp_path / "whole", task, base).variables)
    expected = saved.make_classifier(run, t)(image)
    np.testing.assert_allclose(model.classify(image), expected, atol=1e-5)
    network = run.method.network(run.method.served(run.state), run.state.tasks[t])
    equal(model.variables["params"], export._cut_head(network.params, 10))


def test_another_base_is_refused(of_norm, tmp_path):
  folder, base = of_norm
  run = saved.open_run(folder)
  write(run, tmp_path / "out", without_base=True)
  card = json.loads((tmp_path / "out/task01.json").read_text())
  assert card["pretrained"]["name"] == "base.safetensors"
  digest = card["pretrained"]["sha256"]
  with pytest.raises(UserError, match=rf"task01.*: was written without its base: .*'.*{digest}"):
    export.load(tmp_path / "out", 1)
  other = write_base(tmp_path / "other.safetensors", VIT, seed=1)
  with pytest.raises(UserError, match=rf"other.*: its SHA-256 is \w{{64}}, and .*{digest}"):
    export.load(tmp_path / "out", 1, base=other)
  with pytest.raises(UserError, match="base=nowhere: can't be read"):
    export.load(tmp_path / "out", 1, base="nowhere")
  file = tmp_path / "out/task01.json"
  file.write_text(json.dumps(card | {"base": "0" * 64}))
  with pytest.raises(UserError, match="this machine makes other numbers"):
    export.load(tmp_path / "out", 1, base=base)
  write(run, tmp_path / "whole")
  del card["pretrained"]
  (tmp_path / "whole/task01.json").write_text(json.dumps(card))
  with pytest.raises(UserError, match="its base is base beside it, .*: leave out base="):
    export.load(tmp_path / "whole", 1, base=base)


def test_an_array_of_the_base_that_was_changed_is_refused(of_norm, tmp_path):
  run = saved.open_run(of_norm[0])
  write(run, tmp_path)
  file = tmp_path / "base.safetensors"
  arrays = safetensors.load_file(file)
  whole = dict(arrays)
  del arrays["params/positions"]
  safetensors.save_file(arrays, file)
  with pytest.raises(UserError, match="base.safetensors: was changed after it was written"):
    export.load(tmp_path, 1)
  card = json.loads((tmp_path / "base.json").read_text())
  for name in ("base", "task01"):
    own = json.loads((tmp_path / f"{name}.json").read_text())
    own |= {"hash" if name == "base" else "base": checkpoint.fingerprint(arrays)}
    (tmp_path / f"{name}.json").write_text(json.dumps(own))
  with pytest.raises(UserError, match="task01.safetensors: params/positions is missing"):
    export.load(tmp_path, 1)
  (tmp_path / "base.json").write_text(json.dumps(card))
  safetensors.save_file(whole | {"params/head/bias": np.zeros(10, np.float32)}, file)
  with pytest.raises(UserError, match="unexpected params/head/bias"):
    export.load(tmp_path, 1)


def test_the_command_writes_it_and_says_when_it_can_not(of_norm, tmp_path, capsys):
  def call(*arguments):
    code = verbs.main(["halrp", "export", f"--workdir={of_norm[0]}", *arguments])
    return code, *capsys.readouterr()

  code, out, _ = call(f"--out={tmp_path / 'out'}", "--without_base", "--task=id:1")
  assert code == 0 and "base " not in out and "task01" in out
  assert {p.name for p in (tmp_path / "out").iterdir()} == {"task01.json", "task01.safetensors"}
  for more in ("--merge", "--format=stablehlo"):
    code, _, err = call(f"--out={tmp_path / 'no'}", "--without_base", more)
    assert code == 2 and "do not write: leave it out" in err and not (tmp_path / "no").exists()


def test_a_base_that_the_first_task_trained_is_no_file(tmp_path):
  folder, _ = learn(tmp_path, "all", base_training="all")
  run = saved.open_run(folder)
  with pytest.raises(UserError, match="with base_training=head, none or perturb"):
    write(run, tmp_path / "out", without_base=True)
  write(run, tmp_path / "out")
  assert "pretrained" not in json.loads((tmp_path / "out/task01.json").read_text())


def test_an_extended_run_still_knows_its_base(tmp_path):
  """Whose first task is learned as the later ones are."""
  folder, base = learn(tmp_path, "all", base_training="perturb")
  draw(tmp_path / "lights")
  saved.extend(saved.open_run(folder), str(tmp_path / "lights"), str(tmp_path / "more"))
  run = saved.open_run(str(tmp_path / "more"))
  sizes = dict(export.write(run, str(tmp_path / "out"), [0, 1, 2], "safetensors", False, True))
  assert len(sizes) == 3
  loaded = export.load(tmp_path / "out", run.learned[2].id, base=base)
  image = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
  expected = saved.make_classifier(run, 2)(image)
  np.testing.assert_allclose(loaded.classify(image), expected, atol=1e-5)
