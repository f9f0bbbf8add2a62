"""Logits with int8 and fp8 pages: those of a dense model that rounds K and V itself, and near the
float ones."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.models import Model
from pallas_kernels.dispatch import resolve
from tests.models import tiny
from tests.models.test_logits import STEPS, TOLERANCE, parts

DTYPES = ("int8", "float8_e4m3fn")
# Largest magnitude, and the rms error that rounding K and V may leave in the logits, of their own
# rms. An int8 step is 1/127 of a vector's largest number, about 1/60 of its rms; fp8 has steps of
# 1/8 to 1/16 of each number. Over a few layers of gain 1.5 that about doubles.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
ALLOWED = {"int8": 0.03, "float8_e4m3fn": 0.12}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """K and V of every slot, rounded to 8 bits and back, float32 [slots, K, H]."""

    k: jax.Array
    v: jax.Array


def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """x [T, K, H] to 8 bits and back, a scale for each vector; on the host, in NumPy."""

    def on_host(x: np.ndarray) -> np.ndarray:
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(LARGEST[dtype])
        y = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
        y = np.rint(y) if dtype == "int8" else y.astype(ml_dtypes.float8_e4m3fn)
        return y.astype(np.float32) * scale

    return jax.pure_callback(on_host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def dense(model: Model, dtype: str) -> Model:
    """`model` with one row's attention over `Dense`: no pages, no tiles, no online softmax."""

    def allocate(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, _: str) -> Dense:
        zeros = jnp.zeros((num_pages * page_size, num_kv_heads, head_dim))
        return Dense(zeros, zeros)

    def kv_write(pages: Dense, k: jax.Array, v: jax.Array, slots: jax.Array) -> Dense:
        return Dense(
            pages.k.at[slots].set(rounded(k, dtype)), pages.v.at[slots].set(rounded(v, dtype))
        )

    def attend(q, pages: Dense, ragged: Any, *, scale, window, soft_cap) -> jax.Array:
        size = tiny.PAGE_SIZE
        slots = (ragged.page_table[0][:, None] * size + jnp.arange(size)).reshape(-1)
        group = q.shape[1] // pages.k.shape[1]
        k, v = (jnp.repeat(x[slots], group, axis=1) for x in (pages.k, pages.v))
        at = jnp.arange(len(slots))
        q_pos = ragged.kv_lens[0] - ragged.cu_q_lens[1] + jnp.arange(len(q))[:, None]
        visible = at <= q_pos
        if window is not None:
            visible &= at > q_pos - window
        scores = jnp.einsum("tnh,snh->nts", q, k, precision="highest") * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        return jnp.einsum("nts,snh->tnh", weights, v, precision="highest")

    ops = dataclasses.replace(
        model.ops, allocate=allocate, kv_write=kv_write, paged_attention=attend
    )
    return models.build(model.config, ops, "float32", dtype)


_FEW = ("llama", "gemma2")  # biases and scaled rope; windows and soft caps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "impl"),
    [
        *(pytest.param(c, "xla", marks=[pytest.mark.slow] * (c not in _FEW)) for c in tiny.CONFIGS),
        ("gpt2", "reference"),
        pytest.param("gemma2", "reference", marks=pytest.mark.slow),
        pytest.param("gemma2", "interpret", marks=pytest.mark.slow),
        pytest.param("llama", "interpret", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_rounded_k_and_v(case: str, impl: str, dtype: str):
    """Written in chunks of 7, read by those and later chunks."""
    plain, params, golden = parts(case)
    size = tiny.PAGE_SIZE if impl != "interpret" else 8
    model = models.build(plain.config, resolve(impl), "float32", dtype)
    want = tiny.run(dense(model, dtype), params, golden.tokens, *STEPS["chunks"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "PAGE_SIZE", size)
        got = tiny.run(model, params, golden.tokens, *STEPS["chunks"])
    assert tiny.relative_error(got, want) < TOLERANCE
    error = np.sqrt(np.mean((got - golden.logits) ** 2) / np.mean(golden.logits**2))
    assert 0 < error < ALLOWED[dtype]


def test_the_dense_reference_is_right_without_rounding(monkeypatch: pytest.MonkeyPatch):
    model, params, golden = parts("gemma2")
    monkeypatch.setattr("tests.models.test_kv_pages.rounded", lambda x, dtype: x)
    got = tiny.run(dense(model, "int8"), params, golden.tokens, *STEPS["chunks"])
    assert tiny.relative_error(got, golden.logits) < TOLERANCE
