"""flash_attention of every implementation: oracle, gradients, needles, mutations, memory."""

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import MASKED, Target
from pallas_kernels.flash_attention import attention, xla
from tests.kernels.cases import Choice, all_pairs, pairs_of, pairwise
from tests.kernels.flash_cases import (
    AXES,
    IMPLEMENTATIONS,
    NAMES,
    Built,
    Case,
    Expected,
    Implementation,
    build,
    case_of,
    changed,
    error_of,
    errors_of,
    log_sum_exp,
    lse_of,
    oracle,
    run,
    visible,
)

pytestmark = pytest.mark.optimised

CHOICES = pairwise(AXES, ())
# For the slow to compile: fewer values of each axis, every mask.
FEW_AXES = {
    "heads": ((3, 3), (8, 2)),
    "head_dim": (64, 128),
    "dtype": ("float32", "bfloat16"),
    "mask": AXES["mask"],
    "lengths": ((77, 77), (129, 128)),
}
FEW_CHOICES = pairwise(FEW_AXES, ())

expected_of = lru_cache(lambda case: oracle(build(case)))


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda implementation: implementation.name)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return request.param


def _id(value: Any) -> str:
    if isinstance(value, Implementation):
        return value.name
    return "-".join(str(x).replace(" ", "") for x in value.values())


@pytest.mark.parametrize(("choices", "axes"), [(CHOICES, AXES), (FEW_CHOICES, FEW_AXES)])
def test_the_choices_cover_every_pair(choices: list[Choice], axes: dict[str, tuple]):
    assert set().union(*map(pairs_of, choices)) == all_pairs(axes)


@pytest.mark.parametrize(
    ("implementation", "choice"),
    [
        # Every other choice; `-m slow` runs the others.
        pytest.param(implementation, choice, marks=[pytest.mark.slow] if i % 2 else [])
        for implementation in IMPLEMENTATIONS
        for i, choice in enumerate(CHOICES if implementation.name == "xla" else FEW_CHOICES)
    ],
    ids=_id,
)
def test_output_and_gradients_equal_the_oracle(implementation: Implementation, choice: Choice):
    case = case_of(choice)
    errors = errors_of(run(implementation, build(case)), expected_of(case))
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, heads=(4, 1), scale=0.3),
        # Some queries see no key at all: those behind the last key by more than the window.
        Case(200, 70, window=30, dtype="bfloat16"),
        # Positions up to the largest; a window that hides nothing; one that hides it all.
        Case(40, 90, window=2**40, q_offset=(2**30 - 40, 50)),
        Case(40, 90, window=100, q_offset=(2**30 - 40, 50)),
    ],
    ids=str,
)
def test_lengths_windows_and_offsets_at_their_limits(implementation: Implementation, case: Case):
    errors = errors_of(run(implementation, build(case)), expected_of(case))
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize(
    "case",
    [
        Case(300, 300, heads=(6, 2), soft_cap=3.0),
        Case(300, 400, heads=(3, 3), window=150, q_offset=(100, 40)),
        Case(257, 257, heads=(4, 1), dtype="bfloat16", causal=False, segments=True),
    ],
    ids=str,
)
def test_several_blocks_of_the_size_it_chooses_itself(case: Case):
    chosen = Implementation("xla", xla, Target("cpu"))
    config = xla.default_config(case.heads[0] // case.heads[1], case.q_len, case.kv_len)
    assert config.block_q < case.q_len and config.block_kv < case.kv_len
    errors = errors_of(run(chosen, build(case)), expected_of(case))
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize(
    "case",
    [
        Case(9, 13, head_dim=8, dtype="float64", soft_cap=1.5, q_offset=(4, 2)),
        Case(11, 11, head_dim=8, dtype="float64", window=4, scale=0.7, segments=True),
    ],
    ids=str,
)
def test_the_oracles_gradients_are_its_slopes(case: Case):
    """Central differences in float64 along random directions: error about step ** 2."""
    built, step = build(case), 1e-5
    answer = oracle(built)
    rng = np.random.default_rng(1)
    for name in ("q", "k", "v"):
        x = getattr(built, name)
        direction = rng.standard_normal(x.shape)
        high, low = (
            np.sum(oracle(changed(built, **{name: x + h * direction}))["out"].value * built.dout)
            for h in (step, -step)
        )
        slope = np.sum(answer[f"d{name}"].value * direction)
        assert abs(slope) > 0.1
        assert (high - low) / (2 * step) == pytest.approx(slope, rel=1e-7)


def test_gradients_equal_jaxs_own_of_the_reference(implementation: Implementation):
    """On inputs rounded to bfloat16; the reference computes from them in float32."""
    built = build(Case(70, 90, dtype="bfloat16", soft_cap=2.0, q_offset=(20, 0)))
    wide = {name: getattr(built, name).astype(np.float32) for name in ("q", "k", "v", "dout")}
    wide_case = replace(built.case, dtype="float32")
    expected = run(IMPLEMENTATIONS[0], changed(built, case=wide_case, **wide))
    noises = oracle(built)
    results = run(implementation, built)
    for name in NAMES:
        value = expected[name].astype(np.float64)
        assert error_of(results[name], Expected(value, noises[name].noise)) <= 1, name


@pytest.mark.parametrize(
    "case",
    [
        Case(77, 77, window=19, soft_cap=1.5, dtype="bfloat16", segments=True),
        Case(50, 140, causal=False),
    ],
    ids=str,
)
def test_log_sum_exp(implementation: Implementation, case: Case):
    built = build(case)
    lse, expected = lse_of(implementation, built), log_sum_exp(built)
    sees = np.isfinite(expected)
    assert sees.all() != case.segments
    assert lse.dtype == np.float32 and (lse[~sees] == np.float32(MASKED)).all()
    # Scores of a few units: rounding of their sums, and in bfloat16 that of q * scale.
    allowed = 1e-5 if case.dtype == "float32" else 2e-2
    assert np.abs(lse - expected, where=sees, out=np.zeros_like(expected)).max() <= allowed


def test_needles_at_every_block_boundary(implementation: Implementation):
    """Each query has one key with a large logit: its output is that V, its dout that V's dv."""
    edges = [edge + d for edge in range(0, 257, 32) for d in (-1, 0, 1)]
    positions = [p for p in edges if p >= 0]
    case = Case(len(positions), 290, q_offset=(290 - len(positions), 290 - len(positions)))
    assert max(positions) <= case.q_offset[0]
    built = build(case)
    group = case.heads[0] // case.heads[1]
    q = built.q[:, :, ::group]
    built.q[:] = np.repeat(q, group, axis=2)
    unit = q / np.sum(q**2, axis=-1, keepdims=True) * np.sqrt(case.head_dim)
    built.k[:, positions] = 40.0 * unit
    results = run(implementation, built)
    values = np.repeat(built.v[:, positions], group, axis=2).astype(np.float64)
    assert error_of(results["out"], Expected(values, np.abs(values))) <= 1
    dout = built.dout.astype(np.float64).reshape(*q.shape[:3], group, case.head_dim)
    dv = results["dv"][:, positions]
    # A score of 40 and its lse are off by some of their float32 units, 4e-6 each; so is the weight.
    assert error_of(dv, Expected(dout.sum(3), np.abs(dout).sum(3))) <= 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_query_that_sees_nothing_gives_zeros(implementation: Implementation, dtype: str):
    built = build(Case(40, 90, dtype=dtype, segments=True, q_offset=(50, 0)))
    q_segments, kv_segments = built.segments
    q_segments[0, 5:9], q_segments[1], kv_segments[0, 20:60] = -1, -2, -3
    results = run(implementation, built)
    seen = visible(built)
    blind, unseen = ~seen.any(2), ~seen.any(1)
    assert 4 < blind[0].sum() < 40 and blind[1].all() and 40 < unseen[0].sum() < 90
    for name, nothing in zip(NAMES, (blind, blind, unseen, unseen), strict=True):
        assert not results[name][nothing].any(), name
        assert np.isfinite(results[name]).all() and results[name][~nothing].any(-1).all(), name


def test_rows_and_heads_are_apart(implementation: Implementation):
    """NaN and infinities in a row, and in a KV head, change no bit of the others."""
    built = build(Case(70, 90, heads=(6, 2), q_offset=(20, 20)))
    clean = run(implementation, built)
    bad = changed(built, **{name: getattr(built, name).copy() for name in ("q", "k", "v", "dout")})
    for x in (bad.q, bad.k, bad.v, bad.dout):
        x[1] = np.nan
        x[1, ::3] = np.inf
    results = run(implementation, bad)
    for name in NAMES:
        assert np.array_equal(results[name][0], clean[name][0]), name
        assert np.isnan(results[name][1]).all(), name
    heads = {"out": slice(3), "dq": slice(3), "dk": 0, "dv": 0}
    bad = changed(built, k=built.k.copy(), v=built.v.copy())
    bad.k[:, :, 1], bad.v[:, 10:20, 1] = np.nan, np.inf
    results = run(implementation, bad)
    for name, head in heads.items():
        assert np.array_equal(results[name][:, :, head], clean[name][:, :, head]), name
    assert np.isnan(results["out"][:, :, 3:]).all()


def _hide(built: Built, first: int, last: int) -> Built:
    q_segments, kv_segments = built.segments
    kv_segments = kv_segments.copy()
    kv_segments[:, first:last] = 5
    return changed(built, segments=(q_segments, kv_segments))


def _show_one_more(built: Built) -> Built:
    return changed(built, segments=tuple(np.zeros_like(x) for x in built.segments))


def _windowed(built: Built, by: int) -> Built:
    return changed(built, case=replace(built.case, window=built.case.window + by))


def _moved(built: Built, by: int) -> Built:
    return changed(built, q_offset=built.q_offset + by)


def _one_head_of_each_group(built: Built) -> Built:
    """dk and dv are linear in dout: these are the parts of one query head of each group."""
    group = built.q.shape[2] // built.k.shape[2]
    is_first = (np.arange(built.q.shape[2]) % group == 0)[:, None]
    return changed(built, dout=built.dout * is_first.astype(built.dout.dtype))


# What is computed in place of the truth, and the results in which that must be noticed.
MUTATIONS = {
    "a dropped block of keys": (lambda built: _hide(built, 64, 96), NAMES),
    "half the keys": (lambda built: _hide(built, 0, 80), NAMES),
    "length + 1": (_show_one_more, NAMES),
    "length - 1": (lambda built: _hide(built, 158, 160), NAMES),
    "q_offset + 1": (lambda built: _moved(built, 1), NAMES),
    "q_offset - 1": (lambda built: _moved(built, -1), NAMES),
    "q_offset 0": (lambda built: changed(built, q_offset=np.zeros_like(built.q_offset)), NAMES),
    "window + 1": (lambda built: _windowed(built, 1), NAMES),
    "window - 1": (lambda built: _windowed(built, -1), NAMES),
    "wrong head group": (lambda built: changed(built, k=built.k[:, :, ::-1]), NAMES),
    "one head of each group": (_one_head_of_each_group, ("dq", "dk", "dv")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_notices(name: str):
    """What this suite must catch, it catches in its loosest dtype; the comparison is the same for
    every implementation, and so one stands for all."""
    (implementation,) = (x for x in IMPLEMENTATIONS if x.name == "xla")
    case = Case(96, 160, dtype="bfloat16", segments=True, q_offset=(64, 30))
    built = build(replace(case, window=30 if "window" in name else None))
    built.segments = tuple(np.zeros_like(x) for x in built.segments)
    built = _hide(built, 159, 160) if "length" in name else built
    mutate, noticed = MUTATIONS[name]
    expected = oracle(built)
    errors = errors_of(run(implementation, built), expected)
    assert max(errors.values()) <= 1, errors
    errors = errors_of(run(implementation, mutate(built)), expected)
    assert min(errors[result] for result in noticed) > 2, errors


@pytest.mark.parametrize("soft_cap", [1.5, 30.0])
def test_the_comparison_notices_a_forgotten_derivative_of_the_soft_cap(soft_cap: float):
    """Also where the cap is far above the scores, as models have it: in float32."""
    dtype = "bfloat16" if soft_cap < 5 else "float32"
    built = build(Case(90, 90, dtype=dtype, soft_cap=soft_cap))
    expected, wrong = oracle(built), oracle(built, soft_cap_slope=False)
    errors = errors_of({name: wrong[name].value.astype(built.q.dtype) for name in NAMES}, expected)
    assert errors["out"] <= 1 and errors["dv"] <= 1
    assert errors["dq"] > 2 and errors["dk"] > 2


def test_memory_is_linear_in_length():
    function = attention(xla, Target("cpu"))

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(out)

    sizes = []
    for length in (1024, 4096, 16384):
        q, k = (jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (4, 2))
        memory = jax.jit(both).lower(q, k, k).compile().memory_analysis()
        assert memory is not None
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[1] < 4.1 * sizes[0] and sizes[2] < 4.1 * sizes[1]
    assert sizes[2] < 16384**2 / 10  # no array of S x S, not even of bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 5, 16))}, r"q has shape \(2, 5, 16\); it must be \[B, S, N, H\]"),
        ({"q": jnp.zeros((2, 0, 4, 16))}, r"q has shape \(2, 0, 4, 16\)"),
        ({"k": jnp.zeros((3, 7, 2, 16))}, r"k has shape \(3, 7, 2, 16\).*\(2, >= 1, >= 1, 16\)"),
        ({"k": jnp.zeros((2, 7, 2, 8))}, r"k has shape \(2, 7, 2, 8\).*\(2, >= 1, >= 1, 16\)"),
        ({"v": jnp.zeros((2, 6, 2, 16))}, r"v has shape \(2, 6, 2, 16\).*\(2, 7, 2, 16\)"),
        ({"q": jnp.zeros((2, 5, 3, 16))}, "q has 3 heads; it must be a multiple of k's 2"),
        ({"q": jnp.zeros((2, 5, 4, 16), int)}, "q.dtype is int32; allowed: float32, bfloat16"),
        ({"v": jnp.zeros((2, 7, 2, 16), "float16")}, "q, k and v are float32, float32, float16"),
        ({"causal": 1}, "causal is 1; it must be True or False"),
        ({"window": 0}, "window is 0; it must be an int >= 1"),
        ({"window": 4.0}, "window is 4.0; it must be an int >= 1"),
        ({"window": 4, "causal": False}, "window is 4 with causal=False; .* needs causal=True"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0; it must be None or a finite float > 0"),
        ({"soft_cap": math.inf}, "soft_cap is inf"),
        ({"scale": math.nan}, "scale is nan; it must be a finite float"),
        ({"q_offset": -1}, "q_offset is -1; it must be >= 0"),
        ({"q_offset": 2**30 - 4}, r"q_offset is 1073741820; .* 2\*\*30 - S at most"),
        ({"q_offset": True}, "q_offset is True; it must be an int or an int32 array"),
        ({"q_offset": 1.5}, "q_offset is 1.5; it must be an int or an int32 array"),
        ({"q_offset": jnp.zeros(2)}, "q_offset is float32; it must be int32"),
        ({"q_offset": jnp.zeros(3, int)}, r"q_offset has shape \(3,\); .* = \(2\)"),
        ({"segment_ids": jnp.zeros((2, 5), int)}, r"segment_ids \(kv\) has shape \(2, 5\).*2, 7"),
        (
            {"segment_ids": (jnp.zeros((2, 7), int), jnp.zeros((2, 7), int))},
            r"segment_ids \(q\) has shape \(2, 7\); .* = \(2, 5\)",
        ),
        (
            {"segment_ids": (jnp.zeros((2, 5), int), jnp.zeros((2, 7)))},
            r"segment_ids \(kv\) is float32; it must be int32",
        ),
        ({"segment_ids": (jnp.zeros((2, 5), int),)}, "segment_ids is a tuple of 1; .* two"),
        ({"segment_ids": [[0] * 5] * 2}, "segment_ids is a list of 2; it must be an int32 array"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str):
    """Checked before anything is traced, and before an implementation is asked."""
    arguments = {
        "q": jnp.zeros((2, 5, 4, 16)),
        "k": jnp.zeros((2, 7, 2, 16)),
        "v": jnp.zeros((2, 7, 2, 16)),
        **change,
    }
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        attention(None, Target("cpu"))(q, k, v, **arguments)
