"""Writes goldens/formats.npz: small layers packed and de-quantised by the formats' own libraries.

Run by hand, with torch and transformers, where these packages or their unpacked sources are on
PYTHONPATH (none needs a GPU or a build; the tests need none of them): compressed-tensors 0.20.0,
auto-gptq 0.7.1, autoawq 0.2.9, gptqmodel 4.2.5; fp8 blocks are transformers'.
`python tests/quant/make_goldens.py`

Keys are "case/part|DTYPE", DTYPE a safetensors name, arrays of bfloat16 and fp8 stored as their
bits; "case/expected" is what the library de-quantises to, and "configs" is JSON with every case's
quantization_config.
"""

import importlib
import json
import sys
import types
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import torch

OUT = Path(__file__).parent / "goldens" / "formats.npz"
# imported without their __init__.py, which imports what training and serving need
BARE = (
    "auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear", "awq", "awq.modules",
    "awq.modules.linear", "gptqmodel", "gptqmodel.models", "gptqmodel.nn_modules",
)  # fmt: skip
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8",
    torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}

Tensors = dict[str, torch.Tensor]
arrays: dict[str, np.ndarray] = {}
configs: dict[str, Any] = {}


def add(case: str, config: dict[str, Any], parts: Tensors, expected: torch.Tensor) -> None:
    """`expected` is [K, N]."""
    configs[case] = config
    for part, tensor in {**parts, "expected": expected}.items():
        stored = tensor.detach().contiguous()
        bits = stored.view(BITS[stored.dtype]) if stored.dtype in BITS else stored
        arrays[f"{case}/{part}|{NAMES[stored.dtype]}"] = bits.numpy()


def bare_packages() -> None:
    for name in BARE:
        parent = name.rpartition(".")[0]
        spec = PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
        if spec is None:
            raise SystemExit(f"{name} is not on PYTHONPATH")
        module = types.ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = module


def layer(shape: tuple[int, int], bits: int, groups: torch.Tensor, lowest_zero: int):
    """A linear layer whose weights are exactly integers less zero points times scales.

    shape is (K, N), `groups` the group of each input. Returns it with scales and zeros [G, N].
    """
    num_groups = int(groups.max()) + 1
    values = torch.randint(0, 2**bits, shape)
    zeros = torch.randint(lowest_zero, 2**bits, (num_groups, shape[1])).float()
    scales = (torch.rand(num_groups, shape[1]) * 0.05 + 0.001).half().float()
    linear = torch.nn.Linear(*shape, bias=False)
    linear.weight.data = ((values - zeros[groups]) * scales[groups]).T.contiguous()
    return linear, scales, zeros


def awq() -> None:
    gemm = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    unpack = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    linear, scales, zeros = layer((32, 32), 4, torch.arange(32) // 16, 0)
    packed = gemm.from_linear(linear, 4, 16, scales=scales, zeros=zeros.int())
    parts = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    add("awq", config, parts, unpack(*parts.values(), 4, 16))


def gptq(
    case: str, bits: int, group_size: int, *, act_order: bool, v2: bool, convert: bool = False
) -> None:
    """AutoGPTQ, layout 1, or GPTQModel, layout 2 (`v2`), which it may `convert` to layout 1."""
    shape = (32, 32)
    groups = torch.arange(32) // (32 if group_size == -1 else group_size)
    if act_order:
        groups = groups[torch.randperm(32)]
    # layout 1 stores zero points less one, and its packer cannot store -1
    linear, scales, zeros = layer(shape, bits, groups, 0 if v2 else 1)
    linear.half()
    if v2:
        kind = importlib.import_module("gptqmodel.nn_modules.qlinear.torch").TorchQuantLinear
        packed = kind(bits, group_size, False, act_order, *shape, pack_dtype=torch.int32)
        packed.pack(linear, scales.T.clone(), zeros.T.clone(), groups.int())
        packed.post_init()
        expected = packed.dequantize_weight()
        if convert:
            model = importlib.import_module("gptqmodel.utils.model")
            model.convert_gptq_v2_to_v1_format_module(packed, types.SimpleNamespace(bits=bits))
    else:
        kind = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
        packed = kind(bits, group_size, *shape, False)
        packed.pack(linear, scales.T.clone(), zeros.T.clone(), groups.int())
        expected = packed(torch.eye(32).half())
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order,
        "sym": False, "checkpoint_format": "gptq_v2" if v2 and not convert else "gptq",
    }  # fmt: skip
    names = ("qweight", "qzeros", "scales", "g_idx")
    add(case, config, {name: getattr(packed, name) for name in names}, expected)


def compressed(case: str, layout: str, shape: tuple[int, int], dtype: torch.dtype, **weights: Any):
    """compressed-tensors; shape is (K, N), `weights` the arguments of its QuantizationArgs."""
    base = importlib.import_module("compressed_tensors.compressors.base").BaseCompressor
    quantization = importlib.import_module("compressed_tensors.quantization")
    helpers = importlib.import_module("compressed_tensors.quantization.utils")
    args = quantization.QuantizationArgs(**weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = base.get_value_from_registry(layout)
    matrix = torch.randn(shape[1], shape[0])
    grouped = _by_scale(matrix, args)
    scale, zero = helpers.calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    state = {"weight": matrix.to(dtype), "weight_scale": scale.to(dtype)}
    if zero is not None:
        state["weight_zero_point"] = zero
    parts = compressor.compress(state, scheme)
    expected = compressor.decompress(parts, scheme)["weight"]
    dumped = scheme.model_dump(mode="json")
    config = {"quant_method": "compressed-tensors", "format": layout}
    config |= {"config_groups": {"group_0": dumped}, "ignore": ["lm_head"]}
    add(case, config, parts, expected.T)


def _by_scale(matrix: torch.Tensor, args: Any) -> torch.Tensor:
    """Weights [N, K] with those that share a scale along the last axis."""
    num_rows, num_columns = matrix.shape
    if args.strategy == "tensor":
        return matrix.reshape(1, -1)
    if args.strategy == "channel":
        return matrix.reshape(num_rows, 1, -1)
    if args.strategy == "group":
        return matrix.reshape(num_rows, -1, args.group_size)
    height, width = args.block_structure
    down, across = -(-num_rows // height), -(-num_columns // width)
    padded = torch.zeros(down * height, across * width)
    padded[:num_rows, :num_columns] = matrix
    blocks = padded.reshape(down, height, across, width).transpose(1, 2)
    return blocks.reshape(down, across, -1)


def fp8_blocks() -> None:
    fine = importlib.import_module("transformers.integrations.finegrained_fp8")
    weight = torch.randn(16, 32).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2) * 0.01
    expected = fine._dequantize_fp8_weight(weight, scales, [8, 16], torch.float32)
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 16]}
    add("fp8-block", config, {"weight": weight, "weight_scale_inv": scales}, expected.T)


def main() -> None:
    torch.manual_seed(0)
    torch.compiler.set_stance("force_eager")  # gptqmodel compiles what it de-quantises with
    bare_packages()
    awq()
    gptq("gptq-2", 2, 16, act_order=False, v2=False)
    gptq("gptq-3-act-order", 3, 16, act_order=True, v2=False)
    gptq("gptq-4-act-order", 4, 16, act_order=True, v2=False)
    gptq("gptq-4-channel", 4, -1, act_order=False, v2=False)
    gptq("gptq-8", 8, 16, act_order=False, v2=False)
    gptq("gptq-v2-3", 3, 16, act_order=False, v2=True)
    gptq("gptq-v2-4-act-order", 4, 16, act_order=True, v2=True)
    for bits in (2, 4, 8):
        case = f"gptq-{bits}-converted"
        gptq(case, bits, 16, act_order=False, v2=True, convert=True)
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    group = {"strategy": "group", "group_size": 16}
    channel, tensor = {"strategy": "channel"}, {"strategy": "tensor"}
    block = {"strategy": "block", "block_structure": [8, 16]}
    packed, ints, floats = "pack-quantized", "int-quantized", "float-quantized"
    size, odd = (32, 16), (36, 20)
    compressed("ct-pack4-group", packed, size, f16, num_bits=4, **group)
    compressed("ct-pack4-group-zeros", packed, size, bf16, num_bits=4, symmetric=False, **group)
    compressed("ct-pack4-channel-odd", packed, odd, f32, num_bits=4, symmetric=False, **channel)
    compressed("ct-pack8-group", packed, size, bf16, num_bits=8, **group)
    compressed("ct-int8-channel", ints, size, bf16, num_bits=8, **channel)
    compressed("ct-int8-channel-zeros", ints, size, f32, num_bits=8, symmetric=False, **channel)
    compressed("ct-int8-tensor", ints, size, f16, num_bits=8, **tensor)
    compressed("ct-fp8-channel", floats, size, bf16, num_bits=8, type="float", **channel)
    compressed("ct-fp8-tensor", floats, size, f32, num_bits=8, type="float", **tensor)
    compressed("ct-fp8-block", floats, odd, f32, num_bits=8, type="float", **block)
    fp8_blocks()
    arrays["configs"] = np.array(json.dumps(configs))
    np.savez_compressed(OUT, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{OUT}: {len(arrays)} arrays, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
