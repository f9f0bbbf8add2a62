"""What this machine's processor and memory can do, measured: a JSON object on standard output.

    python -m benchmarks.peers.ceilings [SECONDS]

{"bytes_s": memory read with all cores, "float32" | "bfloat16" | "int8": multiply-adds of a matrix
product of N(0, 1) numbers x 2 a second, "by": {...}}. The best of what numpy and, where this Python
has it, torch reach in about SECONDS each (1). A narrow type that is slower than float32 (processors
without instructions for it), or was not tried, has float32's rate: it can be widened. Standard
library and numpy, and torch if there.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

SMALLEST, SIZE = 128, 2048
READ_BYTES = 1 << 29
LONGEST = 1 / 8  # seconds a product may take for the next size to be tried


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


def product_rate(multiply: Callable[[int], Any], seconds: float) -> float:
    """Operations a second of `multiply(n)`, a product of two [n, n] matrices: at SIZE, or at the
    first smaller size whose fastest of three calls takes more than LONGEST (a type that the
    processor has no instructions for may take a thousand times as long). LONGEST does not shrink
    with `seconds`: beside other work the threads of a small product wait for each other for tens of
    milliseconds, a thousand times as long as they work."""
    size = SMALLEST
    while size < SIZE and best_seconds(partial(multiply, size), 0) <= LONGEST:
        size *= 2
    return 2 * size**3 / best_seconds(partial(multiply, size), seconds)


def numpy_rates(seconds: float) -> dict[str, float]:
    a, b = np.random.default_rng(0).standard_normal((2, SIZE, SIZE), dtype=np.float32)
    return {"float32": product_rate(lambda n: a[:n, :n] @ b[:n, :n], seconds)}


def torch_rates(threads: int, seconds: float) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    products = {
        "float32": (a, b, torch.mm),
        "bfloat16": (a.to(torch.bfloat16), b.to(torch.bfloat16), torch.mm),
        "int8": ((a * 40).to(torch.int8), (b * 40).to(torch.int8), torch._int_mm),
    }
    return {
        name: product_rate(lambda n, x=x, y=y, mm=mm: mm(x[:n, :n], y[:n, :n]), seconds)
        for name, (x, y, mm) in products.items()
    }


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
        if name != "float32":
            rates[f"{result['by']['float32']}, float32"] = result["float32"]
        best = max(rates, key=lambda source: rates[source])
        result[name], result["by"][name] = rates[best], best
    print(json.dumps(result))


if __name__ == "__main__":
    main()
