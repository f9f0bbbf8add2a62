"""The engine on the default model: throughput beside transformers, host time, KV waste, memory,
start-up.

    python -m benchmarks.engine                  # every row
    python -m benchmarks.engine throughput       # one of: throughput host waste start

One JSON line per row. Throughput interleaves the engines in one process (A, B, A, B ...) so that a
busy machine slows both; it reports medians and the ratio. transformers runs where torch is
installed.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxinfer import LLM, SamplingParams
from jaxinfer.config import SchedulerConfig
from jaxinfer.request import Request
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.scheduler import Scheduler
from jaxinfer.weights import open_model

PROMPT_LEN = NEW_TOKENS = 128
VOCAB = 49_152


def report(**row: object) -> None:
    print(json.dumps(row), flush=True)


def random_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB, (count, length)).tolist()


def peak_memory() -> float:
    """Peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# -- throughput
# -------------------------------------------------------------------------------------


def throughput(batches: list[int], repeats: int, dtype: Any) -> None:
    """Output tokens per second at 128 in, 128 out, greedy; transformers is always float32."""
    with LLM(enable_prefix_caching=False, dtype=dtype, verbose=False) as llm:
        ask = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

        def ours(prompts: list[list[int]]) -> None:
            outputs = llm.generate(prompts, ask, use_tqdm=False)
            if any(len(o.outputs[0].token_ids) != NEW_TOKENS for o in outputs):
                raise RuntimeError("jaxinfer made another number of tokens than asked")

        ours(random_prompts(2, PROMPT_LEN, 0))
        report(bench="memory", engine="jaxinfer", peak_gb=round(peak_memory(), 2))
        engines: dict[str, Callable] = {"jaxinfer": ours}
        theirs = transformers_engine()
        if theirs is not None:
            engines["transformers"] = theirs
        for batch in batches:
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for run in engines.values():  # compile, and warm the caches
                run(random_prompts(batch, PROMPT_LEN, 1))
            for repeat in range(repeats):
                prompts = random_prompts(batch, PROMPT_LEN, 2 + repeat)
                for name, run in engines.items():
                    gc.collect()
                    begun = time.perf_counter()
                    run(prompts)
                    seconds[name].append(time.perf_counter() - begun)
            medians = {name: statistics.median(s) for name, s in seconds.items()}
            row = {f"{name}_tok_s": round(batch * NEW_TOKENS / m, 1) for name, m in medians.items()}
            if theirs is not None:
                row["ratio"] = round(medians["transformers"] / medians["jaxinfer"], 2)
            report(bench="throughput", dtype=llm.config.dtype, batch=batch, repeats=repeats, **row)
        metrics = llm.get_metrics()
        report(bench="host", seconds_per_step=round(metrics["host_seconds_per_step"], 6))


def transformers_engine() -> Callable | None:
    """`generate` of transformers on the same GGUF in float32; None, with a line, where it is
    absent."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        report(bench="throughput", engine="transformers", missing=str(error))
        return None
    with open_model(None) as source:
        folder, name = source.path.parent, source.path.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)

    def run(prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
                do_sample=False,
            )

    return run


# -- host time and waste
# ----------------------------------------------------------------------------


def host(rows: int = 256, steps: int = 200) -> None:
    """Scheduling time per step with `rows` running: plan and commit, no device."""
    pool = PagePool(rows * 40, 16)
    limits = SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=4096, max_model_len=1024)
    scheduler = Scheduler(limits, pool)
    for i, prompt in enumerate(random_prompts(rows, 100, 0)):
        params = SamplingParams(temperature=0, max_tokens=steps + 50)
        scheduler.add(Request(str(i), prompt, params, max_tokens=steps + 50, arrival=i))
    seconds = []
    while len(seconds) < steps:
        begun = time.perf_counter()
        plan = scheduler.plan()
        scheduler.commit(plan, [7] * len(plan.rows))
        if len(plan.rows) == rows and plan.num_tokens == rows:
            seconds.append(time.perf_counter() - begun)
    report(
        bench="scheduling",
        rows=rows,
        median_ms=round(statistics.median(seconds) * 1e3, 3),
        p99_ms=round(sorted(seconds)[int(0.99 * len(seconds))] * 1e3, 3),
    )


def waste(requests: int = 400) -> None:
    """Share of the slots of pages in use that hold no token, over a run of mixed lengths."""
    pool = PagePool(4000, 16)
    limits = SchedulerConfig(
        max_num_seqs=64, max_num_batched_tokens=512, max_model_len=2048, enable_prefix_caching=False
    )
    scheduler = Scheduler(limits, pool)
    rng = np.random.default_rng(0)
    for i in range(requests):
        prompt = rng.integers(0, VOCAB, int(rng.integers(1, 701))).tolist()
        new = int(rng.integers(1, 257))
        params = SamplingParams(temperature=0, max_tokens=new)
        scheduler.add(Request(str(i), prompt, params, max_tokens=new, arrival=i))
    slots = tokens = 0
    while (plan := scheduler.plan()) is not None:
        slots += pool.page_size * sum(len(row.pages) for row in plan.rows)
        tokens += sum(row.kv_len for row in plan.rows)
        scheduler.commit(plan, [7] * len(plan.rows))
    report(
        bench="waste", page_size=pool.page_size, wasted_percent=round(100 * (1 - tokens / slots), 2)
    )


# -- start-up
# ---------------------------------------------------------------------------------------


def start() -> None:
    """Seconds from the command to the first character, first and second start; peak memory."""
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first", "second", "third"):
            command = [sys.executable, "-m", "jaxinfer", "generate", "The capital of France is"]
            command += ["--compilation-cache-dir", cache]
            begun = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                if process.stdout is None:
                    raise RuntimeError("no standard output")
                process.stdout.read(1)
                seconds = time.perf_counter() - begun
                process.stdout.read()
            if process.returncode:
                raise RuntimeError(f"{command} failed with {process.returncode}")
            report(bench="start", run=name, first_token_seconds=round(seconds, 2))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    report(bench="start", peak_gb=round(peak, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="throughput, host, waste, start; none: all")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="of jaxinfer's weights and pages")
    options = parser.parse_args()
    rows = {
        "start": start,
        "host": host,
        "waste": waste,
        "throughput": lambda: throughput(options.batches, options.repeats, options.dtype),
    }
    unknown = [w for w in options.what if w not in rows]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(rows)}")
    for name in options.what or rows:
        rows[name]()


if __name__ == "__main__":
    main()
