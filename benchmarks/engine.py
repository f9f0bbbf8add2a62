"""The engine alone: host time, KV waste, memory, start-up. Beside others: `benchmarks.peers`.

    python -m benchmarks.engine                  # every row
    python -m benchmarks.engine host             # one of: host waste start

One JSON line per row.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from jaxinfer import SamplingParams
from jaxinfer.config import SchedulerConfig
from jaxinfer.request import Request
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.scheduler import Scheduler

VOCAB = 49_152


def report(**row: object) -> None:
    print(json.dumps(row), flush=True)


def random_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB, (count, length)).tolist()


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


def start(repeats: int = 5) -> None:
    """Seconds from the command to the first character: one first start, then second starts."""
    with tempfile.TemporaryDirectory() as cache:
        runs = [_start_once(cache) for _ in range(1 + repeats)]
    for name, some in (("first", runs[:1]), ("second", runs[1:])):
        seconds = [run["first_token_s"] for run in some]
        report(
            bench="start",
            run=name,
            repeats=len(some),
            first_token_median_s=round(statistics.median(seconds), 2),
            first_token_min_s=round(min(seconds), 2),
            first_token_max_s=round(max(seconds), 2),
            cpu_median_s=round(statistics.median(run["cpu_s"] for run in some), 2),
            peak_gb=round(max(run["peak_gb"] for run in some), 2),
        )


def _start_once(cache: str) -> dict[str, float]:
    """One command in a process of its own; `cpu_s` is of the whole command, all threads."""
    command = [sys.executable, "-m", "jaxinfer", "generate", "The capital of France is"]
    command += ["--compilation-cache-dir", cache, "--max-tokens", "2"]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        if process.stdout is None:
            raise RuntimeError("no standard output")
        is_text = bool(process.stdout.read(1))
        seconds = time.perf_counter() - begun
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not is_text:
        raise RuntimeError(f"{command} failed with {process.returncode}")
    return {
        "first_token_s": seconds,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="host, waste, start; none: all")
    options = parser.parse_args()
    rows = {"start": start, "host": host, "waste": waste}
    unknown = [w for w in options.what if w not in rows]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(rows)}")
    for name in options.what or rows:
        rows[name]()


if __name__ == "__main__":
    main()
