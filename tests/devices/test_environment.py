"""What a program sets before JAX is loaded, and what it leaves to the user."""

import importlib.metadata

import pytest

from halrp_jax.devices import environment


def prepared(monkeypatch, jaxlib, **variables):
  """Returns XLA_FLAGS and OPENBLAS_THREAD_TIMEOUT after `prepare`, for a version of jaxlib."""
  environ = dict(variables)
  monkeypatch.setattr(environment.os, "environ", environ)
  monkeypatch.setattr(importlib.metadata, "version", lambda name: jaxlib)
  environment.prepare()
  return environ.get("XLA_FLAGS"), environ.get("OPENBLAS_THREAD_TIMEOUT")


@pytest.mark.parametrize(
  ("jaxlib", "given", "expected"),
  [
    ("0.10.2", "", "--xla_cpu_use_fusion_emitters=false"),
    ("0.10.2", "--a=1", "--a=1 --xla_cpu_use_fusion_emitters=false"),
    ("0.10.2", "--xla_cpu_use_fusion_emitters=true", "--xla_cpu_use_fusion_emitters=true"),
    ("0.10.2", "flags.txt", "flags.txt"),  # the name of a file
    ("0.11.0", "--a=1", "--a=1"),  # it would end the process: the flag is not known
    ("0.12.0.1", "", ""),
  ],
)
def test_xla_compiles_without_fusion_emitters_where_they_are_slow(
  monkeypatch, jaxlib, given, expected
):
  assert prepared(monkeypatch, jaxlib, XLA_FLAGS=given)[0] == expected


def test_openblas_threads_sleep_soon_unless_the_user_says_otherwise(monkeypatch):
  assert prepared(monkeypatch, "0.12.0")[1] == "20"
  assert prepared(monkeypatch, "0.12.0", OPENBLAS_THREAD_TIMEOUT="26")[1] == "26"
