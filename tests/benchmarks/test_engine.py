"""The engine's benchmark at toy size: it runs, its rows are what its file says."""

import json

import pytest

from benchmarks import engine
from benchmarks.report import BenchmarkError


def test_sections_without_a_process_run_and_keep_their_rows(tmp_path, capsys):
    path = tmp_path / "engine.json"
    engine.main(["step", "host", "waste", "--toy", "--output", str(path)])
    content = json.loads(path.read_text())
    assert content["schema"] == 1 and content["benchmark"] == "engine" and content["complete"]
    rows = {(row["bench"], row.get("batch")): row for row in content["rows"]}
    assert set(rows) == {("step", 1), ("step", 16), ("scheduling", None), ("waste", None)}
    for batch in (1, 16):
        row = rows["step", batch]
        assert row["steps"] >= 8  # of 24 tokens, when all rows have begun
        assert 0 < row["host_median_s"] < row["step_median_s"] * 2
        assert 0 < row["host_share"] < 1
    assert 0 < rows["waste", None]["wasted_percent"] < 100
    assert "compiles after warm-up: 0" in capsys.readouterr().out


def test_an_unknown_section_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match="unknown: speed; there are start, step"):
        engine.main(["speed", "--output", str(tmp_path / "x.json")])


def test_an_unwritable_output_is_told_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="--output"):
        engine.main(["host", "--toy", "--output", str(tmp_path / "file" / "x.json")])
