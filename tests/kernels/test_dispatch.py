"""resolve: what exists, what is refused, and that nothing falls back in silence."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

import pallas_kernels
from pallas_kernels import Spec, dispatch
from pallas_kernels.common import Target


@pytest.mark.parametrize("platform", dispatch.PLATFORMS)
def test_auto_takes_the_fastest(platform: str):
    ops = pallas_kernels.resolve("auto", platform)
    is_old = jax.__version_info__ < (0, 11)
    fastest = {"cpu": "xla", "tpu": "tpu", "gpu": "xla" if is_old else "mosaic_gpu"}
    assert (ops.name, ops.platform) == (fastest[platform], platform)
    assert f"the fastest there is on {platform}" in ops.reason
    assert ("not mosaic_gpu: jax is" in ops.reason) == (platform == "gpu" and is_old)


@pytest.mark.parametrize("chip", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "AMD Instinct MI300X"])
def test_a_gpu_that_is_no_hopper_takes_xla(chip: str):
    ops = pallas_kernels.resolve("auto", "gpu", device_kind=chip)
    assert ops.name == "xla" and "not mosaic_gpu" in ops.reason
    assert pallas_kernels.resolve("auto", "rocm").name == "xla"
    with pytest.raises(ValueError, match=r"'mosaic_gpu' cannot do this: (device_kind|jax) is"):
        pallas_kernels.resolve("mosaic_gpu", "gpu", device_kind=chip)


def test_without_pages_flash_attention_is_asked():
    plain = Spec(8, 2, 64, None, "float16", None)
    ops = pallas_kernels.resolve("auto", "tpu", spec=plain)
    assert ops.name == "xla" and "not tpu: dtype is float16; allowed" in ops.reason
    assert pallas_kernels.resolve("auto", "tpu", spec=replace(plain, dtype="float32")).name == "tpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads is 5; it must be a multiple of num_kv_heads, 2"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"page_size": 0}, "page_size is 0"),
        ({"page_size": None}, "page_size is None and page_dtype float32; give both or none"),
        ({"dtype": "float64"}, "dtype is float64; allowed: float32"),
        ({"page_dtype": "int4"}, "page_dtype is int4; allowed: float32"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)


def test_the_platform_is_jax_s_own_by_default():
    assert pallas_kernels.resolve().platform == jax.default_backend()
    assert pallas_kernels.resolve("xla", "cuda") is pallas_kernels.resolve("xla", "gpu")


@pytest.mark.parametrize("name", pallas_kernels.available("cpu"))
def test_asked_for_is_given_and_is_one_hashable_object(name: str):
    ops = pallas_kernels.resolve(name, "cpu")
    assert ops.name == name
    assert ops is pallas_kernels.resolve(name, "cpu")
    assert len({ops, pallas_kernels.resolve(name, "cpu")}) == 1


@pytest.mark.parametrize("name", ["metal", "triton", "", "XLA"])
def test_what_does_not_exist_is_refused_with_a_list(name: str):
    allowed = ", ".join(("auto", *pallas_kernels.available("cpu")))
    with pytest.raises(ValueError, match=f"impl is {name!r}, which does not exist; .*: {allowed}"):
        pallas_kernels.resolve(name, "cpu")


def test_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="platform is 'metal'; allowed: cpu, gpu, tpu"):
        pallas_kernels.resolve("auto", "metal")
    with pytest.raises(ValueError, match="platform is 'metal'"):
        pallas_kernels.available("metal")
    with pytest.raises(ValueError, match="impl is 7, which does not exist"):
        pallas_kernels.resolve(7, "cpu")  # type: ignore[arg-type]


SPEC = Spec(8, 2, 64, 16, "float32", "float32")
WIDE = replace(SPEC, head_dim=128)


def _refuse_wide_heads(spec: Spec | None, target: Target) -> str | None:
    if spec is not None and spec.head_dim > 64:
        return f"head_dim is {spec.head_dim}; on {target.device_kind} it must be <= 64"
    return None


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A chip of kind gpu with an implementation "narrow" that cannot do every head dim, before
    "xla" in what auto takes there. Each test has its own: what is resolved once is remembered."""
    flash, paged, write, quant = dispatch._MODULES["xla"][0]
    fake = SimpleNamespace(**{**vars(paged), "unsupported": _refuse_wide_heads})
    monkeypatch.setitem(dispatch._MODULES, "narrow", ((flash, fake, write, quant), ("gpu",)))
    monkeypatch.setitem(dispatch._AUTO, "gpu", ("narrow", "xla"))
    return request.node.name


def test_auto_takes_the_first_that_can_and_says_why(chip: str):
    ops = pallas_kernels.resolve("auto", "gpu", spec=SPEC, device_kind=chip)
    assert (ops.name, ops.reason) == ("narrow", "the fastest there is on gpu")
    ops = pallas_kernels.resolve("auto", "gpu", spec=WIDE, device_kind=chip)
    assert ops.name == "xla"
    assert f"not narrow: head_dim is 128; on {chip} it must be <= 64" in ops.reason


def test_asked_for_and_not_able_is_an_error(chip: str):
    with pytest.raises(ValueError, match=r"'narrow' cannot do this: head_dim is 128; .* <= 64"):
        pallas_kernels.resolve("narrow", "gpu", spec=WIDE, device_kind=chip)
    ops = pallas_kernels.resolve("narrow", "gpu", spec=SPEC, device_kind=chip)
    assert ops.reason == "asked for"
    # Without a spec only the platform decides.
    assert pallas_kernels.resolve("narrow", "gpu", device_kind=chip).name == "narrow"
    with pytest.raises(ValueError, match="impl is 'narrow', which runs on gpu; allowed on cpu"):
        pallas_kernels.resolve("narrow", "cpu")


def test_nothing_can_do_it_names_everything_tried(chip: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(dispatch._AUTO, "gpu", ("narrow",))
    with pytest.raises(ValueError, match="nothing on gpu can do this: not narrow: head_dim is 128"):
        pallas_kernels.resolve("auto", "gpu", spec=WIDE, device_kind=chip)


def test_a_chip_is_part_of_the_question():
    one, other = (
        pallas_kernels.resolve("xla", "tpu", device_kind=kind) for kind in ("TPU v5e", "TPU v6e")
    )
    assert one is not other
    assert one is pallas_kernels.resolve("xla", "tpu", device_kind="TPU v5e")


@pytest.mark.parametrize(
    ("dtype", "on_cpu"),
    [
        ("bfloat16", {"uint16"}),
        ("float8_e4m3fn", {"uint8", "float32"}),
        ("int8", {"int8", "float32"}),
    ],
)
def test_what_xla_copies_on_cpu_is_kept_as_bits_there(dtype: str, on_cpu: set[str]):
    def dtypes(platform: str) -> set[str]:
        ops = pallas_kernels.resolve("xla", platform)
        return {leaf.dtype.name for leaf in jax.tree.leaves(ops.allocate(2, 8, 1, 8, dtype))}

    assert dtypes("cpu") == on_cpu
    assert dtypes("gpu") == dtypes("tpu") == {dtype} | on_cpu - {"uint8", "uint16"}


def test_the_package_stands_alone():
    code = "import sys, pallas_kernels; assert 'jaxinfer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
