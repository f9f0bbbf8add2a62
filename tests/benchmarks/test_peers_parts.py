"""The arithmetic of the benchmark of the engines: measures, bounds, workloads."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import machine, workloads
from benchmarks.peers import ceilings, measures, models, roofline
from benchmarks.peers.measures import Run
from benchmarks.roofline import Decoder
from benchmarks.workloads import Ask, Workload


def test_agreement_counts_tokens_before_the_first_difference():
    def run(*tokens: list[int]) -> Run:
        return Run(1.0, list(tokens), [[0.1] * len(t) for t in tokens], None)

    ours = [run([1, 2, 3, 4], [1, 2, 3, 4])]
    theirs = [run([1, 2, 9, 4], [1, 2, 3, 4])]
    found = measures.agreement(ours, theirs)
    assert found == {"agree_tokens": 6 / 8, "agree_requests": 0.5}


def test_latencies_are_those_of_the_requests():
    run = Run(1.0, [[1, 2, 3], [4]], [[0.5, 0.7, 1.0], [0.1]], None)
    found = measures.latencies([run])
    assert found["ttft_p50_s"] == 0.1
    assert found["ttft_p99_s"] == 0.5
    assert found["itl_p50_s"] == pytest.approx(0.2)
    assert found["itl_p99_s"] == pytest.approx(0.3)
    assert found["tpot_p50_s"] == pytest.approx(0.25)


def test_a_ratio_within_the_spread_is_no_difference():
    workload = workloads.fixed(1, 0, vocab=9, inputs=1, outputs=2)

    def runs(*walls: float) -> list[Run]:
        return [Run(wall, [[1, 2]], [[0.1, 0.2]], None) for wall in walls]

    close = measures.ratio(runs(1.0, 1.0, 1.0), runs(0.9, 1.2, 1.3), workload)
    assert (close["ratio"], close["verdict"]) == (pytest.approx(1.2), "no difference")
    assert measures.ratio(runs(1.0, 1.0), runs(1.1, 1.2), workload)["verdict"] == "faster"
    assert measures.ratio(runs(1.3, 1.4), runs(1.1, 1.2), workload)["verdict"] == "slower"


DECODER = Decoder(2, 4, 2, 16, 64, 128, 512, weight_bytes=4, kv_bytes=4)


def test_the_bound_of_decoding_is_bytes_over_bandwidth():
    ceilings = roofline.Ceilings(bytes_s=1e6, flops={"float32": 1e18}, by={})
    workload = Workload("x", "", ((Ask((1,) * 10, 5),),), 1)
    found = roofline.bound_seconds(workload, DECODER, ceilings, "float32")
    weights = 2 * (64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128) + 64 * 512
    kv = 2 * 2 * 2 * 16 * 4
    context = 11 + 12 + 13 + 14  # tokens that each of the four later steps attends to
    assert found == pytest.approx((4 * weights * 4 + context * kv) / 1e6, rel=0.01)
    assert roofline.bound_seconds(workload, DECODER, ceilings, "bfloat16") is None


def test_the_bound_of_prefill_is_products_over_the_peak():
    ceilings = roofline.Ceilings(bytes_s=1e18, flops={"float32": 1e6}, by={})
    workload = Workload("x", "", ((Ask((1,) * 10, 1),),), 1)
    found = roofline.bound_seconds(workload, DECODER, ceilings, "float32")
    flops = 2 * 10 * DECODER.block_weights + 2 * 64 * 512 + 2 * 2 * 4 * 16 * 100
    assert found == pytest.approx(flops / 1e6)


def test_a_step_reads_weights_as_the_engine_keeps_them():
    model = models.Model("x", Path(), DECODER, file_bytes=1000)
    count = DECODER.block_weights + DECODER.head_weights
    read = {"int8": count, "float32": 4 * count, "q4_1": 1000}
    for weights, expected in read.items():
        assert model.as_kept(weights, "bfloat16").decode(1, 0).weight_bytes == pytest.approx(
            expected
        )
    values = 2 * 2 * 2 * 16  # K and V of a token
    kept = [model.as_kept("int8", d).bytes_per_token for d in ("float32", "bfloat16", "q4_1")]
    assert kept == [4 * values, 2 * values, 2 * values]


@pytest.mark.parametrize("name", ["peers.__main__", "gpu.__main__", "kernels"])
def test_a_parent_that_starts_engines_leaves_jax_to_them(name):
    code = f"import sys, benchmarks.{name}; raise SystemExit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_perfect_prefix_cache_computes_what_is_new():
    system = tuple(range(100, 140))
    rounds = (
        (Ask((*system, 1, 2), 1), Ask((*system, 3), 1)),
        (Ask((*system, 1, 2, 7, 8), 1), Ask(system, 1)),
    )
    cached = Workload("x", "", rounds, 2, prefix_caching=True)
    assert roofline.cached_lengths(cached) == [0, 40, 42, 39]
    assert roofline.cached_lengths(Workload("x", "", rounds, 2)) == [0, 0, 0, 0]


@pytest.mark.parametrize("name", workloads.NAMES)
def test_workloads_depend_on_name_and_seed_alone(name):
    def make(seed: int) -> Workload:
        return workloads.make(
            name, seed, vocab=300, encode=lambda text: list(text.encode()), toy=True
        )

    assert make(3) == make(3)
    assert make(3).name == name
    assert (make(3) == make(4)) == (name == "repetitive")
    tokens = np.array([t for round_ in make(3).rounds for ask in round_ for t in ask.prompt])
    assert tokens.min() >= 0
    assert tokens.max() < 300


def test_full_workloads_are_those_of_the_issue():
    def make(name: str) -> Workload:
        return workloads.make(name, 0, vocab=49152, encode=lambda text: list(text.encode()))

    for batch in (1, 4, 16, 64):
        (asks,) = make(f"fixed-{batch}").rounds
        assert [(len(ask.prompt), ask.max_tokens) for ask in asks] == [(128, 128)] * batch
    chat = make("chat")
    assert chat.prefix_caching
    assert [len(round_) for round_ in chat.rounds] == [8] * 4
    firsts = {ask.prompt[:600] for round_ in chat.rounds for ask in round_}
    assert len(firsts) == 1
    assert make("prefill").output_tokens == 8
    with pytest.raises(ValueError, match="no workload 'fixed-2'; there are"):
        make("fixed-2")


@pytest.mark.parametrize(
    ("flags", "wanted", "name"),
    [
        ("fpu avx2 avx512f avx512_vnni avx512_bf16", "AVX-512 with bf16", "avx_512_with_bf16_"),
        ("fpu avx avx2 fma", "AVX2", "avx2_"),
        ("fpu sse2", "", ""),
    ],
)
def test_machines_are_told_apart_by_their_instructions(monkeypatch, tmp_path, flags, wanted, name):
    file = tmp_path / "cpuinfo"
    file.write_text(f"model name\t: Some CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(machine, "Path", lambda path: file)
    monkeypatch.setattr(machine, "device", lambda: ("cpu", "cpu"))
    assert machine.instructions() == machine.about()["instructions"] == wanted
    assert machine.name() == f"some_cpu_{name}{machine.num_cores()}_cores"


@pytest.mark.parametrize(("slow_from", "largest"), [(None, ceilings.SIZE), (256, 256)])
def test_the_size_of_a_product_is_not_judged_by_one_call(slow_from: int | None, largest: int):
    sizes: list[int] = []

    def multiply(size: int) -> None:
        sizes.append(size)
        if len(sizes) == 1 or (slow_from is not None and size >= slow_from):
            time.sleep(1.5 * ceilings.LONGEST)

    assert ceilings.product_rate(multiply, 0.01) > 0
    assert sizes[-1] == max(sizes) == largest
