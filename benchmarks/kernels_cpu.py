"""The rows of `benchmarks.kernels` on a CPU: ours beside the gather and einsum form, and memory.

Only ratios within a row mean something on a shared machine: all forms of a row run interleaved.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks import attention_cpu

Row = dict[str, Any]

# SmolLM2's heads, which is the default model.
HEADS = {"heads": 9, "kv_heads": 3, "head_dim": 64, "page_size": 16}


def decode(deadline: float, _: Any) -> Iterator[Row]:
    """Paged attention, one layer of a chain of four: every case of `attention_cpu`."""
    args = argparse.Namespace(**HEADS, dtype="float32", layers=4, rounds=15)
    for name in attention_cpu.CASES:
        if time.monotonic() > deadline:
            yield {"left_out": f"decode {name}"}
            continue
        yield from _rows("decode", name, attention_cpu.run_case(name, args)["ms"])


def _rows(section: str, case: str, ms: dict[str, float]) -> Iterator[Row]:
    for impl, time_ms in ms.items():
        note = f"{time_ms / ms['xla']:.2f} times xla's time"
        yield {"section": section, "case": case, "impl": impl, "us": time_ms * 1e3, "note": note}


def prefill(deadline: float, _: Any) -> Iterator[Row]:
    """Causal flash attention, forward and backward, beside the reference."""
    for length in (256, 1024):
        for section in ("forward", "backward"):
            case = f"1 x {length}, 9/3/64 {section}"
            if time.monotonic() > deadline:
                yield {"left_out": f"prefill {case}"}
                continue
            runs = {impl: _flash(impl, length, section) for impl in ("xla", "reference")}
            yield from _rows("prefill", case, attention_cpu.best_ms(runs, 5))


def _flash(impl: str, length: int, section: str) -> Callable[[], Any]:
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, length, n, 64)) for i, n in enumerate((9, 3, 3))
    )
    run = jax.jit(_function(impl, section))
    return lambda: run(q, k, v)


def _function(impl: str, section: str) -> Callable[..., Any]:
    attend = partial(pallas_kernels.resolve(impl).flash_attention, causal=True)
    if section == "forward":
        return attend
    return jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), argnums=(0, 1, 2))


def memory(deadline: float, _: Any) -> Iterator[Row]:
    """Temporary memory that XLA plans for a prefill of one row, in bytes per token: a constant when
    memory grows linearly. Nothing is run."""
    for impl in ("xla", "reference"):
        for section in ("forward", "backward"):
            for length in (1024, 4096, 16384):
                case = f"1 x {length}, 9/3/64 {section}"
                if time.monotonic() > deadline:
                    yield {"left_out": f"memory {case} {impl}"}
                    continue
                args = [jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in (9, 3, 3)]
                compiled = jax.jit(_function(impl, section)).lower(*args).compile()
                planned: Any = compiled.memory_analysis()
                temp = planned.temp_size_in_bytes
                row = {"section": "memory", "case": case, "impl": impl, "temp_bytes": temp}
                yield row | {
                    "achieved": f"{temp / 2**20:.1f} MiB",
                    "note": f"{temp / length:.0f} bytes a token",
                }


SECTIONS: dict[str, Callable[[float, Any], Iterator[Row]]] = {
    "decode": decode,
    "prefill": prefill,
    "memory": memory,
}
