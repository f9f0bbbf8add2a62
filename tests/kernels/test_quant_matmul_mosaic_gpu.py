"""The Hopper quantised matmul without a Hopper: in the interpreter (`mosaic_gpu_quant_cases`), and
what around it needs none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Format, resolve
from pallas_kernels.common import Target
from pallas_kernels.quant_matmul import mosaic_gpu, pack_int4, unpack_int4
from pallas_kernels.quant_matmul.mosaic_gpu import Config
from tests.kernels import mosaic_gpu_interpreter, quant_cases
from tests.kernels.quant_cases import FORMATS, FP8, W8A8

H200 = "NVIDIA H200"
SECONDS = 400  # for a part of the cases: a barrier that nobody arrives at would wait for ever
INT4 = Format("int4", group_size=128)
INT4_16 = Format("int4", group_size=16)
GROUPS = Format("int8", group_size=32)


@mosaic_gpu_interpreter.needs_interpreter
@pytest.mark.parametrize("part", ["int8", "int4", "w8a", "fp8", "fault"])
def test_the_kernel_in_the_interpreter(part: str):
    mosaic_gpu_interpreter.check("mosaic_gpu_quant_cases.py", part, SECONDS)


def kernel(format: Format, dtype: str) -> mosaic_gpu._Kernel:
    config = Config(1, 64, 2, 1)
    return mosaic_gpu._Kernel(format, config, (1, 8, 64), (64, 64), 8, jnp.dtype(dtype), False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_weight_turns_into_x_s_dtype_exactly(dtype: str):
    """All pairs of halves of a byte, every int8, with every zero point; every e4m3."""
    zero = jnp.arange(-128, 128, dtype=jnp.int8)
    q = np.stack(np.meshgrid(np.arange(-8, 8), np.arange(-8, 8)), axis=-1).reshape(1, -1)
    data = pack_int4(q.astype(np.int8), 2).view(np.int8)
    rows = jnp.broadcast_to(jnp.asarray(data), (256, 256))
    for point in (None, zero):
        low, high = kernel(INT4, dtype).values(rows, point)
        want = unpack_int4(data.view(np.uint8), 2).astype(np.float64) + np.zeros((256, 1))
        want = want - (0 if point is None else np.asarray(zero, np.float64)[:, None])
        np.testing.assert_array_equal(np.asarray(low, np.float64), want[:, ::2])
        np.testing.assert_array_equal(np.asarray(high, np.float64), want[:, 1::2])
    ints = jnp.broadcast_to(zero, (256, 256))
    (got,) = kernel(GROUPS, dtype).values(ints, zero)
    want = np.asarray(ints, np.float64) - np.asarray(zero, np.float64)[:, None]
    np.testing.assert_array_equal(np.asarray(got, np.float64), want)
    bits = np.arange(256, dtype=np.uint8)
    e4m3 = bits[(bits & 0x7F) != 0x7F].view(quant_cases.E4M3)
    (got,) = kernel(Format("float8_e4m3fn"), dtype).values(jnp.asarray(e4m3), None)
    np.testing.assert_array_equal(np.asarray(got, np.float32), e4m3.astype(np.float32))


@pytest.mark.parametrize(
    "format", [W8A8, FP8, INT4, GROUPS, FORMATS["int4_32"], Format("int4"), Format("int8")], ids=str
)
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (4096, 14336), (576, 1536)])
@pytest.mark.parametrize("num_rows", [1, 8, 65, 256, 512])
def test_the_rule_shares_k_out_whole(format: Format, shape: tuple[int, int], num_rows: int):
    n, k = shape
    config = mosaic_gpu.rule(num_rows, n, k, format)
    lanes = k // 2 if format.dtype == "int4" else k
    assert n % (config.warpgroups * 64) == 0
    assert lanes % (config.tile * config.splits) == 0
    group = mosaic_gpu._lanes(format, format.group_size or k)
    piece = mosaic_gpu._piece(format, k, config.tile)
    assert group % piece == 0 and config.tile % piece == 0 and piece >= 16
    assert 2 <= config.stages <= mosaic_gpu.MOST_STAGES


@pytest.mark.parametrize("num_rows", range(1, 600))
def test_blocks_of_rows_are_few_and_alike(num_rows: int):
    width = mosaic_gpu._width(num_rows)
    assert width % 8 == 0 and width <= 128
    blocks = -(-num_rows // width)
    assert blocks == -(-num_rows // 128) and blocks * width - num_rows < 8 * blocks


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="all is refused there")
@pytest.mark.parametrize(
    ("format", "n", "k", "dtype", "message"),
    [
        (INT4, 4096, 4096, "float32", "x.dtype is float32; allowed with mosaic_gpu: bfloat16"),
        (INT4, 4000, 4096, "bfloat16", "N is 4000; mosaic_gpu needs a multiple of 64"),
        (INT4_16, 64, 4096, "bfloat16", "K is 4096 and group_size 16; .* of 64 and 32 with int4"),
        (W8A8, 64, 96, "bfloat16", "K is 96 and group_size None; .* of 64 and 16 with int8"),
    ],
)
def test_what_it_cannot_do_is_refused_and_left_to_xla(
    format: Format, n: int, k: int, dtype: str, message: str
):
    target = Target("gpu", H200)
    x = jax.ShapeDtypeStruct((8, k), dtype)
    args = [x, *format.shapes(n, k).values()]
    with pytest.raises(ValueError, match=message):
        mosaic_gpu.quant_matmul(*args, format=format, target=target)
    ops = resolve("auto", "gpu", device_kind=H200)
    assert ops.name == "mosaic_gpu"
    out = jax.eval_shape(partial(ops.quant_matmul, format=format), *args)
    assert out.shape == (8, n)
