"""Offline throughput: a window of the steady state, since a whole job of thousands of requests of
1000 in, 1000 out takes longer than a run may.

The population is that of a long job from its first moment. The first requests are of every age,
evenly: one of age a has a prompt of `inputs` + a tokens and `outputs` - a to make, as if it had
made a already. Whenever one ends, a fresh one of `inputs` in, `outputs` out takes its row. Counting
begins when all rows decode (the ramp, in which the first prompts are computed, is not counted) and
ends with the window; requests that are unfinished then are aborted.
"""

import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from benchmarks.gpu import scale as scales
from benchmarks.gpu.context import Context, Row, add, drop, peak_memory, prepare
from benchmarks.gpu.ours import decoder_of
from benchmarks.report import percentiles
from benchmarks.roofline import Cost
from jaxinfer import LLM
from jaxinfer.runner import COMPILES

PARTS = 5  # of the window, whose spread is told
SPARE = 3.0  # seconds for what comes after the window
FRESH = 4  # requests that always wait, so that no row is ever without one


class Requests:
    """Gives the engine aged requests first, then fresh ones, and knows their ids."""

    def __init__(self, llm: LLM, scale: scales.Scale):
        self.llm, self.scale = llm, scale
        self.ids: list[str] = []
        self._rng = np.random.default_rng(7)
        self._pool = scales.prompts(scale, 64, 2 * scale.stream.inputs + scale.stream.outputs, 1)

    def _add(self, length: int, new: int) -> None:
        # Cut anywhere out of random prompts: what is equal is never at the same position.
        source = self._pool[len(self.ids) % len(self._pool)]
        at = int(self._rng.integers(0, len(source) - length + 1))
        self.ids.append(add(self.llm, source[at : at + length], new))

    def add_aged(self) -> None:
        stream = self.scale.stream
        ages = np.arange(stream.rows) * stream.outputs // stream.rows
        for age in self._rng.permutation(ages).tolist():
            self._add(stream.inputs + age, stream.outputs - age)

    def step(self) -> None:
        """A step of the engine, with fresh requests waiting."""
        for _ in range(FRESH - self.llm.engine.scheduler.num_waiting):
            self._add(self.scale.stream.inputs, self.scale.stream.outputs)
        self.llm.step()


def throughput(ctx: Context) -> Iterator[Row]:
    """Tokens per second of a long offline job."""
    scale, stream = ctx.scale, ctx.scale.stream
    with ctx.build() as llm:
        budget = scale.engine["max_num_batched_tokens"]
        chunk = min(stream.rows + stream.inputs, budget)
        needs = [(stream.rows, stream.rows), (budget, stream.rows), (chunk, stream.rows)]
        needs.append((min(stream.rows + 44, budget), stream.rows))
        yield {"section": "throughput", "case": "prepare", "engine": "jaxinfer"} | prepare(
            llm, needs, ctx
        )
        requests = Requests(llm, scale)
        begun = time.perf_counter()
        requests.add_aged()
        while True:
            ctx.check()
            requests.step()
            last = llm.engine.metrics.steps[-1]
            if last.num_rows == last.num_tokens == stream.rows:
                break
        ramp = time.perf_counter() - begun
        seconds = min(stream.seconds, ctx.left - SPARE)
        if seconds < stream.least_seconds:
            yield {"left_out": f"throughput: the ramp took {ramp:.0f} s, no time for a window"}
            return
        yield _window(requests, ctx, seconds, ramp)
        drop(llm, requests.ids)


def _window(requests: Requests, ctx: Context, seconds: float, ramp: float) -> Row:
    llm, stream = requests.llm, ctx.scale.stream
    metrics, compiles = llm.engine.metrics, COMPILES.compiles
    finished = sum(metrics.requests_finished.values())
    marks = [(time.perf_counter(), metrics.generation_tokens)]
    first_step, times = metrics.num_steps, []
    while len(marks) <= PARTS:
        begun = time.perf_counter()
        requests.step()
        now = time.perf_counter()
        times.append(now - begun)
        if now - marks[0][0] >= seconds * len(marks) / PARTS:
            marks.append((now, metrics.generation_tokens))
    taken, made = marks[-1][0] - marks[0][0], marks[-1][1] - marks[0][1]
    rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(marks)]
    steps = list(metrics.steps)[-(metrics.num_steps - first_step) :]
    count = len(steps)
    rows = sum(s.num_rows for s in steps) / count
    prompts = max(0, sum(s.num_tokens for s in steps) - made)
    size = llm.config.page_size or 1
    # Half of each row's last page is empty, on average.
    context = sum(s.pages_used for s in steps) / count * size / rows - size / 2
    cost = _step_cost(ctx, llm, rows, context, prompts / count)
    step = percentiles(times)
    case = f"{stream.inputs} in, {stream.outputs} out, {stream.rows} rows"
    return {
        "section": "throughput",
        "engine": "jaxinfer",
        "case": case,
        "window_s": taken,
        "ramp_s": ramp,
        "output_tok_s": made / taken,
        "output_tok_s_low": min(rates),
        "output_tok_s_high": max(rates),
        "prompt_tok_s": prompts / taken,
        "requests_finished": sum(metrics.requests_finished.values()) - finished,
        "rows": round(rows, 1),
        "context": round(context),
        "step_p50_s": step["p50"],
        "step_p99_s": step["p99"],
        "decode_only_share": round(sum(s.num_tokens == s.num_rows for s in steps) / count, 3),
        "preemptions": llm.get_metrics().get("num_preemptions"),
        **ctx.shares(cost, taken / count),
        "compiles_while_measured": COMPILES.compiles - compiles,
        "peak_memory_bytes": peak_memory(),
    }


def _step_cost(ctx: Context, llm: LLM, rows: float, context: float, prompts: float) -> Cost:
    """Of the mean step: its decode rows, and its share of the prompts' products."""
    decoder = decoder_of(llm)
    base = decoder.decode(rows, context)
    one = decoder.prefill(1, ctx.scale.stream.inputs)
    part = prompts / ctx.scale.stream.inputs
    return Cost(
        base.weight_bytes,
        base.serial_bytes,
        base.matmul_flops + part * one.matmul_flops,
        base.attention_flops + part * one.attention_flops,
    )
