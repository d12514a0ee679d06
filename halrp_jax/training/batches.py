"""Batches of images: which images a batch has, and how they become network input.

The images of a split are a `jax.Array` on the device, or a numpy array in host memory or on disk
(`data.residence`). Compiled functions take a split and rows. Of images on the host they get a
split of the images of these rows alone (`windows`), so that both ways compute the same.
"""

import collections
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from halrp_jax.types import Array, Inputs, Params, Split, Task

_AHEAD = 2  # windows that are gathered before they are needed


class Batch(NamedTuple):
  """Images and labels of one optimizer step or one pass of an evaluation."""

  image: jax.Array  # float32 [B, H, W, C] network input
  label: jax.Array  # int32 [B] class within the task
  num_classes: Array  # int32 []; [B, 1] where several tasks are learned together
  owner: jax.Array | None  # int32 [B] index of each image's task among them; None: one task


class Parts(NamedTuple):
  """Parts of images that are cut out at random, in stored pixels, of which they may have fractions.

  All arrays are [B].
  """

  top: jax.Array
  left: jax.Array
  height: jax.Array
  width: jax.Array
  mirrored: jax.Array  # bool, whether the part is mirrored


class Joint(NamedTuple):
  """Several tasks that are learned together. Made by `join_tasks`; `fit` takes it like a `Task`."""

  train: Split
  valid: Split
  inputs: Inputs  # its arrays with a leading axis [T]
  num_classes: Array  # int32 [T]
  blocks: tuple[int, ...]  # sizes of consecutive blocks of training images; a batch is of one block


def prepare_images(image: Array, inputs: Inputs, owner: Array | None = None) -> jax.Array:
  """Converts stored images to network input.

  Args:
    image: uint8 [B, H, W, C]
    inputs: the conversion; with `owner`, its arrays have a leading axis [T].
    owner: int32 [B], for each image the row of `inputs` that is used.

  Returns:
    float32 [B, H, W, C]
  """
  x: Params = image.astype(jnp.float32) / 255
  if owner is None:
    if inputs.permutation is not None:
      x = x.reshape(x.shape[0], -1)[:, inputs.permutation].reshape(*x.shape[:3], -1)
    x = _resized(x, inputs)
    return (x - inputs.mean[None, None, None]) / inputs.std[None, None, None]
  if inputs.permutation is not None:
    permuted = jnp.take_along_axis(x.reshape(x.shape[0], -1), inputs.permutation[owner], 1)
    x = permuted.reshape(*x.shape[:3], -1)
  x = _resized(x, inputs)
  return (x - inputs.mean[owner][:, None, None]) / inputs.std[owner][:, None, None]


def _resized(x: jax.Array, inputs: Inputs) -> jax.Array:
  """Returns images [B, H, W, C] with values from 0 to 1 in the size of the network's input."""
  if inputs.resize is None:
    return x
  rows, columns = inputs.resize
  product = "hH,bHWc,wW->bhwc" if rows.ndim == 2 else "bhH,bHWc,bwW->bhwc"
  x = jnp.einsum(product, rows, x, columns, precision="highest")
  return jnp.clip(x, 0, 1)  # bicubic interpolation can overshoot


def stack_inputs(tasks: Sequence[Task]) -> Inputs:
  """Stacks the `Inputs` of all tasks along a leading axis, for `prepare_images` with `owner`.

  All tasks have the same `resize`, which is not stacked.
  """
  mean = jnp.stack([task.inputs.mean for task in tasks])
  std = jnp.stack([task.inputs.std for task in tasks])
  permutation = None
  if any(task.inputs.permutation is not None for task in tasks):
    identity = jnp.arange(math.prod(tasks[0].train.image.shape[1:3]) * mean.shape[-1])
    permutations = [task.inputs.permutation for task in tasks]
    rows: list[Params] = [identity if p is None else p for p in permutations]
    permutation = jnp.stack(rows)
  return Inputs(mean, std, permutation, tasks[0].inputs.resize)


def join_tasks(tasks: Sequence[Task], mixed: bool) -> Joint:
  """Joins tasks that are learned together.

  Args:
    tasks: the tasks.
    mixed: whether a batch holds images of several tasks.
  """

  def join(name: str) -> Split:
    splits: list[Split] = [getattr(task, name) for task in tasks]
    owner = np.concatenate([np.full(len(s.index), t, np.int32) for t, s in enumerate(splits)])
    index = jnp.concatenate([s.index for s in splits])
    label = jnp.concatenate([s.label for s in splits])
    return Split(splits[0].image, index, label, jnp.asarray(owner))

  sizes = tuple(len(task.train.index) for task in tasks)
  return Joint(
    join("train"),
    join("valid"),
    stack_inputs(tasks),
    jnp.array([task.num_classes for task in tasks], jnp.int32),
    (sum(sizes),) if mixed else sizes,
  )


def crop_and_flip(key: jax.Array, image: jax.Array, padding: int = 4, fill: float = 0) -> jax.Array:
  """Pads images, crops each at random to its old size, and mirrors half of them.

  Args:
    key: random key for crops and mirroring.
    image: images [B, H, W, C].
    padding: pixels added on every side.
    fill: value of the added pixels.
  """
  crop_key, flip_key = jax.random.split(key)
  num_images, height, width, _ = image.shape
  pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded = jnp.pad(image, pads, constant_values=fill)
  top, left = jax.random.randint(crop_key, (2, num_images), 0, 2 * padding + 1)
  cropped = jax.vmap(lambda x, i, j: lax.dynamic_slice(x, (i, j, 0), (height, width, x.shape[-1])))(
    padded, top, left
  )
  mirrored = jax.random.bernoulli(flip_key, shape=(num_images, 1, 1, 1))
  return jnp.where(mirrored, cropped[:, :, ::-1], cropped)


def crop_resize_flip(
  key: jax.Array, inputs: Inputs, stored: tuple[int, int], num_images: int, least_area: float
) -> Inputs:
  """Cuts a random part out of each image, resizes it to the network's input, mirrors half of them.

  A part has a fraction of the image's area, uniform from `least_area` to 1, and a ratio of width to
  height whose logarithm is uniform between those of 3/4 and 4/3, as far as the part then fits into
  the image. The interpolation is that of `data.tasks.resizing`; at the edge of a part it uses
  pixels beside it. Nothing is resized twice.

  Args:
    key: random key.
    inputs: how images become network input.
    stored: height H and width W of the stored images.
    num_images: number of images B.
    least_area: least fraction of the image's area.

  Returns:
    `inputs` with weights for each image, float32 [B, H', H] and [B, W', W], as its `resize`.
  """
  to_height, to_width = stored if inputs.resize is None else map(len, inputs.resize)
  parts = draw_parts(key, stored, num_images, least_area)
  rows = _resizing_parts(stored[0], to_height, parts.top, parts.height)
  columns = _resizing_parts(stored[1], to_width, parts.left, parts.width)
  columns = jnp.where(parts.mirrored[:, None, None], columns[:, ::-1], columns)
  return inputs._replace(resize=(rows, columns))


def draw_parts(
  key: jax.Array, stored: tuple[int, int], num_images: int, least_area: float
) -> Parts:
  """Draws the parts of images that `crop_resize_flip` cuts out; arguments as there."""
  area_key, ratio_key, top_key, left_key, flip_key = jax.random.split(key, 5)
  height, width = stored
  area = jax.random.uniform(area_key, (num_images,), minval=least_area) * (height * width)
  # a part of this area fits if its width is at most W and its height at most H
  low, high = jnp.maximum(3 / 4, area / height**2), jnp.minimum(4 / 3, width**2 / area)
  middle = jnp.clip(width / height, 3 / 4, 4 / 3)  # of an image so wide that no ratio fits
  low, high = jnp.log(jnp.minimum(low, middle)), jnp.log(jnp.maximum(high, middle))
  ratio = jnp.exp(jax.random.uniform(ratio_key, (num_images,), minval=low, maxval=high))
  part_height = jnp.minimum(jnp.sqrt(area / ratio), height)
  part_width = jnp.minimum(jnp.sqrt(area * ratio), width)
  top = jax.random.uniform(top_key, (num_images,)) * (height - part_height)
  left = jax.random.uniform(left_key, (num_images,)) * (width - part_width)
  mirrored = jax.random.bernoulli(flip_key, shape=(num_images,))
  return Parts(top, left, part_height, part_width, mirrored)


def _resizing_parts(n: int, m: int, start: jax.Array, length: jax.Array) -> jax.Array:
  """Returns the weights that resize a part of each image along one axis.

  They are those of `data.tasks.resizing` where a part is the whole image.

  Args:
    n: number of stored pixels.
    m: number of pixels of the result.
    start: where the part of each image begins, in pixels from 0 to n. [B]
    length: number of its pixels, which need not be whole. [B]

  Returns:
    float32 [B, m, n]
  """
  start, step = start[:, None, None], (length / m)[:, None, None]
  centre = start + (jnp.arange(m)[None, :, None] + 0.5) * step - 0.5
  x = jnp.abs(jnp.arange(n)[None, None] - centre) / jnp.maximum(step, 1.0)
  near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  w = jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
  return w / w.sum(-1, keepdims=True)


def make_batch(
  split: Split,
  inputs: Inputs,
  num_classes: Array,
  rows: Array,
  image_fn: Callable[[Array], Array] = lambda image: image,
) -> Batch:
  """Returns the batch of some rows of a split.

  Args:
    split: split of one task, or of several that are learned together.
    inputs: the conversion of images to network input.
    num_classes: int32 [], or [T] of several tasks.
    rows: int [B], rows of `split`.
    image_fn: applied to the stored images uint8 [B, H, W, C], to augment them.
  """
  image, label = image_fn(split.image[split.index[rows]]), split.label[rows]
  if split.owner is None:
    return Batch(prepare_images(image, inputs), label, num_classes, None)
  owner = split.owner[rows]
  return Batch(prepare_images(image, inputs, owner), label, num_classes[owner][:, None], owner)


def consecutive(num_images: int, batch_size: int) -> list[np.ndarray]:
  """Cuts the rows 0 to num_images - 1 into batches, in order; the last may be smaller."""
  rows = np.arange(num_images)
  return [rows[i : i + batch_size] for i in range(0, num_images, batch_size)]


def is_on_host(split: Split) -> bool:
  """Returns whether the images of a split are in host memory or on disk, not on the device."""
  return isinstance(split.image, np.ndarray)


def window(split: Split, rows: Array) -> Split:
  """Gathers images on the host: returns the split of some rows alone, with numpy arrays.

  Args:
    split: a split whose images are on the host.
    rows: int [B], rows of `split`.
  """
  index, label = (np.asarray(x)[rows] for x in (split.index, split.label))
  owner = None if split.owner is None else np.asarray(split.owner)[rows]
  image = np.take(split.image, index, axis=0)
  return Split(image, np.arange(len(index), dtype=np.int32), label, owner)


def windows(
  split: Split, parts: Iterable[Array], place: Callable[[Split], Split] = jax.device_put
) -> Generator[tuple[Split, Array], None, None]:
  """Yields for every batch a split and the rows that it has there, for a compiled function.

  Of images on the device these are the split itself and its rows. Of images on the host they are
  `window` on the device and 0 .. B - 1; a thread gathers and sends the next two while the device
  computes.

  Args:
    split: the split.
    parts: rows of every batch, int [B].
    place: puts a window on the device.
  """
  if not is_on_host(split):
    yield from ((split, rows) for rows in parts)
    return
  rest, waiting = iter(parts), collections.deque()
  with futures.ThreadPoolExecutor(1, "windows") as thread:

    def send(rows):
      return place(window(split, np.asarray(rows)))

    waiting.extend(thread.submit(send, rows) for rows in itertools.islice(rest, _AHEAD))
    while waiting:
      part = waiting.popleft().result()
      waiting.extend(thread.submit(send, rows) for rows in itertools.islice(rest, 1))
      yield part, np.arange(len(part.index), dtype=np.int32)


def load_batch(split: Split, inputs: Inputs, rows: Array) -> tuple[jax.Array, jax.Array]:
  """Returns network inputs float32 [B, H, W, C] and labels int32 [B] of some rows of a split."""
  ((split, rows),) = windows(split, [rows])
  return _load(split, inputs, rows)


def load_batches(
  split: Split, inputs: Inputs, parts: Iterable[Array]
) -> Iterator[tuple[jax.Array, jax.Array]]:
  """Yields `load_batch` of the rows of every batch.

  Images on the host are sent while the device computes. A caller that does not wait for what it
  computes of a batch must do so from time to time, or all batches end up on the device.
  """
  return (_load(part, inputs, rows) for part, rows in windows(split, parts))


@jax.jit
def _load(split: Split, inputs: Inputs, rows: Array) -> tuple[jax.Array, jax.Array]:
  """Returns what `load_batch` returns, of a split whose images are on the device."""
  return prepare_images(split.image[split.index[rows]], inputs), split.label[rows]


def over_samples(
  fn: Callable[[jax.Array], Params], task: Task, key: jax.Array, num_samples: int, chunk: int
) -> list[Params]:
  """Applies a function to random training images of a task, chunk by chunk.

  Args:
    fn: (image [B, H, W, C]) -> a pytree of arrays.
    task: whose training images are used.
    key: random key for choosing the images.
    num_samples: number of images; all of them if there are fewer.
    chunk: number of images B that `fn` gets at once; the last chunk may be smaller.

  Returns:
    The results of all chunks, as numpy arrays.
  """
  chosen = np.asarray(jax.random.permutation(key, len(task.train.index)))[:num_samples]
  results = []
  parts = np.split(chosen, range(chunk, len(chosen), chunk))
  for image, _ in load_batches(task.train, task.inputs, parts):
    results.append(jax.tree.map(np.asarray, fn(image)))
  return results
