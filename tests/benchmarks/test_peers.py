"""The benchmark of the engines at toy size: that it runs, what it writes, and how it fails."""

import importlib.util
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers.engines import ENTRIES, HERE, MODULES
from benchmarks.peers.workers import Worker, WorkerError

ROOT = Path(__file__).resolve().parent.parent.parent

FAKE = '''#!{python}
"""An engine for tests: counts upwards; {behaviour} is what it does wrong."""
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks.peers.protocol import Engine, serve

class Fake(Engine):
    settings = {{"fake": True}}
    rounds = 0

    def run(self, asks, clock):
        self.rounds += 1
        print("engines print on standard output")
        if {behaviour!r} == "crash" and self.rounds == 2:
            raise MemoryError("no memory for the second run")
        if {behaviour!r} == "hang" and self.rounds == 2:
            time.sleep(100)
        if {behaviour!r} == "stick" and self.rounds == 4:
            time.sleep(100)
        for i, ask in enumerate(asks):
            for token in range(ask["max_tokens"] - ({behaviour!r} == "short")):
                clock.add(i, [token], clock.now())

serve(lambda setup: (Fake(), {{"fake": "1"}}))
'''


def fake_python(folder: Path, behaviour: str = "") -> Path:
    """A "Python" that runs the fake engine whatever module it is asked for."""
    path = folder / f"fake-{behaviour}"
    path.write_text(FAKE.format(python=sys.executable, root=str(ROOT), behaviour=behaviour))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def peers(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def only_fakes(folder: Path, **behaviours: str) -> list[str]:
    """Options that make every engine of these environments a fake one."""
    options = []
    for environment, behaviour in behaviours.items():
        options += ["--python", f"{environment}={fake_python(folder, behaviour)}"]
    return options


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """One toy run of everything that a toy can run: (folder, process, result)."""
    folder = tmp_path_factory.mktemp("peers")
    options = ["--toy", "--repeats", "2", "--output", str(folder / "peers.json")]
    options += ["--chart", str(folder / "chart.png"), "--profile", str(folder / "trace")]
    names = ["fixed-1", "chat"]
    if importlib.util.find_spec("torch") is None:  # its place is taken by a fake engine
        options += only_fakes(folder, transformers="")
    done = peers(*options, "--workloads", *names)
    assert done.returncode == 0, done.stderr
    return folder, done, json.loads((folder / "peers.json").read_text())


def test_a_toy_run_has_a_row_for_every_engine_and_workload(toy_run):
    _, _, result = toy_run
    assert result["schema"] == 1
    assert result["benchmark"] == "peers"
    assert result["complete"] is True
    assert result["settings"]["engines"] == ["jaxinfer-float32", "transformers-float32"]
    assert set(result["settings"]["ceilings"]) >= {"bytes_s", "float32", "by"}
    rows = [row for row in result["rows"] if row["kind"] == "engine"]
    found = {(row["workload"], row["engine"]) for row in rows}
    assert found == {
        (workload, engine)
        for workload in ("fixed-1", "chat")
        for engine in ("jaxinfer-float32", "transformers-float32")
    }
    for row in rows:
        assert row["repeats"] == 2
        assert row["tokens"] > 0
        assert 0 < row["output_tok_s_low"] <= row["output_tok_s"] <= row["output_tok_s_high"]
        for name in ("ttft", "itl", "tpot"):
            percentiles = [row[f"{name}_p{p}_s"] for p in (50, 90, 99)]
            assert 0 < percentiles[0] <= percentiles[1] <= percentiles[2]
        assert 0 < row["roofline_share"] < 1
        assert row["ceiling_bytes_s"] > 1e8
        assert row["start_s"] > 0
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 10e6
        assert row["versions"]["python"]


def test_all_engines_make_the_same_number_of_tokens_and_the_same_tokens(toy_run):
    _, _, result = toy_run
    for name in ("fixed-1", "chat"):
        rows = [r for r in result["rows"] if r["kind"] == "engine" and r["workload"] == name]
        assert len({(row["tokens"], row["prompt_tokens"]) for row in rows}) == 1
        assert {row["agree_requests"] for row in rows} == {1.0} or not has_torch()
        assert {row["agree_tokens"] for row in rows} == {1.0} or not has_torch()


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def test_prefixes_are_cached_in_chat_alone(toy_run):
    _, _, result = toy_run
    rows = [row for row in result["rows"] if row["kind"] == "engine"]
    ours = {row["workload"]: row for row in rows if row["engine"] == "jaxinfer-float32"}
    assert ours["fixed-1"]["cached_tokens"] == 0
    # 40 tokens of system prompt are two whole pages of 16, for the second turn of both
    assert ours["chat"]["cached_tokens"] >= 2 * 32


def test_no_compiles_after_warm_up_and_it_is_said(toy_run):
    _, done, result = toy_run
    for row in result["rows"]:
        if row["kind"] == "engine" and row["engine"].startswith("jaxinfer"):
            assert row["compiles_after_warmup"] == 0
            assert row["compile_s"] > 0
            assert row["start_s"] > row["compile_s"]
    assert "fixed-1, jaxinfer-float32: 0 compiles after warm-up" in done.stderr


def test_ratios_are_of_pairs_and_printed(toy_run):
    _, done, result = toy_run
    ratios = [row for row in result["rows"] if row["kind"] == "ratio"]
    assert [row["workload"] for row in ratios] == ["fixed-1", "chat"]
    for row in ratios:
        assert (row["engine"], row["peer"]) == ("jaxinfer-float32", "transformers-float32")
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert "jaxinfer / peer" in done.stdout
    assert "| fixed-1 " in done.stdout


def test_the_chart_is_a_png(toy_run):
    folder, _, _ = toy_run
    data = (folder / "chart.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 600
    assert height >= 400


def test_the_trace_is_written(toy_run):
    folder, _, _ = toy_run
    traces = list((folder / "trace" / "fixed-1" / "jaxinfer-float32").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000


# -- how it fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "limit"),
    [("crash", "short", []), ("", "hang", ["--timeout", "8"])],
)
def test_broken_peers_are_reported_and_the_others_go_on(tmp_path, one, other, limit):
    messages = {
        "crash": "MemoryError: no memory for the second run",
        "short": "made 5 tokens for request 0, which asked for 6",
        "hang": "did not answer 'run' within 8 s",
    }
    output = tmp_path / "peers.json"
    done = peers(
        "--toy", "--repeats", "2", "--workloads", "fixed-4", "--output", str(output), "--no-chart",
        "--engines", "jaxinfer-float32", "transformers-float32", "vllm-float32",
        *only_fakes(tmp_path, jaxinfer="", transformers=one, vllm=other), *limit,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    rows = json.loads(output.read_text())["rows"]
    errors = {row["engine"]: row["error"] for row in rows if row["kind"] == "error"}
    broken = {"transformers-float32": one, "vllm-float32": other}
    assert set(errors) == {engine for engine, behaviour in broken.items() if behaviour}
    for engine, error in errors.items():
        assert messages[broken[engine]] in error
        assert messages[broken[engine]] in done.stderr
    good = [(row["engine"], row["repeats"]) for row in rows if row["kind"] == "engine"]
    assert ("jaxinfer-float32", 2) in good
    assert len(good) == 3 - len(errors)
    assert "failed" in done.stdout
    assert not list(tmp_path.glob("*.png"))


def test_a_peer_that_is_not_there_is_reported_and_a_part_is_merged(tmp_path):
    output = tmp_path / "peers.json"
    fakes = only_fakes(tmp_path, jaxinfer="")
    first = ["--toy", "--workloads", "chat", "--output", str(output), "--repeats", "1"]
    done = peers(*first, "--engines", "jaxinfer-float32", *fakes)
    assert done.returncode == 0, done.stderr
    done = peers(
        "--toy", "--repeats", "1", "--workloads", "fixed-1", "--output", str(output), "--merge",
        "--engines", "jaxinfer-float32", "vllm-float32", "transformers-float32",
        *fakes, "--python", "transformers=/nonexistent/python",
        "--cache", str(tmp_path / "cache"), "--no-install",
    )  # fmt: skip
    assert done.returncode == 1
    result = json.loads(output.read_text())
    errors = {row["engine"]: row["error"] for row in result["rows"] if row["kind"] == "error"}
    assert "/nonexistent/python is not a program" in errors["transformers-float32"]
    assert "vllm is not installed in" in errors["vllm-float32"]
    assert "--python vllm=PATH" in errors["vllm-float32"]
    good = [(r["workload"], r["engine"]) for r in result["rows"] if r["kind"] == "engine"]
    assert good == [("fixed-1", "jaxinfer-float32"), ("chat", "jaxinfer-float32")]
    assert "from earlier runs: chat" in result["notes"][-1]
    assert result["complete"] is True
    again = peers(*first[:-1], "3", "--merge", *fakes)
    assert again.returncode == 2
    assert "has repeats 1, now it is 3" in again.stderr
    assert json.loads(output.read_text()) == result


def test_a_failed_installation_is_reported(tmp_path):
    output = tmp_path / "peers.json"
    variables = {**os.environ, "PYTHON": "/nonexistent/python"}
    command = [
        sys.executable, "-m", "benchmarks.peers", "--toy", "--repeats", "1", "--workloads",
        "fixed-1", "--output", str(output), "--engines", "vllm-float32",
        "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    (row,) = json.loads(output.read_text())["rows"]
    assert row["kind"] == "error"
    assert "install.sh vllm failed" in row["error"]
    assert "/nonexistent/python" in row["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "fixed-3"], "no workload 'fixed-3'; there are fixed-1"),
        (["--engines", "vllm"], "no engine 'vllm'; there are jaxinfer-float32"),
        (["--engines", "llama.cpp-q4_1"], "--toy has no GGUF file"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--python", "vllm"], "--python 'vllm' must be NAME=PATH"),
        (["--python", "tgi=/bin/python"], "no environment 'tgi'; there are jaxinfer"),
        (["--output", "/proc/none/peers.json"], "/proc/none/peers.json cannot be written"),
        (["--chart", "/proc/none/chart.png"], "/proc/none/chart.png cannot be written"),
        (["--chart", "x.png", "--workloads", "chat"], "--chart shows the fixed-* workloads"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message):
    done = peers("--toy", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_benchmark_that_is_ended_keeps_its_rows_and_leaves_no_worker(tmp_path, number):
    """Not even a paused one, nor after SIGKILL, which the benchmark cannot know of."""
    python, output, errors = fake_python(tmp_path, "stick"), tmp_path / "peers.json", tmp_path / "e"
    command = [sys.executable, "-m", "benchmarks.peers", "--toy", "--workloads", "fixed-1"]
    command += ["--python", f"jaxinfer={python}", "--python", f"transformers={python}"]
    command += ["--output", str(output), "--repeats", "5"]
    with (
        errors.open("wb") as to,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=to) as process,
    ):
        wait_for(lambda: b"fixed-1 3/5" in errors.read_bytes() and stopped(python))
        assert len(running(python)) == 2
        process.send_signal(number)
    wait_for(lambda: not running(python))
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        result = json.loads(output.read_text())
        assert result["complete"] is False
        assert "fixed-1 was cut short after 2 of 5 repeats" in result["notes"]
        assert [row["repeats"] for row in result["rows"] if row["kind"] == "engine"] == [2, 2]


def running(python: Path) -> list[Path]:
    """Folders in /proc of the processes that run this program."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(python).encode() in (folder / "cmdline").read_bytes().split(b"\0")[1:2]:
                found.append(folder)
        except OSError:
            continue
    return found


def stopped(python: Path) -> bool:
    """Whether one of them is paused."""
    states = [
        (folder / "stat").read_text().rpartition(")")[2].split()[0] for folder in running(python)
    ]
    return "T" in states


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# -- the parts ------------------------------------------------------------------------------------


def test_a_paused_worker_does_not_run_and_goes_on_when_resumed(tmp_path):
    worker = Worker("fake", str(fake_python(tmp_path)), "none", timeout=20)
    try:
        worker.ask({"op": "open", "setup": {}})
        worker.pause()
        ask = {"op": "run", "rounds": [[{"prompt": [1], "max_tokens": 3}]]}
        worker._timeout = 0.5
        worker.resume()
        assert worker.ask(ask)["rounds"][0]["tokens"] == [[0, 1, 2]]
        memory = worker.peak_memory()
        assert memory is None or 1e6 < memory < 1e9
        worker.pause()
        with pytest.raises(WorkerError, match=r"did not answer 'run' within 0\.5 s"):
            worker.ask(ask)
    finally:
        worker.kill()


def test_every_engine_has_an_adapter_and_an_environment():
    installer = (HERE / "install.sh").read_text()
    for entry in ENTRIES.values():
        assert (HERE / f"{entry.module}.py").is_file()
        assert entry.environment == "jaxinfer" or f"    {entry.environment})" in installer
    assert set(MODULES) == {entry.environment for entry in ENTRIES.values()}


def test_the_installer_checks_and_refuses(tmp_path):
    def install(*arguments: str) -> subprocess.CompletedProcess:
        variables = {**os.environ, "JAXINFER_PEERS": str(tmp_path)}
        command = ["bash", str(HERE / "install.sh"), *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

    assert install().returncode == 2
    unknown = install("tgi")
    assert unknown.returncode != 0
    assert "there are: transformers llama.cpp vllm" in unknown.stderr
    assert install("--check", "vllm").returncode == 1
    wanted = "llama-cpp-python==0.3.36 numpy\n"
    python = tmp_path / "llama.cpp" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    (tmp_path / "llama.cpp" / ".installed").write_text(wanted)
    assert install("--check", "llama.cpp").returncode == 0
    again = install("llama.cpp")
    assert again.returncode == 0
    assert "is installed in" in again.stdout
    (tmp_path / "llama.cpp" / ".installed").write_text("older")
    assert install("--check", "llama.cpp").returncode == 1
