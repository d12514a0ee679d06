"""The folder of a run: lock, config, events, and checkpoints from which an interrupted run resumes.

  config.json    the resolved config
  tasks.json     classes, normalisation and shapes (cards.py), which predictions need
  standing.json  what the numbers depend on beside the config (standing.py)
  metrics.jsonl  one event per line
  record.json    the results; written when the run is finished
  lock           locked by the process that runs; its text says which one
  checkpoints/   items (checkpoint.py):
    state-0003    after the third group of tasks: names of its parts, results; most states have
                  only what is new since a whole one, which they name (states.py)
    rows00-HASH   results of the first groups of tasks
    shared-HASH, task00-HASH    the parts of the states, each written once
    now.task03.warmup.fit       progress within the task that is being learned
  (a file without a name)       states of old tasks that are not in memory (spill.py); of more than
                                32 tasks, and only while a process works in the folder
  set_aside/     items that could not be used when the run was resumed; can be deleted at any time

A run resumes with the command that began it. The newest state whose items are all undamaged is
restored. The finished parts of the next task return their results from the checkpoints at once, and
the interrupted part resumes at its last saved epoch. Events after that point are cut off
metrics.jsonl, since they are logged again.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from halrp_jax import files, packing
from halrp_jax.devices import processes
from halrp_jax.runs import cards, checkpoint, identity, spill, states
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
  Params,
  ProgressStore,
  State,
  Stopped,
  UserError,
)

SET_ASIDE = "set_aside"
_IN_MEMORY = 32  # states of the newest tasks
_MOST_PENDING = 16  # items that wait to be written; each holds a copy of its arrays


def _explain_disk(method: Callable) -> Callable:
  """Wraps a method of `Workdir`: an OSError becomes a UserError that names the folder."""

  @functools.wraps(method)
  def call(self, *args):
    try:
      return method(self, *args)
    except OSError as e:
      raise _disk_error(self.folder, e) from e

  return call


class Workdir:
  """The open folder of a run, from `opened`. Only process 0 reads and writes it."""

  def __init__(self, folder: pathlib.Path, strict: bool) -> None:
    self.folder, self.items, self.strict = folder, folder / CHECKPOINTS, strict
    self.stop_asked: Callable[[], bool] = lambda: False
    self.standing: dict = {}  # of the run (standing.py)
    self.new_changes: list[str] = []  # lines: what of `machine` changed since the last start
    self._writer = ThreadPoolExecutor(1, "checkpoint")
    self._pending: list[Future] = []
    self._num_events = 0  # in metrics.jsonl, without those that will be logged again
    self._metrics: TextIO | None = None  # opened at the first event
    # of the two newest states, the newest last: one that is read may turn out to be damaged
    self._states: list[states.Outline] = []
    self._whole: states.Outline | None = None  # the whole state that the next one can build on
    self._parts: dict[str, Params] = {}  # the parts of the newest state
    self._unchanged: dict[str, int] = {}  # the tasks that are as in the state before, by part
    self._spill, self._can_spill = spill.make_spill(folder), True

  # --- events -----------------------------------------------------------------------

  @_explain_disk
  def log(self, event: dict) -> None:
    """Appends an event to metrics.jsonl, after cutting off those that are logged again."""
    if not processes.is_leader():
      return
    if self._metrics is None:
      self._metrics = self._cut_metrics()
    self._metrics.write(json.dumps(event) + "\n")
    self._num_events += 1

  def _cut_metrics(self) -> TextIO:
    """Cuts metrics.jsonl to the events before the last checkpoint, and opens it for appending."""
    path = self.folder / METRICS
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    if len(lines) < self._num_events:
      self._warn(f"{path}: {self._num_events - len(lines)} events are missing")
    files.write_text(path, "".join(lines[: self._num_events]))
    return open(path, "a", buffering=1, encoding="utf-8")

  # --- inside a task ----------------------------------------------------------------

  def progress_store(self) -> ProgressStore:
    """Returns the functions with which `Method.learn` saves and restores its progress."""
    return ProgressStore(self._read, self._write, self.check)

  def check(self) -> None:
    """Raises Stopped if the run was asked to stop."""
    if processes.any_process(self.stop_asked()):
      raise Stopped

  def _read(self, name: str, like: Params | None = None) -> Params | None:
    """Returns the progress saved under a name, or None; for `ProgressStore.read`.

    Args:
      name: such as "task03/warmup/fit".
      like: a pytree; the saved list of leaves is checked against its leaves and returned in its
        structure. None: the saved pytree is returned as it is.
    """
    found = self._read_item(name, like)
    if found is None or like is None:
      return jax.tree.map(_to_device, found)
    return jax.tree.structure(like).unflatten(found)

  @processes.on_leader
  @_explain_disk
  def _read_item(self, name: str, like: Params | None) -> Params | None:
    """Reads and checks a progress item; returns None if it is missing or damaged."""
    folder = self.items / _item(name)
    try:
      tree, about = checkpoint.load(folder)
      if not isinstance(about.get("events"), int):
        raise checkpoint.Damaged(f"{folder}: is not progress within a task")
      if like is not None:
        _require_leaves(tree, like, folder)
    except FileNotFoundError:
      return None
    except checkpoint.Damaged as e:
      self._warn(f"{e}; this part is computed again", [folder])
      return None
    self._num_events = max(self._num_events, about["events"])
    return tree

  @processes.on_leader
  def _write(self, name: str, tree: Params) -> str:
    """Saves progress under a name, and returns its path; for `ProgressStore.write`."""
    folder = self.items / _item(name)
    self._submit(folder, tree, {"events": self._num_events})
    return str(folder)

  def _submit(self, folder: pathlib.Path, tree: Params, about: dict) -> None:
    """Lets the writer's thread write an item; the tree is copied first."""
    self._raise_errors(_MOST_PENDING)
    self._pending.append(self._writer.submit(checkpoint.save, folder, packing.pack(tree), about))

  def _raise_errors(self, most: int) -> None:
    """Waits until at most `most` items are unwritten, and raises UserError if one can't be."""
    late = max(len(self._pending) - most, 0)
    done = [f for i, f in enumerate(self._pending) if i < late or f.done()]
    self._pending = [f for f in self._pending if f not in done]
    for future in done:
      try:
        future.result()
      except OSError as e:
        raise UserError(
          f"{self.items}: a checkpoint can't be written ({e.strerror or e}); {_remedy(e)}, then "
          "start the same command again: the checkpoints before it are complete"
        ) from e

  # --- between tasks ----------------------------------------------------------------

  @processes.on_leader
  @_explain_disk
  def describe(self, benchmark: Benchmark) -> None:
    """Writes tasks.json."""
    files.write_json(self.folder / TASKS, cards.of_benchmark(benchmark))

  @processes.on_leader
  @_explain_disk
  def save_state(self, position: int, state: State, rows: states.Rows) -> None:
    """Saves the state after a group of tasks, writing only the parts that have changed.

    Args:
      position: number of groups of tasks that are learned.
      state: their state.
      rows: results of all groups so far, as JSON types.
    """
    before = self._states[-1] if self._states else None
    parts: dict[str, Params] = {"shared": state.shared, **dict(_numbered(state.tasks))}
    items, written = {}, set(before.items.values()) if before else set()
    self._unchanged = {}
    for t, (name, tree) in enumerate(parts.items(), -1):
      if before and name in self._parts and states.is_same(self._parts[name], tree):
        items[name], self._unchanged[name] = before.items[name], t
        continue
      items[name] = f"{name}-{checkpoint.fingerprint(tree)[:16]}"
      if items[name] not in written:
        self._submit(self.items / items[name], {"tree": tree}, {})
    now = self._save_outline(f"state-{position:04d}", items, rows)
    self._states, self._parts = [*self._states[-1:], now], parts
    needed = [_names_of([now]), _names_of(self._states)]
    self._pending.append(self._writer.submit(self._delete_unneeded, *needed))

  def _save_outline(self, own: str, items: dict[str, str], rows: states.Rows) -> states.Outline:
    """Writes the item `own` of a state: all of it, or what is new since the last whole state."""
    whole, about = self._whole, dict[str, Any](events=self._num_events)
    if whole and len(rows) - len(whole.rows) < states.ROWS and items.keys() >= whole.items.keys():
      about["whole"] = states.position(self.items / whole.states[0])
      about["items"] = {k: n for k, n in items.items() if whole.items.get(k) != n}
      about["rows"] = rows[len(whole.rows) :]
      found = whole._replace(items=items, rows=rows, states=(own, *whole.states))
    else:
      row_items = self._save_rows(rows, whole.row_items if whole else ())
      about |= {"items": items, "row_items": row_items}
      about["rows"] = rows[len(row_items) * states.ROWS :]
      found = self._whole = states.Outline(items, rows, row_items, self._num_events, (own,))
    self._submit(self.items / own, {}, about)
    return found._replace(events=self._num_events)

  def _save_rows(self, rows: states.Rows, written: tuple[str, ...]) -> tuple[str, ...]:
    """Writes the rows that fill items and are not written; returns the names of their items."""
    names = [*written]
    for i in range(len(written), len(rows) // states.ROWS):
      part = rows[i * states.ROWS : (i + 1) * states.ROWS]
      digest = hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16]
      names.append(f"rows{i:02d}-{digest}")
      self._submit(self.items / names[-1], {}, {"rows": part})
    return tuple(names)

  def _delete_unneeded(self, newest: set[str], needed: set[str]) -> None:
    """Deletes all items, those of progress too, but the needed ones.

    Nothing is deleted if an item of the newest state could not be written.
    """
    names = self._names()
    if newest <= names:
      checkpoint.delete_items(self.items, names - needed)

  def _names(self) -> set[str]:
    """Returns the names of the run's items; other files in their folder are not touched."""
    return {p.name for p in self.items.iterdir() if states.ITEM.fullmatch(p.name)}

  def restore_state(self) -> tuple[int, State, states.Rows] | None:
    """Restores the newest complete state.

    Returns:
      The number of groups of tasks that are learned, their state and their results; None if the
      run begins from the start.
    """
    if (found := self._newest_state()) is None:
      return None
    position, state, rows = found
    state = State(*jax.tree.map(_to_device, (state.shared, state.tasks)))
    self._parts = {"shared": state.shared, **dict(_numbered(state.tasks))}
    return position, state, rows

  @processes.on_leader
  @_explain_disk
  def _newest_state(self) -> tuple[int, State, states.Rows] | None:
    """Reads the newest complete state; items that no complete state needs are set aside."""
    known, found, problems = states.find_states(self.items), None, []
    while known and not found:
      try:
        outline = states.outline(known[0])
        place = functools.partial(self._place, len(outline.items) - 1)
        found = states.load_state(self.items, outline, place), outline
      except checkpoint.Damaged as e:
        problems.append(str(e))
        known = known[1:]
    if found:
      self._states = [*itertools.islice(self._outlines(known[1:]), 1), found[1]]
      self._whole = states.outline(self.items / found[1].states[-1])
    if problems:
      then = f"the run resumes after {known[0].name}" if found else "the run starts anew"
      needed = _names_of([*self._outlines(known[1:]), *self._states])
      unused = sorted(self._names() - needed)
      self._warn(f"{'; '.join(problems)}; {then}", [self.items / name for name in unused])
    if not found:
      return None
    state, outline = found
    self._num_events = outline.events
    return states.position(known[0]), state, outline.rows

  def _outlines(self, folders: list[pathlib.Path]) -> Iterator[states.Outline]:
    """Yields the outlines of those states that can be read."""
    for folder in folders:
      with contextlib.suppress(checkpoint.Damaged):
        yield states.outline(folder)

  def _place(self, num_tasks: int, t: int, tree: Params) -> Params:
    """Returns the state of task t, or what the tasks share (-1), in memory or as maps of a file."""
    return self._to_disk(tree) if _is_cold(t, num_tasks) else tree

  def _to_disk(self, tree: Params) -> Params:
    """Returns a tree as maps of a file, or as it is if there is no room for them."""
    if not self._can_spill:
      return tree
    try:
      return self._spill(tree)
    except OSError as e:
      self._can_spill = False
      text = f"{self.folder}: the states of old tasks stay in memory ({e.strerror or e})"
      warnings.warn(text, stacklevel=2)
      return tree

  def spill(self, state: State) -> State:
    """Moves the states of old tasks from memory to a file, and returns the state with maps of it.

    They are those that `save_state` has written before and that have not changed since, but for the
    first task and the newest ones. Only with one process.
    """
    tasks, count = list(state.tasks), len(state.tasks)
    for name, t in self._unchanged.items():
      if _is_cold(t, count) and not spill.is_spilled(tasks[t]):
        tasks[t] = self._parts[name] = self._to_disk(tasks[t])
    return State(state.shared, tuple(tasks))

  def _warn(self, text: str, unused: Sequence[pathlib.Path] = ()) -> None:
    """Warns of damage and moves the unused items into set_aside/.

    Raises:
      UserError: instead, with checkpoint.strict.
    """
    if self.strict:
      raise UserError(f"{text} (set checkpoint.strict=False to resume all the same)")
    if unused:
      aside = checkpoint.free_name(self.folder / SET_ASIDE)
      aside.mkdir()
      for folder in unused:
        folder.rename(aside / folder.name)
      text += f"; {len(unused)} checkpoints that are not used are set aside in {aside}"
    warnings.warn(text, stacklevel=3)

  # --- the end ----------------------------------------------------------------------

  @processes.on_leader
  @_explain_disk
  def finish(self, record: dict) -> None:
    """Waits for the checkpoints and writes the record; the last state stays in the folder."""
    self._raise_errors(0)
    files.write_json(self.folder / RECORD, record)

  @_explain_disk
  def close(self) -> None:
    """Waits for the checkpoints that are being written, and closes the files."""
    self._writer.shutdown(wait=True)
    if self._metrics is not None:
      self._metrics.close()


@contextlib.contextmanager
def opened(
  path: str, config: dict, overwrite: bool, strict: bool, stop_asked: Callable[[], bool], now: dict
) -> Iterator[Workdir]:
  """Opens or makes the folder of a run, and locks it until the block ends.

  Args:
    path: path of the folder.
    config: resolved, as a nested dict.
    overwrite: whether to delete the run that is in the folder.
    strict: whether damaged checkpoints are an error.
    stop_asked: see `experiment.run`.
    now: the standing of this process (standing.py).

  Yields:
    The open folder.

  Raises:
    InUse: if another process has opened it.
    UserError: if it can't be written, or holds a run with another config or other inputs.
  """
  folder = pathlib.Path(path)
  run = Workdir(folder, strict)
  run.stop_asked = stop_asked
  with contextlib.ExitStack() as stack:
    prepare = functools.partial(_prepare, stack, run, path, config, overwrite, now)
    run.standing, run.new_changes = processes.run_on_leader(prepare)
    yield run


def _prepare(
  stack: contextlib.ExitStack, run: Workdir, path: str, config: dict, overwrite: bool, now: dict
) -> tuple[dict, list[str]]:
  """Locks and checks the folder, and returns what `identity.check_standing` does.

  The stack then releases the lock and closes the folder.
  """
  if any("\ud800" <= c <= "\udfff" for c in str(run.folder.resolve())):
    raise UserError(
      f"--workdir={path}: its name can't be decoded in this locale, which checkpoints need; set "
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
    raise _disk_error(path, e) from e


def _disk_error(path: str | pathlib.Path, error: OSError) -> UserError:
  """Returns the error of a folder that can't be used."""
  file = f" ({error.filename})" if error.filename else ""
  return UserError(f"--workdir={path}: {error.strerror or error}{file}; {_remedy(error)}")


def _remedy(error: OSError) -> str:
  """Returns what the user can do about an error of the disk."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    return "free some space or choose a folder on another disk"
  if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
    return "choose a folder that can be read and written"
  return "check the disk, or choose another folder"


def _item(name: str) -> str:
  """Returns the name of a progress item, such as now.task03.warmup.fit."""
  return "now." + name.replace("/", ".")


def _numbered(tasks: Iterable[Params]) -> Iterator[tuple[str, Params]]:
  """Yields the task states with the names of their items."""
  return ((f"task{t:02d}", tree) for t, tree in enumerate(tasks))


def _is_cold(t: int, num_tasks: int) -> bool:
  """Returns whether the state of task t may be on disk: not the first, nor one of the newest."""
  return 0 < t < num_tasks - _IN_MEMORY and processes.count() == 1


def _names_of(outlines: Iterable[states.Outline]) -> set[str]:
  """Returns the names of the items of some states, and of those that they build on."""
  return {n for x in outlines for n in (*x.states, *x.items.values(), *x.row_items)}


def _to_device(x: Params) -> Params:
  """Moves a numpy array in memory to the device; returns anything else as it is."""
  in_memory = isinstance(x, np.ndarray) and not isinstance(x, spill.Spilled)
  return jnp.asarray(x) if in_memory else x


def _require_leaves(found: Params, like: Params, folder: pathlib.Path) -> None:
  """Raises Damaged unless `found` is a list of numpy arrays like the leaves of `like`."""
  expected = [(x.shape, x.dtype) for x in jax.tree.leaves(like)]
  arrays = isinstance(found, list) and all(isinstance(x, np.ndarray) for x in found)
  if not arrays or [(x.shape, x.dtype) for x in found] != expected:
    raise checkpoint.Damaged(f"{folder}: its arrays are not those of this config's model")


def _delete_run(folder: pathlib.Path) -> None:
  """Deletes what a run has written into its folder, but for the lock; other files stay."""
  for path in folder.iterdir():
    if path.name == CHECKPOINTS or re.fullmatch(rf"{SET_ASIDE}(-\d+)?", path.name):
      shutil.rmtree(path, ignore_errors=True)
  for name in (RECORD, METRICS, CONFIG, TASKS, STANDING):
    (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds the folder's lock, which the system releases when the process ends, however it ends.

  Raises:
    InUse: if another process holds it.
    UserError: if the file system can't lock files.
  """
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
        f"--workdir={folder}: its file system can't lock files ({e.strerror}), so two runs could "
        "overwrite each other; choose a folder on a local disk"
      ) from e
    stream.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    stream.write(f"process {os.getpid()} on {platform.node()} since {since}\n")
    stream.flush()
    try:
      yield
    finally:
      stream.truncate(0)  # not deleted: another process may hold the file open by now
