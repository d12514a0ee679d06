"""Checks this machine, the files of a run and the data.

  python -m halrp_jax doctor [--workdir=RUN] [--data_dir=DIR]

Prints versions and devices, with a short numerical test of each device. For a run, verifies every
file and prints the sizes and ranks of its tasks. For a data folder, prints which data sets it
holds, with numbers of images and hashes. Lines that begin with "WRONG" say what is wrong and what
to do; the exit code is then 1.
"""

import importlib.metadata
import pathlib
import platform
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import halrp_jax
from halrp_jax import arguments, data, files, keys
from halrp_jax.config import make_config, resolve
from halrp_jax.data import sources
from halrp_jax.devices import faults
from halrp_jax.nn import layers
from halrp_jax.nn.norm import BatchNorm
from halrp_jax.runs import checkpoint, states
from halrp_jax.types import CONFIG, RECORD, UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
_TOLERANCE = 2e-2  # relative; the matrix units of GPUs and TPUs may round to as few as 10 bits

Finding = tuple[str, str]  # what was checked, and what to do about it ("": nothing, it is right)


def main(argv: list[str]) -> int:
  """Prints the findings; returns 1 if anything is wrong."""
  parser = arguments.parser("doctor", __doc__)
  parser.add_argument("--workdir", default="", help="folder of a run to verify")
  parser.add_argument("--data_dir", default="", help="folder of original data files to check")
  options = parser.parse_args(argv)
  findings = [*_versions(), *_devices()]
  if options.workdir:
    findings += _run(options.workdir)
  if options.data_dir:
    findings += _data(options.data_dir)
  for line, remedy in findings:
    print(f"WRONG  {line}: {remedy}" if remedy else f"ok     {line}")
  wrong = sum(bool(remedy) for _, remedy in findings)
  print(f"{wrong} of {len(findings)} checks are wrong" if wrong else "all is well")
  return 1 if wrong else 0


# --- this machine ---------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
  """Lists the versions of Python and of the packages."""
  yield f"halrp_jax {halrp_jax.__version__}, python {platform.python_version()}", ""
  yield ", ".join(f"{n} {importlib.metadata.version(n)}" for n in _PACKAGES), ""


def _devices() -> Iterator[Finding]:
  """Tests every device of this process."""
  if line := faults.unusable():
    yield "devices", line
    return
  for device in jax.local_devices():
    with jax.default_device(device):
      for what, error in _self_test().items():
        line = f"{device.device_kind} ({device}): {what}, relative error {error:.1e}"
        is_right = np.isfinite(error) and error < _TOLERANCE
        remedy = "do not use this device; check its driver and the version of jaxlib"
        yield line, "" if is_right else remedy


def _self_test() -> dict[str, float]:
  """Returns the relative errors of this package's layers, against plain lax, and of the SVD."""
  keys = jax.random.split(jax.random.key(0), 3)
  image = jax.random.normal(keys[0], (8, 16, 16, 20))
  kernel = jax.random.normal(keys[1], (5, 5, 20, 50))

  def plain(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  def ours(x, w):
    conv = layers.conv(50, 5, padding=2, name="conv")
    return jnp.asarray(conv.apply({"params": {"kernel": w}}, x))

  def gradients(fn):
    return jax.grad(lambda x, w: jnp.sum(fn(x, w) ** 2), argnums=(0, 1))(image, kernel)

  matrix = jax.random.normal(keys[2], (300, 200))
  u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
  norm = BatchNorm(running=False, relu=True, pool=2)
  normed = jnp.asarray(norm.apply(norm.init(keys[0], image, train=False), image, train=False))
  mean, std = image.mean((0, 1, 2)), image.std((0, 1, 2))
  expected = jnp.maximum((image - mean[None, None, None]) / std[None, None, None], 0)
  expected = expected.reshape(8, 8, 2, 8, 2, 20).max((2, 4))
  return {
    "convolution": _error(ours(image, kernel), plain(image, kernel)),
    "its gradients": max(map(_error, gradients(ours), gradients(plain))),
    "batch normalisation": _error(normed, expected),
    "SVD": _error((u * s[None]) @ vt, matrix),
  }


def _error(found: jax.Array, expected: jax.Array) -> float:
  """Returns the norm of the difference relative to the norm of `expected`."""
  return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


# --- a run ----------------------------------------------------------------------------


def _run(path: str) -> Iterator[Finding]:
  """Verifies the files of a run, and compares its model with its record."""
  items, state, results = states.inspect(path)
  folder = pathlib.Path(path)
  config, broken = _json(folder / CONFIG, "restore a copy of it, or start anew with --overwrite")
  yield f"{folder / CONFIG}{_summary(config)}", broken
  for item in items:
    line = f"{item['name']}: {item['files']} files, {item['bytes']:,} bytes"
    if strays := item["strays"]:
      line += f"; with files of other programs, which do no harm: {', '.join(strays)}"
    remedy = f"{item['problem']}; start the run again: it resumes from the newest complete state"
    yield line, remedy if item["problem"] else ""
  rows = results.get("rows", [])
  for t, row in enumerate(rows):
    ranks = " ".join(f"{k}:{v}" for k, v in (row["ranks"] or {}).items())
    size = f"{row['size']['nonzero']:,} non-zero numbers, growth {100 * row['increment']:+.1f} %"
    yield f"task {t + 1}: {size}" + (f", ranks {ranks}" if ranks else ""), ""
  if not (folder / RECORD).exists():
    yield f"{len(rows)} tasks learned, not finished; the command of the run resumes it", ""
    return
  record, broken = _json(folder / RECORD, "delete it: the command of the run writes it again")
  yield f"{folder / RECORD}", broken
  if state is None:
    yield "no state is complete", "the model is lost; learn it again with --overwrite"
  elif not broken:
    is_same = checkpoint.fingerprint(state) == record.get("state_hash")
    remedy = "the newest complete state has another hash; start the run again with --overwrite"
    yield "the model is the one of the record", "" if is_same else remedy


def _json(path: pathlib.Path, remedy: str) -> tuple[dict, str]:
  """Reads a JSON file; the second value says what to do if it can't be read, or is ""."""
  try:
    return files.load_json(path), ""
  except (OSError, ValueError) as e:
    return {}, f"can't be read ({e}); {remedy}"


def _summary(config: dict) -> str:
  """Returns the main keys of a config as one text."""
  flat = keys.flat(config)
  shown = ("method.name", "benchmark", "network", "order", "seed")
  return ": " + ", ".join(f"{k} {flat[k]}" for k in shown if k in flat) if flat else ""


# --- data -----------------------------------------------------------------------------


def _data(data_dir: str) -> Iterator[Finding]:
  """Looks for every data set, and loads the benchmarks whose data sets are there."""
  if not pathlib.Path(data_dir).expanduser().is_dir():
    raise UserError(f"--data_dir={data_dir}: no such folder")
  present = []
  for name in sources.ORIGINALS:
    try:
      files = sources.find(data_dir, name)
    except sources.Missing:
      yield f"{name}: not found", ""
    except UserError as e:
      yield name, str(e)
    else:
      present.append(name)
      yield f"{name}: {files.path}, {len(files.names):,} files", ""
  for benchmark, family in data.BENCHMARKS.items():
    if set(family.originals) & set(present):
      yield _load(benchmark, data_dir)


def _load(benchmark: str, data_dir: str) -> Finding:
  """Loads a benchmark as a run does, and counts its images."""
  config = make_config(
    "stl",
    benchmark=benchmark,
    data_dir=data_dir,
    order="natural",
    allow_partial=True,
    methods_={},
    protocol={"validation_fraction": 0.0},
  )
  try:
    found = data.load(resolve(config))
  except UserError as e:
    return benchmark, str(e)
  counts = [sum(len(getattr(t, s).index) for t in found.tasks) for s in ("train", "valid", "test")]
  train, valid, test = counts
  images = f"{train + valid:,} training and {test:,} test images"
  partial = ", fewer than the protocol asks for (allow_partial)" if found.partial else ""
  line = f"{benchmark}: {len(found.tasks)} tasks, {images}{partial}"
  return f"{line}, split hash {found.split_hash[:16]}", ""
