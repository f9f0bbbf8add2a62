"""The Hopper kernels in the Mosaic GPU interpreter, which also looks for races between warpgroups,
TMA copies and barriers. Slow there: few cases, each with all that it can hold.

Run by `test_paged_attention_mosaic_gpu`, in a process of its own: the interpreter's threads wait
for each other inside XLA's pool, and with fewer threads there than warpgroups it hangs
(PJRT_NPROC, read when the backend starts). What the interpreter cannot show (layouts, registers,
shared memory, speed) needs the compiler or the chip.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Ops
from pallas_kernels.common import Target
from pallas_kernels.kv_write import mosaic_gpu as write_mosaic_gpu
from pallas_kernels.paged_attention import mosaic_gpu
from pallas_kernels.paged_attention.mosaic_gpu_decode import DecodeConfig
from pallas_kernels.paged_attention.mosaic_gpu_prefill import PrefillConfig
from tests.kernels.cases import Case, attend, build, changed, error_of, oracle

# The interpreter's NumPy speaks of the NaN that the tests put into everything unused.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def interpreted(decode: DecodeConfig) -> Ops:
    target = Target("gpu", "NVIDIA H200", plgpu.InterpretGPUParams(detect_races=True))
    return Ops(
        name="reference",  # `cases` asks by name what can run here, and skips the rest
        platform="gpu",
        reason="asked for",
        allocate=partial(mosaic_gpu.allocate, target=target),
        page_bytes=mosaic_gpu.page_bytes,
        kv_write=write_mosaic_gpu.kv_write,
        paged_attention=partial(
            mosaic_gpu.paged_attention, target=target, config=(decode, PrefillConfig(64, 2))
        ),
        copy_pages=mosaic_gpu.copy_pages,
        flash_attention=None,
        quant_matmul=None,
    )


def attended(ops: Ops, built: Any, capfd: Any, fill: str | float = np.nan) -> np.ndarray:
    """The output of `built`, once no race was seen on the way."""
    out = attend(ops, built, fill)
    jax.effects_barrier()
    assert "RACE DETECTED" not in capfd.readouterr().out
    return out


DECODED = {
    # Three splits, of which the short rows leave some empty; tiles of four pages; GQA 3.
    "splits": (
        Case(
            rows=((1, 37), (1, 1), (1, 200), (1, 128)),
            heads=(6, 2),
            head_dim=64,
            dtype="bfloat16",
            page_size=16,
        ),
        DecodeConfig(64, 2, 3),
    ),
    # A ring of three 128-position tiles; pages longer than half a tile; MQA; window and cap.
    "window": (
        Case(
            rows=((1, 300), (1, 64), (1, 65), (1, 63)),
            heads=(5, 1),
            head_dim=64,
            dtype="float16",
            page_size=64,
            window=90,
            soft_cap=1.5,
        ),
        DecodeConfig(128, 3, 1),
    ),
    # Pages of more than one tile.
    "int8": (
        Case(
            rows=((1, 190), (1, 33), (1, 256)),
            heads=(8, 2),
            head_dim=128,
            dtype="bfloat16",
            page_dtype="int8",
            page_size=128,
        ),
        DecodeConfig(64, 3, 2),
    ),
    "fp8": (
        Case(
            rows=((1, 130), (1, 31)),
            heads=(16, 2),
            head_dim=64,
            dtype="bfloat16",
            page_dtype="float8_e4m3fn",
            page_size=32,
            window=70,
        ),
        DecodeConfig(64, 2, 1),
    ),
    "head_dim 256": (
        Case(rows=((1, 100), (1, 9)), heads=(4, 1), head_dim=256, dtype="float16", page_size=8),
        DecodeConfig(64, 2, 2),
    ),
}


@pytest.mark.parametrize("name", DECODED)
def test_decoding_equals_the_oracle_with_nan_in_everything_unused(name: str, capfd: Any):
    case, config = DECODED[name]
    built = build(as_decode(case))
    table = built.ragged["page_table"].copy()
    for i, kv_len in enumerate(built.ragged["kv_lens"]):
        table[i, -(-kv_len // case.page_size) :] = [2**31 - 1, -(2**31), 10**6, -1][i % 4]
    out = attended(interpreted(config), changed(built, page_table=table), capfd)
    assert error_of(out, oracle(built)) <= 1
    assert not out[len(case.rows) :].any()


def as_decode(case: Case) -> Case:
    return replace(case, num_decode=len(case.rows), decode_only=True)


TILED = {
    # More than one tile of tokens in a row, and of positions; a row of one token; GQA 3.
    "mixed": Case(
        rows=((1, 20), (1, 130), (45, 100), (9, 9), (1, 65)),
        num_decode=2,
        heads=(6, 2),
        head_dim=64,
        dtype="bfloat16",
        page_size=16,
    ),
    # Tokens of several rows in one copy of q; the last tile reaches behind the last token.
    "verify": Case(
        rows=((5, 150), (3, 3), (0, 33), (8, 129), (1, 1)),
        heads=(8, 1),
        head_dim=64,
        dtype="float16",
        page_size=64,
        window=70,
        soft_cap=1.5,
        padding_tokens=0,
    ),
    "shared": Case(
        rows=((20, 90), (16, 64)),
        heads=(2, 2),
        head_dim=128,
        dtype="bfloat16",
        page_size=32,
        shared_pages=1,
    ),
    "int8": Case(
        rows=((1, 70), (33, 90)),
        num_decode=1,
        heads=(4, 1),
        head_dim=64,
        dtype="bfloat16",
        page_dtype="int8",
        page_size=32,
    ),
    "fp8": Case(
        rows=((6, 130), (10, 70)),
        heads=(8, 1),
        head_dim=64,
        dtype="float16",
        page_dtype="float8_e4m3fn",
        page_size=64,
        window=50,
    ),
}


@pytest.mark.parametrize("name", TILED)
def test_tiles_equal_the_oracle_with_nan_in_everything_unused(name: str, capfd: Any):
    built = build(TILED[name])
    out = attended(interpreted(DecodeConfig(64, 2)), built, capfd)
    assert error_of(out, oracle(built)) <= 1
    padding = np.setdiff1d(np.arange(len(out)), np.concatenate(built.tokens))
    assert not out[padding].any()


def test_bits_depend_neither_on_what_is_unused_nor_on_batch_mates(capfd: Any):
    case = Case(
        rows=((1, 150), (1, 90), (12, 70), (9, 40)),
        num_decode=2,
        heads=(4, 1),
        head_dim=64,
        dtype="bfloat16",
        page_size=64,
        window=100,
    )
    ops, built = interpreted(DecodeConfig(64, 2, 2)), build(case)
    clean = attended(ops, built, capfd, fill=0.0)
    kv_lens = built.ragged["kv_lens"].copy()
    kv_lens[[1, 3]] = [5, 20]
    other = attended(ops, changed(built, kv_lens=kv_lens), capfd, fill=np.nan)
    kept = np.concatenate([built.tokens[0], built.tokens[2]])
    assert np.array_equal(clean[kept], other[kept])
    assert not np.array_equal(clean[built.tokens[1]], other[built.tokens[1]])
