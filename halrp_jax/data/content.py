"""Hashes of what a task consists of. Paths, dates and file formats make no difference to them.

Every image is hashed once; the hashes of the tasks are made of these. A task's hashes depend
neither on the other tasks nor on the order of training.
"""

import hashlib

import numpy as np

from halrp_jax.types import Split, Task

_CHUNK = 1024  # images whose channels are compared at once


def with_hashes(whole: list[Task], drawn: list[Task]) -> list[Task]:
  """Fills in `data_hash` and `split_hash`.

  Args:
    whole: the tasks before any images are left out or held out. All splits share one image array.
    drawn: the same tasks with the splits that are learned.

  Returns:
    `drawn` with the hashes.
  """
  digests = image_digests(whole[0].train.image)
  return [
    task._replace(data_hash=_data_hash(before, digests), split_hash=_split_hash(task, digests))
    for before, task in zip(whole, drawn, strict=True)
  ]


def image_digests(image: np.ndarray) -> np.ndarray:
  """Hashes every image of uint8 [N, H, W, C] with SHA-256; returns uint8 [N, 32].

  Three equal channels count as one: whether a grey image is stored in one channel or in three can
  depend on the other tasks.
  """
  found = np.empty((len(image), 32), np.uint8)
  for start in range(0, len(image), _CHUNK):
    part = np.ascontiguousarray(image[start : start + _CHUNK])
    grey = (part == part[..., :1]).all((1, 2, 3))
    for i, (x, is_grey) in enumerate(zip(part, grey, strict=True), start):
      x = np.ascontiguousarray(x[..., 0]) if is_grey else x
      found[i] = np.frombuffer(hashlib.sha256(x).digest(), np.uint8)
  return found


def _data_hash(task: Task, digests: np.ndarray) -> str:
  """Hashes all images with their labels as a set, so that no draw makes a difference.

  Which of them are test images counts where the data set itself says so. Means and standard
  deviations don't count: they may be those of the images that were drawn for training.
  """
  found = _begin(task)
  train, valid, test = (_rows(s, digests) for s in (task.train, task.valid, task.test))
  for parts in ([train, valid], [test]) if task.own_test else ([train, valid, test],):
    rows = np.sort(np.concatenate(parts).view("S40"), axis=0)
    found.update(np.int64(len(rows)).tobytes() + rows.tobytes())
  return found.hexdigest()


def _split_hash(task: Task, digests: np.ndarray) -> str:
  """Hashes images and labels of training, validation and test, each in the order of the split."""
  found = _begin(task)
  for split in (task.train, task.valid, task.test):
    rows = _rows(split, digests)
    found.update(np.int64(len(rows)).tobytes() + rows.tobytes())
  return found.hexdigest()


def _begin(task: Task):
  names = "\n".join(task.class_names)
  found = hashlib.sha256(f"{task.train.image.shape[1:3]} {len(names)} {names}".encode())
  if task.inputs.permutation is not None:
    found.update(np.asarray(task.inputs.permutation, np.int64).tobytes())
  return found


def _rows(split: Split, digests: np.ndarray) -> np.ndarray:
  """Returns uint8 [n, 40]: the hash of every image, then its label."""
  label = np.ascontiguousarray(np.asarray(split.label, "<i8")[:, None]).view(np.uint8)
  return np.concatenate([digests[np.asarray(split.index)], label], axis=1)
