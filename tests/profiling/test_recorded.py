"""A trace of the engine, recorded and read back through the command line."""

import gzip
import json
import math

import jax
import pytest

from jaxinfer import cli
from jaxinfer.errors import ConfigError
from jaxinfer.profiling import reader, record
from jaxinfer.profiling.analysis import Profile, analyse
from tests.helpers import greedy, tiny_llm
from tests.profiling.conftest import OPTIONS, PROMPTS
from tests.profiling.xspace import Event, Plane, covered, write


@pytest.fixture(scope="module")
def found(recording) -> Profile:
    return analyse(reader.load(recording.folder))


def report(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["profile", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generation_is_as_without_a_trace(recording, tiny):
    with tiny_llm(tiny, max_num_seqs=4, max_num_batched_tokens=32) as llm:
        outputs = llm.generate(PROMPTS, greedy(max_tokens=9))
    assert [r["outputs"][0]["token_ids"] for r in recording.output] == [
        list(o.outputs[0].token_ids) for o in outputs
    ]


def test_steps_are_the_engines(found, recording):
    assert found.num_steps == len(recording.steps)
    assert found.num_cut == 0
    counts = {label: len(spread.values) for label, spread in found.steps.items()}
    engine: dict[str, int] = {}
    for step in recording.steps:
        engine[step.bucket] = engine.get(step.bucket, 0) + 1
    assert counts == engine
    assert len(counts) >= 2  # prefill and decode
    for phase in ("build", "dispatch", "wait", "collect"):
        assert len(found.phases[phase].values) == len(recording.steps)


def test_host_time_is_what_the_engine_measured(found, recording):
    for phase in ("plan", "build", "dispatch", "collect"):
        engine = sum(getattr(step, f"{phase}_seconds") for step in recording.steps)
        assert found.phases[phase].total == pytest.approx(engine, rel=0.5, abs=2e-3)


def test_totals_agree(found):
    operations = found.trace.operations
    busy = covered((op.start, op.end) for op in operations)
    for parts in (found.scopes, found.operations):
        assert sum(p.time for p in parts) == pytest.approx(busy, rel=1e-6)
        assert sum(p.count for p in parts) == len(operations)
    steps = sum(spread.total for spread in found.steps.values())
    assert 0 < busy <= steps * 1.01
    assert found.busy + found.inside.total == pytest.approx(steps, rel=0.02)


def test_time_has_scopes(found):
    scopes = {"/".join(part.scope) for part in found.scopes}
    for name in ("mlp/up", "mlp/gate", "mlp/down", "attn/qkv", "attn/out", "attn/kv_write"):
        assert f"Decoder/layers/{name}" in scopes
    assert any(s.startswith("Decoder/layers/attn/attention/paged_decode") for s in scopes)
    assert any(s.startswith("Decoder/layers/attn/attention/paged_prefill") for s in scopes)
    assert any(s.startswith("sampler") for s in scopes)
    assert "logits" in scopes
    nameless = sum(part.time for part in found.scopes if not part.scope)
    assert nameless <= 0.02 * found.busy


def test_nothing_was_compiled_while_it_was_recorded(found, recording):
    assert found.trace.compiles == []
    assert recording.num_compiles == 0


def test_the_trace_opens_elsewhere(recording):
    """XProf reads the .xplane.pb in this place; Perfetto the JSON, which must have no metadata."""
    folder = reader.newest(recording.folder).parent
    assert folder.parent.parts[-2:] == ("plugins", "profile")
    events = json.loads(gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes()))
    assert "metadata" not in events
    names = {event.get("name") for event in events["traceEvents"]}
    assert {"step", "plan", "build", "dispatch", "wait", "collect"} <= names
    assert list(folder.glob("*.trace.json.gz"))


def test_the_timeline_has_every_step(recording):
    events = json.loads(recording.timeline.read_text())["traceEvents"]
    on_device = [e for e in events if e["ph"] == "X" and e["tid"] == 1]
    assert [e["name"] for e in on_device] == [step.bucket for step in recording.steps]
    rows = [e["args"]["value"] for e in events if e["ph"] == "C" and e["name"].startswith("rows")]
    assert rows == [step.num_rows for step in recording.steps]
    assert max(rows) == len(PROMPTS)


# -- jaxinfer profile


def test_the_report(recording, capsys, found):
    status, out, err = report(capsys, str(recording.folder), "--top", "3")
    assert (status, err) == (0, "")
    assert f"{found.num_steps}" in out
    for word in ("time by scope", "host gap", "compiles: none", "top 3 operations", "paged_decode"):
        assert word in out
    listed = out.split("top 3 operations")[1].split("\n\n")[0].splitlines()
    assert len(listed) == 2 + 3


def test_the_document(recording, capsys, found):
    status, out, _ = report(capsys, str(recording.folder), "--json")
    document = json.loads(out)
    assert (status, document["schema"], document["platform"]) == (0, 1, "cpu")
    assert document["steps"]["count"] == found.num_steps
    assert math.isclose(sum(s["share"] for s in document["scopes"]), 1, rel_tol=1e-6)
    assert math.isclose(sum(s["time_s"] for s in document["scopes"]), document["device"]["busy_s"])
    assert [h["phase"] for h in document["host"]] == [
        "plan",
        "propose",
        "build",
        "dispatch",
        "wait",
        "collect",
    ]
    assert {"count", "total_s", "share", "p50_s", "p99_s"} <= document["host_gap"].keys()
    assert document["compiles"] == []
    assert all(isinstance(note, str) for note in document["notes"])


def test_one_bucket(recording, capsys, found):
    status, out, _ = report(capsys, str(recording.folder), "--json", "--bucket", "decode 4")
    document = json.loads(out)
    assert status == 0
    assert [b["bucket"] for b in document["steps"]["by_bucket"]] == ["decode 4"]
    assert not any("paged_prefill" in s["scope"] for s in document["scopes"])
    assert 0 < document["device"]["busy_s"] < found.busy
    status, _, err = report(capsys, str(recording.folder), "--bucket", "decode 3")
    assert status == 2
    assert "'decode 3'" in err
    assert "'decode 4'" in err


def test_what_is_no_trace(tmp_path, capsys, recording):
    whole = reader.newest(recording.folder).read_bytes()
    (tmp_path / "cut.xplane.pb").write_bytes(whole[: len(whole) * 2 // 3])
    write(tmp_path / "host", [Plane("/host:CPU", {"python": [Event("plan", 1, 2)]})])
    for name, what in (
        ("missing", "does not exist"),
        ("cut.xplane.pb", "not a whole trace"),
        ("host", "no operation of a device"),
    ):
        status, out, err = report(capsys, str(tmp_path / name))
        assert (status, out) == (2, "")
        assert what in err
    (tmp_path / "none").mkdir()
    status, _, err = report(capsys, str(tmp_path / "none"))
    assert status == 2
    assert "holds no trace" in err


@pytest.mark.parametrize("top", ["0", "-3"])
def test_top_must_be_positive(tmp_path, capsys, top):
    status, _, err = report(capsys, str(tmp_path), f"--top={top}")
    assert status == 2
    assert f"at least 1; got {top}" in err


# -- errors before the work starts


@pytest.mark.parametrize(
    ("flag", "name", "what"),
    [
        ("--profile", "file/trace", "name a writable folder"),
        ("--profile", "", "name a writable folder"),
        ("--timeline", "missing/t.json", "name another file"),
        ("--timeline", "t.txt", "must end in .json or .png"),
    ],
)
def test_an_unusable_path_is_found_first(tiny, tmp_path, capsys, monkeypatch, flag, name, what):
    (tmp_path / "file").write_text("")
    (tmp_path / "plugins").write_text("")

    def never(**_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli, "LLM", never)
    arguments = ["generate", "x", "--model", str(tiny), *OPTIONS, flag, str(tmp_path / name)]
    assert cli.main(arguments) == 2
    assert what in capsys.readouterr().err


# -- in Python


def test_compiles_and_idle_time_are_in_the_trace(tiny, tmp_path, true_names):
    """A cold engine under the trace; between two calls it has nothing to do, which is no gap."""
    with tiny_llm(tiny, max_num_seqs=4, max_num_batched_tokens=32) as llm:
        with record.trace(tmp_path):
            llm.generate("one", greedy(max_tokens=3))
            llm.generate("two", greedy(max_tokens=3))
        num_steps = llm.engine.metrics.num_steps
        compiled = set(map(str, llm.engine.runner._programs))
    trace = reader.load(tmp_path)
    assert {c.program for c in trace.compiles} == compiled
    assert all(c.seconds > 0 for c in trace.compiles)
    found = analyse(trace)
    assert found.num_steps == num_steps
    assert len(found.between.values) == num_steps - 2


def test_write_timeline(tiny, tmp_path):
    with tiny_llm(tiny, max_num_seqs=4, max_num_batched_tokens=32) as llm:
        prompt = list(range(40, 60))
        for _ in range(2):
            llm.generate(prompt, greedy(max_tokens=2))
        llm.write_timeline(tmp_path / "t.json")
        steps = list(llm.engine.metrics.steps)
        hits = llm.get_metrics()["num_prefix_hits"]
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    cached = [e["args"]["value"] for e in events if e["ph"] == "C" and "prefix" in e["name"]]
    assert sum(cached) == hits > 0
    assert all(step.finished is not None and step.finished > step.begun for step in steps)


def test_preemptions_are_on_the_timeline(tiny, tmp_path):
    """Two sequences that do not fit together: one gives way."""
    with tiny_llm(tiny, max_num_seqs=2, max_num_batched_tokens=32, num_pages=8) as llm:
        llm.generate([list(range(40, 56)), list(range(60, 76))], greedy(max_tokens=30))
        total = llm.get_metrics()["num_preemptions"]
        assert total > 0
        assert sum(step.num_preemptions for step in llm.engine.metrics.steps) == total


def test_a_trace_that_cannot_be_written(tmp_path, monkeypatch):
    real = jax.profiler.stop_trace

    def fails():
        real()
        raise RuntimeError("RESOURCE_EXHAUSTED: no space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", fails)
    with pytest.raises(ConfigError, match="is the disk full"), record.trace(tmp_path):
        pass


def test_no_folder_no_trace(tiny, tmp_path):
    with record.trace(None):
        pass
    assert not list(tmp_path.iterdir())
