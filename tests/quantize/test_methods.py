"""The methods on matrices: against the textbook in float64, and against rounding to nearest."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.quantize import awq, descent, gptq
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


def group_errors(rounded: Rounded, grid: Grid, w: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[N, G]: squared errors, those of input k times counts[k]."""
    wrong = counts * (values(rounded, grid) - w) ** 2
    return wrong.reshape(N, -1, grid.group_size or K).sum(-1)


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_without_correlation_is_the_best_grid_and_the_nearest(name: str):
    grid, w = GRIDS[name], weights()
    counts = np.linspace(1, 2, K).astype(np.float32)
    got = gptq.quantise(w, np.diag(counts), grid, "w")
    packed = record(got, grid)
    step = np.repeat(packed.scales, packed.group_size, axis=0).T
    inner = (np.asarray(got.integers) > 0) & (np.asarray(got.integers) < grid.highest)
    assert (np.abs(values(got, grid) - w)[inner] <= 0.5001 * step[inner]).all()
    own = group_errors(got, grid, w, counts)
    nearest = group_errors(round_to_nearest(w, grid), grid, w, counts)
    assert (own <= 1.0001 * nearest).all() and own.sum() < 0.97 * nearest.sum()


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_beats_rounding_on_correlated_inputs(name: str):
    grid, w, hessian = GRIDS[name], weights(), correlated()
    got = gptq.quantise(w, hessian, grid, "w")
    assert error(got, grid, w, hessian) < 0.6 * error(round_to_nearest(w, grid), grid, w, hessian)


def textbook(w: np.ndarray, hessian: np.ndarray, rounded: Rounded, order: np.ndarray):
    """Optimal brain quantisation in a fixed order, column by column, in float64: after each the
    inverse Hessian of what remains is found anew. Integers [N, K] on the grids of `rounded`."""
    w, h = w.astype(np.float64).copy(), hessian.astype(np.float64)
    h = h + gptq.DAMPING * np.mean(np.diag(h)) * np.eye(K)
    per_group = K // rounded.scales.shape[1]
    scales, zeros = (
        np.repeat(np.asarray(part, np.float64), per_group, axis=1)
        for part in (rounded.scales, rounded.zeros)
    )
    integers = np.zeros(w.shape)
    for i, column in enumerate(order):
        rest = order[i:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        scale, zero = scales[:, column], zeros[:, column]
        integers[:, column] = np.clip(np.round(w[:, column] / scale) + zero, 0, 15)
        wrong = (w[:, column] - (integers[:, column] - zero) * scale) / inverse[0, 0]
        w[:, rest] -= np.outer(wrong, inverse[0])
    return integers


@pytest.mark.parametrize("name", ["output", "symmetric", "zeros"])
def test_gptq_is_the_textbooks(name: str):
    """The groups with the largest inputs first, and in a group the largest inputs."""
    grid, w, hessian = GRIDS[name], weights(), correlated()
    got = gptq.quantise(w, hessian, grid, "w")
    size = grid.group_size or K
    diagonal = np.diag(hessian)
    groups = np.argsort(-diagonal.reshape(-1, size).sum(1))
    order = [g * size + k for g in groups for k in np.argsort(-diagonal[g * size :][:size])]
    want = textbook(w, hessian, got, np.array(order))
    # float32 may fall to the other side of a tie, and its row then goes another way
    same = (np.asarray(got.integers) == want).all(axis=1)
    assert same.mean() > 0.9


def test_inputs_that_are_always_zero():
    grid, w, hessian = GRIDS["symmetric"], weights(), correlated()
    hessian[5] = hessian[:, 5] = 0
    got = gptq.quantise(w, hessian, grid, "w")
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
        gptq.quantise(weights(), broken, GRIDS["symmetric"], "mlp/up")


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


@pytest.mark.parametrize("name", ["symmetric", "zeros"])
def test_each_groups_grid_is_no_worse_than_its_range(name: str):
    grid, w = GRIDS[name], weights()
    w[:, ::16] *= 1.5
    blocks = np.kron(np.eye(K // 16), np.ones((16, 16))) * correlated()
    hessian = (blocks + np.diag(np.where(np.arange(K) % 16, 100, 0.1))).astype(np.float32)

    def by_group(rounded: Rounded) -> np.ndarray:
        change = values(rounded, grid) - w
        return ((change @ hessian) * change).reshape(N, -1, 16).sum(-1)

    before, after = by_group(round_to_nearest(w, grid)), by_group(awq.rounded(w, hessian, grid))
    assert (after - before <= 1e-5 * before.max()).all() and after.sum() < 0.8 * before.sum()


@pytest.mark.parametrize("name", GRIDS)
def test_descent_betters_gptq(name: str):
    """Each output's error; and hardly an integer is left that its neighbour would better."""
    grid, w, hessian = GRIDS[name], weights(), gptq.damped(correlated(), gptq.DAMPING)
    start = gptq.quantise(w, correlated(), grid, "w")
    got = descent.refine(start, w, hessian, grid)

    def errors(rounded: Rounded) -> np.ndarray:
        change = values(rounded, grid).astype(np.float64) - w
        return np.sum((change @ np.asarray(hessian, np.float64)) * change, axis=1)

    before, after = errors(start), errors(got)
    assert (after <= 1.001 * before).all() and after.sum() < 0.95 * before.sum()
    change = values(got, grid).astype(np.float64) - w
    slope, curve = change @ np.asarray(hessian, np.float64), np.diag(hessian)
    steps = np.repeat(np.asarray(got.scales), K // got.scales.shape[1], axis=1)
    integers = np.asarray(got.integers)
    worth = [
        (2 * step * steps * slope + steps**2 * curve < -1e-6 * after[:, None])
        & (integers + step >= 0)
        & (integers + step <= grid.highest)
        for step in (-1, 1)
    ]
    assert np.mean(worth) < 0.03
