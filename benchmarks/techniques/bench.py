"""What every technique measures with: engines, prompts, interleaved repeats, and its rows."""

import datetime
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from benchmarks.report import spread
from jaxinfer import LLM, SamplingParams
from jaxinfer.profiling.record import trace
from jaxinfer.request import RequestOutput
from jaxinfer.runner import COMPILES

Run = Callable[[int], float]
"""One measurement: number of the repeat, its seed -> the figure. WARM_UP may do less."""

WARM_UP = -1

RESERVED = 2048
"""Positions that an engine without pages sets aside for each request."""

_MOST_ENGINES = 2
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Literature:
    """What others state: a sentence, its source, and the ratio as (low, high) if there is one."""

    says: str
    source: str
    ratio: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Counted:
    """What arithmetic says, and what was counted: the quantity without and with the technique."""

    says: str
    off: float
    on: float
    more_is_better: bool = False

    @property
    def ratio(self) -> float:
        return self.on / self.off if self.more_is_better else self.off / self.on


@dataclass(frozen=True, slots=True)
class Measured:
    """Repeats of one figure, off and on; `metric` names the figure and its unit."""

    metric: str
    off: Sequence[float]
    on: Sequence[float]
    more_is_better: bool = False

    @property
    def ratios(self) -> list[float]:
        """How many times better "on" is, repeat by repeat: neighbours in time are compared."""
        pairs = zip(self.off, self.on, strict=True)
        return [on / off if self.more_is_better else off / on for off, on in pairs]

    def fields(self) -> dict[str, Any]:
        """Flat columns of a row: medians and extremes of off, on and of their ratio."""
        found: dict[str, Any] = {"metric": self.metric, "repeats": len(self.off)}
        found["better"] = "higher" if self.more_is_better else "lower"
        for name, values in (("off", self.off), ("on", self.on), ("ratio", self.ratios)):
            of = spread(values)
            found |= {name: of["median"], f"{name}_low": of["low"], f"{name}_high": of["high"]}
        return found


def make_row(
    label: str,
    case: str,
    *,
    off_is: str,
    literature: Literature,
    counted: Counted | None = None,
    measured: Measured | None = None,
    target: str | None = None,
    target_met: bool | None = None,
    remark: str | None = None,
    **details: Any,
) -> dict[str, Any]:
    """A row of the result document; its columns are described in benchmarks/README.md."""
    low, high = literature.ratio or (None, None)
    row: dict[str, Any] = {
        "label": label,
        "case": case,
        "off_is": off_is,
        "literature": literature.says,
        "source": literature.source,
        "literature_ratio_low": low,
        "literature_ratio_high": high,
        "counted": counted.says if counted else None,
        "counted_off": counted.off if counted else None,
        "counted_on": counted.on if counted else None,
        "counted_ratio": counted.ratio if counted else None,
    }
    row |= measured.fields() if measured else {"metric": None, "ratio": None}
    row |= {"target": target, "target_met": target_met, "remark": remark}
    row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return row | details


class Bench:
    """Engines by their options (those used last are kept), prompts, and interleaved timing."""

    def __init__(
        self,
        *,
        repeats: int,
        toy_model: Path | None = None,
        profile: Path | None = None,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.repeats = repeats
        self._compiles = 0
        self._toy_model = toy_model
        self._profile = profile
        self._on_progress = on_progress
        self._engines: dict[tuple, LLM] = {}

    def size(self, real: _T, toy: _T) -> _T:
        """`real`, or `toy` where this run only shows that everything runs."""
        return real if self._toy_model is None else toy

    @property
    def page_size(self) -> int:
        """The engine's default on this platform."""
        return {"cpu": 16, "tpu": 128}.get(jax.default_backend(), 64)

    @property
    def model_options(self) -> dict[str, Any]:
        if self._toy_model is None:
            return {}
        return {
            "model": str(self._toy_model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "compilation_cache_dir": None,
        }

    @property
    def usual(self) -> dict[str, int]:
        """Options of the engine that most techniques share: few programs, so little to compile."""
        return {
            "requests": self.size(8, 4),
            "max_num_seqs": self.size(8, 4),
            "max_num_batched_tokens": self.size(512, 32),
        }

    def engine(self, *, requests: int = 8, **options: Any) -> LLM:
        """A warm engine whose pool holds `requests` times RESERVED positions."""
        num_pages = requests * RESERVED // self.page_size
        options = {
            "max_model_len": RESERVED,
            "page_size": self.page_size,
            "num_pages": num_pages,
            "enable_prefix_caching": False,
            "verbose": False,
            **self.model_options,
            **options,
        }
        key = tuple(sorted((name, repr(value)) for name, value in options.items()))
        llm = self._engines.pop(key, None)
        if llm is None:
            while len(self._engines) >= self.size(_MOST_ENGINES, 5):
                self._close(next(iter(self._engines)))
            self._on_progress("loading and compiling")
            llm = LLM(**options)
            llm.warmup()
        self._engines[key] = llm
        return llm

    def _close(self, key: tuple) -> None:
        llm = self._engines.pop(key)
        self._compiles += _compiles_in_steps(llm)
        llm.close()

    @property
    def compiles(self) -> int:
        """After warm-up: in engines' steps, and anything in the process while it was timed."""
        return self._compiles + self._compiles_in_steps()

    def _compiles_in_steps(self) -> int:
        """Those that the open engines count themselves."""
        return sum(_compiles_in_steps(llm) for llm in self._engines.values())

    def close(self) -> None:
        """End every engine."""
        for key in list(self._engines):
            self._close(key)

    def compare(
        self,
        name: str,
        metric: str,
        off: Run,
        on: Run,
        *,
        more_is_better: bool = False,
        repeats: int | None = None,
    ) -> Measured:
        """Each run once to warm up, then interleaved, the first of a pair taking turns.

        Both get the number of the repeat, so that they can serve the same prompts. With a folder
        for profiles, each runs once more under the tracer.
        """
        repeats = repeats or self.repeats
        self._on_progress(f"{name}: warming up")
        off(WARM_UP)
        on(WARM_UP)
        results: tuple[list[float], list[float]] = ([], [])
        before = COMPILES.compiles - self._compiles_in_steps()
        for repeat in range(repeats):
            self._on_progress(f"{name}: repeat {repeat + 1} of {repeats}")
            for side in (0, 1) if repeat % 2 == 0 else (1, 0):
                gc.collect()
                results[side].append((off, on)[side](repeat))
        self._compiles += COMPILES.compiles - self._compiles_in_steps() - before
        if self._profile is not None:
            for side, run in (("off", off), ("on", on)):
                with trace(self._profile / name / side):
                    run(repeats)
        return Measured(metric, *results, more_is_better=more_is_better)


def _compiles_in_steps(llm: LLM) -> int:
    return sum(runner.compiles_after_warmup for runner in llm.engine.runners)


def prompts(llm: LLM, lengths: Iterable[int], *seed: int) -> list[list[int]]:
    """Random token ids of the model's vocabulary; `seed` may hold WARM_UP."""
    rng = np.random.default_rng([1 + s for s in seed])
    vocab = llm.model.config.vocab_size
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def generate(llm: LLM, asked: list[list[int]], num_new: Sequence[int]) -> list[RequestOutput]:
    """All prompts at once, greedy, exactly `num_new` tokens each."""
    params = [greedy(count) for count in num_new]
    outputs = llm.generate(asked, params, use_tqdm=False)
    for output, count in zip(outputs, num_new, strict=True):
        if output.error is not None:
            raise output.error
        made = len(output.outputs[0].token_ids)
        if made != count:
            raise RuntimeError(f"the engine made {made} tokens where {count} were asked")
    return outputs


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **options
    )


def ttft(output: RequestOutput) -> float:
    """Seconds from a request's arrival to its first token."""
    metrics = output.metrics
    if metrics is None or metrics.first_token_time is None:
        raise RuntimeError(f"request {output.request_id} has no first token")
    return metrics.first_token_time - metrics.arrival_time


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def counters(llm: LLM, *names: str) -> tuple[float, ...]:
    """Some of `llm.get_metrics()`."""
    metrics = llm.get_metrics()
    return tuple(metrics[name] for name in names)


@dataclass(frozen=True, slots=True)
class Technique:
    """`measure` yields rows; `about` says what is measured, in a line."""

    name: str
    about: str
    measure: Callable[[Bench], Iterator[dict[str, Any]]]
