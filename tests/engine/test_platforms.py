"""The same step lowers for CPU, TPU and GPU with the kernel that "auto" takes there. Compiling it
needs the platform's compiler: `python -m pallas_kernels.aot` does that."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxinfer import aot, kv_cache, models
from jaxinfer.batch import Layout
from jaxinfer.buckets import Bucket
from jaxinfer.quant import schemes
from jaxinfer.step import step
from jaxinfer.weights import config_from_hf
from pallas_kernels import Spec, dispatch
from pallas_kernels.aot import CHIPS
from tests.helpers import TINY_CONFIG

MOSAIC_GPU = "mosaic_gpu" if jax.__version_info__ >= (0, 11) else "xla"  # the kernel needs 0.11
# Kernels ask which chip they are traced for; there is no device to tell them.
CHIP = {
    "tpu": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "cuda": AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
    "cpu": None,
}
KERNEL_CALL = {"tpu": "tpu_custom_call", "mosaic_gpu": "mosaic_gpu"}


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "kernel"),
    [
        ("cpu", "float32", 8, "xla"),
        ("cpu", "bfloat16", 64, "xla"),
        ("tpu", "float32", 8, "tpu"),
        ("tpu", "bfloat16", 64, "tpu"),
        ("tpu", "float16", 64, "xla"),
        ("cuda", "float32", 64, "xla"),
        ("cuda", "bfloat16", 8, "xla"),
        ("cuda", "bfloat16", 64, MOSAIC_GPU),
        ("cuda", "float16", 128, MOSAIC_GPU),
    ],
)
def test_the_step_lowers(platform, dtype, head_dim, kernel):
    config = config_from_hf({**TINY_CONFIG, "head_dim": head_dim}, None)
    spec = Spec(config.num_heads, config.num_kv_heads, head_dim, 16, dtype, dtype)
    ops = dispatch.resolve("auto", platform, spec=spec)
    assert ops.name == kernel
    model = models.build(config, ops, dtype)
    for bucket in (Bucket(8, 8), Bucket(32, 8)):
        text, num_arrays = lowered(model, bucket, platform)
        assert all((call in text) == (name == kernel) for name, call in KERNEL_CALL.items())
        # The pool is donated: every one of its arrays names the output that takes its place.
        donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
        assert donated >= num_arrays


@pytest.mark.parametrize("page_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "tpu"), ("cuda", MOSAIC_GPU)])
def test_the_step_with_8_bit_pages_lowers(platform, kernel, page_dtype):
    config = config_from_hf({**TINY_CONFIG, "head_dim": 64}, None)
    size = kv_cache.PAGE_SIZES["tpu" if platform == "tpu" else "gpu"]
    spec = Spec(config.num_heads, config.num_kv_heads, 64, size, "bfloat16", page_dtype)
    ops = dispatch.resolve("auto", platform, spec=spec)
    assert ops.name == kernel
    model = models.build(config, ops, "bfloat16", page_dtype)
    text, num_arrays = lowered(model, Bucket(32, 8), platform, size)
    assert num_arrays == {"xla": 4, "mosaic_gpu": 2, "tpu": 2}[kernel] * config.num_layers + 1
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") >= num_arrays
    assert all((call in text) == (name == kernel) for name, call in KERNEL_CALL.items())


def lowered(
    model: models.Model, bucket: Bucket, platform: str, page_size: int = 16
) -> tuple[str, int]:
    """The step as StableHLO for `platform`, and how many arrays its pages are."""
    pages = jax.eval_shape(partial(kv_cache.allocate, model, 9, page_size))
    layout = Layout(bucket, pages_per_row=4)
    function = partial(step, model, layout, num_top=5, valid_vocab=259)
    arguments = (
        model.shapes(),
        pages,
        jax.ShapeDtypeStruct((9, model.config.vocab_size), jnp.float32),
        jax.ShapeDtypeStruct((8,), jnp.int32),
        jax.ShapeDtypeStruct((layout.size,), jnp.int32),
    )
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=CHIP[platform])):
        traced = jax.jit(function, donate_argnames="pages").trace(*arguments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text, len(jax.tree_util.tree_leaves(pages))


# What the matmul of each scheme is in StableHLO on an accelerator: the types of its operands.
OPERANDS = {
    "int8": "xi8>, tensor<",
    "int8_weight_only": "xbf16>, tensor<",
    "int4": "xbf16>, tensor<",
    "int4_asymmetric": "xbf16>, tensor<",
    "fp8": "xf8E4M3FN>, tensor<",
}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_the_quantised_step_lowers(platform, scheme):
    config = config_from_hf(TINY_CONFIG, None)
    model = models.build(config, dispatch.resolve("xla", platform), "bfloat16")
    group = 16 if schemes.SCHEMES[scheme].has_groups else None
    formats = schemes.choose(scheme, model.rules, config, group_size=group)
    model = dataclasses.replace(model, formats=formats)
    text, _ = lowered(model, Bucket(8, 8), platform)
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert any(OPERANDS[scheme] in line for line in dots)


def test_the_programs_for_chips_fit_them():
    """What `pallas_kernels.aot` is given: weights and pages within each chip's memory, which whole
    models nearly fill; and the first layers of a model with each kind of quantised weights."""
    memory = {"v5e": 16 << 30, "v6e": 32 << 30, "h200": 141 << 30}
    for chip in CHIPS:
        programs = aot.programs(chip)
        few = [program for program in programs if program.name.endswith("2 layers")]
        counts = {"v5e": (2, 0), "v6e": (4, 8), "h200": (4, 8)}.get(chip, (0, 0))
        assert (len(programs) - len(few), len(few)) == counts
        for program in programs:
            sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(program.args)]
            assert sum(sizes) < 0.95 * memory[chip]
            assert program in few or sum(sizes) > 0.6 * memory[chip]
            assert program.donate == ("pages",)
