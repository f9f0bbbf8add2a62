"""Which implementation runs: resolved once, by name, before anything is traced; never a fallback.

An implementation is a full set of operations because they share a page layout that nothing else
knows. To add one, write its files in `flash_attention/`, `paged_attention/`, `kv_write/` and
`quant_matmul/`, and its row in `_MODULES`; a row may name another's file where its own would be the
same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax

import pallas_kernels.flash_attention as flash
import pallas_kernels.flash_attention.mosaic_gpu as flash_mosaic_gpu
import pallas_kernels.flash_attention.reference as flash_reference
import pallas_kernels.flash_attention.tpu as flash_tpu
import pallas_kernels.flash_attention.xla as flash_xla
import pallas_kernels.kv_write.mosaic_gpu as write_mosaic_gpu
import pallas_kernels.kv_write.reference as write_reference
import pallas_kernels.kv_write.tpu as write_tpu
import pallas_kernels.kv_write.xla as write_xla
import pallas_kernels.paged_attention.mosaic_gpu as paged_mosaic_gpu
import pallas_kernels.paged_attention.reference as paged_reference
import pallas_kernels.paged_attention.tpu as paged_tpu
import pallas_kernels.paged_attention.xla as paged_xla
import pallas_kernels.quant_matmul.mosaic_gpu as quant_mosaic_gpu
import pallas_kernels.quant_matmul.reference as quant_reference
import pallas_kernels.quant_matmul.tpu as quant_tpu
import pallas_kernels.quant_matmul.xla as quant_xla
from pallas_kernels.common import Spec, Target
from pallas_kernels.quant_matmul import Format, validate

PLATFORMS = ("cpu", "gpu", "tpu")
_PLATFORM_ALIASES = {"cuda": "gpu", "rocm": "gpu"}

# name -> modules of flash_attention, paged_attention, kv_write, quant_matmul; platforms it runs on
_MODULES: dict[str, tuple[tuple[Any, Any, Any, Any], tuple[str, ...]]] = {
    "reference": ((flash_reference, paged_reference, write_reference, quant_reference), PLATFORMS),
    "xla": ((flash_xla, paged_xla, write_xla, quant_xla), PLATFORMS),
    "tpu": ((flash_tpu, paged_tpu, write_tpu, quant_tpu), ("tpu",)),
    "mosaic_gpu": (
        (flash_mosaic_gpu, paged_mosaic_gpu, write_mosaic_gpu, quant_mosaic_gpu),
        ("gpu",),
    ),
    # The TPU's kernels, run by Pallas's interpreter: how they are tested without a TPU.
    "interpret": ((flash_tpu, paged_tpu, write_tpu, quant_tpu), ("cpu",)),
}
IMPLEMENTATIONS = tuple(_MODULES)

# What "auto" takes: the first that can do what is asked; for a quantised matmul, whose weights no
# Spec names, the first from there on that can do each.
_AUTO = {"cpu": ("xla",), "gpu": ("mosaic_gpu", "xla"), "tpu": ("tpu", "xla")}


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
    flash_attention: Callable[..., jax.Array]
    quant_matmul: Callable[..., jax.Array]


def available(platform: str) -> tuple[str, ...]:
    """The implementations that run on `platform`; ValueError for one that is not known."""
    known = _known(platform)
    return tuple(name for name, (_, where) in _MODULES.items() if known in where)


def _known(platform: str) -> str:
    known = _PLATFORM_ALIASES.get(platform, platform) if isinstance(platform, str) else None
    if known not in PLATFORMS:
        raise ValueError(f"platform is {platform!r}; allowed: {', '.join(PLATFORMS)}")
    return known


def resolve(
    impl: str = "auto",
    platform: str | None = None,
    *,
    spec: Spec | None = None,
    device_kind: str | None = None,
) -> Ops:
    """The operations named `impl` ("auto" takes the fastest that can do `spec`) for `platform`.

    `platform` is "cpu", "gpu" or "tpu"; None means jax's default backend. `spec` is what will be
    asked of them; without it platform, chip and jax's version decide, and an operation refuses with
    a ValueError what it cannot do. `device_kind` is jax's name of the chip
    (`jax.devices()[0].device_kind`), which chooses block sizes; None on the default backend means
    the chip that is there. Raises ValueError when `impl` does not exist on the platform or cannot
    do `spec`, saying what is allowed.
    """
    known = _known(platform if platform is not None else jax.default_backend())
    names = available(known)
    if not isinstance(impl, str) or (impl != "auto" and impl not in names):
        where = _MODULES[impl][1] if isinstance(impl, str) and impl in _MODULES else ()
        exists = f"runs on {', '.join(where)}" if where else "does not exist"
        raise ValueError(
            f"impl is {impl!r}, which {exists}; allowed on {known}: auto, {', '.join(names)}"
        )
    if device_kind is None and platform == "rocm":
        device_kind = "rocm"
    if device_kind is None and known == _known(jax.default_backend()):
        device_kind = jax.devices()[0].device_kind
    return _resolve(impl, Target(known, device_kind), spec)


@lru_cache
def _resolve(impl: str, target: Target, spec: Spec | None) -> Ops:
    if impl != "auto":
        why_not = _why_not(impl, target, spec)
        if why_not:
            raise ValueError(f"impl {impl!r} cannot do this: {why_not}")
        return _build(impl, target, "asked for")
    refused = []
    for name in _AUTO[target.platform]:
        why_not = _why_not(name, target, spec)
        if not why_not:
            reason = f"the fastest there is on {target.platform}"
            ops = _build(name, target, "; ".join([*refused, reason]))
            return replace(ops, quant_matmul=_first_that_can(name, target))
        refused.append(f"not {name}: {why_not}")
    raise ValueError(f"nothing on {target.platform} can do this: {'; '.join(refused)}")


def _why_not(name: str, target: Target, spec: Spec | None) -> str | None:
    """Why `name` cannot do `spec` on `target`; None when it can."""
    flash_module, paged, _, _ = _MODULES[name][0]
    module = flash_module if spec is not None and spec.page_size is None else paged
    return module.unsupported(spec, _on(name, target))


def _first_that_can(name: str, target: Target) -> Callable[..., jax.Array]:
    """quant_matmul as "auto" does it: each weight by `name` if that can, else by the next."""
    names = _AUTO[target.platform][_AUTO[target.platform].index(name) :]
    modules = [_MODULES[name][0][3] for name in names]

    def quant_matmul(
        x: jax.Array, data: jax.Array, scales: jax.Array, zeros: Any, *, format: Format
    ) -> jax.Array:
        validate(x, data, scales, zeros, format)
        question = format, len(data), x.shape[1], x.dtype, target
        able = next(module for module in modules if not module.unsupported(*question))
        return able.quant_matmul(x, data, scales, zeros, format=format, target=target)

    return quant_matmul


def _on(name: str, target: Target) -> Target:
    return replace(target, interpret=name == "interpret")


def _build(name: str, target: Target, reason: str) -> Ops:
    (flash_module, paged, writer, quant), _ = _MODULES[name]
    target = _on(name, target)
    return Ops(
        name=name,
        platform=target.platform,
        reason=reason,
        allocate=partial(paged.allocate, target=target),
        page_bytes=paged.page_bytes,
        kv_write=writer.kv_write,
        paged_attention=partial(paged.paged_attention, target=target),
        copy_pages=paged.copy_pages,
        flash_attention=flash.attention(flash_module, target),
        quant_matmul=partial(quant.quant_matmul, target=target),
    )
