"""A run's folder: lock, config, events, and checkpoints that let it go on where it was cut off.

  config.json    the resolved config
  tasks.json     classes, normalisation and shapes (cards.py): what predicting needs of the data
  standing.json  what the run stands on (standing.py), compared when it goes on
  metrics.jsonl  one event per line
  record.json    when the run is finished
  lock           who is at work here
  checkpoints/   items of checkpoint.py:
    state-0003    after the third group of tasks: names of the parts below, results so far
    shared-HASH, task00-HASH    parts of the state, each written once
    now.task03.warmup.fit       inside the task that is being learned
  set_aside/     items that could not be used when the run went on; delete it at any time

A restart is the same command again: the newest state whose items all verify is restored, finished
parts of the next task return at once, the interrupted one goes on at its last saved epoch. Events
after that point are cut off `metrics.jsonl`, since they come again.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import pathlib
import platform
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import files, packing
from halrp_jax.devices import processes
from halrp_jax.runs import cards, checkpoint, identity, states
from halrp_jax.types import (
  CHECKPOINTS,
  CONFIG,
  LOCK,
  METRICS,
  RECORD,
  STANDING,
  TASKS,
  Benchmark,
  InUse,
  Keep,
  State,
  Stopped,
  UserError,
)

SET_ASIDE = "set_aside"
_KEPT_STATES = 2


def _of_folder(method: Callable) -> Callable:
  """Wraps a method of `Workdir`: what the disk refuses is an error that names the folder."""

  @functools.wraps(method)
  def call(self, *args):
    try:
      return method(self, *args)
    except OSError as e:
      raise _unusable(self.folder, e) from e

  return call


class Workdir:
  """An open run folder. Made by `opened`; of several processes the first alone reads and writes."""

  def __init__(self, folder: pathlib.Path, strict: bool):
    self.folder, self.items, self.strict = folder, folder / CHECKPOINTS, strict
    self.stop_asked = lambda: False
    self.standing: dict = {}  # what the run stands on
    self.said: list[str] = []  # what of it has changed since the run was last at work
    self._writer = ThreadPoolExecutor(1, "checkpoint")
    self._pending: list[Future] = []
    self._num_events = 0  # that are in metrics.jsonl and stay there
    self._metrics = None
    self._written: set[str] = set()  # parts of the last state

  # --- events -----------------------------------------------------------------------

  @_of_folder
  def log(self, event: dict) -> None:
    """Appends an event; what an interrupted run wrote after its last saved state goes first."""
    if not processes.is_leader():
      return
    if self._metrics is None:
      self._metrics = self._cut_metrics()
    self._metrics.write(json.dumps(event) + "\n")
    self._num_events += 1

  def _cut_metrics(self):
    path = self.folder / METRICS
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    if len(lines) < self._num_events:
      self._complain(f"{path}: {self._num_events - len(lines)} events are missing")
    files.write_text(path, "".join(lines[: self._num_events]))
    return open(path, "a", buffering=1, encoding="utf-8")

  # --- inside a task ----------------------------------------------------------------

  def keep(self) -> Keep:
    """What `learn` may use to survive an interruption."""
    return Keep(self._read, self._write, self.check)

  def check(self) -> None:
    """Raises Stopped if the run was asked to stop."""
    if processes.any_process(self.stop_asked()):
      raise Stopped

  def _read(self, name: str, like=None):
    """The tree kept under `name`; with `like` the list of leaves kept there in that structure."""
    found = self._read_item(name, like)
    if found is None or like is None:
      return jax.tree.map(_to_device, found)
    return jax.tree.structure(like).unflatten(found)

  @processes.on_leader
  @_of_folder
  def _read_item(self, name: str, like):
    folder = self.items / _item(name)
    try:
      tree, about = checkpoint.load(folder)
      if not isinstance(about.get("events"), int):
        raise checkpoint.Damaged(f"{folder}: was not written inside a task")
      if like is not None:
        _require_leaves(tree, like, folder)
    except FileNotFoundError:
      return None
    except checkpoint.Damaged as e:
      self._complain(f"{e}; this part is computed again", [folder])
      return None
    self._num_events = max(self._num_events, about["events"])
    return tree

  @processes.on_leader
  def _write(self, name: str, tree) -> str:
    folder = self.items / _item(name)
    self._submit(folder, tree, {"events": self._num_events})
    return str(folder)

  def _submit(self, folder, tree, about) -> None:
    self._raise_errors(wait=False)
    self._pending.append(self._writer.submit(checkpoint.save, folder, packing.pack(tree), about))

  def _raise_errors(self, wait: bool) -> None:
    done = [f for f in self._pending if wait or f.done()]
    self._pending = [f for f in self._pending if f not in done]
    for future in done:
      try:
        future.result()
      except OSError as e:
        raise UserError(
          f"{self.items}: a checkpoint can't be written ({e.strerror or e}); {_remedy(e)}, then "
          "start the same command again: what was saved before is whole"
        ) from e

  # --- between tasks ----------------------------------------------------------------

  @processes.on_leader
  @_of_folder
  def describe(self, benchmark: Benchmark) -> None:
    """Writes what predicting needs of the data."""
    files.write_json(self.folder / TASKS, cards.of_benchmark(benchmark))

  @processes.on_leader
  @_of_folder
  def save_state(self, position: int, state: State, results: dict) -> None:
    """Saves the state after a group of tasks; parts that have not changed are not written again."""
    names = []
    for name, tree in (("shared", state.shared), *_numbered(state.tasks)):
      names.append(f"{name}-{checkpoint.fingerprint(tree)[:16]}")
      if names[-1] not in self._written:
        self._submit(self.items / names[-1], {"tree": tree}, {})
    self._written = set(names)
    about = {"items": names, "results": results, "events": self._num_events}
    self._submit(self.items / f"state-{position:04d}", {}, about)
    self._pending.append(self._writer.submit(self._sweep))

  def _sweep(self) -> None:
    """Deletes what neither of the last states needs, and the parts of the task they end with."""
    checkpoint.sweep(
      self.items, self._names() - self._needed(states.find_states(self.items)[:_KEPT_STATES])
    )

  def _names(self) -> set[str]:
    """Names of the items; whatever else is in their folder is not the run's."""
    return {p.name for p in self.items.iterdir() if states.ITEM.fullmatch(p.name)}

  def _needed(self, states: list[pathlib.Path]) -> set[str]:
    """Names of the states that can be read and of their parts."""
    names = set()
    for folder in states:
      with contextlib.suppress(checkpoint.Damaged):
        names |= {folder.name, *checkpoint.verify(folder)["items"]}
    return names

  def restore_state(self) -> tuple[int, State, dict] | None:
    """The newest state whose files all verify: position, state, results. None: start anew."""
    if (found := self._newest_state()) is None:
      return None
    position, state, results = found
    return position, jax.tree.map(jnp.asarray, state), results

  @processes.on_leader
  @_of_folder
  def _newest_state(self) -> tuple[int, State, dict] | None:
    known, found, problems = states.find_states(self.items), None, []
    while known and not found:
      try:
        found = states.load_state(known[0])
      except states.NO_STATE as e:
        problems.append(str(e))
        known = known[1:]
    if problems:
      then = f"the run goes on after {known[0].name}" if found else "the run starts anew"
      unused = sorted(self._names() - self._needed(known))
      self._complain(f"{'; '.join(problems)}; {then}", [self.items / name for name in unused])
    if not found:
      return None
    state, about = found
    self._num_events, self._written = about["events"], set(about["items"])
    return states.position(known[0]), state, about["results"]

  def _complain(self, text: str, unused: list[pathlib.Path] = ()) -> None:
    """Warns of damage, or raises if the run is strict; items that are of no use are moved away."""
    if self.strict:
      raise UserError(f"{text} (checkpoint.strict=False goes on)")
    if unused:
      place = checkpoint.free_name(self.folder / SET_ASIDE)
      place.mkdir()
      for folder in unused:
        folder.rename(place / folder.name)
      text += f"; {len(unused)} checkpoints that are not used are set aside in {place}"
    warnings.warn(text, stacklevel=3)

  # --- the end ----------------------------------------------------------------------

  @processes.on_leader
  @_of_folder
  def finish(self, record: dict) -> None:
    """Writes the record; the last state stays, so that the model can be used."""
    self._raise_errors(wait=True)
    files.write_json(self.folder / RECORD, record)

  @_of_folder
  def close(self) -> None:
    """Waits for what is being written."""
    self._writer.shutdown(wait=True)
    if self._metrics is not None:
      self._metrics.close()


@contextlib.contextmanager
def opened(
  path: str, config: dict, overwrite: bool, strict: bool, stop_asked: Callable[[], bool], now: dict
) -> Iterator[Workdir]:
  """Opens or makes a run folder for a resolved config; nobody else can until it is closed.

  Args:
    now: what the run stands on in this process (standing.py).

  Raises:
    UserError: if it can't be written, belongs to another config, stands on something else, or is in
      use.
  """
  folder = pathlib.Path(path)
  run = Workdir(folder, strict)
  run.stop_asked = stop_asked
  with contextlib.ExitStack() as stack:
    prepare = functools.partial(_prepare, stack, run, path, config, overwrite, now)
    run.standing, run.said = processes.run_on_leader(prepare)
    yield run


def _prepare(stack, run: Workdir, path: str, config: dict, overwrite: bool, now: dict):
  if any("\ud800" <= c <= "\udfff" for c in str(run.folder.resolve())):
    raise UserError(
      f"--workdir={path}: its name is no text in this locale, and checkpoints need one; set "
      "PYTHONUTF8=1 or choose another folder"
    )
  try:
    run.folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_locked(run.folder))
    if overwrite:
      _delete_run(run.folder)
    identity.check_config(run.folder, config)
    result = identity.check_standing(run.folder, config, now)
    (run.folder / CHECKPOINTS).mkdir(exist_ok=True)
    (run.folder / METRICS).touch()
    files.delete_left_behind(run.folder)
    stack.callback(run.close)
    return result
  except OSError as e:
    raise _unusable(path, e) from e


def _unusable(path, error: OSError) -> UserError:
  place = f" ({error.filename})" if error.filename else ""
  return UserError(f"--workdir={path}: {error.strerror or error}{place}; {_remedy(error)}")


def _remedy(error: OSError) -> str:
  """What helps against an error of the disk."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    return "make room or choose a folder that has some"
  if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
    return "choose a folder that can be read and written"
  return "look after the disk, or choose another folder"


def _item(name: str) -> str:
  return "now." + name.replace("/", ".")


def _numbered(tasks):
  return ((f"task{t:02d}", tree) for t, tree in enumerate(tasks))


def _to_device(x):
  return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _require_leaves(found, like, folder) -> None:
  """That `found` is a list of numpy arrays like the leaves of `like`."""
  expected = [(x.shape, x.dtype) for x in jax.tree.leaves(like)]
  arrays = isinstance(found, list) and all(isinstance(x, np.ndarray) for x in found)
  if not arrays or [(x.shape, x.dtype) for x in found] != expected:
    raise checkpoint.Damaged(f"{folder}: its arrays are not those of this config's model")


def _delete_run(folder: pathlib.Path) -> None:
  for path in folder.iterdir():
    if path.name == CHECKPOINTS or re.fullmatch(rf"{SET_ASIDE}(-\d+)?", path.name):
      shutil.rmtree(path, ignore_errors=True)
  for name in (RECORD, METRICS, CONFIG, TASKS, STANDING):
    (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """The system gives the lock back when its holder ends, however it ends: none goes stale."""
  path = folder / LOCK
  with open(path, "a+", encoding="utf-8", errors="replace") as stream:
    try:
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      stream.seek(0)
      who = stream.read().strip() or "by another process"
      raise InUse(
        f"--workdir={folder} is in use ({who}): wait for that run, stop it, or take another folder"
      ) from e
    except OSError as e:
      raise UserError(
        f"--workdir={folder}: its file system can't lock files ({e.strerror}), and two runs in one "
        "folder would spoil it; choose a folder on a local disk"
      ) from e
    stream.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    stream.write(f"process {os.getpid()} on {platform.node()} since {since}\n")
    stream.flush()
    try:
      yield
    finally:
      stream.truncate(0)  # not deleted: another process may hold the file open by now
