"""The parts of `accelerator.py`: each is a generator of results and runs in a process of its own.

  python benchmarks/accelerator_parts.py PART TARGET [--smoke] [--data_dir=PATH]

The measurement starts when a line arrives on the standard input, so that importing modules takes no
time of the measurement. A result, called a row, is a line of JSON on the standard output with
"name", "value", "unit" and further fields.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata

from halrp_jax.devices import allocator, environment

if __name__ == "__main__":
  allocator.tune()
  environment.prepare()

import accelerator
import jax
import jax.numpy as jnp
import mixed_batches
import numpy as np
import pretrained_step
import replicas
import svd
import throughput
from accelerator_steps import compile_clock, learn, make, measure_steps, row
from jax import lax

from halrp_jax import arguments
from halrp_jax.commands import doctor
from halrp_jax.runs import experiment, sweep
from halrp_jax.training import batches
from halrp_jax.training import evaluate as evaluation

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "numpy", "scipy", "torch")


def about() -> dict:
  """Returns the device and the versions of the packages."""
  versions = {"python": platform.python_version()}
  for name in PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      versions[name] = metadata.version(name)
  device = jax.devices()[0]
  devices = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
  return {"device": devices, "host_cores": os.cpu_count(), "versions": versions}


# --- the parts --------------------------------------------------------------------------


def device(target, options):
  """Measures the self-test, the precision of float32 products, peak rates, the cost of a call."""
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    code = doctor.main([])
  yield row("doctor", code, "exit code", said=said.getvalue().splitlines())
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 512, 512)).astype(np.float32)
  exact = a.astype(np.float64) @ b
  for precision in ("default", "highest"):
    got = np.asarray(jax.jit(functools.partial(jnp.matmul, precision=precision))(a, b))
    error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    kind = "float32" if error < 1e-5 else "tf32 or less"
    yield row(f"float32 product, {precision}", error, "relative error", kind=kind)
  size = 1024 if options.smoke else 8192
  for dtype, precision in (("float32", "highest"), ("float32", "default"), ("bfloat16", "default")):
    rate = throughput.matrix_product_rate(size, dtype, precision) / 1e3
    yield row(f"product {size}^3 {dtype} {precision}", rate, "TFLOP/s", ceiling=dtype)
  x = jnp.ones(2 ** (24 if options.smoke else 28), jnp.float32)
  add = jax.jit(lambda x: x + 1)
  seconds = throughput.measure(lambda: add(x).block_until_ready(), 10)
  yield row("device memory, read and written", 2 * x.nbytes / seconds / 1e9, "GB/s")
  host = np.asarray(x[: x.size // 4])
  there = throughput.measure(lambda: jax.device_put(host).block_until_ready(), 3)
  back = throughput.measure(lambda: np.asarray(add(x[: host.size])), 3)
  yield row("host to device", host.nbytes / there / 1e9, "GB/s")
  yield row("device to host", host.nbytes / back / 1e9, "GB/s")
  one = jax.device_put(np.float32(1))

  def calls(finish):
    y = one
    for _ in range(1000):
      y = add(y)
      finish(y)
    return y.block_until_ready()

  for name, finish in (
    ("a call, not waited for", lambda y: None),
    ("a call, waited for", lambda y: y.block_until_ready()),
    ("a call, its number read", float),
  ):
    seconds = throughput.measure(functools.partial(calls, finish), 2)
    yield row(name, 1e3 * seconds, "us")  # `seconds` are those of 1,000 calls


def steps(target, options):
  """Measures the training steps of a network with both loops."""
  setting, precision = target.split(":")
  clock = compile_clock()
  for loop in ("scan", "steps"):
    yield from measure_steps(setting, precision, options.smoke, clock, loop=loop)


def torch(target, options):
  """Measures PyTorch's steps, one round after every epoch of ours."""
  setting, precision = target.split(":")
  made = make(setting, "stl", options.smoke, precision=precision)
  config, benchmark, _, _ = made
  num_steps = config.steps_per_epoch(len(benchmark.tasks[0].train.index))

  def ask(mode):
    print(json.dumps([mode, num_steps]), file=options.peer.stdin, flush=True)
    return json.loads(options.peer.stdout.readline())

  for mode in ("eager", "reduce-overhead", "default"):
    name = f"{target.replace(':', ' ')} {mode}"
    first = ask(mode)
    if "error" in first:
      yield row(name, None, "", error=first["error"])
      continue
    ours, theirs, peak = [], [], 0

    def watch(event, mode=mode, ours=ours, theirs=theirs):
      if event["event"] == "epoch" and event["epoch"] > 1:
        ours.append(event["seconds"] / num_steps)
        theirs.append(ask(mode))

    learn(made, 1, watch)
    ratios = sorted(t["seconds"] / s for s, t in zip(ours, theirs, strict=True))
    peak = theirs[-1].get("peak_bytes", 0)
    yield row(
      name,
      1e3 * statistics.median(t["seconds"] for t in theirs),
      "ms",
      ours_ms=1e3 * statistics.median(ours),
      ratio=statistics.median(ratios),  # PyTorch's time / ours: above 1, ours is faster
      spread=[ratios[0], ratios[-1]],
      first_seconds=first["first"],
      torch_peak_mib=peak / 2**20,
    )


def split(target, options):
  """Measures complete runs of CIFAR100-Split as from the command line."""
  with tempfile.TemporaryDirectory() as folder:
    said = accelerator.originals(options.data_dir, folder, options.smoke)
    how = [f"--config.data_dir={folder}"]
    if options.smoke:
      how += [f"--config.{k}" for k in ("allow_partial=True", "network=mlp", "epochs=2")]
    for method in ("halrp", "stl"):
      config = arguments.load_config(str(ROOT / "configs/cifar100_split.py"), method, how)
      start = time.perf_counter()
      record = experiment.run(config, f"{folder}/{method}")
      seconds = {k: sum(s[k] for s in record["seconds"]) for k in record["seconds"][0]}
      yield row(
        f"CIFAR100-Split 100 % {method}",
        time.perf_counter() - start,
        "s",
        acc=record["average_accuracy"] if options.data_dir else None,
        images=said,
        seconds=seconds,
        peak_mib=record["peak_memory_bytes"] / 2**20,
        growth=record["increment"][-1],
      )


def svd_(target, options):
  """Measures the exact and the randomised SVD on the device or on the host."""
  where = jax.devices("cpu" if target == "host" else None)[0]
  rows, columns, rank = (512, 256, 64) if options.smoke else (9216, 2048, 256)
  with jax.default_device(where):
    got = svd.compare(rows, columns, rank)
  for name in ("randomised", "exact"):
    yield row(f"SVD {rows} x {columns} {name}, {target}", got.pop(name), "s", **got)


def evaluate(target, options):
  """Measures `evaluate` on 20 tasks, and what it would gain by waiting less often for results."""
  num_tasks = 5 if options.smoke else 20
  network = "mlp" if options.smoke else "lenet"
  made = make(network, "halrp", options.smoke, num_tasks)
  _, benchmark, method, _ = made
  state = learn(made, 2)
  state = state._replace(tasks=(state.tasks[0], *[state.tasks[1]] * (num_tasks - 1)))
  on_host = [p._replace(num_classes=np.asarray(p.num_classes)) for p in state.tasks]
  num_images = sum(len(task.test.index) for task in benchmark.tasks)

  def run(state, size):
    predict = lambda i, image: method.predict(state, i, image)
    return evaluation.evaluate(predict, benchmark.tasks, "test", size)

  @jax.jit
  def whole(state, split, inputs, rows):
    num_classes = np.int32(benchmark.max_classes)
    state = state._replace(tasks=tuple(p._replace(num_classes=num_classes) for p in state.tasks))

    def one(hits, rows):
      image, label = batches.load_batch(split, inputs, rows)
      return hits + jnp.sum(jnp.argmax(method.predict(state, 1, image), -1) == label), None

    return lax.scan(one, 0, rows)[0]

  def at_once(size):
    rows = np.arange(len(benchmark.tasks[0].test.index)).reshape(-1, size)
    two = state._replace(tasks=state.tasks[:2])
    return jax.device_get([whole(two, t.test, t.inputs, rows) for t in benchmark.tasks])

  apart = state._replace(tasks=tuple(on_host))
  count = jax.jit(lambda logits, label: jnp.sum(jnp.argmax(logits, -1) == label))

  def read_last(size):
    hits = []
    for i, task in enumerate(benchmark.tasks):
      for rows in batches.consecutive(len(task.test.index), size):
        image, label = batches.load_batch(task.test, task.inputs, rows)
        hits.append(count(method.predict(apart, i, image), label))
    return jax.device_get(hits)

  for size in (25, 50) if options.smoke else (100, 500):
    for name, fn in (
      ("as it is", functools.partial(run, state, size)),
      ("number of classes on the host", functools.partial(run, apart, size)),
      ("and all results read at the end", functools.partial(read_last, size)),
      ("a program a task", functools.partial(at_once, size)),
    ):
      rate = num_images / throughput.measure(fn, 3)
      yield row(f"evaluate {num_tasks} tasks, batches of {size}, {name}", rate, "images/s")


def replicas_(target, options):
  """Measures 25 runs at once and a single run, without and with compiled programs in the cache."""
  numbers, suffixes = ("0,1", ("",)) if options.smoke else ("0,1,2,3,4", ("", " again"))
  epochs = 2 if options.smoke else 6
  of_method = ("--config.method.variant=published", "--config.method.warmup_epochs=1")
  how = [f"--config.epochs={epochs}", *of_method]
  how += ["--config.order=0,1"] * options.smoke  # two tasks
  config = arguments.load_config(str(ROOT / "configs/digits.py"), "halrp", how)
  orders = "" if options.smoke else numbers
  cells = sweep.cells({"halrp": config}, orders, numbers)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    for again in suffixes:
      alone, accuracy, _ = replicas.run(cells[:1], root / f"one{again}", False)
      yield row(f"one run{again}", alone, "s", acc=accuracy.mean())
      seconds, accuracy, _ = replicas.run(cells, root / f"all{again}", True)
      name = f"{len(cells)} runs at once{again}"
      yield row(name, seconds, "s", acc=accuracy.mean(), times_one=seconds / alone)


def predict_many(target, options):
  """Measures `predict_many` on batches with images of many tasks."""
  rounds = 3 if options.smoke else 15
  for num_tasks in (5,) if options.smoke else (10, 40):
    got = mixed_batches.compare(num_tasks, 64 if options.smoke else 256, [1, 4, 100, 33], rounds)
    yield row(f"predict_many {num_tasks} tasks", got.pop("many"), "ms", **got)


def devices(target, options):
  """Measures a step on one device and sharded over all devices."""
  if jax.device_count() < 2:
    yield row("several devices", 1, "device", note="a single device: nothing to shard")
    return
  clock = compile_clock()
  for setting in ("mlp",) if options.smoke else ("lenet", "resnet18_64"):
    for parallel in ("none", "auto"):
      yield from measure_steps(setting, "float32", options.smoke, clock, parallel=parallel)


def pretrained(target, options):
  """Measures HALRP's step on a pretrained network's size beside full fine-tuning's, in turn."""
  ranks, privates = ([8], ["all"]) if options.smoke else ([4, 8], ["all", "head"])
  yield from pretrained_step.compare(
    target, ranks, privates, 3 if options.smoke else 20, options.smoke
  )


PARTS = {
  "device": device,
  "steps": steps,
  "torch": torch,
  "split": split,
  "svd": svd_,
  "evaluate": evaluate,
  "replicas": replicas_,
  "predict_many": predict_many,
  "pretrained": pretrained,
  "devices": devices,
}


def peer_of(target: str, smoke: bool) -> subprocess.Popen:
  """Starts a process with PyTorch, whose libraries must not be loaded beside JAX's."""
  setting, precision = target.split(":")
  network, batch, image_shape, num_classes = throughput.SETTINGS[setting]
  asked = {"network": network, "batch": min(batch, 16) if smoke else batch}
  asked |= {"image_shape": image_shape, "num_classes": num_classes, "precision": precision}
  command = [sys.executable, str(ROOT / "benchmarks/torch_networks.py"), json.dumps(asked)]
  pipe = subprocess.PIPE
  return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8")


def main() -> None:
  """Waits for a line on the standard input, measures, and prints the rows."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("part", choices=PARTS)
  parser.add_argument("target")
  parser.add_argument("--smoke", action="store_true")
  parser.add_argument("--data_dir", default="")
  options = parser.parse_args()
  rows, sys.stdout = sys.stdout, sys.stderr
  if options.part == "torch":
    options.peer = peer_of(options.target, options.smoke)
  if not sys.stdin.readline():
    return
  print(json.dumps({"about": about()}), file=rows, flush=True)
  for found in PARTS[options.part](options.target, options):
    print(json.dumps(found), file=rows, flush=True)


if __name__ == "__main__":
  main()
