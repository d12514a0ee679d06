"""What a run needs is measured, not what an earlier one in the same process had needed."""

import platform
import subprocess
import sys

import pytest

from ..conftest import ROOT

CODE = """
from halrp_jax.devices import allocator
assert allocator.tune()
import numpy as np
from halrp_jax.runs import measure
arrays = [np.ones(1 << 22) for _ in range(20)]  # 32 MiB each
last = np.ones(1 << 10)  # lies behind them
high = measure.peak_memory()
del arrays
measure.forget_peak()
print(high - measure.peak_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_what_was_freed_is_no_part_of_the_next_peak():
  done = subprocess.run(
    [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, check=True
  )
  assert int(done.stdout) > 500 * 2**20
