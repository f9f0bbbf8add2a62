"""A needle in 4,096 tokens: with float and 8-bit pages attention finds the one key that matters."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import common
from pallas_kernels.paged_attention import Ragged
from tests.kernels.cases import run, write

LENGTH, PAGE = 4096, 16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
LOGIT = 24.0
"""The needle's score; others are N(0, 1). exp(24) outweighs 4,095 times exp(1/2), their mean, by
four million to one."""
POSITIONS = (0, 1, 15, 16, 127, 128, 1000, 2047, 2048, 3333, 4079, 4080, 4094, 4095)


def haystack(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((NUM_KV_HEADS, HEAD_DIM)).astype(dtype)
    k, v = (rng.standard_normal((LENGTH, NUM_KV_HEADS, HEAD_DIM)).astype(dtype) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize(
    ("impl", "page_dtype"),
    [
        ("xla", "float32"),
        ("xla", "int8"),
        ("xla", "float8_e4m3fn"),
        ("reference", "int8"),
        pytest.param("reference", "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param("interpret", "int8", marks=pytest.mark.slow),
        pytest.param("interpret", "float8_e4m3fn", marks=pytest.mark.slow),
    ],
)
def test_the_output_is_the_needles_v(impl: str, page_dtype: str, new: int):
    """Of the last token, alone (decode) and as the last of 5 (a chunk), wherever the needle is."""
    ops = pallas_kernels.resolve(impl)
    q, k, v = haystack("float32")
    num_pages = LENGTH // PAGE
    table = np.random.default_rng(1).permutation(np.arange(1, num_pages + 1)).astype(np.int32)
    at = np.arange(LENGTH)
    slots = jnp.asarray(table[at // PAGE] * PAGE + at % PAGE, jnp.int32)
    empty = ops.allocate(num_pages + 1, PAGE, NUM_KV_HEADS, HEAD_DIM, page_dtype)
    pages = write(ops, empty, jnp.asarray(k), jnp.asarray(v), slots)
    ragged = Ragged(
        page_table=jnp.asarray(table[None]),
        kv_lens=jnp.asarray([LENGTH], jnp.int32),
        cu_q_lens=jnp.asarray([0, new], jnp.int32),
        num_decode=jnp.int32(new == 1),
        slots=slots[-new:],
        decode_only=new == 1,
    )
    queries = jnp.asarray(np.tile(np.repeat(q, NUM_HEADS // NUM_KV_HEADS, axis=0), (new, 1, 1)))
    needle = LOGIT * HEAD_DIM**0.5 * q / np.sum(q**2, axis=-1, keepdims=True)
    for position in POSITIONS:
        one = slots[position : position + 1]
        found = write(ops, pages, jnp.asarray(needle[None]), jnp.asarray(v[None, position]), one)
        out = np.asarray(run(ops, queries, found, ragged, HEAD_DIM**-0.5, None, None))[-1]
        held = v[position]
        if page_dtype in common.QUANTISED:
            data, scale = common.quantise(jnp.asarray(held), page_dtype)
            held = np.asarray(data.astype(jnp.float32) * scale[:, None])
            # Half a step: 1/254 of the largest number, or 1/16 of each and of the smallest step.
            largest = np.abs(v[position]).max(axis=-1, keepdims=True)
            step = largest / 254 if page_dtype == "int8" else np.abs(v[position]) / 16
            assert (np.abs(held - v[position]) <= step + largest * 1e-5).all()
        want = np.repeat(held, NUM_HEADS // NUM_KV_HEADS, axis=0)
        # The haystack's share, and what rounding the needle's K takes off its logit.
        np.testing.assert_allclose(out, want, atol=1e-4, err_msg=f"needle at {position}")
