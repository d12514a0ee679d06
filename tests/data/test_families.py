"""Every benchmark family: what the protocol asks for, and tasks made of small originals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import io as scipy_io

from halrp_jax import arguments, data, methods
from halrp_jax.config import resolve
from halrp_jax.runs import experiment
from halrp_jax.training import batches
from halrp_jax.types import UserError

from ..conftest import ROOT
from . import originals

# --- what the protocols ask for (spec b and c) --------------------------------------------

# config -> tasks, classes, train, valid, test, parameters
ASKED = {
  "cifar100_split": (10, 10, 4000, 1000, 1000, 2_995_620),
  "cifar100_superclass": (20, 5, 2000, 500, 500, 2_993_115),
  "saha_superclass": (20, 5, 2375, 125, 500, 2_989_000),
  "pmnist": (10, 10, 48_000, 12_000, 10_000, 2_995_620),
  "omniglot_rotation": (100, 12, 720, 0, 240, 24_466_988),
  "tinyimagenet20_alexnet": (20, 10, 4500, 500, 500, 23_310_666),
  "tinyimagenet20_resnet18": (20, 10, 4500, 500, 500, 2_838_410),
  "tinyimagenet20": (20, 10, 4500, 500, 500, 2_838_410),
  "tinyimagenet40_alexnet": (40, 5, 2250, 250, 250, 23_300_421),
  "tinyimagenet40_resnet18": (40, 5, 2250, 250, 250, 2_817_925),
  "tinyimagenet40": (40, 5, 2250, 250, 250, 2_817_925),
  "pmnist20_mlp": (20, 10, 48_000, 12_000, 10_000, 269_322),
  "iru_pmnist20": (20, 10, 60_000, 0, 10_000, 269_322),
  "cifar100_split_pretrained": (10, 10, 4000, 1000, 1000, 3_383_818),
  "cifar100_20_mlp": (20, 5, 2000, 500, 500, 853_765),
  "cifar100_20_resnet18": (20, 5, 2000, 500, 500, 2_802_565),
  "five_datasets_alexnet": (5, 10, None, None, None, 6_533_450),
  "five_datasets_resnet18": (5, 10, None, None, None, 2_807_690),
}


def config_file(name, *more):
  return arguments.parse_config(["x", f"--config={ROOT}/configs/{name}.py", *more], {}, {}).config


def test_every_config_is_here():
  names = {p.stem for p in (ROOT / "configs").glob("*.py")}
  ablations = {"ablation_table6", "ablation_lambda_split", "ablation_lambda_superclass"}
  assert names == {
    *ASKED,
    *ablations,
    "digits",
    "custom",
    "pretrained",
  }  # ablations: test_reproduce.py


@pytest.mark.parametrize("name", ASKED)
def test_the_plan_is_the_protocol_also_without_data(name):
  num_tasks, classes, *sizes, parameters = ASKED[name]
  plan = experiment.plan(config_file(name))
  assert "data_dir is not set" in plan["missing"]
  assert len(plan["tasks"]) == num_tasks and plan["parameters"] == parameters
  assert sorted(t["id"] for t in plan["tasks"]) == list(range(num_tasks))
  for task in plan["tasks"]:
    assert task["num_classes"] == classes
    if None not in sizes:
      assert [task[s] for s in ("train", "valid", "test")] == sizes


def test_the_plan_of_five_datasets():
  plan = experiment.plan(config_file("five_datasets_alexnet"))
  found = {t["name"]: [t[s] for s in ("train", "valid", "test")] for t in plan["tasks"]}
  assert found == {
    "cifar10": [40_000, 10_000, 10_000],
    "mnist": [48_000, 12_000, 10_000],
    "svhn": [58_606, 14_651, 26_032],
    "fashion_mnist": [48_000, 12_000, 10_000],
    "notmnist": [13_484, 3_370, 1_870],
  }


TABLE8 = {
  "cifar100_split/LeNet": "cifar100_split",
  "cifar100_superclass/LeNet": "cifar100_superclass",
  "pmnist/LeNet": "pmnist",
  "five_dataset/AlexNet": "five_datasets_alexnet",
  "five_dataset/ResNet18": "five_datasets_resnet18",
  "omniglot_rotation/extended_LeNet": "omniglot_rotation",
  "tinyimagenet_40split/AlexNet": "tinyimagenet40_alexnet",
  "tinyimagenet_40split/ResNet18": "tinyimagenet40_resnet18",
  "tinyimagenet_20split/AlexNet": "tinyimagenet20_alexnet",
  "tinyimagenet_20split/ResNet18": "tinyimagenet20_resnet18",
}


def test_hyper_parameters_are_those_of_table_8():
  spec = ROOT.parent / "shared" / "spec" / "paper_results.json"
  if not spec.is_file():
    pytest.skip("no ../shared/spec here")
  table = json.loads(spec.read_text())["table8_hyperparameters"]
  assert table.keys() == TABLE8.keys()
  for key, paper in table.items():
    config = config_file(TABLE8[key]).to_dict()
    ours = {
      "n_epochs": config["epochs"],
      "warmup_epochs_nr": config["method"]["warmup_epochs"],
      "alpha": config["method"]["alpha"],
      "lr": config["learning_rate"],
      "lambda0_l1": config["method"]["l1"],
      "lambda1_l2": config["method"]["l2"],
      "batch_size": config["batch_size"],
    }
    assert ours == paper, key


@pytest.mark.parametrize("name", sorted({*ASKED, "custom", "digits"}))
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_config_fits_every_method(name, method):
  config = arguments.parse_config(
    ["x", f"--config={ROOT}/configs/{name}.py:{method}"], {}, {}
  ).config
  assert resolve(config).method.name == method


# --- P-MNIST ------------------------------------------------------------------------------


def stored(folder):
  """Images of the synthetic MNIST as its files have them."""
  files = {}
  for part in ("train", "t10k"):
    raw = (folder / "mnist" / f"{part}-images-idx3-ubyte").read_bytes()
    files[part] = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
  return np.concatenate([files["train"], files["t10k"]])


@pytest.fixture
def mnist_folder(tmp_path):
  originals.mnist(tmp_path, zipped=False)
  return tmp_path


def test_pmnist_permutes_as_the_authors_program(mnist_folder):
  """Resize, three channels, flatten in the order channel, row, column, permute, normalise."""
  written = (2, 8, 4, 9, 1, 6, 7, 3, 0, 5)
  images = stored(mnist_folder)
  benchmark = data.load(originals.config_of("pmnist", mnist_folder))
  assert benchmark.image_shape == (32, 32, 3) and benchmark.partial
  for task in (benchmark.tasks[3], benchmark.tasks[8]):
    seed = 100 * task.id + written.index(task.id)
    permutation = np.random.RandomState(seed).permutation(3072)
    for split in (task.train, task.test):
      got, _ = batches.load_batch(split, task.inputs, np.arange(5))
      for x, row in zip(np.asarray(got), np.asarray(split.index), strict=False):
        small = Image.fromarray(images[row]).resize((32, 32), Image.Resampling.BILINEAR)
        planes = np.stack([np.asarray(small) / 255] * 3).reshape(-1)[permutation]
        want = (planes.reshape(3, 32, 32) - 0.1307) / 0.3081
        np.testing.assert_allclose(x, want.transpose(1, 2, 0), atol=1e-5)


def test_pmnist_as_it_is(mnist_folder):
  config = originals.config_of("pmnist", mnist_folder)
  values = config.to_dict()
  values["data"]["mnist_size"] = 28
  benchmark = data.load(resolve(values))
  assert benchmark.image_shape == (28, 28, 1)
  assert sorted(np.asarray(benchmark.tasks[0].inputs.permutation)) == list(range(784))


@pytest.mark.parametrize("benchmark", ["pmnist", "pmnist20", "digits"])
@pytest.mark.parametrize("count", [2, 23])
def test_more_tasks_or_fewer_are_permuted_by_the_same_rule(benchmark, count, mnist_folder):
  config = originals.config_of(benchmark, mnist_folder)
  more = originals.config_of(benchmark, mnist_folder, {"num_tasks": count})
  own, found = data.load(config).tasks, data.load(more).tasks
  assert len(found) == count
  permutations = [np.asarray(task.inputs.permutation) for task in found]
  for task, permutation in zip(own, permutations, strict=False):
    np.testing.assert_array_equal(task.inputs.permutation, permutation)
  assert len({x.tobytes() for x in permutations}) == count
  seeded = dataclasses.replace(more, order="3")
  expected = np.random.RandomState(3).permutation(count)
  assert [task["id"] for task in data.planned(seeded)[1]] == expected.tolist()


def test_omniglot_has_characters_for_35_tasks_more(tmp_path):
  originals.omniglot(tmp_path, characters=26)
  own, two = (
    data.load(originals.config_of("omniglot_rotation", tmp_path, keys)).tasks
    for keys in ({}, {"num_tasks": 2})
  )
  assert [task.num_classes for task in own] == [12, 12, 2]
  assert [task.num_classes for task in two] == [12, 12]
  np.testing.assert_array_equal(
    own[1].train.image[own[1].train.index], two[1].train.image[two[1].train.index]
  )
  with pytest.raises(UserError, match="data.num_tasks = 136: omniglot_rotation has 135 at most"):
    data.load(originals.config_of("omniglot_rotation", tmp_path, {"num_tasks": 136}))


def test_other_benchmarks_have_their_own_number_of_tasks(tmp_path):
  with pytest.raises(UserError, match="data.num_tasks = 3: cifar100_split has its own number"):
    originals.config_of("cifar100_split", tmp_path, {"num_tasks": 3})


def test_pmnist20_shuffles_add_up(mnist_folder):
  tasks = data.load(originals.config_of("pmnist20", mnist_folder)).tasks
  permutations = [np.asarray(t.inputs.permutation) for t in tasks]
  np.testing.assert_array_equal(permutations[0], np.arange(784))
  values = np.arange(784)
  for seed in (100, 200, 300):
    np.random.RandomState(seed).shuffle(values)
  np.testing.assert_array_equal(permutations[3], values)
  assert len({p.tobytes() for p in permutations}) == 20


# --- Five-dataset -------------------------------------------------------------------------


@pytest.fixture
def five_folder(tmp_path):
  originals.mnist(tmp_path)
  originals.mnist(tmp_path, "fashion_mnist")
  originals.cifar10(tmp_path)
  originals.notmnist(tmp_path)
  return tmp_path


def test_a_missing_set_is_left_out_and_said(five_folder):
  config = originals.config_of("five_datasets", five_folder)
  with pytest.warns(UserWarning, match="svhn is left out"):
    benchmark = data.load(config)
  assert benchmark.partial and [t.id for t in benchmark.tasks] == [0, 1, 3, 4]
  values = config.to_dict() | {"allow_partial": False}
  with pytest.raises(UserError, match="svhn/ with train_32x32.mat"):
    data.load(resolve(values))


def test_five_sets_in_one_array(five_folder):
  originals.svhn(five_folder)
  config = originals.config_of("five_datasets", five_folder)
  benchmark = data.load(resolve(config.to_dict() | {"order": "0"}))
  assert [t.name for t in benchmark.tasks] == [
    "svhn",
    "cifar10",
    "mnist",
    "fashion_mnist",
    "notmnist",
  ]
  svhn, cifar10, mnist, fashion, notmnist = benchmark.tasks
  assert all(t.train.image is svhn.train.image for t in benchmark.tasks)
  row = int(np.asarray(svhn.train.index).min())  # the first training image of its file
  first = scipy_io.loadmat(five_folder / "svhn" / "train_32x32.mat")
  np.testing.assert_array_equal(svhn.train.image[row], first["X"][..., 0])
  record = np.frombuffer(
    (five_folder / "cifar-10-batches-bin/test_batch.bin").read_bytes(), np.uint8
  )
  np.testing.assert_array_equal(
    cifar10.test.image[int(cifar10.test.index[0])],
    record[1:3073].reshape(3, 32, 32).transpose(1, 2, 0),
  )
  for task in (mnist, fashion, notmnist):
    image = np.asarray(task.train.image[np.asarray(task.train.index)])
    assert (image[..., :1] == image).all()  # grey
    assert not image[:, :2].any() and not image[:, :, -2:].any() and image[:, 2:30, 2:30].any()
  assert len(notmnist.test.index) == 10 and len(notmnist.train.index) == 90
  assert not np.array_equal(
    mnist.train.image[np.asarray(mnist.test.index)],
    mnist.train.image[np.asarray(fashion.test.index)],
  )


# --- Omniglot -----------------------------------------------------------------------------


def test_omniglot_turns_every_drawing(tmp_path):
  originals.omniglot(tmp_path, characters=14)
  benchmark = data.load(originals.config_of("omniglot_rotation", tmp_path))
  first, second = benchmark.tasks
  assert (first.num_classes, second.num_classes) == (12, 2) and benchmark.partial
  assert benchmark.image_shape == (32, 32, 1)
  assert [len(s.index) for s in (first.train, first.test)] == [720, 240]
  assert (np.bincount(np.asarray(first.train.label)) == 60).all()
  assert not set(np.asarray(first.train.index)) & set(np.asarray(first.test.index))
  image = np.asarray(first.train.image)[..., 0]
  for turn in range(4):  # the first drawing of the first character lies first
    np.testing.assert_array_equal(image[turn], np.rot90(image[0], turn))
  assert first.class_names[0] == "Alphabet/character01"


def test_omniglot_from_folders_is_the_same(tmp_path):
  import zipfile

  originals.omniglot(tmp_path)
  config = originals.config_of("omniglot_rotation", tmp_path)
  zipped = data.load(config).split_hash
  for path in (tmp_path / "omniglot").glob("*.zip"):
    with zipfile.ZipFile(path) as archive:
      archive.extractall(path.parent)
    path.unlink()
  assert data.load(config).split_hash == zipped


def test_omniglot_without_what_systems_leave_behind(tmp_path):
  import zipfile

  originals.omniglot(tmp_path)
  config = originals.config_of("omniglot_rotation", tmp_path)
  clean = data.load(config).split_hash
  path = tmp_path / "omniglot" / "images_background.zip"
  with zipfile.ZipFile(path, "a") as archive:
    for name in (
      "Alphabet/character01/._0001_00.png",
      ".cache/character99/0.png",
      "@eaDir/c/0.png",
    ):
      archive.writestr(f"images_background/{name}", b"x")
  assert data.load(config).split_hash == clean
  with zipfile.ZipFile(path) as archive:
    archive.extractall(path.parent)
  path.unlink()
  assert data.load(config).split_hash == clean


def test_a_character_without_all_its_drawings_is_refused(tmp_path):
  originals.omniglot(tmp_path, drawings=19)
  config = originals.config_of("omniglot_rotation", tmp_path)
  with pytest.raises(UserError, match="character01 has 19 drawings, expected 20"):
    data.load(resolve(config.to_dict() | {"allow_partial": False}))


# --- TinyImageNet -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny")
  originals.tiny_imagenet(folder)
  return folder


def tiny_config(folder, benchmark="tinyimagenet40", **data_keys):
  config = originals.config_of(benchmark, folder)
  values = config.to_dict()
  values["data"] |= data_keys
  return resolve(values)


def rows(split):
  return set(np.asarray(split.index).tolist())


def test_tiny_imagenet_swaps_its_splits_as_published(tiny_folder):
  published = data.load(tiny_config(tiny_folder)).tasks
  official = data.load(tiny_config(tiny_folder, tiny_test="official")).tasks
  assert len(published) == 40 and published[0].num_classes == 5
  for a, b in zip(published, official, strict=True):
    assert rows(a.test) == rows(b.valid) and rows(a.valid) == rows(b.test)
    assert rows(a.train) == rows(b.train)
    assert not rows(a.train) & rows(a.test) and max(rows(a.train)) < 2000 <= min(rows(a.valid))
    assert [len(rows(s)) for s in (a.train, a.valid, a.test)] == [45, 10, 5]
  assert published[0].class_names[0] == "thing n00000000, stuff"


def test_tiny_imagenet_folder_and_zip_are_the_same(tiny_folder, tmp_path):
  folder_hash = data.load(tiny_config(tiny_folder)).split_hash
  originals.tiny_imagenet(tmp_path)
  originals.zipped(tmp_path, "tiny-imagenet-200", "tiny-imagenet-200.zip")
  assert data.load(tiny_config(tmp_path)).split_hash == folder_hash


def test_tiny_imagenet_without_what_systems_leave_behind(tmp_path):
  originals.tiny_imagenet(tmp_path)
  clean = data.load(tiny_config(tmp_path)).split_hash
  place = tmp_path / "tiny-imagenet-200" / "train"
  (place / ".ipynb_checkpoints" / "images").mkdir(parents=True)
  for name in (".ipynb_checkpoints/images/x.JPEG", "n00000003/images/._n00000003_1.JPEG"):
    (place / name).write_bytes(b"x")
  class_folder = place / "n00000005"
  class_folder.rename(tmp_path / "elsewhere")
  class_folder.symlink_to(tmp_path / "elsewhere")
  assert data.load(tiny_config(tmp_path)).split_hash == clean
  class_folder.unlink()
  class_folder.symlink_to("/mnt/gone")
  with pytest.raises(UserError, match="n00000005: a link to /mnt/gone, which can't be read"):
    data.load(tiny_config(tmp_path))


def test_grey_jpegs_become_rgb(tiny_folder):
  task = data.load(tiny_config(tiny_folder)).tasks[0]
  image = np.asarray(task.train.image)
  grey = (image == image[..., :1]).all((1, 2, 3))
  assert image.shape[1:] == (64, 64, 3) and 0 < grey.sum() < len(image) / 2


@pytest.mark.parametrize(
  ("damage", "says"),
  [
    (lambda p: p.write_bytes(p.read_bytes()[:300]), r"n00000007_3.JPEG: not a PNG or JPEG"),
    (
      lambda p: p.write_bytes(originals.picture(np.random.default_rng(0), (60, 64, 3), "JPEG")),
      r"n00000007_3.JPEG: 64 x 60 pixels, expected 64 x 64",
    ),
    (lambda p: [x.unlink() for x in p.parent.iterdir()], "class n00000007 has no training images"),
  ],
)
def test_tiny_imagenet_names_what_is_damaged(tmp_path, damage, says):
  originals.tiny_imagenet(tmp_path)
  damage(tmp_path / "tiny-imagenet-200/train/n00000007/images/n00000007_3.JPEG")
  with pytest.raises(UserError, match=says):
    data.load(tiny_config(tmp_path))


def test_crops_and_flips():
  """Every result is a crop of the padded image or its mirror image; all offsets occur."""
  image = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(600, axis=0)
  crop = jax.jit(batches.crop_and_flip)
  got = np.asarray(crop(jax.random.key(0), image))
  padded = np.pad(image[0, :, :, 0], 4)
  known = {}
  for i in range(9):
    for j in range(9):
      x = padded[i : i + 8, j : j + 8]
      known[x.tobytes()], known[x[:, ::-1].tobytes()] = (i, j, False), (i, j, True)
  seen = {known[x[..., 0].tobytes()] for x in got}
  assert len(seen) > 150  # of 162
  np.testing.assert_array_equal(got, crop(jax.random.key(0), image))


# --- the real images ----------------------------------------------------------------------

REAL = {  # benchmark -> tasks, training and validation images, test images
  "pmnist": (10, 600_000, 100_000),
  "pmnist20": (20, 1_200_000, 200_000),
  "omniglot_rotation": (100, 72_000, 24_000),
  "cifar100_20": (20, 50_000, 10_000),
  "five_datasets": (4, 87_000, 22_000),
  "tinyimagenet20": (20, 5_600, 400),
  "tinyimagenet40": (40, 5_600, 400),
}


@pytest.mark.filterwarnings("ignore:svhn is left out")
@pytest.mark.parametrize("benchmark", REAL)
def test_real_images(real_data, benchmark):
  found = data.load(originals.config_of(benchmark, real_data))
  counts = [sum(len(getattr(t, s).index) for t in found.tasks) for s in ("train", "valid", "test")]
  assert (len(found.tasks), counts[0] + counts[1], counts[2]) == REAL[benchmark]
  assert found.partial == (benchmark.startswith(("five", "tiny")))
