"""The timeline of steps: the Chrome trace's schema, the picture, and what cannot be written."""

import builtins
import json
import sys

import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.metrics import StepStats
from jaxinfer.profiling import timeline


def step(begun: float, finished: float | None, **more) -> StepStats:
    fields = {
        "bucket": "decode 8", "num_rows": 3, "num_tokens": 3, "pages_used": 5,
        "plan_seconds": 0.001, "build_seconds": 0.002, "dispatch_seconds": 0.003,
        "wait_seconds": 0.004, "collect_seconds": 0.005,
    }  # fmt: skip
    return StepStats(**{**fields, "begun": begun, "finished": finished, **more})


# The second is dispatched while the first runs; the last has not ended.
STEPS = [
    step(100.0, 100.050, bucket="mixed 32x8", cached_tokens=16, num_tokens=20),
    step(100.020, 100.090, num_preemptions=1, pages_used=9),
    step(100.080, None),
]


def test_steps_on_the_device_do_not_overlap():
    spans = timeline.slices(STEPS)
    assert spans[:2] == [pytest.approx((0.006, 0.050)), pytest.approx((0.050, 0.090))]
    assert spans[2] is None
    assert timeline.slices([]) == []


def test_chrome_trace():
    document = json.loads(json.dumps(timeline.chrome_trace(STEPS)))
    events = document["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "C"}
    for event in events:
        assert {"name", "ph", "pid"} <= event.keys()
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert isinstance(event["tid"], int)
    threads = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    device = [e for e in events if e["ph"] == "X" and e["tid"] == threads["steps on the device"]]
    assert [(e["name"], round(e["ts"]), round(e["dur"])) for e in device] == [
        ("mixed 32x8", 6_000, 44_000), ("decode 8", 50_000, 40_000),
    ]  # fmt: skip
    assert device[0]["args"]["tokens found in the prefix cache"] == 16
    host = [e for e in events if e["ph"] == "X" and e["tid"] == threads["host"]]
    assert [(e["name"], round(e["ts"]), round(e["dur"])) for e in host[:5]] == [
        ("plan", 0, 1000), ("build", 1000, 2000), ("dispatch", 3000, 3000),
        ("wait", 46_000, 4000), ("collect", 50_000, 5000),
    ]  # fmt: skip
    counters = [e for e in events if e["ph"] == "C"]
    assert {e["name"] for e in counters} == set(timeline.COUNTERS)
    pages = [e["args"]["value"] for e in counters if e["name"] == "pages in use"]
    assert pages == [5, 9, 5]


@pytest.mark.parametrize("steps", [STEPS, []])
def test_files(tmp_path, steps):
    timeline.write(tmp_path / "t.json", steps)
    assert "traceEvents" in json.loads((tmp_path / "t.json").read_text())
    pytest.importorskip("matplotlib")
    timeline.write(tmp_path / "t.PNG", steps)
    data = (tmp_path / "t.PNG").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width == 1200
    assert height == 1000


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("t.svg", "must end in .json or .png"),
        ("t", "must end in .json or .png"),
        ("folder.json", "is a folder"),
        ("missing/t.json", "cannot be written"),
        ("file/t.png", "cannot be written"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, what):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=what):
        timeline.write(tmp_path / name, STEPS)


def test_checking_leaves_the_file_as_it_was(tmp_path):
    timeline.check(tmp_path / "new.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.json").write_text("kept")
    timeline.check(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "kept"


def test_without_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    for name in [n for n in sys.modules if n.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(timeline.importlib, "import_module", absent)
    timeline.write(tmp_path / "t.json", STEPS)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        timeline.check(tmp_path / "t.png")
