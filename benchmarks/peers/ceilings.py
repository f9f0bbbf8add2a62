"""What this machine's processor and memory can do, measured: a JSON object on standard output.

    python -m benchmarks.peers.ceilings [SECONDS]

{"bytes_s": memory read with all cores, "float32" | "bfloat16" | "int8": multiply-adds of a matrix
product of N(0, 1) numbers x 2 a second, or null, "by": {...}}. The best of what numpy and, where
this Python has it, torch reach in SECONDS each (1). Standard library and numpy, and torch if there.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SIZE = 2048
READ_BYTES = 1 << 29


def best_seconds(run: Callable[[], Any], seconds: float) -> float:
    """Shortest of at least three calls, and of as many as fit."""
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
        count += 1
    return best


def read_rate(threads: int, seconds: float) -> float:
    """Bytes a second of reading an array far larger than the caches, a part by each core."""
    values = np.ones(READ_BYTES // 4, np.float32)
    parts = np.array_split(values, threads)
    with ThreadPoolExecutor(threads) as pool:
        times = [
            best_seconds(lambda read=read: list(pool.map(read, parts)), seconds)
            for read in (np.max, lambda part: np.dot(part, part))
        ]
    return values.nbytes / min(times)


def numpy_rates(seconds: float) -> dict[str, float]:
    a, b = np.random.default_rng(0).standard_normal((2, SIZE, SIZE), dtype=np.float32)
    return {"float32": 2 * SIZE**3 / best_seconds(lambda: a @ b, seconds)}


def torch_rates(threads: int, seconds: float) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    rates = {}
    a, b = torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for name in ("float32", "bfloat16"):
        x, y = a.to(getattr(torch, name)), b.to(getattr(torch, name))
        rates[name] = 2 * SIZE**3 / best_seconds(lambda x=x, y=y: x @ y, seconds)
    x, y = (a * 40).to(torch.int8), (b * 40).to(torch.int8)
    rates["int8"] = 2 * SIZE**3 / best_seconds(lambda: torch._int_mm(x, y), seconds)
    return rates


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = threads or 1
    sources = {"numpy": numpy_rates(seconds)}
    if importlib.util.find_spec("torch") is not None:
        sources["torch"] = torch_rates(threads, seconds)
    result: dict[str, Any] = {"bytes_s": read_rate(threads, seconds), "by": {}}
    for name in ("float32", "bfloat16", "int8"):
        rates = {source: found[name] for source, found in sources.items() if name in found}
        best = max(rates, key=lambda source: rates[source], default=None)
        result[name] = rates[best] if best else None
        result["by"][name] = best
    print(json.dumps(result))


if __name__ == "__main__":
    main()
