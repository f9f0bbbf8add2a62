"""Which implementation runs: resolved once, by name, before anything is traced; never a fallback.

An implementation is a full set of operations because they share a page layout that nothing else
knows. To add one, write its files in `paged_attention/` and `kv_write/` and its row in `_BUILD`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax

import pallas_kernels.kv_write.reference as write_reference
import pallas_kernels.kv_write.xla as write_xla
import pallas_kernels.paged_attention.reference as attention_reference
import pallas_kernels.paged_attention.xla as attention_xla

PLATFORMS = ("cpu", "gpu", "tpu")
_PLATFORM_ALIASES = {"cuda": "gpu", "rocm": "gpu"}


@dataclass(frozen=True)
class Ops:
    """The operations of one implementation; their contracts stand in the op packages.

    `name` is the implementation, `platform` where it will run, `reason` why it was chosen (text).
    `resolve` returns the same object for the same question, so an Ops may be a static argument.
    """

    name: str
    platform: str
    reason: str
    allocate: Callable[..., Any]
    page_bytes: Callable[..., int]
    kv_write: Callable[..., Any]
    paged_attention: Callable[..., jax.Array]
    copy_pages: Callable[..., Any]


def _reference(platform: str) -> dict[str, Callable[..., Any]]:
    return {
        "allocate": attention_reference.allocate,
        "page_bytes": attention_reference.page_bytes,
        "kv_write": write_reference.kv_write,
        "paged_attention": attention_reference.paged_attention,
        "copy_pages": attention_reference.copy_pages,
    }


def _xla(platform: str) -> dict[str, Callable[..., Any]]:
    return {
        "allocate": partial(attention_xla.allocate, platform=platform),
        "page_bytes": attention_xla.page_bytes,
        "kv_write": write_xla.kv_write,
        "paged_attention": attention_xla.paged_attention,
        "copy_pages": attention_xla.copy_pages,
    }


_BUILD = {"reference": _reference, "xla": _xla}
_AUTO = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}
IMPLEMENTATIONS = tuple(_BUILD)


def resolve(impl: str = "auto", platform: str | None = None) -> Ops:
    """The operations named `impl` ("auto" takes the fastest there is) for `platform`.

    `platform` is "cpu", "gpu" or "tpu"; None means jax's default backend. Raises ValueError when
    `impl` does not exist, naming those that do.
    """
    given = platform if platform is not None else jax.default_backend()
    known = _PLATFORM_ALIASES.get(given, given)
    if known not in PLATFORMS:
        raise ValueError(f"platform is {given!r}; allowed: {', '.join(PLATFORMS)}")
    if impl != "auto" and impl not in _BUILD:
        raise ValueError(
            f"impl is {impl!r}, which does not exist on {known}; "
            f"allowed: auto, {', '.join(IMPLEMENTATIONS)}"
        )
    return _resolve(impl, known)


@lru_cache
def _resolve(impl: str, platform: str) -> Ops:
    name = _AUTO[platform] if impl == "auto" else impl
    reason = f"the fastest there is on {platform}" if impl == "auto" else "asked for"
    return Ops(name=name, platform=platform, reason=reason, **_BUILD[name](platform))
