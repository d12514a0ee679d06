"""Hashes of the images and labels of tasks.

A hash depends on what the files contain, not on their paths, dates or formats. Every image is
hashed once, and the hash of a task is computed from the hashes of its images. It depends neither on
the other tasks nor on the order of training.
"""

import hashlib

import numpy as np

from halrp_jax.types import Array, Split, Task

_CHUNK = 1024  # number of images whose channels are compared in one step


def with_hashes(whole: list[Task], drawn: list[Task]) -> list[Task]:
  """Returns tasks with the fields `data_hash` and `split_hash` filled in.

  Args:
    whole: the tasks with all their images. All splits share one image array.
    drawn: the same tasks after drawing a fraction of the images and holding out validation images.

  Returns:
    The tasks in `drawn`, with the hashes.
  """
  digests = image_digests(whole[0].train.image)
  return [
    task._replace(data_hash=_data_hash(before, digests), split_hash=_split_hash(task, digests))
    for before, task in zip(whole, drawn, strict=True)
  ]


def image_digests(image: Array) -> np.ndarray:
  """Computes the SHA-256 of every image.

  Equal channels are hashed as a single one, because the other tasks may decide whether a grey image
  is stored in one channel or in three.

  Args:
    image: uint8 [N, H, W, C]

  Returns:
    uint8 [N, 32]
  """
  found = np.empty((len(image), 32), np.uint8)
  for start in range(0, len(image), _CHUNK):
    part = np.ascontiguousarray(image[start : start + _CHUNK])
    grey = (part == part[..., :1]).all((1, 2, 3))
    for i, (x, is_grey) in enumerate(zip(part, grey, strict=True), start):
      x = np.ascontiguousarray(x[..., 0]) if is_grey else x
      found[i] = np.frombuffer(hashlib.sha256(x.data).digest(), np.uint8)
  return found


def _data_hash(task: Task, digests: np.ndarray) -> str:
  """Computes a hash of all images and labels that does not depend on any random draw.

  The images are hashed as a set. If the data set itself defines the test images, they form a second
  set. Means and standard deviations are not included, because they may be computed from the
  images that were drawn for training.
  """
  found = _begin(task)
  train, valid, test = (_rows(s, digests) for s in (task.train, task.valid, task.test))
  for parts in ([train, valid], [test]) if task.own_test else ([train, valid, test],):
    rows = np.sort(np.concatenate(parts).view("S40"), axis=0)
    found.update(np.int64(len(rows)).tobytes() + rows.tobytes())
  return found.hexdigest()


def _split_hash(task: Task, digests: np.ndarray) -> str:
  """Computes a hash of the three splits: their images and labels, in the order of each split."""
  found = _begin(task)
  for split in (task.train, task.valid, task.test):
    rows = _rows(split, digests)
    found.update(np.int64(len(rows)).tobytes() + rows.tobytes())
  return found.hexdigest()


def _begin(task: Task):
  """Returns a SHA-256 object that contains image size, class names and permutation of a task."""
  names = "\n".join(task.class_names)
  found = hashlib.sha256(f"{task.train.image.shape[1:3]} {len(names)} {names}".encode())
  if task.inputs.permutation is not None:
    found.update(np.asarray(task.inputs.permutation, np.int64).tobytes())
  return found


def _rows(split: Split, digests: np.ndarray) -> np.ndarray:
  """Returns 32 bytes of hash and 8 bytes of label for each image of a split: uint8 [n, 40]."""
  label = np.ascontiguousarray(np.asarray(split.label, "<i8")[:, None]).view(np.uint8)
  return np.concatenate([digests[np.asarray(split.index)], label], axis=1)
