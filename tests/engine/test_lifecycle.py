"""Opening and closing: memory comes back, engines side by side, what is said, the compile cache."""

import dataclasses
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxinfer import LLM, ConfigError, kv_cache
from tests.helpers import (
    TINY_CONFIG,
    assert_no_leak,
    greedy,
    tiny_llm,
    tiny_weights,
    write_tiny_model,
)

SMALL = {"max_num_seqs": 1, "max_num_batched_tokens": 32}


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_three_engines_in_turn_give_their_memory_back(tiny):
    base = live_bytes()
    tokens = []
    for _ in range(3):
        with tiny_llm(tiny, **SMALL) as llm:
            tokens.append(llm.generate("in turn", greedy())[0].outputs[0].token_ids)
            taken = live_bytes() - base
            assert taken >= llm.memory_plan.weights + llm.memory_plan.pages
        assert live_bytes() <= base
    assert tokens[0] == tokens[1] == tokens[2]


def test_closing_in_mid_run_gives_everything_back(tiny):
    base = live_bytes()
    llm = tiny_llm(tiny, max_num_seqs=2, max_num_batched_tokens=32)
    stream = llm.stream(["open", "also open", "waiting"], greedy(max_tokens=50))
    next(stream)
    llm.close()
    stream.close()
    assert live_bytes() <= base
    llm.close()


def test_an_error_in_the_block_closes_too(tiny):
    base = live_bytes()
    with pytest.raises(KeyError), tiny_llm(tiny, **SMALL):
        raise KeyError("the user's own")
    assert live_bytes() <= base


def test_two_engines_at_once(tiny, tmp_path):
    other_model = write_tiny_model(tmp_path / "other", weights=tiny_weights(TINY_CONFIG, seed=1))
    with tiny_llm(tiny, **SMALL) as one, tiny_llm(other_model, **SMALL) as other:
        mine = one.stream("both", greedy())
        first = next(mine).outputs[0].token_ids
        theirs = other.generate("both", greedy())[0].outputs[0].token_ids
        ours = first + [t for d in mine for t in d.outputs[0].token_ids]
        assert ours != theirs
        other.close()
        assert one.generate("both", greedy())[0].outputs[0].token_ids == ours
        assert_no_leak(one)


def test_a_failed_start_leaves_nothing(tiny, monkeypatch):
    base = live_bytes()

    def broken(*args, **kwargs):
        raise MemoryError("no room for pages")

    monkeypatch.setattr(kv_cache, "allocate", broken)
    with pytest.raises(MemoryError):
        tiny_llm(tiny, **SMALL)
    assert live_bytes() <= base


# -- what is said ----------------------------------------------------------------------


def test_the_plan_is_printed_before_memory_is_taken(tiny, capsys, monkeypatch):
    printed_before = []
    real = kv_cache.allocate

    def allocate(*args):
        printed_before.append(capsys.readouterr().err)
        return real(*args)

    monkeypatch.setattr(kv_cache, "allocate", allocate)
    with tiny_llm(tiny, verbose=True, **SMALL) as llm:
        pass
    err = printed_before[0] + capsys.readouterr().err
    plan = printed_before[0]
    assert str(llm.memory_plan) in plan
    assert "200 pages of 8 tokens hold 1,600 tokens" in plan
    assert "attention: " in plan
    for bucket in llm.engine.runner.buckets:
        assert str(bucket) in err
    for field in dataclasses.fields(llm.config):
        value = getattr(llm.config, field.name)
        assert re.search(rf"^  {field.name} +{re.escape(str(value))}$", err, re.MULTILINE)


def test_silent_unless_asked(tiny, capfd):
    with tiny_llm(tiny, **SMALL) as llm:
        llm.warmup()
        llm.generate(["a", "b"], greedy())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_bars(tiny, capfd):
    with tiny_llm(tiny, verbose=True, **SMALL) as llm:
        llm.warmup()
        llm.generate(["a", "b"], greedy())
        err = capfd.readouterr().err
        assert re.search(r"loading.*100%", err)
        assert re.search(rf"compiling.*{llm.engine.runner.num_programs}/", err)
        assert re.search(r"generating.*2/2", err)
        assert "programs ready in" in err
        llm.generate("quiet", greedy(), use_tqdm=False)
        assert capfd.readouterr().err == ""


def test_config_has_everything_decided(tiny):
    with LLM(str(tiny), compilation_cache_dir=None, kv_cache_memory_bytes=2**20) as llm:
        config = llm.config
        assert config.model == str(tiny)
        assert (config.page_size, config.max_num_seqs, config.max_num_batched_tokens) == (
            16,
            64,
            512,
        )
        assert config.dtype == "float32"
        assert config.max_model_len == 1024
        assert config.num_pages == llm.memory_plan.num_pages - 1
        assert config.kv_cache_memory_bytes <= 2**20
        assert config.num_pages * 16 >= 1024
        undecided = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) is None}
        assert undecided <= {
            "tokenizer", "hf_overrides", "revision", "chat_template", "compilation_cache_dir",
            "verbose", "quantization", "quantization_group_size", "speculative_config",
        }  # fmt: skip
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.seed = 1  # type: ignore[misc]


def test_few_pages_lower_the_context(tiny):
    with tiny_llm(tiny, num_pages=5, **SMALL) as llm:
        assert llm.config.max_model_len == 40
        assert len(llm.generate([1] * 39, greedy(max_tokens=None))[0].outputs[0].token_ids) == 1


# -- random weights --------------------------------------------------------------------


def test_dummy_weights_need_only_a_config(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    options = {"load_format": "dummy", "skip_tokenizer_init": True, **SMALL}
    runs = []
    for seed in (0, 0, 1):
        with tiny_llm(folder, seed=seed, **options) as llm:
            runs.append(llm.generate([1, 2, 3], greedy())[0].outputs[0].token_ids)
            assert_no_leak(llm)
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(ValueError, match=r"safetensors|weight"):
        tiny_llm(folder, skip_tokenizer_init=True)


# -- the compile cache -----------------------------------------------------------------

START = """
import json, sys
from pathlib import Path
from tests.helpers import tiny_llm
llm = tiny_llm(Path(sys.argv[1]), compilation_cache_dir=sys.argv[2], max_num_seqs=1,
               max_num_batched_tokens=32)
before = llm.get_metrics()
llm.warmup()
after = llm.get_metrics()
names = ("num_compiles", "num_compile_cache_hits")
counts = {name: after[name] - before[name] for name in names}
print(json.dumps({**counts, "programs": llm.engine.runner.num_programs}))
"""


def start(model: Path, cache: Path) -> dict[str, int]:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", START, str(model), str(cache)],
        capture_output=True, text=True, check=True, cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_the_second_start_finds_its_programs(tiny, tmp_path):
    cache = tmp_path / "cache"
    first, second = start(tiny, cache), start(tiny, cache)
    assert first["num_compile_cache_hits"] == 0
    assert any(cache.iterdir())
    assert cache.stat().st_mode & 0o777 == 0o700
    # Every compile of the second start is a hit, the programs' above all.
    assert second["num_compile_cache_hits"] >= second["programs"]
    assert second["num_compile_cache_hits"] == second["num_compiles"]


def test_a_cache_that_others_may_write_is_refused(tiny, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for mode in (0o777, 0o770, 0o720, 0o702):
        cache.chmod(mode)
        with pytest.raises(ConfigError, match=r"writable only by you.*chmod 700"):
            tiny_llm(tiny, compilation_cache_dir=str(cache))
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigError, match="cannot be used"):
        tiny_llm(tiny, compilation_cache_dir=str(file))
    assert jax.config.jax_compilation_cache_dir != str(cache)
    shutil.rmtree(cache)
