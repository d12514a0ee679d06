"""The networks in PyTorch, as in the code of the paper's authors. Needs the extra [bench]."""

import json
import sys
import time

import numpy as np
import torch
from torch import nn


def _dense_blocks(sizes, dropout):
  """Returns the layers of a perceptron with BatchNorm, ReLU and dropout."""
  parts = []
  for num_in, num_out in zip(sizes, sizes[1:], strict=False):
    parts += [nn.Linear(num_in, num_out), nn.BatchNorm1d(num_out), nn.ReLU()]
    parts += [nn.Dropout(dropout)] if dropout else []
  return parts


def lenet(num_in, num_classes, channels=(20, 50), hidden=(800, 500)):
  """Builds LeNet for 32 x 32 images with `num_in` channels."""
  parts = []
  for features in channels:
    parts += [nn.Conv2d(num_in, features, 5, padding=2), nn.BatchNorm2d(features)]
    parts += [nn.ReLU(), nn.MaxPool2d(2)]
    num_in = features
  parts += [nn.Flatten(), *_dense_blocks((channels[1] * 64, *hidden), 0)]
  return nn.Sequential(*parts, nn.Linear(hidden[1], num_classes))


def wide_lenet(num_in, num_classes):
  """Builds the wide LeNet of Omniglot-Rotation."""
  return lenet(num_in, num_classes, (64, 128), (2500, 1500))


def alexnet(num_in, num_classes, size=32):
  """Builds AlexNet for size x size images."""
  parts = []
  for features, width, rate in ((64, 4, 0.2), (128, 3, 0.2), (256, 2, 0.5)):
    parts += [nn.Conv2d(num_in, features, width)]
    parts += [nn.BatchNorm2d(features, track_running_stats=False), nn.ReLU()]
    parts += [nn.Dropout(rate), nn.MaxPool2d(2)]
    num_in, size = features, (size - width + 1) // 2
  parts += [nn.Flatten(), *_dense_blocks((num_in * size**2, 2048, 2048), 0.5)]
  return nn.Sequential(*parts, nn.Linear(2048, num_classes))


class _Block(nn.Module):
  """A residual block of ResNet18."""

  def __init__(self, num_in, features, stride):
    super().__init__()
    self.body = nn.Sequential(
      nn.Conv2d(num_in, features, 3, stride, 1),
      nn.BatchNorm2d(features),
      nn.ReLU(),
      nn.Conv2d(features, features, 3, 1, 1),
      nn.BatchNorm2d(features),
    )
    self.shortcut = nn.Identity()
    if stride > 1 or num_in != features:
      self.shortcut = nn.Sequential(
        nn.Conv2d(num_in, features, 1, stride), nn.BatchNorm2d(features)
      )

  def forward(self, x):
    """Returns the block's output."""
    return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(num_in, num_classes, size=32):
  """Builds ResNet18 for size x size images."""
  parts, features = [nn.Conv2d(num_in, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU()], 32
  for stage in range(4):
    for i in range(2):
      parts.append(_Block(features, 32 * 2**stage, 2 if stage and not i else 1))
      features = 32 * 2**stage
  return nn.Sequential(*parts, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(size**2, num_classes))


def mlp(num_in, num_classes):
  """Builds the multi-layer perceptron for 32 x 32 x 3 images."""
  del num_in
  return nn.Sequential(
    nn.Flatten(),
    nn.Linear(3072, 256),
    nn.ReLU(),
    nn.Linear(256, 256),
    nn.ReLU(),
    nn.Linear(256, num_classes),
  )


def make_step(name, image, label, num_classes, device="cpu", mode=None, precision="float32"):
  """Returns a training step with Adam and the L2 term, as a function without arguments.

  Args:
    name: name of the network.
    image: images, float32 [B, H, W, C]; they are moved to the device before the first step.
    label: classes, int32 [B].
    num_classes: width of the head.
    device: PyTorch's device. The step does not wait until a GPU has finished.
    mode: mode of torch.compile; None: eager execution.
    precision: "float32", or "bfloat16" with autocast.
  """
  torch.set_float32_matmul_precision("high")  # as JAX does by default on a GPU
  size = {"size": image.shape[1]} if name in ("alexnet", "resnet18") else {}
  model = globals()[name](image.shape[-1], num_classes, **size).train().to(device)
  x = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous().to(device)
  y = torch.from_numpy(label).long().to(device)
  if device != "cpu":
    model, x = (z.to(memory_format=torch.channels_last) for z in (model, x))
  optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=device != "cpu" or None)
  kernels = [p for n, p in model.named_parameters() if p.ndim > 1]

  def loss_fn():
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
      logits = model(x)
    loss = nn.functional.cross_entropy(logits.float(), y)
    return loss + 0.5e-4 * sum((w**2).sum() for w in kernels[:-1])

  if mode is not None:
    loss_fn = torch.compile(loss_fn, mode=mode)

  def step():
    optimizer.zero_grad()
    loss_fn().backward()
    optimizer.step()

  return step


def serve(network, batch, image_shape, num_classes, precision) -> None:
  """Measures steps on request, until the standard input ends.

  A request is a line of JSON [mode, number of steps] on the standard input. The answer is a line of
  JSON on the standard output: {"seconds": seconds of a step, "first": seconds of the first three
  steps, which compile, and "peak_bytes" on a GPU}, or {"error": text}.
  """
  rng = np.random.default_rng(0)
  image = rng.normal(size=(batch, *image_shape)).astype(np.float32)
  label = rng.integers(0, num_classes, batch).astype(np.int32)
  answers, sys.stdout = sys.stdout, sys.stderr
  device, steps = ("cuda" if torch.cuda.is_available() else "cpu"), {}
  torch.backends.cudnn.benchmark = True

  def run(step, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
      step()
    if device != "cpu":
      torch.cuda.synchronize()
    return time.perf_counter() - start

  for line in sys.stdin:
    mode, repeats = json.loads(line)
    try:
      answer = {}
      if mode not in steps:
        how = (device, None if mode == "eager" else mode, precision)
        steps[mode] = make_step(network, image, label, num_classes, *how)
        answer["first"] = run(steps[mode], 3)
      answer["seconds"] = run(steps[mode], repeats) / repeats
    except Exception as e:
      answer = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
    if device != "cpu":
      answer["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  serve(**json.loads(sys.argv[1]))
