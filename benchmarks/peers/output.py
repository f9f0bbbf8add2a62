"""What a reader sees: tables on the terminal and the chart of throughput by batch."""

from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.report import BenchmarkError, table

COLUMNS = {
    "engine": "engine",
    "tok_s": "tok/s",
    "spread": "low-high",
    "ttft_p50_s": "ttft p50",
    "ttft_p99_s": "ttft p99",
    "itl_p50_s": "itl p50",
    "itl_p99_s": "itl p99",
    "tpot_p50_s": "tpot p50",
    "roofline_share": "of roofline",
    "peak_gb": "peak GB",
    "start_s": "start",
    "compile_s": "of it compile",
    "agree_tokens": "tokens agree",
}


def workload_table(rows: list[dict[str, Any]]) -> str:
    """The engines of one workload; times in seconds."""
    shown = []
    for row in rows:
        if row["kind"] == "error":
            shown.append({"engine": row["engine"], "tok/s": "failed"})
            continue
        name = "output_tok_s" if "output_tok_s" in row else "prefill_tok_s"
        memory = row["peak_memory_bytes"]
        cells = {
            **row,
            "tok_s": row[name],
            "spread": f"{row[name + '_low']:.4g}-{row[name + '_high']:.4g}",
            "peak_gb": memory and memory / 1e9,
        }
        shown.append({title: cells.get(key) for key, title in COLUMNS.items()})
    return table(shown, list(COLUMNS.values()))


def ratio_table(rows: list[dict[str, Any]]) -> str:
    """Of jaxinfer's rate to each peer's, a line per workload and one of our engines."""
    ratios = [row for row in rows if row["kind"] == "ratio"]
    peers = list(dict.fromkeys(row["peer"] for row in ratios))
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in ratios:
        key = row["workload"], row["engine"]
        line = lines.setdefault(key, {"workload": key[0], "engine": key[1]})
        mark = " ~" if row["verdict"] == "no difference" else ""
        line[row["peer"]] = f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f}){mark}"
    return table(list(lines.values()), ["workload", "engine", *peers])


def is_point(row: dict[str, Any]) -> bool:
    """Whether the chart shows this row."""
    return row["kind"] == "engine" and row["workload"].startswith("fixed-")


def check_chart(path: Path | None, workloads: list[str]) -> None:
    """Raises BenchmarkError, before anything is measured, where no chart can be drawn or kept.

    `path`: the one asked for; None: there is one where there is something to show.
    """
    if not any(name.startswith("fixed-") for name in workloads):
        if path is not None:
            raise BenchmarkError("--chart shows the fixed-* workloads; ask for one of them")
        return
    charts.check(path)


def draw_chart(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Output tokens a second by batch, a line per engine, all points with their spread."""
    figure = charts.figure_class()(figsize=(9, 6), dpi=charts.DPI, layout="constrained")
    axes = figure.add_subplot()
    series: dict[str, list[tuple[int, dict]]] = {}
    for row in rows:
        if is_point(row):
            batch = int(row["workload"].removeprefix("fixed-"))
            series.setdefault(row["engine"], []).append((batch, row))
    batches = sorted({batch for points in series.values() for batch, _ in points})
    for engine, points in series.items():
        points.sort(key=lambda point: point[0])
        middle = [row["output_tok_s"] for _, row in points]
        below = [row["output_tok_s"] - row["output_tok_s_low"] for _, row in points]
        above = [row["output_tok_s_high"] - row["output_tok_s"] for _, row in points]
        ours = engine.startswith("jaxinfer")
        axes.errorbar(
            [batch for batch, _ in points], middle, yerr=[below, above], label=engine, marker="o",
            capsize=3, linewidth=2.5 if ours else 1.2, linestyle="-" if ours else "--",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("requests at once")
    axes.set_ylabel("output tokens per second (median, lowest to highest)")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if series:
        axes.legend()
    charts.save(figure, path)
