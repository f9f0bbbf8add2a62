"""Starting: programs come from the compile cache or early, and files are not memory of arrays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.buckets import Bucket
from jaxinfer.runner import Runner
from jaxinfer.weights import memory
from tests.helpers import assert_no_leak, tiny_llm

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

START = """
import json, sys
from pathlib import Path
from jaxinfer import SamplingParams
from tests.helpers import tiny_llm

def counts():
    metrics = llm.get_metrics()
    return metrics["num_compiles"], metrics["num_compile_cache_hits"]

llm = tiny_llm(Path(sys.argv[1]), compilation_cache_dir=sys.argv[2], max_num_seqs=2,
               max_num_batched_tokens=32, first_prompts="hello there")
params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={3: -2.0})
answer = llm.generate("hello there", params)
lazy = counts()
llm.warmup()
warm = counts()
programs = llm.engine.runner.num_programs
tokens = answer[0].outputs[0].token_ids
print(json.dumps({"lazy": lazy, "warm": warm, "programs": programs, "tokens": tokens}))
"""


def python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_process_compiles_nothing_and_a_damaged_cache_stops_nobody(tiny, tmp_path):
    cache = tmp_path / "cache"
    first = json.loads(python(START, tiny, cache))
    assert first["warm"][1] == 0
    assert first["warm"][0] >= first["programs"]
    second = json.loads(python(START, tiny, cache))
    for when in ("lazy", "warm"):  # every compile of the process is a hit
        compiles, hits = second[when]
        assert compiles == hits == first[when][0]
    assert second["tokens"] == first["tokens"]

    entries = sorted(cache.glob("*-cache"))
    assert len(entries) >= first["programs"]
    for number, entry in enumerate(entries):
        content = entry.read_bytes()
        wrong = (content[: len(content) // 2], b"", bytes(len(content)), b"garbage" * 100)
        entry.write_bytes(wrong[number % len(wrong)])
    third = json.loads(python(START, tiny, cache))
    assert third["warm"] == [first["warm"][0], 0]
    assert third["tokens"] == first["tokens"]


def test_importing_is_frugal_and_leaves_the_collector_as_it_was():
    code = """
import gc, json, sys
if sys.argv[1] == "off":
    gc.disable()
import jaxinfer.cli
heavy = {"torch", "transformers", "huggingface_hub.hf_api", "orbax.checkpoint", "matplotlib"}
print(json.dumps([gc.isenabled(), sorted(heavy & set(sys.modules))]))
"""
    assert json.loads(python(code, "on")) == [True, []]
    assert json.loads(python(code, "off")) == [False, []]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Bucket]:
    """The buckets whose programs are compiled, in order."""
    seen: list[Bucket] = []
    original = Runner._lower

    def lower(self: Runner, bucket: Bucket):
        seen.append(bucket)
        return original(self, bucket)

    monkeypatch.setattr(Runner, "_lower", lower)
    return seen


OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 64}


@pytest.mark.parametrize(
    "prompts, expected",
    [
        ("hello", [(32, 4), (1, 1)]),
        ([1, 2, 3], [(32, 4), (1, 1)]),
        ([7], [(1, 1), (1, 1)]),
        ([[1] * 40], [(64, 4), (1, 1)]),
        ([[1] * 200, [2] * 3], [(64, 4), (1, 1)]),  # the first fills the step
        ([[1] * 10, [2] * 3, {"prompt_token_ids": [5]}], [(32, 4), (4, 4)]),
        ([[1, 2], "", [10**9], 3.5], [(32, 4), (1, 1)]),  # the last three are refused when asked
        ([], []),
        ([[10**9]], []),
    ],
)
def test_the_programs_of_the_first_prompts_are_compiled_early(tiny, compiled, prompts, expected):
    with tiny_llm(tiny, first_prompts=prompts, **OPTIONS) as llm:
        early = [(b.num_tokens, b.num_rows) for b in compiled]
        assert early == list(dict.fromkeys(expected))
        asked = [p for p in ([prompts] if isinstance(prompts, str) else prompts)]
        if asked and expected:
            llm.generate(prompts, GREEDY)
            used = {step.bucket for step in llm.engine.metrics.steps}
            assert {str(bucket) for bucket in compiled[: len(early)]} <= used | {"decode 1"}
        llm.warmup()
        assert len(compiled) == len(set(compiled)) == len(llm.engine.runner.buckets)
        assert_no_leak(llm)


def test_first_prompts_change_no_token(tiny):
    drawn = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)  # no seed of its own
    with tiny_llm(tiny, **OPTIONS) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(["one", "two"], drawn)]
    with tiny_llm(tiny, first_prompts=["one", "two"], **OPTIONS) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(["one", "two"], drawn)] == expected


def test_a_fault_in_the_background_reaches_who_needs_the_program(tiny, monkeypatch):
    def finish(self: Runner, bucket: Bucket, lowered: object):
        raise RuntimeError("no room for the program")

    monkeypatch.setattr(Runner, "_finish", finish)
    with (
        tiny_llm(tiny, first_prompts="hello", **OPTIONS) as llm,
        pytest.raises(Exception, match="no room for the program"),
    ):
        llm.generate("hello", GREEDY)


def test_an_array_on_the_device_does_not_change_with_its_file(tmp_path):
    path = tmp_path / "weights"
    np.arange(4096, dtype=np.float32).tofile(path)
    mapped = np.memmap(path, np.float32, "r+")
    view = np.asarray(mapped)[1024:2048].reshape(32, 32)
    kept = jax.device_put(memory.owned(view))
    before = np.array(kept)
    mapped[:] = -1
    np.testing.assert_array_equal(np.asarray(kept), before)


def test_own_memory_is_not_copied():
    for dtype in ("float32", "bfloat16", "float16"):
        array = memory.aligned(1000, jax.numpy.dtype(dtype))
        assert array.shape == (1000,) and array.dtype == dtype
        assert array.ctypes.data % memory.ALIGNMENT == 0
        view = array[:992].reshape(31, 32)
        assert memory.owned(view) is view and memory.owned(view.T) is not None
