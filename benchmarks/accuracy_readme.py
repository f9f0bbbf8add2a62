"""The table of accuracy as text: for the terminal, and for benchmarks/README.md between markers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import measured_on, replace_between, table

COLUMNS = (
    "configuration",
    "perplexity",
    "change",
    "same greedy token",
    "KL at least",
    "weights",
    "decode, 8 rows",
)


def lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The table's cells, by COLUMNS; the float model has nothing to be compared with."""
    found = []
    for row in rows:
        cells = [row["label"].replace("|", "/"), f"{row['perplexity']:.3f}"]
        if "greedy_agreement" in row:
            cells += [
                f"{row['perplexity_change_percent']:+.2f} %",
                f"{100 * row['greedy_agreement']:.2f} %",
                f"{row['kl_divergence']:.5f}",
            ]
        else:
            cells += ["", "", ""]
        cells += [f"{row['weight_bytes'] / 1e6:.1f} MB", f"{row['decode_tok_s']:.0f} tok/s"]
        found.append(dict(zip(COLUMNS, cells, strict=True)))
    return found


def text(content: dict[str, Any]) -> str:
    """What stands between the markers: where it was measured, on what text, the table, notes."""
    settings, rows = content["settings"], content["rows"]
    parts = [measured_on(content, "accuracy")]
    if rows:
        parts.append(
            f"Model: {settings['model']}, dtype {settings['dtype']}. "
            f"{rows[0]['num_scored']:,} tokens scored, in windows of {settings['window']:,} with "
            f"stride {settings['stride']:,}; KL from the {settings['num_top']} most likely tokens. "
            f"Text: {settings['text']}; SHA-256 `{settings['text_sha256']}`."
        )
    parts.append(table(lines(rows), COLUMNS))
    parts += [f"Note: {note}" for note in content["notes"]]
    return "\n\n".join(parts)


def update(path: Path, content: dict[str, Any]) -> None:
    """Replace what stands between the markers of `path`."""
    replace_between(path, "accuracy", text(content))
