"""Techniques on against off inside this engine, beside the literature. See --help."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import charts, command_line, machine, toy
from benchmarks.report import BenchmarkError, Report, earlier, result_path, run_main, table
from benchmarks.techniques import readme
from benchmarks.techniques.bench import Bench, Technique
from benchmarks.techniques.registry import TECHNIQUES

HELP = """Each technique on and off inside this engine, on the embedded default model, beside the
figure that the literature states: by arithmetic, by count, and by interleaved timing.

The table is printed, kept as JSON (after every row) and drawn as a PNG; --update-readme also puts
it into benchmarks/README.md. A run may be made in parts:

    python -m benchmarks.techniques --only kv-cache paged-attention
    python -m benchmarks.techniques --only overlap --merge --update-readme

techniques:
"""


def parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {t.name:<22}{t.about}" for t in TECHNIQUES)
    made = command_line.parser("techniques", HELP + names)
    made.add_argument("--only", nargs="+", metavar="NAME", help="these techniques; default: all")
    made.add_argument("--repeats", type=int, default=3, help="timed pairs (default 3)")
    made.add_argument(
        "--merge", action="store_true", help="keep the file's rows of techniques not run now"
    )
    command_line.add_chart(made, "the ratios")
    command_line.add_update_readme(made)
    made.add_argument("--toy", action="store_true", help="tiny model and sizes: only shows it runs")
    made.add_argument("--profile", type=Path, metavar="DIR", help="XLA traces of a run on and off")
    return made


def chosen(names: Sequence[str] | None) -> list[Technique]:
    known = {t.name: t for t in TECHNIQUES}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise BenchmarkError(
            f"no technique is called {', '.join(unknown)}; there are: {', '.join(known)}"
        )
    return [t for t in TECHNIQUES if names is None or t.name in names]


def make_folder(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"--profile {path} cannot be used ({error})") from None


def draw(path: Path, content: dict[str, Any]) -> None:
    """Ratios of the literature, of what was counted and of what was measured."""
    rows = content["rows"]
    labels = [row["label"] for row in rows]

    def bar(row: dict[str, Any], name: str) -> charts.Bar | None:
        middle = row.get(name)
        if middle is None:
            return None
        return (row.get(f"{name}_low", middle), middle, row.get(f"{name}_high", middle))

    stated = [
        None
        if row["literature_ratio_low"] is None
        else (
            row["literature_ratio_low"],
            row["literature_ratio_low"],
            row["literature_ratio_high"],
        )
        for row in rows
    ]
    about = content["machine"]
    charts.ratio_bars(
        path,
        labels,
        {
            "literature": stated,
            "counted here": [bar(row, "counted_ratio") for row in rows],
            "measured here": [bar(row, "ratio") for row in rows],
        },
        title="What each technique buys: on against off in one engine",
        axis="times better (logarithmic; whisker: range stated, spread measured)",
        note=f"{content['date'][:10]}, {about['cpu']}, {about['cores']} cores, "
        f"jax {about['versions'].get('jax')}",
    )


def measure(
    techniques: Sequence[Technique], options: argparse.Namespace, report: Report, folder: Path
) -> None:
    """Add every technique's rows to `report`."""
    toy_model = toy.write_model(folder / "model") if options.toy else None
    shown = sys.stderr.isatty()
    begun = time.perf_counter()
    load = machine.load()
    with tqdm(total=len(techniques), unit="technique", disable=not shown) as bar:

        def say(text: str) -> None:
            bar.set_postfix_str(text)
            if not shown:  # a log: lines instead of a bar
                print(f"[{time.perf_counter() - begun:.0f} s] {text}", file=sys.stderr, flush=True)

        bench = Bench(
            repeats=options.repeats,
            toy_model=toy_model,
            profile=options.profile,
            on_progress=say,
        )
        try:
            for technique in techniques:
                bar.set_description(technique.name)
                before = bench.compiles
                for row in technique.measure(bench):
                    compiles, before = bench.compiles - before, bench.compiles
                    row |= {"compiles_after_warmup": compiles, "load_at_start": load}
                    report.add({"technique": technique.name, **row})
                    line = readme.lines(report.rows[-1:])[0]
                    tqdm.write(" | ".join(cell for cell in line.values() if cell))
                    sys.stdout.flush()
                bar.update()
        finally:
            bench.close()


def conclude(report: Report) -> int:
    """Put the rows in order and note what a reader must know; the compiles after warm-up."""
    order = [t.name for t in TECHNIQUES]
    report.rows.sort(key=lambda row: order.index(row["technique"]))
    missing = [name for name in order if all(r["technique"] != name for r in report.rows)]
    if missing:
        report.note(f"not measured: {', '.join(missing)}")
    load = max((row["load_at_start"] or 0 for row in report.rows), default=0)
    if load > machine.num_cores() / 2:
        report.note(
            f"the machine was busy when this, or a part of it, began (load {load:.1f}): ratios are "
            f"of neighbours in time and survive that, times do not"
        )
    compiles = sum(row["compiles_after_warmup"] for row in report.rows)
    report.content["compiles_after_warmup"] = compiles
    if compiles:
        report.note(f"{compiles} program(s) were compiled after warm-up: times include compiling")
    else:
        report.finish()
    return compiles


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit status 1 where something was compiled after warm-up: the figures are kept."""
    options = parser().parse_args(arguments)
    techniques = chosen(options.only)
    if options.repeats < 1:
        raise BenchmarkError(f"--repeats must be at least 1; got {options.repeats}")
    if not options.no_chart:
        charts.check(options.chart)
    command_line.check_update_readme(options, "techniques")
    make_folder(options.profile)
    output = options.output or result_path("techniques")
    model = {"model": "toy" if options.toy else "default"}
    kept = earlier(output, "techniques", model) if options.merge else []
    report = Report("techniques", output=output, settings={"repeats": options.repeats, **model})
    names = {t.name for t in techniques}
    report.keep([row for row in kept if row["technique"] not in names], "technique")
    with tempfile.TemporaryDirectory() as folder:
        measure(techniques, options, report, Path(folder))
    compiles = conclude(report)
    print("\n" + table(readme.lines(report.rows), readme.COLUMNS))
    print(f"\ncompiles after warm-up: {compiles}\nresults: {report.path}")
    if not options.no_chart:
        chart = options.chart or output.with_suffix(".png")
        draw(chart, report.content)
        print(f"chart: {chart}")
    if options.update_readme is not None:
        readme.update(options.update_readme, report.content)
        print(f"table: {options.update_readme}")
    if compiles:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    run_main(main)
