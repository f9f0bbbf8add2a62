"""What is the TPU kernels' own: small blocks, hidden blocks, the interpreter that watches memory,
lowering for TPU, block sizes that cannot be."""

import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.common import Target
from pallas_kernels.flash_attention import Mask, Options, attention, tpu
from pallas_kernels.flash_attention.tpu_config import (
    BackwardConfig,
    Blocks,
    ForwardConfig,
    backward_config,
    forward_config,
)
from pallas_kernels.flash_attention.tpu_tiles import Tiles, block_tables, fetched_block
from tests.kernels.flash_cases import (
    Case,
    Configured,
    Implementation,
    build,
    changed,
    errors_of,
    oracle,
    run,
)

CHIPS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", None)


def small(heads: int, target: Target, block_kv: int = 128) -> Implementation:
    """Blocks so small that short sequences have many; `heads` query heads in a tile."""
    forward = ForwardConfig(16, heads, block_kv, 128)
    backward = BackwardConfig(16, heads, block_kv, 128, 32, heads, block_kv, 128)
    return Implementation("tpu", Configured(tpu, forward, backward), target)


INTERPRET = Target("cpu", None, interpret=True)


@pytest.mark.parametrize(
    ("heads", "block_kv", "case"),
    [
        (2, 256, Case(50, 500, heads=(4, 1), window=100, soft_cap=2.0, q_offset=(450, 20))),
        (1, 256, Case(70, 300, heads=(3, 1), segments=True, q_offset=(230, 0))),
        (3, 128, Case(70, 300, heads=(3, 1), causal=False, segments=True, dtype="bfloat16")),
        (1, 128, Case(300, 300, heads=(1, 1), head_dim=80, window=129)),
        # Offsets beyond all keys: with a window some queries see nothing.
        (1, 128, Case(40, 200, heads=(1, 1), window=30, q_offset=(200, 1000))),
        (1, 128, Case(40, 200, heads=(1, 1), scale=-0.3)),
    ],
    ids=str,
)
def test_many_blocks(heads: int, block_kv: int, case: Case):
    built = build(case)
    errors = errors_of(run(small(heads, INTERPRET, block_kv), built), oracle(built))
    assert max(errors.values()) <= 1, errors


def test_blocks_that_nobody_sees_are_not_computed():
    # 100 queries at [0, 100) and [330, 430), a window of 20: in row 0 keys from 128 on are in
    # blocks that nobody sees, in row 1 those below 256 and those from 512 on.
    built = build(Case(100, 600, heads=(2, 1), window=20, q_offset=(0, 330)))
    poisoned = {name: getattr(built, name).copy() for name in "kv"}
    for x in poisoned.values():
        x[0, 128:] = np.nan
        x[1, :256] = np.nan
        x[1, 512:] = np.nan
    want = run(small(2, INTERPRET), built)
    got = run(small(2, INTERPRET), changed(built, **poisoned))
    for name in ("out", "dq"):
        np.testing.assert_array_equal(got[name], want[name])
    # Of dk and dv the hidden blocks stay zero whatever the queries say.
    for name in ("dk", "dv"):
        assert not want[name][0, 128:].any() and not want[name][1, :256].any()
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize(("window", "offset"), [(None, 0), (None, 700), (150, 300), (20, 900)])
def test_hidden_blocks_are_not_fetched(window: int | None, offset: int):
    q, k = jnp.zeros((1, 256, 1, 64)), jnp.zeros((1, 1024, 1, 64))
    tiles = Tiles.of(q, k, Blocks(16, 1, 128, 128))
    mask = Mask(jnp.full(1, offset, jnp.int32), None, None)
    options = Options(True, window, None, 1.0)
    tables = [np.asarray(x) for x in block_tables(mask, options, tiles, by_kv=False)]
    seen, fetched = [], []
    for i in range(tiles.q_blocks):
        low, high = offset + 16 * i, offset + 16 * i + 15
        first = 0 if window is None else max(0, low - window + 1) // 128
        mine = list(range(first, min(high, 1023) // 128 + 1))
        following = min(i + 1, tiles.q_blocks - 1)
        steps = [
            int(fetched_block(tables, i, following, step))
            for step in range(tiles.kv_steps(options))
        ]
        assert steps[: len(mine)] == mine
        seen += mine
        fetched += steps
    # A block is fetched when it is not the one of the step before.
    assert sum(a != b for a, b in pairwise([-1, *fetched])) <= len(seen)


WATCHED = """
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from pallas_kernels.common import Target
from tests.kernels.flash_cases import Case, build, errors_of, oracle, run
from tests.kernels.test_flash_attention_tpu import small
params = pltpu.InterpretParams({})
for case in (
    Case(20, 150, heads=(2, 1), window=70, soft_cap=2.0, q_offset=(130, 10)),
    Case(17, 130, heads=(2, 1), causal=False, segments=True),
):
    built = build(case)
    errors = errors_of(run(small(1, Target("cpu", None, params)), built), oracle(built))
    assert max(errors.values()) <= 1, errors
    races = interpret_pallas_call.races
    assert races is None or not races.races_found
"""


@pytest.mark.parametrize(
    "params",
    ["dma_execution_mode='on_wait'", "dma_execution_mode='eager', detect_races=True"],
)
def test_under_the_interpreter_that_watches_memory(params: str):
    # It raises on reads out of bounds and fills what nobody wrote with NaN. A process of its own,
    # because a wait that never ends can only be killed.
    subprocess.run([sys.executable, "-c", WATCHED.format(params)], check=True, timeout=300)


@pytest.mark.parametrize("device_kind", CHIPS)
@pytest.mark.parametrize(
    ("dtype", "num_kv_heads", "head_dim", "segments"),
    [("bfloat16", 8, 128, False), ("float32", 1, 64, True), ("bfloat16", 2, 256, True)],
)
def test_lowers_for_tpu(
    device_kind: str | None, dtype: str, num_kv_heads: int, head_dim: int, segments: bool
):
    ids = jax.ShapeDtypeStruct((2, 700), jnp.int32) if segments else None
    q = jax.ShapeDtypeStruct((2, 700, 8, head_dim), dtype)
    k = jax.ShapeDtypeStruct((2, 700, num_kv_heads, head_dim), dtype)
    attend = attention(tpu, Target("tpu", device_kind))

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, ids: Any, offset: jax.Array) -> Any:
        function = partial(attend, window=300, soft_cap=30.0, segment_ids=ids, q_offset=offset)
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(out)

    offset = jax.ShapeDtypeStruct((2,), jnp.int32)
    lowered = jax.jit(gradients).trace(q, k, k, ids, offset).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 3


@pytest.mark.parametrize("device_kind", CHIPS)
@pytest.mark.parametrize("group", [1, 3, 4, 8, 71])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rule_gives_blocks_that_can_be(device_kind: str | None, group: int, dtype: str):
    target = Target("tpu", device_kind)
    backward = backward_config(target, dtype, 128, group)
    for blocks in (forward_config(target, dtype, 128, group), backward.dq, backward.dkv):
        blocks.check("blocks", group)
        for q_len, kv_len in ((1, 1), (17, 4000), (5000, 129)):
            cut = blocks.cut(q_len, kv_len)
            cut.check("cut", group)
            assert cut.block_q <= blocks.block_q and cut.block_kv <= max(128, blocks.block_kv)


def test_tuned_blocks_come_first(monkeypatch: pytest.MonkeyPatch):
    forward = ForwardConfig(32, 2, 256, 128)
    backward = BackwardConfig(*[32, 2, 256, 128] * 2)
    asked = []

    def lookup(device_kind: str, op: str, stage: str, **key: Any) -> dict[str, int]:
        asked.append((device_kind, op, stage, key))
        return asdict(forward if stage == "forward" else backward)

    monkeypatch.setattr(tuning, "lookup", lookup)
    target = Target("tpu", "TPU v6 lite")
    assert forward_config(target, "bfloat16", 64, 4) == forward
    assert backward_config(target, "bfloat16", 64, 4) == backward
    key = {"dtype": "bfloat16", "head_dim": 64, "group": 4}
    assert asked == [
        ("TPU v6 lite", "flash_attention", stage, key) for stage in ("forward", "backward")
    ]


GOOD = ForwardConfig(16, 2, 256, 128)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(GOOD, block_q=24), r"config\.block_q is 24; .* power of two >= 16"),
        (replace(GOOD, block_q=8), r"config\.block_q is 8; .* power of two >= 16"),
        (replace(GOOD, heads=3), r"config\.heads is 3; it must divide the 4"),
        (replace(GOOD, heads=0), r"config\.heads is 0; it must be an int >= 1"),
        (replace(GOOD, compute_kv=64), r"config\.compute_kv is 64; .* multiple of 128"),
        (replace(GOOD, block_kv=320), r"config\.block_kv is 320; .* multiple of its compute_kv"),
    ],
)
def test_blocks_that_cannot_be_are_named(config: Blocks, message: str):
    mask, options = Mask(jnp.zeros(1, jnp.int32), None, None), Options(True, None, None, 1.0)
    q, k = jnp.zeros((1, 8, 4, 64)), jnp.zeros((1, 8, 1, 64))
    with pytest.raises(ValueError, match=message):
        tpu.forward(q, k, k, mask, options, INTERPRET, config=ForwardConfig(**asdict(config)))
    backward = BackwardConfig(
        **{f"dq_{n}": x for n, x in asdict(GOOD).items()},
        **{f"dkv_{n}": x for n, x in asdict(config).items()},
    )
    with pytest.raises(ValueError, match=message.replace(r"config\.", r"config\.dkv\.")):
        tpu.backward(q, k, k, q, jnp.zeros((1, 4, 8)), q, mask, options, INTERPRET, config=backward)


def test_float16_is_refused():
    q = jnp.zeros((1, 8, 1, 64), jnp.float16)
    with pytest.raises(ValueError, match=r"q\.dtype .* is float16; allowed: float32, bfloat16"):
        attention(tpu, INTERPRET)(q, q, q)
