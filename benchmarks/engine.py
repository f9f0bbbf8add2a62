"""The engine alone: a step's host time, scheduling, KV waste, start-up. Beside others:
`benchmarks.peers`.

    python -m benchmarks.engine                  # every row
    python -m benchmarks.engine host             # one of: start step host waste

start   seconds from the command to the first character, with an empty compile cache and a full one
step    share of the host (plan, build, dispatch, collect) in the time of decode steps, by batch
host    scheduling alone (plan and commit), with 256 running rows and no device
waste   slots of KV pages that hold no token, over a run of mixed lengths, no device
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import command_line, toy
from benchmarks.report import BenchmarkError, Report, percentiles, run_main
from jaxinfer import LLM, SamplingParams
from jaxinfer.config import SchedulerConfig
from jaxinfer.profiling import record
from jaxinfer.request import Request
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.scheduler import Scheduler

VOCAB = 49_152
BATCHES = (1, 16, 64)


def random_prompts(count: int, length: int, seed: int, vocab: int = VOCAB) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab, (count, length)).tolist()


# -- a step of the engine
# -------------------------------------------------------------------------------------


def step(options: argparse.Namespace, report: Report) -> None:
    """Host time of decode steps at 128 tokens in, 64 out; compiles after warm-up."""
    settings: dict = {"enable_prefix_caching": False, "verbose": False}
    vocab, lengths = VOCAB, (128, 64)
    with tempfile.TemporaryDirectory() as folder:
        if options.toy:
            settings |= {"model": str(toy.write_model(Path(folder))), "load_format": "dummy"}
            settings |= {"skip_tokenizer_init": True, "max_num_seqs": 16, "num_pages": 256}
            settings |= {"max_num_batched_tokens": 128}
            vocab, lengths = toy.VOCAB, (16, 24)
        if options.profile:
            record.prepare(options.profile)
        with LLM(**settings) as llm:
            llm.warmup(use_tqdm=False)
            for batch in BATCHES:
                if batch <= (llm.config.max_num_seqs or 0):
                    add(report, **_step_row(llm, batch, vocab, *lengths, options.profile))
            compiles = llm.get_metrics()["num_compiles_after_warmup"]
    print(f"compiles after warm-up: {compiles}")
    if compiles:
        raise SystemExit(f"error: {compiles} program(s) were compiled after warm-up")  # status 1


def _step_row(
    llm: LLM, batch: int, vocab: int, num_in: int, num_out: int, profile: Path | None
) -> dict[str, object]:
    ask = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)
    steps = llm.engine.metrics.steps
    steps.clear()
    with record.trace(profile / f"batch-{batch}" if profile else None):
        llm.generate(random_prompts(batch, num_in, batch, vocab), ask, use_tqdm=False)
    done = [s for s in steps if s.bucket.startswith("decode") and s.num_rows == batch]
    pairs = [
        (later.finished - earlier.finished, later)
        for earlier, later in itertools.pairwise(done)
        if earlier.finished is not None and later.finished is not None
    ]
    if not pairs:
        raise BenchmarkError(f"no two decode steps had {batch} rows; ask for more tokens")
    host = [
        s.plan_seconds + s.build_seconds + s.dispatch_seconds + s.collect_seconds for _, s in pairs
    ]
    total = sum(seconds for seconds, _ in pairs)
    return {
        "bench": "step",
        "batch": batch,
        "steps": len(pairs),
        "step_median_s": statistics.median(seconds for seconds, _ in pairs),
        "host_median_s": statistics.median(host),
        "host_share": sum(host) / total,
    }


def add(report: Report, **row: object) -> None:
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(rounded), flush=True)
    report.add(rounded)


# -- scheduling and waste
# ----------------------------------------------------------------------------


def host(options: argparse.Namespace, report: Report) -> None:
    """Scheduling time per step with 256 rows running: plan and commit, no device."""
    rows, steps = (16, 20) if options.toy else (256, 200)
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
    add(
        report,
        bench="scheduling",
        rows=rows,
        median_ms=round(statistics.median(seconds) * 1e3, 3),
        p99_ms=round(percentiles(seconds)["p99"] * 1e3, 3),
    )


def waste(options: argparse.Namespace, report: Report) -> None:
    """Share of the slots of pages in use that hold no token, over a run of mixed lengths."""
    requests = 20 if options.toy else 400
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
    add(
        report,
        bench="waste",
        page_size=pool.page_size,
        wasted_percent=round(100 * (1 - tokens / slots), 2),
    )


# -- start-up
# ---------------------------------------------------------------------------------------


def start(options: argparse.Namespace, report: Report) -> None:
    """Seconds from the command to the first character: one first start, then second starts."""
    repeats = 1 if options.toy else 5
    with tempfile.TemporaryDirectory() as cache:
        runs = [_start_once(cache) for _ in range(1 + repeats)]
    for name, some in (("first", runs[:1]), ("second", runs[1:])):
        seconds = [run["first_token_s"] for run in some]
        add(
            report,
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


SECTIONS = {"start": start, "step": step, "host": host, "waste": waste}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line.parser("engine", __doc__)
    parser.add_argument("what", nargs="*", help=f"{', '.join(SECTIONS)}; none: all")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="XLA traces of the step section"
    )
    parser.add_argument(
        "--toy", action="store_true", help="small sizes: shows that it runs (start is the real one)"
    )
    options = parser.parse_args(argv)
    unknown = [w for w in options.what if w not in SECTIONS]
    if unknown:
        raise BenchmarkError(f"unknown: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    chosen = options.what or list(SECTIONS)
    report = Report("engine", output=options.output, settings={"sections": chosen})
    for name in chosen:
        SECTIONS[name](options, report)
    report.finish()


if __name__ == "__main__":
    run_main(main)
