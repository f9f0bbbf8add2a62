"""quant_matmul: every implementation that runs here against the definitions in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Format
from pallas_kernels.quant_matmul import dequantise, pack_int4, unpack_int4, xla
from tests.kernels import quant_cases
from tests.kernels.quant_cases import FORMATS, FP8, W8A8, W8A16, Weight

pytestmark = pytest.mark.optimised

IMPLEMENTATIONS = ("reference", "xla", "interpret")
SIZES = [(1, 96, 96), (2, 40, 192), (4, 7, 96), (9, 200, 384), (13, 33, 96), (40, 64, 576)]
# The interpreter is slow: every other size.
PAIRS = [
    (impl, size)
    for impl in IMPLEMENTATIONS
    for size in (SIZES[1::2] if impl == "interpret" else SIZES)
]


def compute(impl: str, x: np.ndarray, weight: Weight) -> np.ndarray:
    """The op, compiled."""
    op = jax.jit(partial(pallas_kernels.resolve(impl).quant_matmul, format=weight.format))
    out = op(jnp.asarray(x), weight.data, weight.scales, weight.zeros)
    assert out.dtype == jnp.float32
    return np.asarray(out)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 outputs, so that small weights have several, the last of them overlapping."""
    monkeypatch.setattr(xla, "TILE_SIZE", 16 * 96)


@pytest.mark.parametrize(("impl", "size"), PAIRS, ids=str)
@pytest.mark.parametrize("format", [W8A8, W8A16], ids=["w8a8", "w8a16"])
def test_integers_are_their_definition_bit_for_bit(
    impl: str, format: Format, size: tuple[int, int, int]
):
    t, n, k = size
    x, weight = quant_cases.rows(t, k), quant_cases.make(format, n, k)
    np.testing.assert_array_equal(
        compute(impl, x, weight), quant_cases.integer_definition(x, weight)
    )


@pytest.mark.parametrize(("impl", "size"), PAIRS, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_float64_on_the_same_values(impl: str, name: str, size: tuple[int, int, int]):
    t, n, k = size
    x, weight = quant_cases.rows(t, k, seed=1), quant_cases.make(FORMATS[name], n, k, seed=2)
    want, allowed = quant_cases.float64_definition(x, weight)
    error = np.abs(compute(impl, x, weight) - want)
    # Below float32's smallest normal number a CPU rounds to zero.
    assert (error <= allowed + 1e-37).all(), (error / (allowed + 1e-37)).max()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("wrong", ["scale", "value", "half"])
def test_the_tolerance_finds_a_fault(name: str, wrong: str):
    """One scale off by 1e-3, one value off by the smallest step, halves of a byte swapped."""
    x, weight = quant_cases.rows(9, 192), quant_cases.make(FORMATS[name], 40, 192)
    want, allowed = quant_cases.float64_definition(x, weight)
    data, scales = weight.data.copy(), weight.scales.copy()
    row = int(np.argmax(weight.scales.reshape(40, -1).min(axis=1)))  # no scale of it is zero
    if wrong == "scale":
        scales[row] *= np.float32(1 + 1e-3)
    elif wrong == "value":
        data.view(np.uint8)[row, 0] ^= 1
    else:
        data.view(np.uint8)[row] = np.roll(data.view(np.uint8)[row], 1)
    changed = Weight(weight.format, weight.values, data, scales, weight.zeros)
    assert (np.abs(compute("xla", x, changed) - want) > allowed).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["w8a8", "w8a16", "int8", "int4_zeros_32", "fp8"])
def test_rows_of_two_bytes(impl: str, dtype: str, name: str):
    for t in (3, 20):
        x = quant_cases.rows(t, 96, dtype=dtype)
        weight = quant_cases.make(FORMATS[name], 24, 96)
        want, allowed = quant_cases.float64_definition(x.astype(np.float32), weight)
        assert (np.abs(compute(impl, x, weight) - want) <= allowed + 1e-37).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_rows", [5, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_depends_on_no_other(impl: str, name: str, num_rows: int):
    """NaN, infinity and huge numbers in some rows change no bit of the others, and show in theirs;
    what is beyond a format's range is clipped, never wrapped."""
    x, weight = quant_cases.rows(num_rows, 96), quant_cases.make(FORMATS[name], 40, 96)
    clean = compute(impl, x, weight)
    dirty = x.copy()
    dirty[0, 5], dirty[1, 7], dirty[2], dirty[3] = np.nan, -np.inf, 3e38, np.nan
    out = compute(impl, dirty, weight)
    np.testing.assert_array_equal(out[4:], clean[4:])
    assert not np.isfinite(out[[0, 1, 3]]).any()
    assert not np.isnan(x).any() and not clean[4].any()
    zero = weight.scales.reshape(40, -1).max(axis=1) == 0
    assert not clean[:, zero].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_largest_sum_does_not_wrap(impl: str):
    """The longest K that is allowed, every product 127 * -128."""
    k = 2**16
    data = np.full((16, k), -128, np.int8)
    weight = Weight(W8A8, data, data, np.ones(16, np.float32), None)
    x = np.full((1, k), 2.0, np.float32)
    want = np.float32(-127 * 128 * k) * (np.float32(2.0) / np.float32(127))
    np.testing.assert_array_equal(compute(impl, x, weight), np.full((1, 16), want))
    with pytest.raises(ValueError, match="K is 65537"):
        W8A8.shapes(1, k + 1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_largest_sums_of_digits_do_not_wrap(impl: str):
    """As above with both digits 127: the sum of the values themselves would need 38 bits."""
    k = 2**16
    data = np.full((16, k), -128, np.int8)
    weight = Weight(W8A16, data, data, np.ones(16, np.float32), None)
    x = np.full((1, k), 2.0, np.float32)
    np.testing.assert_array_equal(
        compute(impl, x, weight), quant_cases.integer_definition(x, weight)
    )


def test_every_e4m3_value_is_read_exactly():
    bits = np.arange(256, dtype=np.uint8)
    bits = bits[(bits & 0x7F) != 0x7F].reshape(1, -1)  # without NaN
    values = bits.view(quant_cases.E4M3)
    got = jax.jit(xla._e4m3_to_float32)(bits)
    np.testing.assert_array_equal(np.asarray(got), values.astype(np.float32))


def test_int4_packs_and_unpacks_all_values():
    q = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    for group in (2, 4, 8):
        packed = pack_int4(q, group)
        assert packed.dtype == np.uint8 and packed.shape == (2, 4)
        np.testing.assert_array_equal(unpack_int4(packed, group), q)
        np.testing.assert_array_equal(np.asarray(pack_int4(jnp.asarray(q), group)), packed)
        np.testing.assert_array_equal(np.asarray(unpack_int4(jnp.asarray(packed), group)), q)
    # Element j of a group is in the low half of byte j, element j + 2 in the high half.
    assert pack_int4(q[:1], 4)[0].tolist() == [0x20, 0x31, 0x64, 0x75]


@pytest.mark.parametrize("name", FORMATS)
def test_dequantised_is_the_weight(name: str):
    weight = quant_cases.make(FORMATS[name], 24, 96)
    arrays = weight.data, jnp.asarray(weight.scales), _jax(weight.zeros)
    got = dequantise(jnp.asarray(arrays[0]), *arrays[1:], weight.format)
    # A product of two float32 numbers, rounded once; (q - zero) is a small integer.
    np.testing.assert_allclose(np.asarray(got), weight.float64(), rtol=2**-24, atol=0)


def _jax(a: np.ndarray | None):
    return None if a is None else jnp.asarray(a)


@pytest.mark.parametrize("num_rows", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("name", ["w8a8", "w8a16", "int8", "int4_32", "int4_zeros_32", "fp8"])
def test_no_float_weight_is_written_on_a_cpu(monkeypatch, name: str, num_rows: int):
    """What XLA allocates beside inputs and outputs is far less than the weight, as int8 even; but
    fp8's bits are copied."""
    monkeypatch.undo()  # tiles as they are
    format, n, k = FORMATS[name], 4096, 1536
    op = partial(pallas_kernels.resolve("xla", "cpu").quant_matmul, format=format)
    x = jax.ShapeDtypeStruct((num_rows, k), jnp.float32)
    memory = jax.jit(op).lower(x, *format.shapes(n, k).values()).compile().memory_analysis()
    assert memory is not None
    activations = 4 * num_rows * (k + n) * 4  # rows as digits, their sums, the output of the loop
    allowed = 4 * xla.TILE_SIZE * 3 + activations
    assert memory.temp_size_in_bytes < allowed + (n * k if name == "fp8" else 0)
    assert allowed < 2 * n * k  # or the test would say nothing: a float16 weight has as much


@pytest.mark.parametrize("name", FORMATS)
def test_sums_over_the_result_are_right(monkeypatch, name: str):
    """XLA:CPU may fuse what follows with the dots of a weight of few outputs, wrongly."""
    monkeypatch.undo()  # tiles as they are
    rows, n, k = 40, 192, 576
    weight = quant_cases.make(FORMATS[name], n, k, seed=3)
    arrays = weight.data, weight.scales, weight.zeros
    op = partial(pallas_kernels.resolve("xla", "cpu").quant_matmul, format=weight.format)
    x = jnp.asarray(quant_cases.rows(rows, k, seed=4))

    def then_sum(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        out = op(x, *arrays)
        return out + jnp.sum(out, axis=1, keepdims=True)

    want = np.asarray(op(x, *arrays), np.float64)
    want += want.sum(axis=1, keepdims=True)
    # A sum of 192 float32 in another order; the fault is off by 65 times the largest.
    np.testing.assert_allclose(jax.jit(then_sum)(x, *arrays), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", FORMATS)
def test_an_accelerator_s_form_computes_the_same(platform: str, name: str):
    """The form that accelerators fuse, run here: float32 rows lose nothing in it."""
    x, weight = quant_cases.rows(9, 192), quant_cases.make(FORMATS[name], 40, 192)
    op = jax.jit(
        partial(pallas_kernels.resolve("xla", platform).quant_matmul, format=weight.format)
    )
    out = np.asarray(op(x, weight.data, weight.scales, weight.zeros))
    want, allowed = quant_cases.float64_definition(x, weight)
    assert (np.abs(out - want) <= allowed + 1e-37).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int3"}, "dtype is 'int3'; allowed: int8, int4, float8_e4m3fn"),
        ({"dtype": "int4", "group_size": 3}, "group_size is 3; int4 needs an even one"),
        ({"dtype": "int8", "group_size": 0}, "group_size is 0"),
        ({"dtype": "int8", "zero_points": True}, "they need an integer dtype and groups"),
        ({"dtype": "int4", "activations": "int8"}, "a weight of their own dtype"),
        ({"dtype": "int8", "activations": "int8", "group_size": 32}, "without groups"),
        ({"dtype": "int8", "activations": "int4"}, "activations is 'int4'; allowed: float"),
        ({"dtype": "int4", "activations": "int16"}, "int16: int8"),
        ({"dtype": "int8", "activations": "int16", "group_size": 32}, "without groups"),
    ],
)
def test_a_format_that_makes_no_sense_is_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Format(**fields)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_arguments_that_do_not_fit_are_named(impl: str):
    op = pallas_kernels.resolve(impl).quant_matmul
    w = quant_cases.make(FORMATS["int4_zeros_32"], 24, 96)
    data, scales, zeros = jnp.asarray(w.data), jnp.asarray(w.scales), _jax(w.zeros)
    x = jnp.ones((2, 96))
    for args, message in (
        ((x[0], data, scales, zeros), r"x has shape \(96,\)"),
        ((x[:, :64], data, scales, zeros), r"data has shape \(24, 48\)"),
        ((x[:, :48], data, scales, zeros), "group_size is 32; it must divide K, 48"),
        ((x, data.astype(jnp.int8), scales, zeros), "data.dtype is int8; allowed: uint8"),
        ((x, data, scales[:, :2], zeros), r"scales has shape \(24, 2\)"),
        ((x, data, scales, None), "zeros is None"),
        ((x.astype(jnp.int32), data, scales, zeros), "x.dtype is int32"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*args, format=w.format)
    with pytest.raises(ValueError, match="zeros is given, but the format has no zero points"):
        op(x, data, scales, zeros, format=FORMATS["int4_32"])
    assert FP8 != W8A8
