"""`benchmarks.gpu` at toy size on a CPU: its rows, its arithmetic, and what goes wrong."""

import importlib.util
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import machine, roofline, sections
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import child, ours, peer, stream
from benchmarks.gpu import scale as scales
from benchmarks.gpu.context import Context, OutOfTime, buckets_for
from benchmarks.report import BenchmarkError
from jaxinfer.buckets import Buckets

REQUIREMENTS = Path(command.__file__).parents[1] / "gpu_requirements.txt"
CEILINGS = {
    "section": "ceilings",
    "case": "x",
    "engine": "jax",
    "copy_bytes_s": 1e9,
    "matmul_flops_s": 1e12,
    "memory_bytes": None,
}


@pytest.fixture
def ctx(tmp_path):
    return Context(
        scales.TOY,
        scales.write_model(scales.TOY, tmp_path / "model"),
        tmp_path / "cache",
        tmp_path / "traces",
        time.time(),
        time.monotonic() + 300,
        roofline.Limits(1e10, 1e11),
    )


def check(content):
    """The documented schema, and that a row is flat."""
    assert content["schema"] == 1 and content["benchmark"] == "gpu"
    assert {"command", "date", "machine", "settings", "rows", "notes", "complete"} <= set(content)
    for row in content["rows"]:
        assert {"section", "case", "engine"} <= set(row)
        assert all(v is None or isinstance(v, str | int | float) for v in row.values()), row


def test_a_run_from_the_command_to_the_file(tmp_path, capsys):
    """Ceilings and decode steps, each in its process, and transformers beside them."""
    output = tmp_path / "new" / "gpu.json"
    names = ["decode"]
    has_torch = importlib.util.find_spec("torch") is not None
    if has_torch:
        names += ["transformers", "batching"]
    traces = tmp_path / "traces"
    command.main(["--toy", "--sections", *names, "--output", str(output), "--profile", str(traces)])
    content = json.loads(output.read_text())
    check(content)
    assert content["complete"], content["notes"]
    rows = {(r["section"], r["case"]): r for r in content["rows"]}
    for batch in scales.TOY.batches:
        row = rows["decode", f"batch {batch}"]
        assert row["output_tok_s"] == pytest.approx(batch / row["step_s"])
        assert row["compiles_while_measured"] == 0 and row["bucket"] == f"decode {batch}"
        assert row["mbu_measured"] > 0 and row["mbu_nominal"] is None  # no maker's figure for a CPU
        assert abs(row["context"] - scales.TOY.context) <= 8
        found = rows["decode", f"batch {batch}, traced"]
        assert found["trace_steps"] >= 3 and found["device_busy_s"] > 0, found
        assert list(traces.rglob("*.xplane.pb"))
        if has_torch:
            asked = rows["batching", f"batch {batch}"]
            assert asked["num_tokens"] == batch * 2 * scales.TOY.peer_tokens
            assert ("transformers", f"batch {batch}") in rows
    assert "compiles while measured: 0" in capsys.readouterr().out


def test_prompts_and_the_stream(ctx):
    rows = [*ours.prefill(ctx), *stream.throughput(ctx)]
    assert not [row for row in rows if "left_out" in row]
    by_case = {row["case"]: row for row in rows}
    for count, length in scales.TOY.prefills:
        row = by_case[f"{count} x {length}"]
        assert row["prefill_tok_s"] == pytest.approx(count * length / row["ttft_p50_s"])
    # Only a lot that is a whole step can be told apart when all wait.
    assert "2 x 32, back to back" in by_case and "1 x 32, back to back" not in by_case
    row = by_case["24 in, 24 out, 8 rows"]
    assert row["compiles_while_measured"] == 0
    # As many tokens go in as come out, in rows that are half through on average.
    assert 0.7 < row["prompt_tok_s"] / row["output_tok_s"] < 1.4
    assert row["rows"] > 6 and 24 < row["context"] < 48
    assert row["output_tok_s_low"] <= row["output_tok_s"] <= row["output_tok_s_high"]


def test_first_and_second_start_and_the_job(ctx):
    cold = {row["case"]: row for row in ours.cold(ctx)}
    warm = {row["case"]: row for row in ours.warm(ctx)}
    assert cold["cold programs"]["programs"] == warm["warm programs"]["programs"] == 4
    # In one process: what is compiled besides the programs is not compiled again.
    before = cold["cold programs"]["cache_hits"]
    assert warm["warm programs"]["cache_hits"] - before >= 4
    assert cold["cold start"]["num_tokens"] == 1
    rows = list(ours.default(ctx))
    job = next(row for row in rows if row["case"] == "8 x 8 in, 8 out")
    assert job["compiles_while_measured"] == 0 and job["output_tok_s"] > 0


def test_what_there_is_no_time_for_is_told(ctx):
    late = replace(ctx, deadline=time.monotonic() - 1)
    with pytest.raises(OutOfTime):
        list(ours.decode(late))
    arguments = ["--child", "--toy", "--sections", "decode", "--seconds", "0", "--begun", "0"]
    arguments += ["--work", str(ctx.model.parent), "--ceilings", "{}"]
    found = []
    problem = sections.run([sys.executable, "-m", "benchmarks.gpu", *arguments], 100, found.append)
    assert problem is None
    assert found == [{"left_out": "decode: the rest, no time"}]


def test_a_section_that_fails_says_why(tmp_path, capsys):
    """No model where it should be."""
    arguments = ["--child", "--toy", "--sections", "prefill", "--seconds", "60", "--begun", "0"]
    args = command._parser().parse_args([*arguments, "--work", str(tmp_path), "--ceilings", "{}"])
    assert child.main(args) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["failed"].startswith("prefill: ConfigError: model ")


def test_one_that_hangs_is_killed_with_what_it_started():
    code = (
        "import subprocess, sys, time\n"
        "print('{\"a\": 1}', flush=True)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('hanging', flush=True)\n"
        "time.sleep(60)\n"
    )
    found, begun = [], time.monotonic()
    problem = sections.run([sys.executable, "-c", code], 2.0, found.append)
    assert time.monotonic() - begun < 20  # the grandchild holds the pipe, and is killed too
    assert found == [{"a": 1}]
    assert problem == "killed after 2 s: hanging"


def test_one_that_dies_leaves_its_last_words():
    code = "print('{not JSON'); raise SystemExit('the device is gone')"
    problem = sections.run([sys.executable, "-c", code], 30, lambda row: None)
    assert problem == "exit status 1: {not JSON | the device is gone" or (
        problem == "exit status 1: the device is gone | {not JSON"
    )


def test_time_is_shared_by_what_is_left():
    budgets = {"a": 10.0, "b": 20.0, "c": 30.0}
    names = list(budgets)
    assert sections.share(budgets, names, 0, 60.0) == 10.0
    assert sections.share(budgets, names, 0, 100.0) == 50.0  # what is spare
    assert sections.share(budgets, names, 1, 25.0) == 20.0  # the later ones go short
    assert sections.share(budgets, names, 2, 5.0) == 5.0


@pytest.fixture
def fake(monkeypatch):
    """Sections that say what they are told to, in no process."""
    said = {"ceilings": [CEILINGS]}

    def run(arguments, seconds, take, *, env):
        for row in said.get(arguments[arguments.index("--sections") + 1], []):
            take(row)

    monkeypatch.setattr(sections, "run", run)
    return said


def run_toy(tmp_path, *arguments):
    path = tmp_path / "gpu.json"
    try:
        command.main(["--toy", "--output", str(path), *arguments])
    finally:
        content = json.loads(path.read_text())
        check(content)
    return content


def test_too_little_memory_ends_the_run_and_keeps_the_rows(tmp_path, fake):
    fake["ceilings"] = [{**CEILINGS, "memory_bytes": 1000}]
    with pytest.raises(
        BenchmarkError, match=r"needs about 0 GiB .* run it on one with more memory"
    ):
        run_toy(tmp_path)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert len(content["rows"]) == 1 and not content["complete"]


def test_a_compile_while_measuring_is_said_loudly(tmp_path, fake, capsys):
    row = {"section": "decode", "case": "batch 1", "engine": "jaxinfer", "step_s": 1.0}
    fake["decode"] = [{**row, "compiles_while_measured": 2}]
    with pytest.raises(SystemExit) as ended:
        run_toy(tmp_path)
    assert ended.value.code == 1
    assert "2 PROGRAMS WERE COMPILED" in capsys.readouterr().err


def test_a_failed_section_does_not_stop_the_others(tmp_path, fake):
    row = {"section": "prefill", "case": "1 x 32", "engine": "jaxinfer", "ttft_p50_s": 1.0}
    fake["decode"] = [{"failed": "decode: RuntimeError: no"}]
    fake["prefill"] = [row, {"left_out": "the rest"}]
    with pytest.raises(SystemExit) as ended:
        run_toy(tmp_path)
    assert ended.value.code == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["rows"][-1] == row
    assert content["notes"] == ["failed: decode: RuntimeError: no", "left out: the rest"]


def test_without_time_every_section_is_noted(tmp_path, fake):
    content = run_toy(tmp_path, "--seconds", "1")
    assert content["notes"] == [f"left out: {name}: no time" for name in command.BUDGETS]


def test_warm_needs_cold_and_all_need_ceilings():
    assert command._names(["warm"]) == ["ceilings", "cold", "warm"]
    assert command._names([]) == list(command.BUDGETS)
    assert command.SECONDS < 540 - 15  # what is left is for the start and the end of the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "nothing", "decode"], "unknown: nothing; sections: ceilings, cold"),
        ([], "this needs a GPU, and jax finds 'cpu' only; run it on .* --toy"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, message, monkeypatch):
    monkeypatch.setattr(machine, "device", lambda: ("cpu", "cpu"))
    with pytest.raises(BenchmarkError, match=message):
        command.main(arguments)


def test_an_unwritable_output_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match=r"cannot be written .* name another with --output"):
        command.main(["--toy", "--output", str(tmp_path / "file" / "gpu.json")])


def test_limits_of_the_model_on_its_chip():
    """Llama-3.1-8B at 1024 positions: the figures that public arithmetic gives for an H200."""
    decoder, chip = scales.FULL.decoder, roofline.NOMINAL["NVIDIA H200"]
    assert decoder.block_weights == 6_979_321_856 and decoder.head_weights == 525_336_576
    assert decoder.bytes_per_token == 131_072
    times = [decoder.decode(batch, 1024).seconds(chip) * 1e3 for batch in (1, 64, 256)]
    assert times == pytest.approx([3.155, 4.917, 11.04], rel=1e-3)
    flops = [decoder.prefill(1, tokens).flops / 1e12 for tokens in (1024, 8192)]
    assert flops == pytest.approx([14.57, 131.9], rel=1e-3)
    reached = roofline.shares(decoder.decode(1, 1024), 2 * times[0] / 1e3, chip, "x")
    assert reached["mbu_x"] == reached["roofline_share_x"] == pytest.approx(0.5, abs=1e-3)
    assert roofline.shares(decoder.decode(1, 1), 1.0, None, "x")["mfu_x"] is None


def test_the_full_size_fits_and_its_steps_have_buckets():
    full = scales.FULL
    buckets = Buckets.make(full.engine["max_num_seqs"], full.engine["max_num_batched_tokens"])
    made = type("", (), {"builder": type("", (), {"buckets": buckets})})
    llm = type("", (), {"engine": type("", (), {"runner": made})})
    for need, bucket in zip(full.needs[:2], buckets_for(llm, full.needs[:2]), strict=True):
        assert bucket.num_tokens >= need[0] and bucket.decode_only == (need[0] == need[1])
    assert full.memory_bytes() < 0.92 * 139 * 2**30
    pages = full.stream.rows * -(-(full.stream.inputs + full.stream.outputs) // 64)
    assert pages <= full.engine["num_pages"]
    assert max(t for _, t in full.prefills) < full.engine["max_model_len"]


def test_the_steady_part_of_a_job_by_its_time_stamps():
    stamps = [[0.0, 1.0, 2.0, 3.0], [1.5, 2.5, 3.5]]
    found = peer._steady(stamps)  # from 1.5, when the second has begun, to 3, when the first ends
    assert found["steady_tokens"] == 3 and found["output_tok_s"] == pytest.approx(2.0)
    assert found["step_s"] == pytest.approx(1.0) and found["fill_s"] == 1.5
    assert peer._steady([[0.0, 1.0], [2.0, 3.0]])["step_s"] is None


def test_every_requirement_has_a_version():
    lines = [x for x in REQUIREMENTS.read_text().splitlines() if not x.startswith("#")]
    assert lines and all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)
