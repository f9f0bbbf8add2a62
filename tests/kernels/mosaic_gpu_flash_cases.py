"""Runs flash attention on Mosaic GPU's interpreter and prints what came out, one JSON line for each
case: `python -m tests.kernels.mosaic_gpu_flash_cases NAME...`.

A program of its own, because a wrong barrier hangs and takes the process with it, and because the
interpreter's threads wait for each other inside XLA's pool: with fewer threads than warpgroups it
hangs, too (PJRT_NPROC, read when the backend starts).
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.common import MASKED, Target
from pallas_kernels.flash_attention import mosaic_gpu, validate
from pallas_kernels.flash_attention.mosaic_gpu import BackwardConfig, ForwardConfig
from tests.kernels import flash_cases
from tests.kernels.flash_cases import Case

SMALL = ForwardConfig(block_kv=64)  # more blocks for the same length


@dataclass(frozen=True)
class Run:
    """A case, its block sizes, and whether races are looked for."""

    case: Case
    forward: ForwardConfig | None = SMALL
    backward: BackwardConfig | None = None
    with_backward: bool = True
    races: bool = False


RUNS = {
    # Four blocks through a ring of two, rows that see nothing at first.
    "causal": Run(Case(50, 250, (3, 1), 64, "bfloat16", q_offset=(200, 75)), races=True),
    # One CTA takes several tiles, in both directions.
    "persistent": Run(
        Case(140, 140, (2, 2), 64, "bfloat16"),
        ForwardConfig(block_kv=64, ctas=3),
        with_backward=False,
        races=True,
    ),
    "three warpgroups": Run(
        Case(150, 130, (1, 1), 64, "bfloat16", causal=False),
        ForwardConfig(block_kv=64, compute_wgs=3),
        with_backward=False,
    ),
    "window": Run(
        Case(77, 200, (2, 1), 64, "float16", window=19, soft_cap=1.5, q_offset=(100, 3)), races=True
    ),
    "segments": Run(Case(129, 127, (2, 1), 64, "bfloat16", segments=True), races=True),
    "head dim 128": Run(Case(70, 130, (2, 2), 128, "bfloat16", causal=False), None),
    "head dim 256": Run(Case(33, 129, (2, 1), 256, "bfloat16", q_offset=(96, 0)), None),
    "head dim 256, window": Run(
        Case(20, 129, (2, 1), 256, "bfloat16", window=40, soft_cap=1.5, q_offset=(100, 0)), None
    ),
    "one": Run(Case(1, 1, (2, 2), 64, "float16", scale=-0.5), None),
}


def run(name: str) -> dict[str, Any]:
    """Errors of `name` as multiples of what is allowed, and whether races were found."""
    setup = RUNS[name]
    case = setup.case
    built = flash_cases.build(case)
    arrays = (built.q, built.k, built.v, built.dout, built.q_offset, built.segments)
    q, k, v, dout, q_offset, segments = jax.tree.map(jnp.asarray, arrays)
    mask, options = validate(
        *(q, k, v, case.causal, case.window, case.soft_cap, case.scale),
        segment_ids=segments,
        q_offset=q_offset,
    )
    target = Target("gpu", "NVIDIA H200", InterpretGPUParams(detect_races=setup.races))
    forward = partial(mosaic_gpu.forward, config=setup.forward)
    out, lse = jax.jit(forward, static_argnums=(4, 5))(q, k, v, mask, options, target)
    results = {"out": np.asarray(out)}
    if setup.with_backward:
        backward = jax.jit(
            partial(mosaic_gpu.backward, config=setup.backward), static_argnums=(7, 8)
        )
        grads = backward(q, k, v, out, lse, dout, mask, options, target)
        results |= dict(zip(("dq", "dk", "dv"), map(np.asarray, grads), strict=True))
    expected = flash_cases.oracle(built)
    errors = {x: flash_cases.error_of(y, expected[x]) for x, y in results.items()}
    exact = flash_cases.log_sum_exp(built)
    exact = np.where(np.isfinite(exact), exact, MASKED)
    found = setup.races and interpret_pallas_call.get_races().races_found
    return {"errors": errors, "lse": float(np.abs(lse - exact).max()), "races": bool(found)}


def main(names: list[str]) -> None:
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        for name in names:
            print(json.dumps({"name": name, **run(name)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(RUNS))
