"""What every Mosaic GPU (Hopper) kernel shares: jax's names that moved, and tanh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import Target

LOG2E = math.log2(math.e)

# Untyped: jax 0.10's load has one more argument. The kernels refuse to run there, and import.
load: Any = plgpu.load
Accumulator: Any = plgpu.WGMMAAccumulatorRef


CHIPS = ("H100", "H200", "H800", "H20", "GH200")


def missing(target: Target) -> str | None:
    """Why no Mosaic GPU kernel of this package can be built for `target`; None when they can. A
    chip that is not known is taken for a Hopper."""
    if jax.__version_info__ < (0, 11):
        return f"jax is {jax.__version__}; mosaic_gpu needs 0.11 or later"
    chip = target.device_kind
    if chip is not None and not target.interpret and not any(name in chip for name in CHIPS):
        return f"device_kind is {chip}; allowed: Hopper ({', '.join(CHIPS)})"
    return None


def tanh(x: jax.Array, factor: float) -> jax.Array:
    """tanh(factor * x) as 1 - 2 / (e ** (2 factor x) + 1), to 2 ** -21.

    The hardware's own instruction has 11 bits: times a soft cap of 50 they are an error of 2 % in a
    probability. rsqrt in place of its division, which takes more registers."""
    root = lax.rsqrt(jnp.exp2(x * (2 * factor * LOG2E)) + 1.0)
    return 1.0 - 2.0 * (root * root)
