"""Engines on one workload after another: start them, run them in turn, write their rows.

Rows of the result have `kind`, `workload`, `engine` and, by kind:

    engine  `output_tok_s` (or `prefill_tok_s`), median of `repeats`, `_low`, `_high`; `wall_s`;
            `ttft`, `itl`, `tpot` `_p50_s`, `_p90_s`, `_p99_s` over the requests of all repeats;
            `tokens`, `prompt_tokens`, `cached_tokens` of a repeat; `peak_memory_bytes` (all
            processes); `start_s` until it could serve, `compile_s` of it; `compiles_after_warmup`;
            `roofline_share`: the least time by `ceiling_bytes_s` and `ceiling_flops` (roofline.py)
            over the time it took; `agree_tokens`, `agree_requests` with transformers-float32;
            `settings`, `versions`, `date`
    ratio   of `engine`'s rate to `peer`'s: `ratio`, `low`, `high`, `verdict` (measures.py)
    error   `error`, after `repeats_done`

What an engine does not tell is null.
"""

import contextlib
import datetime
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine, workloads
from benchmarks.peers import measures, roofline
from benchmarks.peers.engines import REFERENCE, Entry, Environments, Missing
from benchmarks.peers.measures import Run
from benchmarks.peers.models import Model, encode
from benchmarks.peers.workers import Worker, WorkerError
from benchmarks.report import Report
from benchmarks.workloads import Workload

WARMUP_SEED, FIRST_SEED = 1000, 0
TOY_OPTIONS = {"max_model_len": 128, "max_num_batched_tokens": 64}
"""Of jaxinfer in a toy run: it has fewer programs to compile then."""


@dataclass(slots=True)
class Bench:
    """What stays the same over all workloads of a run."""

    model: Model
    environments: Environments
    cache: Path
    report: Report
    repeats: int
    toy: bool
    timeout: float
    profile: Path | None
    texts: dict[str, list[int]] = field(default_factory=dict)
    ceilings: roofline.Ceilings | None = None
    failed: bool = False

    def workload(self, name: str, seed: int) -> Workload:
        return workloads.make(
            name, seed, vocab=self.model.decoder.vocab, encode=self._encode, toy=self.toy
        )

    def _encode(self, text: str) -> list[int]:
        if text not in self.texts:
            self.texts[text] = encode(self.model, [text])[0]
        return self.texts[text]

    def error(self, workload: str, entry: Entry, what: str, **more: Any) -> None:
        self.failed = True
        row = {"kind": "error", "workload": workload, "engine": entry.name, "error": what, **more}
        self.report.add(row)
        print(f"\n{entry.name} failed in {workload}: {what}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Running:
    """An engine that serves the workload at hand."""

    entry: Entry
    worker: Worker
    start_s: float
    opened: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    peak_memory: int | None = None
    compiles: int | None = None


def request(workload: Workload) -> dict[str, Any]:
    rounds = [
        [{"prompt": list(ask.prompt), "max_tokens": ask.max_tokens} for ask in round_]
        for round_ in workload.rounds
    ]
    return {"op": "run", "rounds": rounds}


def start(bench: Bench, entry: Entry, workload: Workload, longest: int) -> Running:
    """Start an engine for a workload. Raises Missing or WorkerError."""
    python = bench.environments.python(entry.environment)
    source = bench.model.source
    if not entry.reads_gguf:
        writer = python if source.is_dir() else bench.environments.python("transformers")
        source = bench.model.folder(bench.cache, writer)
    setup = {
        "model": str(source),
        "dtype": entry.dtype,
        "max_num_seqs": workload.max_num_seqs,
        "max_len": longest,
        "prefix_caching": workload.prefix_caching,
        "threads": machine.num_cores(),
        "options": {**(TOY_OPTIONS if bench.toy else {}), **entry.options},
        "profile": trace_folder(bench, entry, workload),
    }
    worker = Worker(entry.name, python, entry.module, timeout=bench.timeout)
    try:
        opened = worker.ask({"op": "open", "setup": setup})
    except BaseException:
        worker.kill()
        raise
    return Running(entry, worker, worker.age, opened)


def trace_folder(bench: Bench, entry: Entry, workload: Workload) -> str | None:
    """Where the trace of our engine goes; None for no trace."""
    if bench.profile is None or not entry.is_ours:
        return None
    return str((bench.profile / workload.name / entry.name).resolve())


def run_once(engine: Running, workload: Workload) -> Run:
    """One run, checked; the engine is paused before and after. Raises WorkerError."""
    engine.worker.resume()
    run = Run.of(engine.worker.ask(request(workload)))
    engine.worker.pause()
    wrong = measures.wrong_count(run, workload)
    if wrong is not None:
        raise WorkerError(f"{engine.entry.name} {wrong}")
    return run


def run_workload(bench: Bench, name: str, entries: list[Entry], bar: tqdm) -> None:
    """All engines on one workload, interleaved; their rows."""
    repeats = [bench.workload(name, FIRST_SEED + i) for i in range(bench.repeats)]
    warmup = bench.workload(name, WARMUP_SEED)
    asks = [ask for w in (*repeats, warmup) for round_ in w.rounds for ask in round_]
    longest = max(len(ask.prompt) + ask.max_tokens for ask in asks)
    engines: list[Running] = []
    with contextlib.ExitStack() as stack:
        for entry in entries:
            bar.set_description(f"{name}: starting {entry.name}")
            try:
                engine = start(bench, entry, warmup, longest)
                stack.callback(engine.worker.kill)
                engine.worker.pause()
                bar.set_description(f"{name}: warming up {entry.name}")
                run_once(engine, warmup)
            except (Missing, WorkerError) as error:
                bench.error(name, entry, str(error), repeats_done=0)
                bar.update(bench.repeats)
                continue
            engines.append(engine)
        try:
            interleave(bench, engines, repeats, bar)
        except (KeyboardInterrupt, SystemExit):
            common = min((len(engine.runs) for engine in engines), default=0)
            if common:
                bench.report.note(f"{name} was cut short after {common} of {bench.repeats} repeats")
                for engine in engines:
                    del engine.runs[common:]
                    engine.peak_memory = engine.worker.peak_memory()
                write_rows(bench, engines, repeats[:common])
            raise
        write_rows(bench, close(bench, engines, repeats[0]), repeats)


def interleave(bench: Bench, engines: list[Running], repeats: list[Workload], bar: tqdm) -> None:
    """Each repeat by each engine in turn, another one first each time; those that fail leave."""
    for i, workload in enumerate(repeats):
        first = i % len(engines) if engines else 0
        for engine in engines[first:] + engines[:first]:
            bar.set_description(f"{workload.name} {i + 1}/{bench.repeats}: {engine.entry.name}")
            try:
                engine.runs.append(run_once(engine, workload))
            except WorkerError as error:
                bench.error(workload.name, engine.entry, str(error), repeats_done=i)
                engines.remove(engine)
                bar.update(bench.repeats - i - 1)
            bar.update()


def close(bench: Bench, engines: list[Running], workload: Workload) -> list[Running]:
    """End the engines, after a traced run of ours where that is wanted; those that ended well."""
    done: list[Running] = []
    for engine in engines:
        engine.peak_memory = engine.worker.peak_memory()
        try:
            folder = trace_folder(bench, engine.entry, workload)
            if folder is not None:
                engine.worker.resume()
                engine.worker.ask({**request(workload), "op": "profile", "directory": folder})
            engine.compiles = engine.worker.close()["compiles_after_warmup"]
        except WorkerError as error:
            count = len(engine.runs)
            bench.error(workload.name, engine.entry, str(error), repeats_done=count)
            continue
        done.append(engine)
        if engine.compiles:
            bench.failed = True
            bench.report.note(
                f"{workload.name}: {engine.entry.name} compiled {engine.compiles} programs after "
                f"warm-up, which takes time that the figures of a warm engine should not have"
            )
        elif engine.compiles is not None:
            said = f"{workload.name}, {engine.entry.name}: 0 compiles after warm-up"
            tqdm.write(said, sys.stderr)
    return done


def write_rows(bench: Bench, engines: list[Running], repeats: list[Workload]) -> None:
    reference = next((e.runs for e in engines if e.entry.name == REFERENCE), None)
    for engine in engines:
        bench.report.add(engine_row(bench, engine, repeats, reference))
    for ours in (e for e in engines if e.entry.is_ours):
        for theirs in (e for e in engines if not e.entry.is_ours):
            found = measures.ratio(ours.runs, theirs.runs, repeats[0])
            names = {"engine": ours.entry.name, "peer": theirs.entry.name}
            bench.report.add({"kind": "ratio", "workload": repeats[0].name, **names, **found})


def engine_row(
    bench: Bench,
    engine: Running,
    repeats: list[Workload],
    reference: list[Run] | None,
) -> dict[str, Any]:
    entry, workload = engine.entry, repeats[0]
    ceilings = bench.ceilings
    decoder = bench.model.as_kept(entry.weights, entry.dtype)
    bounds = ceilings and [
        roofline.bound_seconds(repeat, decoder, ceilings, entry.peak) for repeat in repeats
    ]
    walls = [run.wall for run in engine.runs]
    shares = [b / wall for b, wall in zip(bounds or [], walls, strict=False) if b is not None]
    return {
        "kind": "engine",
        "workload": workload.name,
        "engine": entry.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "repeats": len(engine.runs),
        **measures.rates(engine.runs, workload),
        "wall_s": statistics.median(walls),
        **measures.latencies(engine.runs),
        "tokens": sum(map(len, engine.runs[0].tokens)),
        "prompt_tokens": workload.prompt_tokens,
        "cached_tokens": engine.runs[0].cached_tokens,
        "peak_memory_bytes": engine.peak_memory,
        "start_s": engine.start_s,
        "compile_s": engine.opened["compile_s"],
        "compiles_after_warmup": engine.compiles,
        "ceiling_bytes_s": ceilings and ceilings.bytes_s,
        "ceiling_flops": ceilings and ceilings.flops.get(entry.peak),
        "roofline_share": statistics.median(shares) if shares else None,
        **(measures.agreement(engine.runs, reference) if reference else {}),
        "settings": engine.opened["settings"],
        "versions": engine.opened["versions"],
    }


def measure_ceilings(bench: Bench, entries: list[Entry]) -> None:
    """What the machine can do, by torch where an engine's Python has it, else by numpy alone."""
    seconds = 0.05 if bench.toy else 1.0
    pythons = []
    for environment in ("transformers", "vllm"):
        if any(entry.environment == environment for entry in entries):
            with contextlib.suppress(Missing):  # told when the engine is started
                pythons.append(bench.environments.python(environment))
    for python in [*pythons, sys.executable]:
        try:
            bench.ceilings = roofline.measure(python, seconds)
            return
        except (RuntimeError, OSError) as error:
            bench.report.note(f"{error}")


def measure_all(bench: Bench, names: list[str], entries: list[Entry]) -> None:
    """The machine's ceilings, then every workload."""
    measure_ceilings(bench, entries)
    if bench.ceilings is not None:
        found = bench.ceilings
        bench.report.content["settings"]["ceilings"] = {
            "bytes_s": found.bytes_s,
            **found.flops,
            "by": found.by,
        }
    report = bench.report
    with tqdm(total=len(names) * len(entries) * bench.repeats, unit="run") as bar:
        for name in names:
            run_workload(bench, name, entries, bar)
    report.rows.sort(key=lambda row: workloads.NAMES.index(row["workload"]))
    report.finish()
