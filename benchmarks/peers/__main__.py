"""The same prompts, lengths, greedy settings and weights through jaxinfer, transformers, llama.cpp
and vLLM's CPU build, interleaved, with the roofline measured in the same run.

    python -m benchmarks.peers                                   # everything: about two hours
    python -m benchmarks.peers --workloads fixed-16 --engines jaxinfer-float32 vllm-bfloat16
    python -m benchmarks.peers --python vllm=/path/to/python     # use an environment there is
    python -m benchmarks.peers --workloads chat --merge          # into the result that there is
    python -m benchmarks.peers --toy                             # seconds; the numbers mean nothing

Each engine runs in a process and a Python of its own; environments are made on demand by
benchmarks/peers/install.sh. In every repeat each engine runs the workload once, in rotating order,
while the processes of the others are stopped; before the first there is a run that is not counted.
Prompts differ from repeat to repeat and are the same for all engines; prefixes are cached in the
workload `chat` alone and forgotten before every run. jaxinfer compiles all its programs before it
is measured. An engine that fails is reported, the others go on, and the exit status is 1.
"""

import argparse
import contextlib
import importlib.util
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import command_line, workloads
from benchmarks.peers import output
from benchmarks.peers.bench import FIRST_SEED, Bench, measure_all
from benchmarks.peers.engines import (
    DEFAULT,
    ENTRIES,
    REFERENCE,
    Entry,
    Environments,
    cache_folder,
    parse_engines,
    parse_pythons,
)
from benchmarks.peers.models import default_model, toy_model
from benchmarks.report import BenchmarkError, Report, earlier, result_path, run_main


def say(bench: Bench) -> None:
    """The tables, on standard output."""
    rows = bench.report.rows
    for name in workloads.NAMES:
        mine = [row for row in rows if row["workload"] == name and row["kind"] != "ratio"]
        if mine:
            print(f"\n{name}: {bench.workload(name, FIRST_SEED).description}")
            print(output.workload_table(mine))
    if any(row["kind"] == "ratio" for row in rows):
        print("\njaxinfer / peer, median (lowest to highest) of the repeats; ~: no difference")
        print(output.ratio_table(rows))


def parse() -> argparse.Namespace:
    parser = command_line.parser("peers", __doc__)
    add = parser.add_argument
    add("--workloads", nargs="+", metavar="NAME", default=list(workloads.NAMES),
        help=f"of {', '.join(workloads.NAMES)}; default: all")  # fmt: skip
    add("--engines", nargs="+", metavar="NAME",
        help=f"of {', '.join(ENTRIES)}; default: {', '.join(DEFAULT)}")  # fmt: skip
    add("--repeats", type=int, default=5, help="counted runs of each engine (5)")
    add("--python", action="append", default=[], metavar="NAME=PATH",
        help="the Python of an environment: jaxinfer, transformers, llama.cpp or vllm")  # fmt: skip
    add("--install", action=argparse.BooleanOptionalAction, default=True,
        help="make environments that are missing (about 10 minutes the first time)")  # fmt: skip
    add("--cache", type=Path, default=cache_folder(),
        help="of environments and weights ($JAXINFER_PEERS, ~/.cache/jaxinfer/peers)")  # fmt: skip
    add("--merge", action="store_true", help="keep that file's rows of workloads not run now")
    command_line.add_chart(parser, "output tokens a second by batch")
    add("--profile", type=Path, metavar="DIR",
        help="write an XLA trace of one more run of each workload by jaxinfer")  # fmt: skip
    add("--timeout", type=float, default=900.0, help="seconds an engine may take to answer (900)")
    add("--toy", action="store_true", help="a tiny model and tiny workloads, to see it run")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Entry]:
    """The engines asked for, or the usual ones; the toy's are those that its folder serves."""
    names = options.engines or list(DEFAULT)
    if options.toy and not options.engines:
        has_torch = "transformers=" in str(options.python) or importlib.util.find_spec("torch")
        names = ["jaxinfer-float32", *([REFERENCE] if has_torch else [])]
    entries = parse_engines(names)
    for entry in entries:
        if options.toy and entry.environment == "llama.cpp":
            raise BenchmarkError(f"--toy has no GGUF file, which {entry.name} needs; leave it out")
    return entries


def check(options: argparse.Namespace) -> None:
    """Raises BenchmarkError, before anything is measured, for what cannot be done."""
    unknown = [name for name in options.workloads if name not in workloads.NAMES]
    if unknown:
        raise BenchmarkError(
            f"no workload {', '.join(map(repr, unknown))}; there are {', '.join(workloads.NAMES)}"
        )
    if options.repeats < 1:
        raise BenchmarkError(f"--repeats {options.repeats} must be at least 1")
    if not options.no_chart:
        output.check_chart(options.chart, options.workloads)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that no stopped worker is left behind."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    options = parse()
    check(options)
    entries = chosen(options)
    pythons = parse_pythons(options.python)
    if options.toy:
        pythons = {"transformers": sys.executable, **pythons}
    environments = Environments(pythons, cache=options.cache, install=options.install)
    names = list(dict.fromkeys(options.workloads))
    with tempfile.TemporaryDirectory() as folder, ended_by_signals():
        model = toy_model(Path(folder)) if options.toy else default_model()
        settings = {
            "model": model.name,
            "workloads": names,
            "engines": [entry.name for entry in entries],
            "repeats": options.repeats,
        }
        path = options.output or result_path("peers")
        alike = {"model": model.name, "repeats": options.repeats}
        kept = earlier(path, "peers", alike) if options.merge else []
        report = Report("peers", output=path, settings=settings)
        report.keep([row for row in kept if row["workload"] not in names], "workload")
        bench = Bench(
            model=model,
            environments=environments,
            cache=options.cache,
            report=report,
            repeats=options.repeats,
            toy=options.toy,
            timeout=options.timeout,
            profile=options.profile,
        )
        measure_all(bench, names, entries)
        say(bench)
    if not options.no_chart and any(output.is_point(row) for row in report.rows):
        about = report.content["machine"]
        title = f"{model.name}, {about['cpu']}, {about['cores']} cores, {report.content['date']}"
        chart = options.chart or path.with_suffix(".png")
        output.draw_chart(report.rows, chart, title)
        print(f"\nchart: {chart}")
    print(f"results: {path}")
    if bench.failed:
        print("something failed: see above", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
