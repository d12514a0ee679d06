"""Shared by all tests: silent broadcasting is an error, small real runs, the real images if any."""

import contextlib
import gc
import os
import pathlib

# Most of the tests' time is XLA's, and each worker has one processor.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads wait busily

import jax
import pytest

from halrp_jax import methods
from halrp_jax.config import make_config
from halrp_jax.devices import compile_cache, environment
from halrp_jax.runs import experiment
from halrp_jax.types import Stopped

ROOT = pathlib.Path(__file__).parents[1]
# the processes that tests start inherit it, but in test_end_to_end
FOR_SPEED = {"JAX_DISABLE_MOST_OPTIMIZATIONS", "OPENBLAS_NUM_THREADS"}

environment.prepare()  # XLA reads its flags when the first array is made
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
  """What tests compile is shared by all their processes, and no part of the user's cache.

  HALRP_TEST_CACHE=DIR keeps the compiled programs, and nothing else, for the next run.
  """
  root = tmp_path_factory.getbasetemp()
  root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
  os.environ["XDG_CACHE_HOME"] = str(root / "cache")
  kept = os.environ.get("HALRP_TEST_CACHE")
  if kept and (programs := compile_cache.use(os.path.abspath(kept))):
    link = root / "cache" / "halrp_jax" / programs.name
    link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process of the tests was first
      link.symlink_to(programs)
  compile_cache.use("")


@pytest.fixture(scope="session", autouse=True)
def small_heap():
  """Collects garbage after each file only: it would take a fifth of the time."""
  gc.disable()
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def no_old_programs():
  """Frees the programs of a file's tests. What stays is not looked at again: runs collect, too."""
  yield
  methods._make.cache_clear()
  jax.clear_caches()
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="session")
def real_data() -> str:
  """The folder of real images in the original archives' layout."""
  folder = os.environ.get("HALRP_TEST_DATA", "")
  if not folder:
    pytest.skip("HALRP_TEST_DATA is not set: no real images here")
  return folder


@pytest.fixture
def digits_config():
  """Builds a small config on the real digits: (method, **overrides by dotted key) -> config."""

  def build(method="halrp", **overrides):
    config = make_config(
      method,
      benchmark="digits",
      network="mlp",
      epochs=2,
      batch_size=64,
      protocol={},
      every_method={"l2": 1e-4},
      methods_={
        "halrp": {"l1": 1e-5},
        "prd": {"epochs": 6, "augment": "none", "learning_rate": 7e-3, "momentum": 0.3},
        "ibpwf": {"fine_tune_epochs": 1},
      },
    )
    with config.unlocked():
      config.update_from_flattened_dict(overrides)
    return config

  return build


@pytest.fixture(params=sorted(methods.METHODS))
def method_name(request) -> str:
  """Every method, for the contract tests."""
  return request.param


def interrupt(config, folder, num_tasks: int) -> None:
  """Runs a config until `num_tasks` of its tasks are learned."""
  evaluations = []

  def show(event):
    if event["event"] == "evaluation":
      evaluations.append(event)

  with pytest.raises(Stopped):
    experiment.run(config, str(folder), show, stop_asked=lambda: len(evaluations) >= num_tasks)


@contextlib.contextmanager
def building_anew():
  """Within it methods are built anew, and none built there is used outside: parts are replaced."""
  methods._make.cache_clear()
  yield
  methods._make.cache_clear()


def slow_except(*quick: str):
  """Parametrises `method_name` over all methods, of which `make test` runs `quick` alone.

  In place of the fixture `method_name`, for tests that take long: the methods of `quick` differ in
  what the test is about.
  """
  assert set(quick) <= methods.METHODS.keys()
  marks = {name: [pytest.mark.slow] * (name not in quick) for name in sorted(methods.METHODS)}
  return pytest.mark.parametrize(
    "method_name", [pytest.param(name, marks=mark) for name, mark in marks.items()]
  )


HEAVY = {"apd", "apdfix", "bmkp", "clr", "gpm", "ibpwf", "iru", "prd"}
heavy_are_slow = slow_except(*(methods.METHODS.keys() - HEAVY))
