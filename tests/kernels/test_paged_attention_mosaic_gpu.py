"""The Hopper kernels without a Hopper: in the interpreter (`mosaic_gpu_paged_cases`), and what
around them needs none."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Ragged
from pallas_kernels.common import Spec, Target
from pallas_kernels.paged_attention import mosaic_gpu
from pallas_kernels.paged_attention import mosaic_gpu_items as items
from pallas_kernels.paged_attention.mosaic_gpu_decode import DecodeConfig, num_splits
from tests.kernels import mosaic_gpu_interpreter
from tests.kernels.cases import Case, build

TARGET = Target("gpu", "NVIDIA H200")
SECONDS = 400  # for all cases: a barrier that nobody arrives at would wait for ever


@mosaic_gpu_interpreter.needs_interpreter
@pytest.mark.parametrize("part", ["decoding", "tiles", "bits"])
def test_the_kernels_in_the_interpreter(part: str):
    mosaic_gpu_interpreter.check("mosaic_gpu_paged_cases.py", part, SECONDS)


def test_items_hold_every_head_and_token_once():
    for group in range(1, 49):
        heads, tokens = items.packing(group)
        assert group % heads == 0 and tokens % 8 == 0 and heads * tokens <= items.ROWS
        shape = items.Shape(heads, group // heads, tokens, group, 1, 64, False, None, None)
        found = [
            (head, token + i, warpgroup * 64 + row + i)
            for warpgroup in range(2)
            for head, token, size, row in shape.pieces(warpgroup)
            for i in range(size)
        ]
        assert found == [
            (head, token, head * tokens + token) for head in range(heads) for token in range(tokens)
        ]


def test_the_plan_covers_every_tiled_token_once_and_long_tiles_come_first():
    rows = ((1, 9), (1, 4), (70, 200), (0, 50), (33, 33), (1, 700), (32, 64))
    built = build(Case(rows=rows, num_decode=2, heads=(4, 1)))
    shape = items.Shape(4, 1, 32, 4, 1, 64, False, None, None)
    plan, count = items.plan(built.device_ragged(), len(built.q), shape)
    plan = np.asarray(plan)[: int(count[0])]
    tokens = [token for _, first, _, size in plan for token in range(first, first + size)]
    assert sorted(tokens) == list(range(2, sum(new for new, _ in rows)))
    for row, first, position, size in plan:
        new, kv_len = rows[row]
        assert 1 <= size <= 32
        assert position == kv_len - new + first - built.ragged["cu_q_lens"][row]
    of_row_2 = [position for row, _, position, _ in plan if row == 2]
    assert of_row_2 == sorted(of_row_2, reverse=True) and len(of_row_2) == 3


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16, 32, 48, 64, 128, 256])
def test_splits_fill_the_chip(rows: int):
    config = DecodeConfig(64, 4)
    splits = num_splits(rows, 8, 32768, config)
    waves = rows * 8 * splits / 264
    assert waves / np.ceil(waves) > 0.75
    assert splits == 1 or rows * 8 < 2 * 264
    assert num_splits(rows, 8, 64, config) == 1
    assert num_splits(rows, 8, 32768, DecodeConfig(64, 4, 3)) == 3


GOOD = Spec(32, 8, 128, 64, "bfloat16", "bfloat16")


@mosaic_gpu_interpreter.needs_interpreter
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (Spec(32, 8, 128, 64, "float32", "float32"), "dtype is float32; allowed: bfloat16"),
        (Spec(32, 8, 128, 64, "bfloat16", "float16"), "page_dtype is float16; allowed: bfloat16,"),
        (Spec(32, 8, 96, 64, "bfloat16", "bfloat16"), "head_dim is 96; allowed: 64, 128, 256"),
        (Spec(32, 8, 256, 64, "bfloat16", "int8"), "head_dim is 256; allowed with int8 .* 64, 128"),
        (Spec(32, 8, 128, 24, "bfloat16", "bfloat16"), "is 24; .*: 8, 16, 32 and multiples of 64"),
        (Spec(32, 8, 128, 16, "bfloat16", "int8"), "is 16; .* int8 pages: 32 and multiples of 64"),
        (Spec(71, 1, 64, 64, "bfloat16", "bfloat16"), "is 71; .* head_dim 64: at most 48"),
    ],
)
def test_what_it_cannot_do_is_named(spec: Spec, reason: str):
    assert mosaic_gpu.unsupported(GOOD, TARGET) is None
    assert re.search(reason, mosaic_gpu.unsupported(spec, TARGET) or "")
    other = mosaic_gpu.unsupported(GOOD, Target("gpu", "NVIDIA B200"))
    assert other == "device_kind is NVIDIA B200; allowed: Hopper (H100, H200, H800, H20, GH200)"


@mosaic_gpu_interpreter.needs_interpreter
def test_what_it_cannot_do_raises():
    pages = mosaic_gpu.allocate(3, 8, 2, 16, "float32", target=TARGET)
    row = jnp.zeros(4, jnp.int32)
    ragged = Ragged(
        jnp.zeros((4, 2), jnp.int32), row, jnp.zeros(5, jnp.int32), jnp.int32(0), row, True
    )
    with pytest.raises(ValueError, match="dtype is float32; allowed: bfloat16, float16"):
        mosaic_gpu.paged_attention(
            jnp.zeros((4, 6, 16)),
            pages,
            ragged,
            scale=1.0,
            window=None,
            soft_cap=None,
            target=TARGET,
        )
