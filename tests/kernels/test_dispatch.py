"""resolve: what exists, what is refused, and that nothing falls back in silence."""

import subprocess
import sys

import jax
import pytest

import pallas_kernels


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_is_xla_everywhere(platform: str):
    ops = pallas_kernels.resolve("auto", platform)
    assert (ops.name, ops.platform) == ("xla", platform)
    assert platform in ops.reason


def test_the_platform_is_jax_s_own_by_default():
    assert pallas_kernels.resolve().platform == jax.default_backend()
    assert pallas_kernels.resolve("xla", "cuda") is pallas_kernels.resolve("xla", "gpu")


@pytest.mark.parametrize("name", pallas_kernels.IMPLEMENTATIONS)
def test_asked_for_is_given_and_is_one_hashable_object(name: str):
    ops = pallas_kernels.resolve(name, "cpu")
    assert ops.name == name
    assert ops is pallas_kernels.resolve(name, "cpu")
    assert len({ops, pallas_kernels.resolve(name, "cpu")}) == 1


@pytest.mark.parametrize("name", ["tpu", "mosaic_gpu", "triton", "interpret", "", "XLA"])
def test_what_does_not_exist_is_refused_with_a_list(name: str):
    with pytest.raises(ValueError, match=r"impl is .*; allowed: auto, reference, xla"):
        pallas_kernels.resolve(name, "tpu")


def test_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="platform is 'metal'; allowed: cpu, gpu, tpu"):
        pallas_kernels.resolve("auto", "metal")


def test_bfloat16_is_kept_as_bits_on_cpu_only():
    def dtypes(platform: str) -> set[str]:
        ops = pallas_kernels.resolve("xla", platform)
        return {leaf.dtype.name for leaf in jax.tree.leaves(ops.allocate(2, 8, 1, 8, "bfloat16"))}

    assert dtypes("cpu") == {"uint16"}
    assert dtypes("gpu") == dtypes("tpu") == {"bfloat16"}


def test_the_package_stands_alone():
    code = "import sys, pallas_kernels; assert 'jaxinfer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
