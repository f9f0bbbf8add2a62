"""The worker's side of the benchmark: what an adapter must offer, and the loop that serves it.

Requests and replies are JSON, one a line, over the standard input and output that the worker was
started with. Standard library only: it runs on the Python of any environment.

    {"op": "open", "setup": {...}}   -> {"settings": {}, "versions": {}, "compile_s": s or null}
    {"op": "run", "rounds": [[{"prompt": [id], "max_tokens": n}]]}
                                     -> {"rounds": [{"wall": s, "tokens": [[id]], "times": [[s]]}],
                                         "cached_tokens": n or null}
    {"op": "profile", "rounds": ..., "directory": "..."}        -> {}, from jaxinfer alone
    {"op": "close"}                  -> {"compiles_after_warmup": n or null}

A fault ends the process; its standard error says why.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any


class Engine:
    """What an adapter makes of a setup, which it is constructed with.

    The setup has: `model` (file or folder), `dtype`, `max_num_seqs`, `max_len` (longest prompt and
    output of the workload), `prefix_caching`, `threads`, and for jaxinfer `options` of its LLM and
    `profile`, the folder of a trace to come, or None.
    """

    settings: dict[str, Any]
    """What the engine runs with, for the report."""
    compile_s: float | None = None
    """Seconds of start-up spent compiling; None where they cannot be told apart."""

    def reset(self) -> None:
        """Forget cached prefixes, where any are kept."""

    def run(self, asks: list[dict], clock: "Clock") -> None:
        """Serve a round: hand every token to `clock` when the caller of the engine has it."""
        raise NotImplementedError

    def profiled(self, rounds: list[list[dict]], directory: str) -> None:
        """Write an XLA trace of serving `rounds`."""
        raise RuntimeError(f"{type(self).__name__} writes no XLA trace")

    def close(self) -> dict[str, Any]:
        """End it; what the reply to "close" holds."""
        return {"compiles_after_warmup": None}


class Clock:
    """Tokens of a round's requests and when they came, in seconds after all were submitted."""

    def __init__(self, count: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.times: list[list[float]] = [[] for _ in range(count)]
        self.cached_tokens: int | None = None
        self._begun = time.perf_counter()

    def now(self) -> float:
        """One reading for all the tokens of a step."""
        return time.perf_counter() - self._begun

    def add(self, request: int, tokens: list[int], when: float) -> None:
        """`tokens` of the request at this position were there at `when`."""
        self.tokens[request] += tokens
        self.times[request] += [when] * len(tokens)


def die_with_parent() -> None:
    """On Linux the kernel ends this process when the benchmark's process ends, however that is: a
    stopped worker would otherwise stay for ever."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def run_rounds(engine: Engine, rounds: list[list[dict]]) -> dict[str, Any]:
    """All rounds in turn; the clock of each begins when its requests are handed over."""
    engine.reset()
    done = []
    cached: int | None = None
    for asks in rounds:
        gc.collect()
        clock = Clock(len(asks))
        engine.run(asks, clock)
        done.append({"wall": clock.now(), "tokens": clock.tokens, "times": clock.times})
        if clock.cached_tokens is not None:
            cached = (cached or 0) + clock.cached_tokens
    return {"rounds": done, "cached_tokens": cached}


def serve(make: Callable[[dict[str, Any]], tuple[Engine, dict[str, str]]]) -> None:
    """Serve the benchmark until it says "close" or goes away; `make`: setup -> engine, versions."""
    die_with_parent()
    # Engines and their children print on standard output and may read standard input.
    with os.fdopen(os.dup(1), "w") as replies, os.fdopen(os.dup(0)) as requests:
        os.dup2(2, 1)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        engine: Engine | None = None
        for line in requests:
            request = json.loads(line)
            if request["op"] == "open":
                engine, versions = make(request["setup"])
                reply = {
                    "settings": engine.settings,
                    "versions": {"python": sys.version.split()[0], **versions},
                    "compile_s": engine.compile_s,
                }
            elif engine is None:
                raise RuntimeError(f"{request['op']!r} came before 'open'")
            elif request["op"] == "run":
                reply = run_rounds(engine, request["rounds"])
            elif request["op"] == "profile":
                engine.profiled(request["rounds"], request["directory"])
                reply = {}
            elif request["op"] == "close":
                reply = engine.close()
            else:
                raise RuntimeError(f"unknown op {request['op']!r}")
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
            if request["op"] == "close":
                return
