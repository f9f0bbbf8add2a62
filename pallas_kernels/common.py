"""What every operation's checks share: dtype names, argument errors. Knows no page layout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16", "float16")

# Below every real score, and finite: max and exp of a row that sees nothing stay free of NaN.
MASKED = -1e30


def dtype_name(dtype: Any, argument: str) -> str:
    """`dtype` (a name or a dtype) as one of DTYPES; ValueError otherwise."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"{argument} is {name}; allowed: {', '.join(DTYPES)}")
    return name


def check_positive(argument: str, value: object) -> None:
    """ValueError unless `value` is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{argument} is {value!r}; it must be an int >= 1")


def check_array(
    argument: str, value: jax.Array, shape: tuple[int | None, ...], letters: str
) -> None:
    """ValueError unless `value` has `shape`, where None stands for any length >= 1."""
    given = tuple(value.shape)
    fits = len(given) == len(shape) and all(
        have >= 1 if want is None else have == want for have, want in zip(given, shape, strict=True)
    )
    if not fits:
        want = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{argument} has shape {given}; it must be {letters} = ({want})")


def check_int32(argument: str, value: jax.Array) -> None:
    """ValueError unless `value` is int32: other widths would recompile or wrap silently."""
    if value.dtype != jnp.int32:
        raise ValueError(f"{argument} is {value.dtype}; it must be int32")
