"""The methods on matrices: against the textbook in float64, and against rounding to nearest."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.quantize import awq, gptq
from jaxinfer.quantize.grid import Grid, Rounded, output_error, round_to_nearest, split

GRIDS = {
    "symmetric": Grid(4, 16, True, "float16"),
    "zeros": Grid(4, 16, False, "float16", lowest_zero=1),
    "output": Grid(4, None, True, "float16"),
    "int8": Grid(8, 16, False, "bfloat16"),
}
K, N = 64, 24


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)


def correlated(seed: int = 1) -> np.ndarray:
    """X'X of inputs that a dozen directions explain for the most part."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((500, 12)) @ rng.standard_normal((12, K))
    x += 0.3 * rng.standard_normal((500, K))
    return (x.T @ x).astype(np.float32)


def record(rounded: Rounded, grid: Grid):
    (packed,) = split(rounded, ["layer"], [len(rounded.integers)], grid)
    packed.check_invariants()
    return packed


def values(rounded: Rounded, grid: Grid) -> np.ndarray:
    return record(rounded, grid).dequantize().T


def error(rounded: Rounded, grid: Grid, w: np.ndarray, hessian: np.ndarray) -> float:
    return float(output_error(values(rounded, grid) - w, w, hessian))


@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_is_as_fine_as_it_says(name: str):
    grid, w = GRIDS[name], weights()
    packed = record(round_to_nearest(w, grid), grid)
    stored = packed.scales.astype(jnp.dtype(grid.scale_dtype))
    np.testing.assert_array_equal(stored.astype(np.float32), packed.scales)
    assert (packed.zeros is None) == grid.symmetric
    step = np.repeat(packed.scales, packed.group_size, axis=0)
    off = np.abs(packed.dequantize() - w.T)
    integers = packed.values.astype(int) + (1 << (grid.bits - 1))
    inner = (integers > 0) & (integers < grid.highest)
    assert inner.mean() > 0.8
    assert (off[inner] <= 0.5001 * step[inner]).all()
    # At the ends the zero point's rounding comes to that, and the scale's: 2**-9 of 255 at most.
    assert (off <= 1.5 * step).all()


def test_groups_of_zeros_and_of_tiny_numbers():
    w = weights()
    w[:, :16] = 0
    w[:, 16:32] = 1e-9
    for grid in GRIDS.values():
        got = values(round_to_nearest(w, grid), grid)
        assert not got[:, :16].any()
        assert np.abs(got[:, 16:32]).max() <= 1e-8


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_without_correlation_is_rounding_to_nearest(name: str):
    grid, w = GRIDS[name], weights()
    hessian = np.diag(np.linspace(1, 2, K).astype(np.float32))
    got = gptq.quantise(w, hessian, grid, "w", act_order=False)
    want = round_to_nearest(w, grid)
    for mine, nearest in zip(got[:3], want[:3], strict=True):
        np.testing.assert_array_equal(mine, nearest)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_gptq_beats_rounding_on_correlated_inputs(name: str, act_order: bool):
    grid, w, hessian = GRIDS[name], weights(), correlated()
    got = gptq.quantise(w, hessian, grid, "w", act_order=act_order)
    assert error(got, grid, w, hessian) < 0.6 * error(round_to_nearest(w, grid), grid, w, hessian)


def textbook(w: np.ndarray, hessian: np.ndarray, scale: np.ndarray, order: np.ndarray):
    """Optimal brain quantisation in a fixed order, column by column, in float64: after each the
    inverse Hessian of what remains is found anew. Integers [N, K] of a symmetric grid."""
    w, h = w.astype(np.float64).copy(), hessian.astype(np.float64)
    h = h + gptq.DAMPING * np.mean(np.diag(h)) * np.eye(K)
    integers = np.zeros(w.shape)
    for i, column in enumerate(order):
        rest = order[i:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        integers[:, column] = np.clip(np.round(w[:, column] / scale) + 8, 0, 15)
        wrong = (w[:, column] - (integers[:, column] - 8) * scale) / inverse[0, 0]
        w[:, rest] -= np.outer(wrong, inverse[0])
    return integers


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_the_textbooks(act_order: bool):
    grid, w, hessian = GRIDS["output"], weights(), correlated()
    got = gptq.quantise(w, hessian, grid, "w", act_order=act_order)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(K)
    want = textbook(w, hessian, np.asarray(got.scales)[:, 0].astype(np.float64), order)
    # float32 may fall to the other side of a tie, and its row then goes another way
    same = (np.asarray(got.integers) == want).all(axis=1)
    assert same.mean() > 0.9


def test_act_order_groups_inputs_by_size():
    """Without correlation: rounding to nearest of the columns in order, in groups of that order."""
    grid, w = GRIDS["zeros"], weights()
    diagonal = np.random.default_rng(3).permutation(np.linspace(1, 2, K)).astype(np.float32)
    order = np.argsort(-diagonal)
    packed = record(gptq.quantise(w, np.diag(diagonal), grid, "w", act_order=True), grid)
    rank = np.argsort(order)
    np.testing.assert_array_equal(packed.g_idx, rank // 16)
    want = values(round_to_nearest(w[:, order], grid), grid)
    np.testing.assert_array_equal(packed.dequantize().T[:, order], want)


def test_inputs_that_are_always_zero():
    grid, w, hessian = GRIDS["symmetric"], weights(), correlated()
    hessian[5] = hessian[:, 5] = 0
    got = gptq.quantise(w, hessian, grid, "w", act_order=True)
    assert not values(got, grid)[:, 5].any()
    assert error(got, grid, w, hessian) < error(round_to_nearest(w, grid), grid, w, hessian)


def test_the_factor_of_the_inverse():
    hessian = correlated().astype(np.float64) + 10 * np.eye(K)
    factor = np.asarray(gptq.inverse_factor(jnp.asarray(hessian, jnp.float32)), np.float64)
    assert not np.tril(factor, -1).any()
    inverse = np.linalg.inv(hessian)
    # the condition number is about 3e3, float32 has 1e-7
    np.testing.assert_allclose(factor.T @ factor, inverse, atol=1e-3 * np.abs(inverse).max())


def test_a_hessian_without_factor_is_said():
    broken = correlated()
    broken[0, 0] = np.nan
    with pytest.raises(ConfigError, match="not finite"):
        gptq.quantise(weights(), broken, GRIDS["symmetric"], "mlp/up", act_order=False)


def outliers() -> tuple[np.ndarray, np.ndarray]:
    """(X'X, sum |x|) of inputs that are independent, one of them thirty times as large."""
    x = np.random.default_rng(4).standard_normal((400, K)).astype(np.float32)
    x[:, 7] *= 30
    return x.T @ x, np.abs(x).sum(axis=0)


@pytest.mark.parametrize("name", ["symmetric", "zeros"])
def test_awq_beats_rounding_where_an_input_is_large(name: str):
    grid, w = GRIDS[name], weights()
    hessian, magnitudes = outliers()
    scale = np.asarray(awq.best_scales(w, hessian, magnitudes, grid))
    assert scale[7] == scale.max() > 2 * np.median(scale)
    got = values(round_to_nearest(w * scale, grid), grid) / scale
    nearest = error(round_to_nearest(w, grid), grid, w, hessian)
    assert float(output_error(got - w, w, hessian)) < 0.9 * nearest


def test_awq_leaves_alone_what_it_cannot_better():
    """Equal inputs: every exponent gives scales of 1."""
    ones, identity = np.ones(K, np.float32), np.eye(K, dtype=np.float32)
    scale = awq.best_scales(weights(), identity, ones, GRIDS["zeros"])
    np.testing.assert_array_equal(scale, ones)


def test_clipping_lessens_each_groups_error():
    grid, w = GRIDS["zeros"], weights()
    w[:, ::16] *= 1.5
    blocks = np.kron(np.eye(K // 16), np.ones((16, 16))) * correlated()
    hessian = (blocks + np.diag(np.where(np.arange(K) % 16, 100, 0.1))).astype(np.float32)
    cut = np.asarray(awq.clipped(w, hessian, grid))
    assert (np.abs(cut) <= np.abs(w)).all() and (cut != w).any()
    before = values(round_to_nearest(w, grid), grid) - w
    after = values(round_to_nearest(cut, grid), grid) - w

    def by_group(change: np.ndarray) -> np.ndarray:
        return ((change @ hessian) * change).reshape(N, -1, 16).sum(-1)

    worse = by_group(after) - by_group(before)
    assert (worse <= 1e-5 * by_group(before).max()).all() and worse.min() < 0
