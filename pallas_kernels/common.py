"""What every operation shares: dtype names, argument errors, quantisation of K and V, the target
that an implementation is built for. Knows no page layout."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16", "float16")

# What pages may be quantised to, and the largest magnitude each holds.
QUANTISED = {"int8": 127.0, "float8_e4m3fn": 448.0}
PAGE_DTYPES = (*DTYPES, *QUANTISED)
# Two digits of balanced base 256, the first of magnitude <= 127: 127 * 256 + 127.
LARGEST_INT16 = 32639.0

# Below every real score, and finite: max and exp of a row that sees nothing stay free of NaN.
MASKED = -1e30


@dataclass(frozen=True)
class Target:
    """Where an implementation will run.

    `platform` is "cpu", "gpu" or "tpu"; `device_kind` is jax's name of the chip ("TPU v5 lite",
    "NVIDIA H200"), None when unknown; `interpret` is what Pallas takes as `interpret=`: False,
    True, or the interpreter's own parameters.
    """

    platform: str
    device_kind: str | None = None
    interpret: Any = False


@dataclass(frozen=True)
class Spec:
    """What an implementation will be asked for: N, K, H, the page size, the dtype of q, and the
    dtype of the pages. Page size and page dtype are None where no pages are used: then flash
    attention alone is asked about. ValueError unless they fit each other."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int | None
    dtype: str
    page_dtype: str | None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            check_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, "
                f"{self.num_kv_heads}"
            )
        dtype_name(self.dtype, "dtype")
        if (self.page_size is None) != (self.page_dtype is None):
            raise ValueError(
                f"page_size is {self.page_size} and page_dtype {self.page_dtype}; give both or none"
            )
        if self.page_size is not None:
            check_positive("page_size", self.page_size)
            dtype_name(self.page_dtype, "page_dtype", PAGE_DTYPES)


def dtype_name(dtype: Any, argument: str, allowed: tuple[str, ...] = DTYPES) -> str:
    """`dtype` (a name or a dtype) as one of `allowed`; ValueError otherwise."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in allowed:
        raise ValueError(f"{argument} is {name}; allowed: {', '.join(allowed)}")
    return name


def quantise(x: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """`x [..., H]` as (`[..., H]` of `dtype`, float32 scales `[...]`), symmetric, one scale for
    each vector: x is about data * scale.

    In float32, scale = max|x| * (1 / largest) and y = x * (1 / scale): products, because XLA makes
    such of divisions by what is constant or common to a vector, but not always. `largest` is
    QUANTISED[dtype], or LARGEST_INT16 for int16. Integers round half to even. A vector of zeros, or
    of numbers so small that the scale would be subnormal, has scale 0. A vector with a NaN or an
    infinity has the scale NaN.
    """
    largest = LARGEST_INT16 if dtype == "int16" else QUANTISED[dtype]
    x = x.astype(jnp.float32)
    # XLA:CPU's max over the minor axis loses a NaN when the array is large.
    is_finite = jnp.all(jnp.isfinite(x), axis=-1)
    scale = jnp.max(jnp.abs(x), axis=-1) * np.float32(1 / largest)
    scale = jnp.where(scale < np.finfo(np.float32).tiny, 0.0, scale)
    scale = jnp.where(is_finite, scale, jnp.nan)
    y = x * (1.0 / jnp.where(scale == 0, 1.0, scale))[..., None]
    y = jnp.clip(y if dtype == "float8_e4m3fn" else jnp.round(y), -largest, largest)
    return y.astype(dtype), scale


def check_positive(argument: str, value: object) -> None:
    """ValueError unless `value` is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{argument} is {value!r}; it must be an int >= 1")


def check_array(
    argument: str, value: jax.Array, shape: tuple[int | None, ...], letters: str
) -> None:
    """ValueError unless `value` has `shape`, where None stands for any length >= 1."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{argument} is a {type(value).__name__}; it must be an array {letters}")
    given = tuple(value.shape)
    fits = len(given) == len(shape) and all(
        have >= 1 if want is None else have == want for have, want in zip(given, shape, strict=True)
    )
    if not fits:
        want = ", ".join(">= 1" if n is None else str(n) for n in shape)
        raise ValueError(f"{argument} has shape {given}; it must be {letters} = ({want})")


def check_int32(argument: str, value: jax.Array) -> None:
    """ValueError unless `value` is int32: other widths would recompile or wrap silently."""
    if value.dtype != jnp.int32:
        raise ValueError(f"{argument} is {value.dtype}; it must be int32")


def check_options(scale: float, window: int | None, soft_cap: float | None) -> None:
    """ValueError unless the three are what every attention takes."""
    if not _is_float32(scale):
        raise ValueError(f"scale is {scale!r}; it must be a finite float, in float32 too")
    if window is not None:
        check_positive("window", window)
    if soft_cap is not None and not (_is_float32(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap is {soft_cap!r}; it must be None or a finite float > 0")


def _is_float32(value: Any) -> bool:
    """Whether `value` is a number that float32 holds."""
    is_number = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
    return is_number and bool(abs(value) <= float(np.finfo(np.float32).max))
