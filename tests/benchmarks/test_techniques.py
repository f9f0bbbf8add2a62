"""The techniques' benchmark at toy size: rows, files, chart, README, and what users get wrong."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import charts
from benchmarks.report import README, BenchmarkError, check_markers, markers
from benchmarks.techniques import __main__ as command
from benchmarks.techniques import flash_attention, readme, registry
from benchmarks.techniques.bench import Counted, Literature, Measured, make_row
from benchmarks.techniques.continuous_batching import new_tokens, steps_of
from benchmarks.techniques.simulate import serve

NAMES = [t.name for t in registry.TECHNIQUES]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Folder with the result and the chart of one run of everything."""
    folder = tmp_path_factory.mktemp("techniques")
    command.main(["--toy", "--repeats", "1", "--output", str(folder / "out.json")])
    return folder


@pytest.fixture(scope="module")
def content(toy) -> dict:
    return json.loads((toy / "out.json").read_text())


def test_every_technique_has_rows_of_the_schema(content):
    assert content["schema"] == 1
    assert content["benchmark"] == "techniques"
    assert content["complete"]
    assert content["settings"] == {"repeats": 1, "model": "toy"}
    assert list(dict.fromkeys(row["technique"] for row in content["rows"])) == NAMES
    for row in content["rows"]:
        assert (
            row["literature"] and row["source"] and row["off_is"] and row["case"] and row["label"]
        )
        assert all(isinstance(v, str | int | float | None) for v in row.values())
        if row["metric"] is None:
            assert row["counted_ratio"] > 1
            continue
        assert row["better"] in ("lower", "higher")
        for name in ("off", "on", "ratio"):
            assert 0 < row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


def test_nothing_is_compiled_after_warm_up(content):
    assert content["compiles_after_warmup"] == 0


def rows_of(content: dict, technique: str) -> list[dict]:
    return [row for row in content["rows"] if row["technique"] == technique]


def test_kv_cache_counts_what_is_fed(content):
    (row,) = rows_of(content, "kv-cache")
    assert row["counted_off"] == sum(range(2, 14))
    assert row["counted_on"] == 2 + 11
    assert row["equal_tokens"] == row["new_tokens"] == 12
    assert row["padded_tokens_off"] > row["counted_off"]


def test_prompt_caching_counts_hits(content):
    prefix, no_hits, chat = rows_of(content, "prompt-caching")
    assert prefix["tokens_saved"] == 2 * 32  # two later requests, the whole pages of 40 tokens
    assert no_hits["counted_ratio"] == 1
    assert 0 < no_hits["host_s_on"] < no_hits["on"]
    assert no_hits["target_met"] is None or no_hits["spread_percent"] < 2
    assert chat["tokens_saved"] > 0


def test_flash_attention_needs_less_memory_and_is_exact(content):
    for row in rows_of(content, "flash-attention"):
        assert row["temporary_bytes_on"] < row["temporary_bytes_off"]
        assert row["target_met"]


def test_chunks_are_smaller_than_the_prompt(content):
    (row,) = rows_of(content, "chunked-prefill")
    assert row["metric"] == "itl_p99_s"
    assert row["itl_max_s_off"] > 0 and row["ttft_of_long_s_on"] > 0


def test_chart_is_a_png(toy):
    width, height = png_size(toy / "out.png")
    assert width == 9 * charts.DPI
    assert height > 3 * charts.DPI


# -- arithmetic -----------------------------------------------------------------------------------


def test_elements_moved_are_the_literatures():
    assert flash_attention.moved_without(4000, 1, 1) == pytest.approx(64e6, rel=0.02)
    moved = flash_attention.moved_with(4000, 1, 1, 128, 128, causal=False)
    assert moved == pytest.approx(17e6, rel=0.01)
    half = flash_attention.moved_with(4000, 1, 1, 128, 128, causal=True)
    assert half == pytest.approx(moved / 2, rel=0.1)


def test_exact_attention_is_softmax_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((7, n, 4)) for n in (2, 1, 1))
    out = flash_attention.exact(q, k, v, causal=True)
    scores = q[5, 1] @ k[:6, 0].T / 2
    weights = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(out[5, 1], weights @ v[:6, 0], rtol=1e-12)
    np.testing.assert_allclose(out[0, 0], v[0, 0])


def test_steps_of_static_and_continuous_batching():
    lengths = new_tokens(100, 20, 200)
    assert steps_of(lengths, 4) == 25 * 200
    continuous = steps_of(lengths, 100)
    assert 11_000 / 4 <= continuous <= 11_000 / 4 + 200


def test_simulated_waste_is_that_of_the_last_pages():
    counts = serve([(10, 7)], rows=4, num_pages=10, page_size=8, max_len=64)
    assert counts.num_steps == 7  # the last token is never fed
    held = list(range(10, 17))
    assert counts.token_steps == sum(held)
    assert counts.position_steps == sum(-(-n // 8) * 8 for n in held)
    assert counts.waste_of_reserving(64) == pytest.approx(1 - sum(held) / (7 * 64))


def test_ratios_say_how_many_times_better():
    slower = Measured("time_s", off=[4.0, 6.0, 8.0], on=[2.0, 2.0, 2.0])
    assert slower.ratios == [2, 3, 4]
    assert slower.fields()["ratio"] == 3
    more = Measured("output_tok_s", off=[1.0], on=[3.0], more_is_better=True)
    assert more.ratios == [3]
    assert Counted("x", 10, 5).ratio == Counted("x", 5, 10, more_is_better=True).ratio == 2


# -- README ---------------------------------------------------------------------------------------


def some_content() -> dict:
    row = make_row(
        "name",
        "a | case",
        off_is="without",
        literature=Literature("2x", "a paper", (2, 2)),
        counted=Counted("10 -> 5", 10, 5),
        measured=Measured("time_s", [2.0, 2.2, 1.8], [1.0, 1.0, 1.0]),
        target="under 9",
        target_met=False,
    )
    machine = {"name": "m", "cpu": "c", "cores": 2, "memory_gb": 8, "platform": "cpu"}
    machine |= {"device": "cpu", "versions": {"jax": "0.0"}}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "command": "python -m benchmarks.techniques",
        "machine": machine,
        "rows": [{"technique": "t", **row}],
        "notes": [],
    }


def test_readme_table_stands_between_the_markers(tmp_path):
    path = tmp_path / "README.md"
    begin, end = markers("techniques")
    path.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    readme.update(path, some_content())
    readme.update(path, some_content())  # again, in place
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old" not in text
    assert text.count("2026-01-02") == 1
    line = next(x for x in text.splitlines() if x.startswith("| name "))
    assert "time 2 s (1.8..2.2) -> 1 s (1..1)" in line
    assert "a / case" in line and "NOT met" in line and "2 (1.8..2.2)" in line
    assert len(line.split("|")) == len(readme.COLUMNS) + 2


def test_readme_of_the_repository_has_the_markers():
    check_markers(README, "techniques")


# -- what users get wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "kv-cache", "paging"], "no technique is called paging.*kv-cache"),
        (["--repeats", "0"], "--repeats must be at least 1; got 0"),
        (["--toy", "--update-readme"], "toy"),
        (["--update-readme", "/nowhere/README.md"], "/nowhere/README.md cannot be read"),
        (["--profile", "/proc/nothing/here"], "--profile /proc/nothing/here"),
        (["--output", "/proc/nothing/out.json"], "--output"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, says, tmp_path):
    if "--output" not in arguments:
        arguments = [*arguments, "--output", str(tmp_path / "out.json")]
    with pytest.raises(BenchmarkError, match=says):
        command.main(arguments)
    assert not (tmp_path / "out.json").exists()


def test_a_readme_without_markers_is_left_alone(tmp_path):
    path = tmp_path / "README.md"
    begin, end = markers("techniques")
    path.write_text(f"{end}\n{begin}\n")
    with pytest.raises(BenchmarkError, match="needs the lines"):
        command.main(["--update-readme", str(path), "--output", str(tmp_path / "out.json")])
    assert path.read_text() == f"{end}\n{begin}\n"


def test_no_matplotlib_is_told_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BenchmarkError, match=r"pip install matplotlib.*--no-chart"):
        command.main(["--toy", "--output", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()


def test_a_chart_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="--chart"):
        charts.ratio_bars(
            tmp_path / "file" / "x.png", ["a"], {"s": [(1, 2, 3)]}, title="t", axis="x"
        )


def test_a_bar_out_of_order_is_refused(tmp_path):
    with pytest.raises(ValueError, match="low <= value"):
        charts.ratio_bars(tmp_path / "x.png", ["a"], {"s": [(3, 2, 1)]}, title="t", axis="x")


def test_merge_keeps_other_rows_and_profile_writes_traces(toy, tmp_path):
    path = tmp_path / "out.json"
    path.write_text((toy / "out.json").read_text())
    some = ["--toy", "--repeats", "1", "--only", "grouped-queries", "--no-chart", "--merge"]
    traces = tmp_path / "traces"
    command.main([*some, "--output", str(path), "--profile", str(traces)])
    for side in ("off", "on"):
        assert any((traces / "grouped-queries" / side).rglob("*.xplane.pb"))
    old, new = (json.loads(p.read_text()) for p in (toy / "out.json", path))
    assert [r["case"] for r in new["rows"]] == [r["case"] for r in old["rows"]]
    for before, after in zip(old["rows"], new["rows"], strict=True):
        assert (before == after) is (before["technique"] != "grouped-queries")
    assert any("in parts" in note and "kv-cache" in note for note in new["notes"])
    assert not path.with_suffix(".png").exists()
    new["machine"]["versions"]["jax"] = "0.0.1"
    path.write_text(json.dumps(new))
    with pytest.raises(BenchmarkError, match="leave --merge out"):
        command.main([*some, "--output", str(path)])
    assert json.loads(path.read_text()) == new


def test_compiles_after_warm_up_fail_the_run_and_keep_the_rows(monkeypatch, tmp_path):
    def measure(techniques, options, report, folder):
        row = some_content()["rows"][0]
        report.add(row | {"technique": "overlap", "compiles_after_warmup": 3, "load_at_start": 9e3})

    monkeypatch.setattr(command, "measure", measure)
    path = tmp_path / "out.json"
    with pytest.raises(SystemExit) as end:
        command.main(["--toy", "--no-chart", "--output", str(path)])
    assert end.value.code == 1
    kept = json.loads(path.read_text())
    assert not kept["complete"]
    assert kept["compiles_after_warmup"] == 3
    assert any("3 program(s)" in note for note in kept["notes"])
    assert any("not measured: kv-cache" in note for note in kept["notes"])
    assert any("load 9000.0" in note for note in kept["notes"])
    assert len(kept["rows"]) == 1
