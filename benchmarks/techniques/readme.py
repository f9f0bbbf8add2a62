"""The techniques' table as text: for the terminal, and for benchmarks/README.md between markers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import measured_on, replace_between, table

COLUMNS = ("technique", "case", "literature", "counted", "measured: off -> on", "times better")

_METRICS = {
    "time_s": ("time", 1.0, "s"),
    "ttft_p50_s": ("TTFT p50", 1e3, "ms"),
    "itl_p99_s": ("ITL p99", 1e3, "ms"),
    "output_tok_s": ("output", 1.0, "tok/s"),
}


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def measured(row: dict[str, Any]) -> str:
    """ "time 6.1 s (5.9..6.4) -> 1.2 s (1.1..1.3)", median and extremes; "" where nothing was."""
    if row["metric"] is None:
        return ""
    name, scale, unit = _METRICS[row["metric"]]
    if row["metric"] == "time_s" and row["off"] < 1:
        scale, unit = 1e3, "ms"
    sides = []
    for side in ("off", "on"):
        middle, low, high = (number(scale * row[side + end]) for end in ("", "_low", "_high"))
        sides.append(f"{middle} {unit} ({low}..{high})")
    return f"{name} {' -> '.join(sides)}"


def better(row: dict[str, Any]) -> str:
    """The measured ratio and its extremes; the counted one where nothing was measured."""
    if row["metric"] is None:
        return f"{number(row['counted_ratio'])} (counted)"
    low, high = number(row["ratio_low"]), number(row["ratio_high"])
    return f"{number(row['ratio'])} ({low}..{high})"


def lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The table's cells, by COLUMNS."""
    found = []
    for row in rows:
        counted = row["counted"] or ""
        if row["target"]:
            verdict = {True: "met", False: "NOT met", None: "spread too wide to tell"}
            counted += (
                f"{'; ' if counted else ''}target: {row['target']}: {verdict[row['target_met']]}"
            )
        cells = (row["label"], row["case"], row["literature"], counted)
        cells = (*cells, measured(row), better(row))
        found.append(dict(zip(COLUMNS, (cell.replace("|", "/") for cell in cells), strict=True)))
    return found


def text(content: dict[str, Any]) -> str:
    """What stands between the markers: where it was measured, the table, what "off" is, sources."""
    rows = content["rows"]
    parts = [
        measured_on(content, "techniques"),
        table(lines(rows), COLUMNS),
        'What "off" is, and where the figure is from:',
    ]
    parts.append(
        "\n".join(
            f"- {row['label']}. Off: {row['off_is']}. Source: {row['source']}. "
            f"{row['remark'] or ''}".rstrip()
            for row in rows
        )
    )
    parts += [f"Note: {note}" for note in content["notes"]]
    return "\n\n".join(parts)


def update(path: Path, content: dict[str, Any]) -> None:
    """Replace what stands between the markers of `path`."""
    replace_between(path, "techniques", text(content))
