r"""Measures an accelerator with one command that ends within its budget of seconds.

  python benchmarks/accelerator.py --budget=360 --out=DIR [--parts=steps,torch] [--rest] [--smoke]
      [--networks=lenet,resnet18_64] [--data_dir=PATH]
  python benchmarks/accelerator.py --pack=DATA_DIR:FILE

Each part runs in a process of its own (accelerator_parts.py) with a time limit. If a part fails or
takes too long, this is reported and the next part runs. DIR/accelerator.json gets every result as
soon as it is known, DIR/accelerator.log the output of the processes; a table is printed at the end.
The most useful parts come first, and parts that do not fit into the budget are named. --rest starts
with these. --smoke uses small shapes, for a machine without an accelerator. --networks chooses the
networks of the parts steps and torch.

--data_dir (or the environment variable HALRP_ACCELERATOR_DATA) is a folder with CIFAR-100's
original files, or a file that --pack has made from them. Packing is lossy, so that all images take
20 MiB, and the accuracies are those on the packed images. Without it the images are random and
there are no accuracies. PyTorch is needed for the part torch only.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
# (part, target, time limit in seconds for a budget of 360 seconds). The targets of the parts steps
# and torch are network:precision.
FIRST = (
  ("device", "-", 90),
  ("steps", "lenet:float32", 80),
  ("steps", "resnet18_64:bfloat16", 90),
  ("torch", "lenet:float32", 75),
  ("split", "-", 110),
  ("torch", "resnet18_64:bfloat16", 90),
  ("pretrained", "vit_s16", 60),
  ("pretrained", "efficientnet_lite0", 90),
  ("svd", "device", 45),
  ("evaluate", "-", 40),
  ("replicas", "-", 70),
  ("predict_many", "-", 40),
  ("devices", "-", 60),
)
REST = (
  ("steps", "alexnet64:float32", 60),
  ("steps", "resnet18_64:float32", 75),
  ("steps", "lenet:bfloat16", 60),
  ("torch", "alexnet64:float32", 60),
  ("torch", "resnet18_64:float32", 75),
  ("svd", "host", 60),
  ("steps", "alexnet64:bfloat16", 60),
  ("steps", "wide_lenet:float32", 60),
  ("torch", "wide_lenet:float32", 60),
  ("steps", "mlp:float32", 40),
  ("torch", "mlp:float32", 40),
  ("steps", "alexnet32:float32", 60),
  ("torch", "alexnet32:float32", 60),
  ("steps", "resnet18:float32", 75),
  ("torch", "resnet18:float32", 75),
  ("torch", "lenet:bfloat16", 60),
  ("torch", "alexnet64:bfloat16", 60),
  ("steps", "resnet18:bfloat16", 75),
  ("steps", "wide_lenet:bfloat16", 60),
  ("steps", "alexnet32:bfloat16", 60),
  ("steps", "mlp:bfloat16", 40),
)
PARTS = tuple(dict.fromkeys(part for part, *_ in FIRST))
LEAST = 8  # no part is started with fewer seconds left
LEAST_SMOKE = 25  # the same with --smoke: a CPU needs so long to compile the smallest network


# --- the processes ----------------------------------------------------------------------


class Worker:
  """The process of a part. It imports its modules and then waits for `go`."""

  def __init__(self, unit, options, environment):
    self.part, self.target, self.limit = unit
    self.output = tempfile.TemporaryFile()  # noqa: SIM115
    script = str(ROOT / "benchmarks/accelerator_parts.py")
    command = [sys.executable, script, self.part, self.target, f"--data_dir={options.data_dir}"]
    self.process = subprocess.Popen(
      command + ["--smoke"] * options.smoke,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self.output,
      text=True,
      encoding="utf-8",
      env=environment,
      start_new_session=True,
    )
    self.lines = queue.Queue()
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self):
    """Puts the lines of the process into a queue, and None at their end."""
    for line in self.process.stdout:
      self.lines.put(line)
    self.lines.put(None)

  def go(self, seconds: float):
    """Starts the measurement and yields its rows; a failure is a row with an error."""
    stop, name = time.monotonic() + seconds, self.target
    try:
      print("go", file=self.process.stdin, flush=True)
      while (line := self.lines.get(timeout=max(stop - time.monotonic(), 0.01))) is not None:
        yield json.loads(line)
      if self.process.wait(timeout=max(stop - time.monotonic(), 0.01)):
        yield {"name": name, "error": f"exit code {self.process.returncode}: {self.last_lines()}"}
    except (queue.Empty, subprocess.TimeoutExpired):
      yield {"name": name, "error": f"stopped after {seconds:.0f} s"}
    except (OSError, ValueError) as e:
      yield {"name": name, "error": f"{type(e).__name__}: {e}; {self.last_lines()}"}
    finally:
      self.end()

  def end(self):
    """Kills the process and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()

  def tail(self, most: int) -> str:
    """Returns the last `most` bytes of the output."""
    self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - most))
    return self.output.read().decode(errors="replace")

  def last_lines(self) -> str:
    """Returns the last lines of the output on one line."""
    return " | ".join(line.strip() for line in self.tail(1500).splitlines()[-4:])


def measure(options) -> int:
  """Runs the parts and returns the number of those that failed."""
  deadline = time.monotonic() + options.budget
  out, cache = pathlib.Path(options.out), tempfile.mkdtemp(prefix="accelerator-cache-")
  out.mkdir(parents=True, exist_ok=True)
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "JAX_COMPILATION_CACHE_DIR": cache,  # empty, so that compile times are complete
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two processes share the device in part torch
  }
  results = {"budget": options.budget, "smoke": options.smoke, "gpu": nvidia_smi()}
  results |= {"no_room": [], "rows": []}
  units, failed = chosen(options), 0
  least = LEAST_SMOKE if options.smoke else LEAST
  scale = options.budget / max(min(360, sum(limit for *_, limit in units)), 1)
  if results["gpu"] and not options.smoke:  # fail rather than measure the CPU by mistake
    environment["JAX_PLATFORMS"] = "cuda,cpu"

  def start(unit):
    several = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    fake = options.smoke and unit[0] == "devices"  # two devices of one CPU
    return Worker(unit, options, environment | (several if fake else {}))

  def keep(part, row):
    ceilings = {r["ceiling"]: r["value"] for r in results["rows"] if "ceiling" in r}
    if row.get("precision") in ceilings:  # float32: the rate of products at the default precision
      row["share"] = row["tflops"] / ceilings[row["precision"]]
    results["rows"].append({"part": part} | rounded(row))
    print(line_of(results["rows"][-1]), flush=True)
    write(out / "accelerator.json", results)

  worker = start(units[0]) if units else None
  with open(out / "accelerator.log", "w", encoding="utf-8") as log:
    for i, (part, target, limit) in enumerate(units):
      left = deadline - time.monotonic()
      if left < least:
        results["no_room"] = [f"{part} {target}" for part, target, _ in units[i:]]
        break
      begin, now = time.monotonic(), worker
      # the next part imports its modules meanwhile
      worker = start(units[i + 1]) if i + 1 < len(units) else None
      for row in now.go(min(left, max(limit * scale, least))):
        if "about" in row:
          results |= row["about"]
          continue
        failed += "error" in row
        keep(part, row)
      seconds = time.monotonic() - begin
      keep(part, {"name": f"{target} the whole part", "value": seconds, "unit": "s"})
      print(f"--- {part} {target}\n{now.tail(8000)}", file=log, flush=True)
  if worker:
    worker.end()
  write(out / "accelerator.json", results)
  shutil.rmtree(cache, ignore_errors=True)
  print(table(results))
  return failed


def chosen(options) -> list[tuple]:
  """Returns the (part, target, limit) of the parts and networks that were asked for, in order."""
  parts = options.parts.split(",") if options.parts else PARTS
  units = REST if options.rest else FIRST + REST
  if options.smoke and not options.rest:  # every part once with the smallest network, before all
    once = {part: (part, target, limit) for part, target, limit in reversed(FIRST)}
    once |= {part: (part, "mlp:float32", once[part][2]) for part in ("steps", "torch")}
    units = tuple(dict.fromkeys((*(once[part] for part in PARTS), *units)))
  networks = options.networks.split(",") if options.networks else None
  return [
    unit
    for unit in units
    if unit[0] in parts
    and (not networks or ":" not in unit[1] or unit[1].split(":")[0] in networks)
  ]


# --- the results ------------------------------------------------------------------------


def nvidia_smi() -> str:
  """Returns what nvidia-smi says about the GPU; "" if there is none."""
  fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
  command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
  try:
    return subprocess.run(
      command, capture_output=True, text=True, encoding="utf-8", timeout=20
    ).stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    return ""


def rounded(x):
  """Returns a JSON value with all numbers rounded to six digits."""
  if isinstance(x, dict):
    return {k: rounded(v) for k, v in x.items()}
  if isinstance(x, list):
    return [rounded(v) for v in x]
  return float(f"{x:.6g}") if isinstance(x, float) else x


def write(path: pathlib.Path, results: dict) -> None:
  """Writes the results as JSON, completely or not at all."""
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
  temporary.replace(path)


def line_of(row: dict) -> str:
  """Returns a row as a line of a table."""
  hidden = ("part", "name", "value", "unit", "said", "precision", "ceiling")
  more = " ".join(
    f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={str(v)[:150]}"
    for k, v in row.items()
    if k not in hidden
  )
  x = row.get("value")
  value = "-" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"
  return f"{row['part']:<12} {row['name']:<48} {value:>9} {row.get('unit', ''):<14}  {more}"


def table(results: dict) -> str:
  """Returns the most important numbers as a table for the terminal."""
  head = [f"device: {results.get('device', 'none answered')}", str(results.get("versions", ""))]
  keys = ("share", "ratio", "compile_seconds", "acc", "times_one", "loop", "kind", "error")
  lines = []
  for row in results["rows"]:
    if "whole part" not in row["name"]:
      more = {k: row[k] for k in keys if row.get(k) is not None}
      short = {k: row[k] for k in ("part", "name", "value", "unit") if k in row}
      lines.append(line_of(short | more).rstrip())
  if results["no_room"]:
    lines.append("no room in the budget: " + ", ".join(results["no_room"]))
  return "\n".join(["", *head, *lines])


# --- CIFAR-100 in 20 MiB ----------------------------------------------------------------

_SIDE = 50  # images along a side of a mosaic
_MOST = 20 * 2**20  # bytes of a packed file


def pack(data_dir: str, path: str) -> str:
  """Packs CIFAR-100 into mosaics in AVIF of at most 20 MiB; returns a description."""
  from PIL import Image

  folder = pathlib.Path(data_dir) / "cifar-100-binary"
  records = np.concatenate(
    [np.fromfile(folder / f"{name}.bin", np.uint8).reshape(-1, 3074) for name in ("train", "test")]
  )
  image = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  mosaics = image.reshape(-1, _SIDE, _SIDE, 32, 32, 3).transpose(0, 1, 3, 2, 4, 5)
  mosaics = np.ascontiguousarray(mosaics.reshape(-1, 32 * _SIDE, 32 * _SIDE, 3))

  def encode(mosaic, quality):
    out = io.BytesIO()
    Image.fromarray(mosaic).save(out, "AVIF", quality=quality, speed=6, subsampling="4:4:4")
    return out.getvalue()

  enough = 0.96 * _MOST / len(mosaics)
  quality = next(q for q in range(90, 0, -2) if len(encode(mosaics[0], q)) < enough)
  parts = [encode(mosaic, quality) for mosaic in mosaics]
  again = np.stack([np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts])
  error = np.mean((again.astype(np.float32) - mosaics) ** 2, dtype=np.float64)
  about = f"CIFAR-100 in AVIF 4:4:4, quality {quality}, PSNR {10 * np.log10(255**2 / error):.1f} dB"
  with zipfile.ZipFile(path, "w") as archive:
    for i, part in enumerate(parts):
      archive.writestr(f"{i:02d}.avif", part)
    archive.writestr("labels", records[:, :2].tobytes(), zipfile.ZIP_DEFLATED)
    for name in ("fine_label_names.txt", "coarse_label_names.txt"):
      archive.write(folder / name, name)
    archive.writestr("about", about)
  return f"{path}: {pathlib.Path(path).stat().st_size:,} bytes, {about}"


def originals(source: str, folder: str, smoke: bool) -> str:
  """Writes CIFAR-100's files into a folder and returns a description of the images.

  Args:
    source: folder with the original files, or a packed file, or "" for random images.
    folder: where to write.
    smoke: whether a few random images are enough.
  """
  target = pathlib.Path(folder) / "cifar-100-binary"
  if source and pathlib.Path(source).is_dir():
    target.symlink_to(pathlib.Path(source).resolve() / "cifar-100-binary")
    return "the original images"
  target.mkdir()
  if source:
    from PIL import Image

    with zipfile.ZipFile(source) as archive:
      about, label = archive.read("about").decode(), archive.read("labels")
      label = np.frombuffer(label, np.uint8).reshape(-1, 2)
      names = sorted(name for name in archive.namelist() if name.endswith(".avif"))
      mosaics = [np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names]
      archive.extractall(target, ["fine_label_names.txt", "coarse_label_names.txt"])
    image = np.stack(mosaics).reshape(-1, _SIDE, 32, _SIDE, 32, 3).transpose(0, 1, 3, 5, 2, 4)
    image = image.reshape(len(label), -1)
    num_test = 10000
  else:
    num_test, num_train = (2000, 4000) if smoke else (10000, 50000)
    fine = np.tile(np.arange(100, dtype=np.uint8), (num_test + num_train) // 100)
    label = np.stack([fine // 5, fine], 1)
    image = np.random.default_rng(0).integers(0, 256, (len(fine), 3072), np.uint8)
    about = "random images"
    for name, count in (("fine", 100), ("coarse", 20)):
      names = "\n".join(f"{name}_{i}" for i in range(count))
      (target / f"{name}_label_names.txt").write_text(names, encoding="utf-8")
  records = np.hstack([label, image])
  records[:-num_test].tofile(target / "train.bin")
  records[-num_test:].tofile(target / "test.bin")
  return about


def main() -> int:
  """Measures, or packs data with --pack; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--budget", type=float, default=360, help="seconds")
  parser.add_argument("--out", default="", help="folder for the results")
  parser.add_argument("--parts", default="")
  parser.add_argument("--networks", default="")
  parser.add_argument("--rest", action="store_true")
  parser.add_argument("--smoke", action="store_true")
  parser.add_argument("--data_dir", default=os.environ.get("HALRP_ACCELERATOR_DATA", ""))
  parser.add_argument("--pack", default="", metavar="DATA_DIR:FILE")
  options = parser.parse_args()
  if options.pack:
    print(pack(*options.pack.rsplit(":", 1)))
    return 0
  if unknown := set(options.parts.split(",")) - {*PARTS, ""}:
    parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
  if not options.out:
    parser.error("--out, the folder for the results, is missing")
  return 1 if measure(options) else 0


if __name__ == "__main__":
  sys.exit(main())
