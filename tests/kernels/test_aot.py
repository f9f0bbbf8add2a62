"""Compiling for chips that are not there: the matrix, what is read out of the compilers' output,
and, where a compiler is installed, the whole command."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Format, aot, aot_cases, aot_quant, aot_targets, tpu_static
from pallas_kernels.aot_targets import CHIPS, Program

POOL = jax.ShapeDtypeStruct((601, 16, 2, 64), jnp.float32)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture
def as_cpu(monkeypatch):
    """What the command sets for itself."""
    for name, value in aot_targets.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


# -- what the compilers say

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Function properties for other
    0 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 16 barriers, 1 bytes smem
  %287 = call i32 @mosaic_gpu_launch_kernel(ptr %0, i32 4, i32 8, i32 16, i32 0, i32 0, i32 0, \
i32 256, i32 1, i32 1, i32 158824, i32 0, ptr %1, ptr %278)
  %9 = call i32 @mosaic_gpu_launch_kernel(ptr %0, i32 4, i32 8, i32 16, i32 0, i32 0, i32 0, \
i32 256, i32 1, i32 1, i32 2048, i32 0, ptr %1, ptr %2)
"""


def test_ptxas_report_takes_the_worst_of_all_kernels():
    assert aot_targets.ptxas_report(PTXAS) == {
        "registers": 255,
        "spills": 64,
        "serialised": 0,
        "shared_memory": 158824,
    }
    assert aot_targets.spilling(PTXAS) == ["other 24"]
    assert aot_targets.ptxas_report("nothing of the kind") == {}
    warning = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert aot_targets.ptxas_report(PTXAS + warning)["serialised"] == 1


def test_vmem_is_that_of_the_kernels_alone():
    config = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"%d"}]'
    fusion = "%f = f32[8] fusion(%x), backend_config={" + config % 9_000_000 + "}"
    kernel = '%k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={'
    text = "\n".join([fusion, kernel + config % 2_281_472 + "}", kernel + config % 64 + "}"])
    assert aot_targets.vmem_of(text) == 2_281_472
    assert aot_targets.vmem_of(fusion) is None


def problems_of(function):
    """What is wrong with a program that was really compiled, here for the CPU."""
    index = jax.ShapeDtypeStruct((4,), jnp.int32)
    program = Program("p", function, (POOL, index), donate=(0,))
    compiled = jax.jit(function, donate_argnums=0).lower(*program.args).compile()
    alias = compiled.memory_analysis().alias_size_in_bytes
    pools = aot_targets.large_arrays(program, program.donate)
    assert pools == [POOL]
    return aot_targets.pool_problems(compiled.as_text(), pools, alias)


def test_an_update_in_place_is_no_problem():
    assert problems_of(lambda pool, i: pool.at[i].set(1.0, mode="drop")) == []


def test_a_pool_that_is_copied_or_not_aliased_is_a_problem():
    by_head = (601, 2, 16, 64)

    def transposes(pool, i):
        moved = jnp.swapaxes(pool, 1, 2).reshape(by_head).at[i].set(1.0)
        return jnp.swapaxes(moved, 1, 2) + jnp.sum(moved)

    found = problems_of(transposes)
    assert any("a copy as large as the pool" in problem for problem in found)
    size = 601 * 16 * 2 * 64 * 4
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        dropped = problems_of(lambda pool, i: jnp.sum(pool[i]))
    assert f"0 of {size} donated bytes are aliased to an output" in dropped


def test_copies_are_found_in_the_forms_hlo_has():
    lines = (
        "%copy.1 = f32[601,16,128]{2,1,0:T(8,128)} copy(%x)",
        "%s = (f32[601,16,128]{2,1,0}, f32[601,16,128]{2,1,0:T(8,128)S(1)}, u32[]) copy-start(%x)",
        "ROOT %t.2 = bf16[1230848]{0} convert(%x)",
    )
    for line in lines:
        assert aot_targets.pool_problems(line, [POOL], 10**9)
    fine = ("%f = f32[601,16,128]{2,1,0} fusion(%x)", "%c = f32[600,16,128]{2,1,0} copy(%x)")
    for line in fine:
        assert not aot_targets.pool_problems(line, [POOL], 10**9)


def test_donated_arrays_are_found_by_name_too_and_small_ones_are_not_meant():
    small = jax.ShapeDtypeStruct((8,), jnp.int32)
    program = Program("p", lambda q, pages: pages, (small, {"a": POOL, "b": small}), ("pages",))
    assert aot_targets.large_arrays(program, program.donate) == [POOL]


def weights_in_floats(function, weight, rows=16):
    """What is wrong with a product of a quantised weight, compiled here for the CPU."""
    x = jax.ShapeDtypeStruct((rows, 2048), jnp.float32)
    program = Program("p", function, (x, weight), packed=("weight",))
    weights = aot_targets.large_arrays(program, program.packed)
    assert weights == [weight]
    return aot_targets.float_copies(jax.jit(function).lower(x, weight).compile().as_text(), weights)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_quantised_weight_that_is_written_as_floats_is_a_problem(dtype):
    values = jax.ShapeDtypeStruct((1024, 1024 if dtype == "uint8" else 2048), dtype)

    def whole(x, weight):
        if dtype == "uint8":
            weight = jnp.concatenate([weight & 15, weight >> 4], axis=1)
        return x @ weight.astype(jnp.float32).T

    (problem,) = weights_in_floats(whole, values)
    assert "a whole weight in floats: " in problem and "f32[" in problem
    op = pallas_kernels.resolve("xla").quant_matmul
    format = Format("int8") if dtype == "int8" else Format("int4")
    scales = np.ones(1024, np.float32)

    def in_tiles(x, weight):
        return op(x, weight, scales, None, format=format)

    assert weights_in_floats(in_tiles, values) == []


# -- the matrix


@pytest.mark.parametrize("chip", CHIPS)
def test_every_stage_meets_every_head_shape_and_page_dtype(chip):
    names = list(aot.programs_for(chip))
    kernel = "mosaic_gpu/" if CHIPS[chip].platform == "gpu" else "tpu/"
    mine = [name for name in names if name.startswith(kernel)]
    decode = [name for name in mine if "decode" in name]
    for heads in aot_cases.HEADS:
        assert any(heads in name for name in decode), heads
    for page_dtype in aot_cases.PAGE_DTYPES:
        for op in ("decode", "prefill", "kv_write", "copy_pages"):
            found = [name for name in mine if op in name and page_dtype in name]
            assert found or op == "prefill", (op, page_dtype)
    assert any(name.startswith("xla/step") for name in names)


def test_the_tpus_together_have_every_head_shape_in_every_stage():
    tpus = [chip for chip in CHIPS if CHIPS[chip].platform == "tpu"]
    names = [name for chip in tpus for name in aot.programs_for(chip) if name.startswith("tpu/")]
    for stage in ("forward", "backward", "decode", "prefill"):
        for heads in aot_cases.HEADS:
            assert any(f".{stage}/{heads}" in name for name in names), (stage, heads)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_quantised_format_meets_every_number_of_rows(chip):
    kernel = "mosaic_gpu" if CHIPS[chip].platform == "gpu" else "tpu"
    names = [n for n in aot.programs_for(chip) if n.startswith(f"{kernel}/quant_matmul/")]
    for label in aot_quant.FORMATS:
        for rows in aot_quant.ROWS:
            assert any(n.endswith(f"/{label}/{rows} rows") for n in names), (label, rows)


def test_the_tpus_together_have_every_format_with_every_weight():
    tpus = [chip for chip in CHIPS if CHIPS[chip].platform == "tpu"]
    names = [name for chip in tpus for name in aot.programs_for(chip)]
    for label in aot_quant.FORMATS:
        for weight in aot_quant.WEIGHTS:
            assert any(n.startswith(f"tpu/quant_matmul/{weight}/{label}/") for n in names)


def test_what_is_refused_is_a_row_with_its_reason(capsys):
    program = Program("tpu/x", lambda: None, (), refused="page_size is 9")
    result = aot_targets.compile_program(program, CHIPS["v4"])
    assert (result.status, result.refused) == ("refused", "page_size is 9")
    assert "refused: page_size is 9" in aot.row(result)


# -- the command


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "say what to compile"),
        (["--chip", "v9"], "invalid choice: 'v9'"),
        (["--all", "--jobs", "0"], "--jobs is 0; it must be >= 1"),
    ],
)
def test_bad_arguments_exit_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        aot.main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_compiler_is_an_error_that_says_what_to_install(monkeypatch, capsys, as_cpu):
    monkeypatch.setattr(aot_targets, "_installed", lambda module: False)
    assert aot.main(["--all"]) == 2
    said = capsys.readouterr().err
    assert "pip install libtpu" in said
    assert f"jax-cuda13-plugin=={jax.__version__}" in said
    assert aot.main(["--chip", "v5e"]) == 2
    assert "cuda" not in capsys.readouterr().err


def test_a_compiler_that_dies_is_a_failure(as_cpu):
    (result,) = aot.run([("h200", "no such program")], jobs=2)
    assert (result.name, result.status) == ("no such program", "FAILED")
    assert "the compiler's process died with exit code 1" in result.problems[0]


@needs_libtpu
def test_the_command_compiles_for_a_tpu(tmp_path, capsys, as_cpu):
    path = tmp_path / "results.json"
    argv = ["--chip", "v5e", "--impl", "reference", "--op", "copy_pages", "--json", str(path)]
    assert aot.main(argv) == 0
    said = capsys.readouterr().out
    assert "1 programs: 1 ok" in said
    (result,) = json.loads(path.read_text())
    assert result["memory"]["alias"] >= 3001 * 128 * 16 * 128 * 2


@needs_libtpu
def test_a_copy_of_the_pool_fails_on_a_tpu(as_cpu):
    def copies(pages, i):
        moved = jnp.swapaxes(pages, 0, 3).at[i].set(1.0)
        return jnp.swapaxes(moved, 0, 3)

    program = Program("bad", copies, (POOL, jax.ShapeDtypeStruct((4,), jnp.int32)), donate=(0,))
    result = aot_targets.compile_program(program, CHIPS["v5e"])
    assert result.status == "FAILED"
    assert "a copy as large as the pool" in "".join(result.problems)


# -- the static schedule

USE = """\
== CAPACTIY:
MATMUL, VLOAD, VLOAD:FILL, VSTORE:SPILL
    4     3     3     1
== UTILIZATION:
0 1 0 0
0 1 0 0
4 0 0 0
4 0 1 0
0 0 0 1
0 1 0 0
"""
BUNDLES = """\
LB: loop body

     0   :  { %3 = vsyncpa [#allocation4], 0 } /* Start region 1 */
   0x1 LB: > { %s1 = sadd.s32 1, %s0 } /* Start region 7 :: Start region 8 */
   0x2   : >> { %5 = vmatmul.bf16.gmra.mxu0 %v1 } /* Start region 9 */
second_minor_factor: 1 */
   0x3   : >> { %6 = vmatmul.bf16.gmra.mxu0 %v2 } /* End region 9 */
   0x4   : > { %7 = sbr.rel (!%p1) target = $region8 } /* End region 8 :: End region 7 */
   0x5   :  { %8 = vsyncpa [#allocation4], 1 } /* End region 1 */
"""


def test_a_schedule_is_read_loop_by_loop():
    kernel = tpu_static.parse("k", BUNDLES, USE)
    spans = [(r.start, r.end, r.is_loop) for r in kernel.regions]
    assert spans == [(0, 5, False), (1, 4, True), (2, 3, False)]
    assert kernel.whole.bundles == 6 and kernel.whole.busy["MATMUL"] == 8
    hot = kernel.hot()
    assert (hot.start, hot.bundles, hot.spills) == (2, 2, 1)
    assert hot.share("MATMUL", kernel.slots) == 1.0
    loop = kernel.hot(loops_only=True)
    assert (loop.start, loop.bundles, loop.spills) == (1, 4, 2)
    assert kernel.hot("VLOAD").bundles == 6


def test_a_schedule_of_another_form_is_an_error():
    with pytest.raises(ValueError, match="another form"):
        tpu_static.parse("k", BUNDLES, "== SOMETHING:\n")
    with pytest.raises(ValueError, match="no bundles or no regions"):
        tpu_static.parse("k", "", USE)


def test_dma_cycles_are_those_of_the_published_bandwidth():
    peak = tpu_static.PEAKS["TPU v5 lite"]
    assert peak.clock * peak.flops_per_cycle == pytest.approx(197e12, rel=0.01)
    assert peak.dma_cycles(819e9) == peak.clock
    v6e = tpu_static.PEAKS["TPU v6 lite"]
    assert v6e.clock * v6e.flops_per_cycle == pytest.approx(918e12, rel=0.01)


@needs_libtpu
def test_the_compilers_own_files_are_read():
    request = {"chip": "v5e", "impl": "tpu", "make": "paged_program"}
    options = {"heads_name": [2, 1, 128], "stage": "decode"}
    (kernel,) = tpu_static.schedule(request | {"options": options})
    loop = kernel.hot(loops_only=True)
    assert loop.is_loop and 50 < loop.bundles < kernel.whole.bundles
    assert kernel.whole.busy["MATMUL"] > 0
