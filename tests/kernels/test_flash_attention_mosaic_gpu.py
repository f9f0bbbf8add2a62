"""Flash attention for Hopper: numbers and races on Mosaic GPU's interpreter, and bad input. That it
compiles for the chip is the business of `pallas_kernels/aot.py`."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common import Target
from pallas_kernels.flash_attention import mosaic_gpu, validate
from pallas_kernels.flash_attention.mosaic_gpu import BackwardConfig, ForwardConfig

H200 = Target("gpu", "NVIDIA H200")
NAMES = (
    "causal",
    "persistent",
    "three warpgroups",
    "window",
    "segments",
    "head dim 128",
    "head dim 256",
    "head dim 256, window",
    "one",
)
JAX = tuple(map(int, jax.__version__.split(".")[:2]))
needs_interpreter = pytest.mark.skipif(
    JAX < (0, 11), reason=f"Mosaic GPU's interpreter works from jax 0.11; this is {jax.__version__}"
)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What each case printed; those after one that hung are missing."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "16", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.kernels.mosaic_gpu_flash_cases", *NAMES]
    process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(results: dict[str, dict[str, Any]], name: str) -> None:
    assert name in results, "no result: it failed (see stderr), or it or one before it hung"
    result = results[name]
    assert all(error <= 1 for error in result["errors"].values()), result["errors"]
    # A few hundred exponentials in float32, each right to 2 units of 2**-23.
    assert result["lse"] <= 1e-5
    assert not result["races"]


def arguments(**changes: Any) -> tuple[Any, ...]:
    shape = {"dtype": "bfloat16", "head_dim": 64} | changes
    q = jnp.zeros((1, 8, 2, shape["head_dim"]), shape["dtype"])
    mask, options = validate(q, q, q, True, None, None, None, segment_ids=None, q_offset=0)
    return q, q, q, mask, options


def backward(q: Any, k: Any, v: Any, mask: Any, options: Any, target: Target, **kwargs: Any) -> Any:
    lse = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))
    return mosaic_gpu.backward(q, k, v, q, lse, q, mask, options, target, **kwargs)


@pytest.mark.parametrize("function", [mosaic_gpu.forward, backward])
def test_what_the_tensor_cores_do_not_take(function: Any) -> None:
    old = r"jax is .*; mosaic_gpu needs 0\.11" if jax.__version_info__ < (0, 11) else None
    with pytest.raises(ValueError, match=old or r"float32; allowed on .*: bfloat16, float16"):
        function(*arguments(dtype="float32"), H200)
    with pytest.raises(ValueError, match=old or r"head dim is 80; allowed on .*: 64, 128, 256"):
        function(*arguments(head_dim=80), H200)
    with pytest.raises(ValueError, match=old or "device_kind is NVIDIA A100; allowed: Hopper"):
        function(*arguments(), replace(H200, device_kind="NVIDIA A100"))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ForwardConfig(block_q=96), "block_q is 96; it must be a multiple of 64"),
        (lambda: ForwardConfig(block_kv=0), "block_kv is 0; it must be a multiple of 64"),
        (lambda: ForwardConfig(stages=0), r"stages is 0; it must be in \[1, 8\]"),
        (lambda: ForwardConfig(compute_wgs=4), r"compute_wgs is 4; it must be in \[1, 3\]"),
        (lambda: ForwardConfig(ctas=-1), "ctas is -1; it must be >= 0"),
        (lambda: BackwardConfig(dq_block_kv=32), "dq_block_kv is 32; it must be a multiple of 64"),
        (lambda: BackwardConfig(dkv_stages=1), r"dkv_stages is 1; it must be in \[2, 8\]"),
        (
            lambda: BackwardConfig(compute_wgs=1, dkv_halves=1),
            r"dkv_halves is 1; it must be in \[0, 0\]",
        ),
    ],
)
def test_block_sizes_that_do_not_exist(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
