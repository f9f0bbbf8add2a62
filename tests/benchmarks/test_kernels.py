"""The arithmetic of the kernels' benchmark, on small numbers."""

import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import device_time, kernels, kernels_device, kernels_quant, report, roofline


def test_flops_count_the_visible_pairs():
    for new, length in ((1, 9), (5, 5), (3, 7)):
        seen = sum(length - new + i + 1 for i in range(new))
        assert roofline.attention_flops(3, 16, [new], [length]) == 4 * 3 * 16 * seen
    two = roofline.attention_flops(3, 16, [1, 5], [9, 5])
    assert two == 4 * 3 * 16 * (9 + 15)


def test_quantised_pages_are_read_with_their_scales():
    assert roofline.page_bytes_read(8, 128, "bfloat16", 10) == 10 * 2 * 8 * 256
    assert roofline.page_bytes_read(8, 128, "int8", 10) == 10 * 2 * 8 * 132


def test_every_call_of_the_timing_loop_is_made():
    """The step's time counts: a loop that XLA emptied would take none."""
    calls = []

    def step(x, fixed, i):
        jax.debug.callback(lambda n: calls.append(int(n)), i)
        return x * fixed

    carry, fixed = jnp.ones((8, 8)), jnp.float32(2.0)
    seconds = device_time.seconds_per_call(step, carry, fixed, 1e-3, target=0.03, repeats=2)
    jax.effects_barrier()
    assert seconds > 0
    assert calls == 3 * list(range(30))  # one run to compile, two that are timed


def test_rows_have_their_pages_and_lengths():
    ragged, count = kernels_device.ragged_of([(1, 65), (3, 64), (2, 2)], 64, 1)
    assert count == 5
    used = np.asarray(ragged.page_table)
    assert sorted(used[used > 0]) == [1, 2, 3, 4]
    assert ragged.cu_q_lens.tolist() == [0, 1, 4, 6]
    assert not ragged.decode_only


def test_a_row_that_cannot_run_says_why():
    def fails(guess):
        raise ValueError("no such chip\nand more")

    at = {"matmul_flops": 1e12, "copy_bytes": 1e9}
    row = kernels_device.timed({"case": "x"}, fails, 2e12, 1e9, at)
    assert row["note"] == "cannot run: ValueError: no such chip"
    assert row["roofline_us"] == 2e6
    good = kernels_device.timed({"case": "x"}, lambda guess: 2 * guess, 0.0, 2e9, at)
    assert (good["share"], good["achieved"]) == (0.25, "0 GB/s")


def test_rows_ceilings_and_what_was_left_out_are_kept(tmp_path, capsys):
    kept = report.Report("kernels", output=tmp_path / "a" / "kernels.json")
    assert kernels.ceilings_of(kept) == {}
    kernels.keep(kept, {"section": "s", "case": "c", "impl": "i", "us": 1.5})
    kernels.keep(kept, {"left_out": "the rest"})
    kernels.keep(kept, {"section": "ceilings", "copy_bytes": 1.0})
    content = json.loads((tmp_path / "a" / "kernels.json").read_text())
    assert content["rows"][0] == {"section": "s", "case": "c", "impl": "i", "us": 1.5}
    assert content["notes"] == ["left out: the rest"]
    assert kernels.ceilings_of(kept) == {"copy_bytes": 1.0}
    said = capsys.readouterr()
    assert "left out: the rest" in said.err and "copy_bytes" in said.out


def test_unknown_sections_are_refused(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--static", "nothing"])
    assert "unknown: nothing; there are static" in capsys.readouterr().err


@pytest.mark.parametrize(
    "section", ["check", "decode", "prefill", "backward", "paged_prefill", "quant"]
)
def test_a_section_runs_here_with_small_shapes(section, monkeypatch):
    """What cannot run on a CPU says so in its note; ours all run, and the deadline is kept."""
    small = {
        "PAGE_SIZE": {"cpu": 16},
        "HEADS": {16: (4, 2)},
        "LENGTHS": (32,),
        "BATCHES": (2,),
        "CONTEXTS": (32,),
        "PEER_DECODE": ((2, 32),),
        "POOL_PAGES": 9,
        "CHUNKS": {"mixed": [(1, 40), (16, 32)]},
    }
    for name, value in small.items():
        monkeypatch.setattr(kernels_device, name, value)
    monkeypatch.setattr(kernels_quant, "CHECKED", (64, 256))
    monkeypatch.setattr(kernels_quant, "ROWS", (2,))
    monkeypatch.setattr(kernels_quant, "COPY_BYTES", 1)
    monkeypatch.setitem(kernels_quant.aot_quant.WEIGHTS, "down", (64, 256))
    monkeypatch.setattr(kernels_quant, "WEIGHTS", ("down",))
    quick = partial(device_time.seconds_per_call, target=1e-9, repeats=1)
    monkeypatch.setattr(kernels_device.device_time, "seconds_per_call", quick)
    at = {"matmul_flops": 1e12, "copy_bytes": 1e9}
    rows = list(kernels_device.SECTIONS[section](time.monotonic() + 60, at))
    mine = [row for row in rows if row.get("impl") == "xla"]
    assert mine and not any("cannot run" in row.get("note", "") for row in mine), rows
    if section == "check":
        return
    late = list(kernels_device.SECTIONS[section](time.monotonic() - 1, at))
    assert any("left_out" in row for row in late)
