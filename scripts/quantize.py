"""Quantises a model into a folder that jaxinfer and other engines load.

    python scripts/quantize.py default OUT --method rtn
    python scripts/quantize.py MODEL OUT --method gptq --calibration text.txt
    python scripts/quantize.py MODEL OUT --method awq --group-size 64 --calibration text.txt
    python scripts/quantize.py MODEL OUT --method kv --calibration text.txt

MODEL is a safetensors folder, a .gguf file, a hub id, or "default", the embedded SmolLM2-135M.

  rtn   Rounds to the nearest. No calibration, seconds; the weakest at 4 bits, fine at 8.
        Written as compressed-tensors.
  awq   Scales inputs that are large on average before rounding. 4 bits. Written as AutoAWQ (gemm).
  gptq  Rounds column by column and lets the columns to come make up for the error: the strongest
        where the calibration text is like the use. Written as AutoGPTQ.
  kv    Leaves the weights and adds static scales for an fp8 KV cache (compressed-tensors), also
        to a model that is quantised already.

The calibration text is a UTF-8 file, best of the kind that the model will be used for. 128
sequences of 512 tokens (--num-sequences, --sequence-length) are about 300 KB of English; more
change little. Embedding, norms and output head stay float. Groups are inputs that share a scale:
smaller ones are more exact and take more room (4 bits in groups of 32: 4.5 bits a weight, of 128:
4.1).

It goes layer by layer; memory holds one layer and what the text is at that layer. Ctrl-C is safe:
the same command goes on after the last finished layer, and the folder is then the same as without.
"""

import argparse
import sys

from jaxinfer.errors import JaxInferError
from jaxinfer.quantize.run import quantize
from jaxinfer.quantize.settings import METHODS, Request


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad arguments or files, 130 interrupted."""
    args = _parser().parse_args(argv)
    request = Request(
        method=args.method,
        bits=args.bits,
        group_size=args.group_size,
        symmetric=args.symmetric,
        act_order=args.act_order,
        layout=args.format,
        num_sequences=args.num_sequences,
        sequence_length=args.sequence_length,
    )
    model = None if args.model == "default" else args.model
    try:
        summary = quantize(model, args.out, request, calibration=args.calibration)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (JaxInferError, OSError) as error:
        print(f"quantize: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(filter(None, [summary.text(), f"written: {args.out}"])))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help='folder, .gguf file, hub id or "default"')
    parser.add_argument("out", metavar="OUT", help="folder to make; nothing is overwritten")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--bits", type=int, help="4 or 8; awq has 4 (default: 4, kv 8)")
    parser.add_argument(
        "--group-size",
        type=int,
        help="inputs that share a scale, a divisor of every matrix's inputs; -1: one scale for "
        "each output (default: the largest of 128, 64, 32 that fits; rtn at 8 bits -1)",
    )
    points = parser.add_mutually_exclusive_group()
    points.add_argument(
        "--symmetric", dest="symmetric", action="store_true", default=None, help="no zero points"
    )
    points.add_argument(
        "--asymmetric",
        dest="symmetric",
        action="store_false",
        default=None,
        help="zero points (default: symmetric, awq asymmetric)",
    )
    parser.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        help="gptq: inputs that are largest first (desc_act); more exact (default: on)",
    )
    parser.add_argument(
        "--format",
        help="rtn: int-quantized or pack-quantized; at 8 bits vLLM takes weights alone only "
        "pack-quantized (default: pack-quantized, at 8 bits int-quantized)",
    )
    parser.add_argument("--calibration", metavar="FILE", help="UTF-8 text; all methods but rtn")
    parser.add_argument("--num-sequences", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512, metavar="TOKENS")
    return parser


if __name__ == "__main__":
    sys.exit(main())
