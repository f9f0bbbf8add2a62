"""Tests under the Mosaic GPU interpreter, each file of cases in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent.parent

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason=f"jax is {jax.__version__}; the Mosaic GPU interpreter works from 0.11",
)


def check(cases: str, part: str, seconds: int) -> None:
    """The tests of the file `cases` beside this one whose names contain `part`, which must all
    end within `seconds`: a barrier that nobody arrives at would wait for ever."""
    path = f"tests/kernels/{cases}"
    # Of a test that hangs, where each thread stands.
    options = ["-q", "-o", "faulthandler_timeout=120", "-p", "no:cacheprovider", "-k", part]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "16", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, path],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
