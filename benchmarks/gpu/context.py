"""What a section's process is told, and what every section of jaxinfer starts from."""

import itertools
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks import roofline
from benchmarks.gpu.scale import Scale
from jaxinfer import LLM, SamplingParams
from jaxinfer.buckets import Bucket
from jaxinfer.runner import COMPILES
from jaxinfer.sampling_params import RequestOutputKind

Row = dict[str, Any]
_ids = itertools.count()


class OutOfTime(Exception):
    """The section's deadline came while something was being prepared."""


@dataclass(frozen=True, slots=True)
class Context:
    """`model` is the folder with config.json, `cache` that of compiled programs, `traces` where
    traces go. `begun` (time.time) is when the process was started; `deadline` (time.monotonic) when
    the section must have ended. `measured` are the ceilings of this run."""

    scale: Scale
    model: Path
    cache: Path
    traces: Path
    begun: float
    deadline: float
    measured: roofline.Limits | None

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def check(self) -> None:
        if self.left <= 0:
            raise OutOfTime

    def shares(self, cost: roofline.Cost, seconds: float) -> Row:
        """Of what this run's ceilings and the chip's nominal ones allow."""
        nominal = roofline.NOMINAL.get(jax.devices()[0].device_kind)
        return {
            **roofline.shares(cost, seconds, self.measured, "measured"),
            **roofline.shares(cost, seconds, nominal, "nominal"),
        }

    def build(self, **options: Any) -> LLM:
        """The engine at this scale, with random weights."""
        return LLM(
            str(self.model),
            dtype=self.scale.dtype,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # the prompts are random
            verbose=False,
            compilation_cache_dir=str(self.cache),
            **self.scale.engine,
            **options,
        )


def ask(max_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def add(llm: LLM, prompt: list[int], max_tokens: int) -> str:
    request_id = f"gpu-{next(_ids)}"
    llm.add_request(request_id, {"prompt_token_ids": prompt}, ask(max_tokens))
    return request_id


def finish(llm: LLM) -> None:
    """Serve what was added to its end."""
    while llm.has_unfinished_requests():
        llm.step()


def drop(llm: LLM, ids: Iterable[str]) -> None:
    """Abort what is left of `ids`."""
    llm.abort(list(ids))
    finish(llm)


def fill(llm: LLM, asks: list[tuple[list[int], int]], ctx: Context) -> tuple[list[str], float]:
    """Add (prompt, tokens to make) and step until every row decodes: ids, and seconds it took."""
    begun = time.perf_counter()
    ids = [add(llm, prompt, new) for prompt, new in asks]
    while True:
        ctx.check()
        llm.step()
        last = llm.engine.metrics.steps[-1]
        if last.num_rows == last.num_tokens == len(asks):
            return ids, time.perf_counter() - begun


def buckets_for(llm: LLM, needs: Iterable[tuple[int, int]]) -> list[Bucket]:
    """The buckets that steps of (new tokens, rows) run in."""
    buckets = llm.engine.runner.builder.buckets
    found: dict[Bucket, None] = {}
    for tokens, rows in needs:
        if tokens == rows:
            found[buckets.decode_bucket(rows)] = None
            continue
        fitting = (b for b in buckets.mixed if b.num_tokens >= tokens and b.num_rows >= rows)
        found[next(fitting)] = None
    return list(found)


def compile_all(llm: LLM, buckets: Iterable[Bucket], ctx: Context) -> Iterator[Row]:
    """A row for each program that is compiled (or read from the cache); two at a time, as the
    engine's own warm-up does."""
    runner = llm.engine.runner

    def one(bucket: Bucket) -> Row:
        if ctx.left <= 0:
            return {"program": str(bucket), "note": "no time"}
        begun = time.perf_counter()
        runner.compile(bucket)
        seconds = round(time.perf_counter() - begun, 3)
        temp = runner.temp_bytes.get(bucket)
        return {"program": str(bucket), "seconds": seconds, "temp_bytes": temp}

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(one, [b for b in buckets if not runner.is_compiled(b)])


def prepare(llm: LLM, needs: Iterable[tuple[int, int]], ctx: Context) -> Row:
    """Compile what a section needs; {"programs", "prepare_s", "cache_hits"}."""
    hits, begun = COMPILES.cache_hits, time.perf_counter()
    rows = list(compile_all(llm, buckets_for(llm, needs), ctx))
    ctx.check()
    seconds = round(time.perf_counter() - begun, 2)
    return {"programs": len(rows), "prepare_s": seconds, "cache_hits": COMPILES.cache_hits - hits}


def peak_memory() -> int | None:
    """Most bytes of the device that were in use; None where it does not say."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
