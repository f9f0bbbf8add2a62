"""Which programs `python -m pallas_kernels.aot` compiles: every operation of every implementation,
for published head shapes, page dtypes and every tuned entry of a chip.

Not the full product: each head shape meets each stage, each page dtype meets each stage and each
chip, and the rest varies along (pairwise).
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels.flash_attention as flash
from pallas_kernels import aot_quant, tuning
from pallas_kernels.aot_targets import CHIPS, Chip, Program
from pallas_kernels.common import QUANTISED, Spec
from pallas_kernels.paged_attention import Ragged

# name -> platforms of its kernels
IMPLEMENTATIONS = {
    "reference": ("gpu", "tpu"),
    "xla": ("gpu", "tpu"),
    "tpu": ("tpu",),
    "mosaic_gpu": ("gpu",),
}
KERNELS = ("tpu", "mosaic_gpu")
# (implementation, platform) whose writes are not in place, and why that is known and stays.
MAY_COPY = {("xla", "tpu"): "the layout is CPU's, which a TPU transposes to write"}
MAY_COPY_SCALES = "the compiler moves scales that fit vector memory there while they are scattered"
OPS = ("flash_attention", "paged_attention", "kv_write", "copy_pages", "step", "quant_matmul")

QUERY_TOKENS = 4096  # of flash attention
NUM_PAGES = 3001  # a prime: nothing but the pool has as many elements
NUM_ROWS, STEP_TOKENS, COPIES = 64, 2048, 8
CONTEXT = 8192


@dataclass(frozen=True)
class Heads:
    """N, K, H of a published model, and the window and soft cap of its attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    soft_cap: float | None = None


HEADS = {
    "Llama-3-8B": Heads(32, 8, 128),
    "Llama-3.2-3B": Heads(24, 8, 128),
    "Llama-3.2-1B": Heads(32, 8, 64),
    "Qwen3-0.6B": Heads(16, 8, 128),
    "Gemma-2": Heads(8, 4, 256, window=4096, soft_cap=50.0),
    "SmolLM2": Heads(9, 3, 64),
    "MQA": Heads(8, 1, 128),
}
MAIN = "Llama-3-8B"
PAGE_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")

Array: Any = jax.ShapeDtypeStruct


def programs(chip: Chip) -> list[Program]:
    """Every program of this package for `chip`, what is refused included."""
    found = []
    for impl, platforms in IMPLEMENTATIONS.items():
        if chip.platform not in platforms:
            continue
        matrix = _kernel_matrix if impl in KERNELS else _plain_matrix
        found += matrix(impl, chip)
        if impl in KERNELS:
            found += aot_quant.programs(impl, chip)
    return found


def _module(op: str, impl: str) -> Any:
    """The module of `op` by `impl`."""
    return importlib.import_module(f"pallas_kernels.{op}.{impl}")


def _plain_matrix(impl: str, chip: Chip) -> Iterator[Program]:
    """What XLA alone makes of the operations: one head shape, one dtype; on chips that are like
    another, all operations on pages in one program."""
    yield step_program(impl, chip, MAIN, "bfloat16")
    if chip.name not in ("v5e", "h200"):
        return
    for stage in ("forward", "backward"):
        yield flash_program(impl, chip, MAIN, stage)
    for stage in ("decode", "prefill"):
        for page_dtype in ("bfloat16", "int8"):
            yield paged_program(impl, chip, MAIN, stage, page_dtype=page_dtype)
    for make in (write_program, copy_program):
        yield make(impl, chip, MAIN, "bfloat16")


def _kernel_matrix(impl: str, chip: Chip) -> Iterator[Program]:
    """Decode for every head shape; the stages that take long to compile for MAIN and, on TPUs, for
    a third of the others: the five chips together have them all."""
    turn = list(CHIPS).index(chip.name)
    alone = chip.platform == "gpu"
    names = list(HEADS)
    some = [n for i, n in enumerate(names) if alone or n == MAIN or (i + turn) % 3 == 0]
    dtypes = {n: PAGE_DTYPES[(i + turn) % 3] for i, n in enumerate(names)}
    for name in some:
        yield flash_program(impl, chip, name, "forward")
        yield flash_program(impl, chip, name, "backward")
    options: tuple[dict[str, Any], ...] = (
        {"causal": False, "segments": True, "length": 1000},
        {"dtype": "float32"},
        {"dtype": "float16"},
    )
    for kind in options if alone else (options[turn % 2],):
        yield flash_program(impl, chip, MAIN, "forward", **kind)
        yield flash_program(impl, chip, MAIN, "backward", **kind)
    for name in names:
        yield paged_program(impl, chip, name, "decode", page_dtype=dtypes[name])
    for name in some:
        yield paged_program(impl, chip, name, "prefill", page_dtype=dtypes[name])
    for page_dtype in PAGE_DTYPES:
        if page_dtype != dtypes[MAIN]:
            yield paged_program(impl, chip, MAIN, "decode", page_dtype=page_dtype)
        if page_dtype == dtypes[MAIN] or alone:
            yield step_program(impl, chip, MAIN, page_dtype)
        yield write_program(impl, chip, MAIN, page_dtype)
        yield copy_program(impl, chip, MAIN, page_dtype)
    for dtype in ("float32", "float16"):
        for stage in ("decode", "prefill"):
            yield paged_program(impl, chip, "Qwen3-0.6B", stage, dtype=dtype, page_dtype=dtype)
    for page_size in (16, 256):
        yield paged_program(impl, chip, MAIN, "decode", page_size=page_size)
    yield paged_program(impl, chip, MAIN, "prefill", page_size=16)
    yield write_program(impl, chip, "Llama-3.2-1B", "bfloat16")
    yield write_program(impl, chip, "MQA", "int8")
    yield from _tuned_matrix(impl, chip)


def _tuned_matrix(impl: str, chip: Chip) -> Iterator[Program]:
    """One program for each entry of the chip's file, at a shape that finds this very entry."""
    for entry in tuning.entries(chip.device_kind):
        make = flash_program if entry.op == "flash_attention" else paged_program
        yield make(impl, chip, heads_of(entry.key), entry.stage, **_options(entry))


def _options(entry: tuning.Entry) -> dict[str, Any]:
    """The keywords of `flash_program` or `paged_program` for the entry's key."""
    key = entry.key
    if entry.op == "flash_attention":
        options = {"dtype": key["dtype"]} if "dtype" in key else {}
        return {**options, "causal": bool(key.get("causal", True)), "tuned": entry}
    names = {"dtype": "page_dtype", "page_dtype": "page_dtype", "page_size": "page_size"}
    return {names[name]: key[name] for name in key if name in names} | {"tuned": entry}


def heads_of(key: Mapping[str, Any]) -> Heads:
    """Heads that a tuned entry's key describes; what it leaves open is 8 KV heads, 4 queries."""
    num_kv_heads = int(key.get("num_kv_heads", 8))
    num_heads = int(key.get("num_heads", num_kv_heads * int(key.get("group", 4))))
    return Heads(num_heads, num_kv_heads, int(key["head_dim"]))


def _heads(name: str | Heads) -> tuple[str, Heads]:
    if isinstance(name, Heads):
        return f"{name.num_heads}/{name.num_kv_heads}/{name.head_dim}", name
    return name, HEADS[name]


def flash_program(
    impl: str,
    chip: Chip,
    heads_name: str | Heads,
    stage: str,
    *,
    dtype: str = "bfloat16",
    length: int = QUERY_TOKENS,
    causal: bool = True,
    segments: bool = False,
    tuned: tuning.Entry | None = None,
) -> Program:
    """One call of flash attention, or its gradients, over two sequences of `length` tokens."""
    label, heads = _heads(heads_name)
    attend = flash.attention(_module("flash_attention", impl), chip.target)
    # What an implementation does is asked of its pages: it is chosen for all operations at once.
    shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim)
    spec = Spec(*shape, chip.page_size, dtype, dtype)
    refused = _module("paged_attention", impl).unsupported(spec, chip.target)
    options = {"causal": causal}
    if causal:
        options |= {"window": heads.window}
    options |= {"soft_cap": heads.soft_cap}
    q = Array((2, length, heads.num_heads, heads.head_dim), dtype)
    kv = Array((2, length, heads.num_kv_heads, heads.head_dim), dtype)
    ids = (Array((2, length), jnp.int32),) if segments else ()

    def forward(q: Any, k: Any, v: Any, *segment_ids: Any) -> Any:
        ids = segment_ids[0] if segment_ids else None
        return attend(q, k, v, segment_ids=ids, **options)

    def backward(q: Any, k: Any, v: Any, dout: Any, *segment_ids: Any) -> Any:
        return jax.vjp(lambda *x: forward(*x, *segment_ids), q, k, v)[1](dout)

    forms: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "forward": (forward, (q, kv, kv, *ids)),
        "backward": (backward, (q, kv, kv, q, *ids)),
    }
    extra = [] if dtype == "bfloat16" else [dtype]
    extra += ["segments, not causal"] if segments else []
    extra += ["not causal"] if not causal and not segments else []
    extra += [f"{length} tokens"] if length != QUERY_TOKENS else []
    name = "/".join([impl, f"flash_attention.{stage}", label, *extra])
    note = _config_note(tuned)
    return Program(name, *forms[stage], note=note, tuned=tuned, refused=refused)


def _config_note(tuned: tuning.Entry | None) -> str:
    if tuned is None:
        return "default"
    return "tuned " + " ".join(f"{name}={value}" for name, value in sorted(tuned.config.items()))


@dataclass(frozen=True)
class _Paged:
    """Modules, pages and arguments of the programs over pages."""

    attention: Any
    writer: Any
    pages: Any
    refused: str | None
    heads: Heads
    dtype: str
    chip: Chip
    page_size: int
    may_copy: str | None

    def attend(self, q: Any, pages: Any, ragged: Ragged) -> Any:
        return self.attention.paged_attention(
            q,
            pages,
            ragged,
            scale=self.heads.head_dim**-0.5,
            window=self.heads.window,
            soft_cap=self.heads.soft_cap,
            target=self.chip.target,
        )

    def queries(self, stage: str) -> tuple[Any, Ragged]:
        """q and its batch: NUM_ROWS decode rows, or STEP_TOKENS tokens of as many rows."""
        tokens = NUM_ROWS if stage == "decode" else STEP_TOKENS
        ragged = Ragged(
            page_table=Array((NUM_ROWS, CONTEXT // self.page_size), jnp.int32),
            kv_lens=Array((NUM_ROWS,), jnp.int32),
            cu_q_lens=Array((NUM_ROWS + 1,), jnp.int32),
            num_decode=Array((), jnp.int32),
            slots=Array((tokens,), jnp.int32),
            decode_only=stage == "decode",
        )
        return Array((tokens, self.heads.num_heads, self.heads.head_dim), self.dtype), ragged

    def new_kv(self, tokens: int) -> Any:
        return Array((tokens, self.heads.num_kv_heads, self.heads.head_dim), self.dtype)


def _paged(
    impl: str, chip: Chip, heads: Heads, page_dtype: str, dtype: str, page_size: int | None
) -> _Paged:
    attention = _module("paged_attention", impl)
    page_size = page_size or chip.page_size
    shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim)
    refused = attention.unsupported(Spec(*shape, page_size, dtype, page_dtype), chip.target)
    pages = None
    if not refused:
        make = partial(attention.allocate, target=chip.target)
        pool = partial(make, NUM_PAGES, page_size, *shape[1:], page_dtype)
        pages = jax.eval_shape(pool)
    writer = _module("kv_write", impl)
    may_copy = MAY_COPY.get((impl, chip.platform))
    return _Paged(attention, writer, pages, refused, heads, dtype, chip, page_size, may_copy)


def paged_program(
    impl: str,
    chip: Chip,
    heads_name: str | Heads,
    stage: str,
    *,
    page_dtype: str = "bfloat16",
    dtype: str = "bfloat16",
    page_size: int | None = None,
    tuned: tuning.Entry | None = None,
) -> Program:
    """One call of paged attention: "decode" rows alone, or "prefill", decode rows and chunks."""
    label, heads = _heads(heads_name)
    paged = _paged(impl, chip, heads, page_dtype, dtype, page_size)
    q, ragged = paged.queries(stage)
    name = f"{impl}/paged_attention.{stage}/{label}/{page_dtype}/page {paged.page_size}"
    args = (q, paged.pages, ragged)
    note = _config_note(tuned)
    return Program(name, paged.attend, args, note=note, refused=paged.refused, tuned=tuned)


def write_program(impl: str, chip: Chip, heads_name: str, page_dtype: str) -> Program:
    """A donated write of a step's tokens."""
    label, heads = _heads(heads_name)
    paged = _paged(impl, chip, heads, page_dtype, "bfloat16", None)
    kv = paged.new_kv(STEP_TOKENS)
    args = (paged.pages, kv, kv, Array((STEP_TOKENS,), jnp.int32))
    name = f"{impl}/kv_write/{label}/{page_dtype}"
    return Program(
        name,
        paged.writer.kv_write,
        args,
        donate=(0,),
        refused=paged.refused,
        may_copy=paged.may_copy,
    )


def copy_program(impl: str, chip: Chip, heads_name: str, page_dtype: str) -> Program:
    """A donated copy of a few pages."""
    label, heads = _heads(heads_name)
    paged = _paged(impl, chip, heads, page_dtype, "bfloat16", None)
    ids = Array((COPIES,), jnp.int32)
    name = f"{impl}/copy_pages/{label}/{page_dtype}"
    args = (paged.pages, ids, ids)
    return Program(
        name,
        paged.attention.copy_pages,
        args,
        donate=(0,),
        refused=paged.refused,
        may_copy=paged.may_copy,
    )


def step_program(impl: str, chip: Chip, heads_name: str, page_dtype: str) -> Program:
    """What a layer does to its donated pages in one step: copy, write, attend."""
    label, heads = _heads(heads_name)
    paged = _paged(impl, chip, heads, page_dtype, "bfloat16", None)
    q, ragged = paged.queries("prefill")
    kv, ids = paged.new_kv(STEP_TOKENS), Array((COPIES,), jnp.int32)

    def step(pages: Any, q: Any, k: Any, v: Any, ragged: Ragged, src: Any, dst: Any) -> Any:
        pages = paged.attention.copy_pages(pages, src, dst)
        pages = paged.writer.kv_write(pages, k, v, ragged.slots)
        return paged.attend(q, pages, ragged), pages

    args = (paged.pages, q, kv, kv, ragged, ids, ids)
    name = f"{impl}/step/{label}/{page_dtype}"
    has_scales = impl == "tpu" and page_dtype in QUANTISED
    return Program(
        name,
        step,
        args,
        donate=(0,),
        refused=paged.refused,
        may_copy=MAY_COPY_SCALES if has_scales else paged.may_copy,
        may_copy_dtype="float32" if has_scales else None,
    )
