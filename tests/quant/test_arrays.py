"""QuantArray as a pytree; einsum and take over arrays and QuantArrays."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quant.arrays import QuantArray, einsum, take
from jaxinfer.quant.rounding import quantise
from pallas_kernels import resolve
from pallas_kernels.quant_matmul import dequantise
from tests.kernels.quant_cases import FORMATS

OPS = resolve("reference")
SPECS = [  # spec, shape of w, axes summed over
    ("td,df->tf", (64, 24), (0,)),
    ("td,nhd->tnh", (3, 8, 64), (2,)),
    ("tnh,dnh->td", (24, 4, 16), (1, 2)),
    ("rd,vd->rv", (24, 64), (1,)),
]


def made(shape: tuple[int, ...], contracted: tuple[int, ...], name: str) -> QuantArray:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    leaf = QuantArray.of_shape(shape, contracted, FORMATS[name])
    return jax.device_put(quantise(w, leaf, "w"))


def restored(w: QuantArray) -> np.ndarray:
    """The float array of `shape` that a QuantArray stands for."""
    matrix = np.asarray(dequantise(w.data, w.scales, w.zeros, w.format))
    axes = (*w.kept, *w.contracted)
    return matrix.reshape([w.shape[a] for a in axes]).transpose(np.argsort(axes))


@pytest.mark.parametrize(("spec", "shape", "contracted"), SPECS)
@pytest.mark.parametrize("name", ["int8", "int4_32", "int4_zeros_32"])
def test_einsum_is_that_of_the_float_weight(spec, shape, contracted, name):
    w = made(shape, contracted, name)
    rest = [shape[axis] for axis in contracted]
    for t in (1, 5):
        x = np.random.default_rng(t).standard_normal((t, *rest)).astype(np.float32)
        got = jax.jit(partial(einsum, spec, ops=OPS))(x, w=w)
        want = np.einsum(spec, x.astype(np.float64), restored(w).astype(np.float64))
        plain = einsum(spec, jnp.asarray(x), jnp.asarray(restored(w)), OPS)
        for out in (got, plain):
            assert out.dtype == jnp.float32 and out.shape == want.shape
            # 64 terms of about 1: far from what a wrong axis would give.
            np.testing.assert_allclose(out, want, atol=2e-5)


@pytest.mark.parametrize(("rows", "first"), [(1, False), (2, True), (64, True), (65, False)])
def test_a_weight_is_the_first_operand_for_few_rows(rows: int, first: bool):
    """Also of the product that XLA:CPU then computes, which is the transposed one."""
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((48, 24), (rows, 24)))
    program = jax.jit(partial(einsum, "rd,vd->rv", w=w, ops=OPS)).lower(x).compile()
    np.testing.assert_allclose(program(x), x @ w.T, rtol=1e-5, atol=1e-5)  # order of 24 products
    products = re.findall(
        r"= f32\[([0-9,]+)\]\S* (?:dot|fusion)\([^\n]*dot_general", program.as_text()
    )
    assert (f"48,{rows}" in products) == first


def test_one_row_of_two_bytes_is_computed_as_two():
    x = jnp.ones((1, 64), jnp.bfloat16)
    out = einsum("td,df->tf", x, jnp.ones((64, 3), jnp.bfloat16), OPS)
    np.testing.assert_array_equal(out, np.full((1, 3), 64, np.float32))


@pytest.mark.parametrize("spec", ["td,fd->tf", "tdn,dnf->tf"])
def test_other_axes_than_those_quantised_are_refused(spec: str):
    w = made((64, 24), (0,), "int8")
    with pytest.raises(ValueError, match=r"quantised along \(0,\)"):
        einsum(spec, jnp.ones((2, 24, 1)[: len(spec.split(",")[0])]), w, OPS)


@pytest.mark.parametrize("spec", ["td,df->ft", "td,ef->tf", "td,df", "t,f->tf", "td,df->f"])
def test_a_spec_that_is_no_matmul_of_rows_is_refused(spec: str):
    with pytest.raises(ValueError, match="must be rows and inputs"):
        einsum(spec, jnp.ones((2, 3)), jnp.ones((3, 4)), OPS)


@pytest.mark.parametrize("name", ["w8a8", "int8", "int4_32", "fp8"])
def test_take_gives_rows_and_clips_ids(name: str):
    table = made((24, 64), (1,), name)
    ids = jnp.asarray([0, 23, 24, 2**30, -1], jnp.int32)
    got = take(table, ids, "bfloat16")
    want = restored(table)[[0, 23, 23, 23, 0]].astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got), want)
    plain = take(jnp.asarray(restored(table)), ids, "float32")
    np.testing.assert_array_equal(np.asarray(plain).astype(jnp.bfloat16), want)


def test_take_of_columns_is_refused():
    with pytest.raises(ValueError, match="must be quantised along D"):
        take(made((64, 24), (0,), "int8"), jnp.zeros(1, jnp.int32), "float32")


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_a_pytree_with_static_format_and_shape(name: str):
    w = made((64, 24), (0,), "int8") if name == "int4_96" else made((64, 24), (0,), name)
    same = jax.tree.map(lambda a: a, w)
    assert (same.format, same.shape, same.contracted) == (w.format, (64, 24), (0,))
    empty = QuantArray.of_shape((64, 24), (0,), w.format)
    assert jax.tree.structure(w) == jax.tree.structure(empty)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(w)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(empty)
    ]
    assert w.num_bytes == empty.num_bytes == sum(a.nbytes for a in jax.tree.leaves(w))
