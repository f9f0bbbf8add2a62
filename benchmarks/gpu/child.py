"""One section in a process of its own: a JSON object a line on standard output."""

import argparse
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import scale as scales

PEERS = ("transformers", "batching")


def main(args: argparse.Namespace) -> int:
    """Print the section's rows; what ends it early is a last row {"failed": text} and status 1."""
    deadline = time.monotonic() + args.seconds
    name = args.sections[0]
    try:
        for row in _rows(name, args, deadline):
            print(json.dumps(row), flush=True)
    except Exception as error:  # told to the parent, which keeps the rows there are
        traceback.print_exc(file=sys.stderr)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps({"failed": f"{name}: {text[:1000]}"}), flush=True)
        return 1
    return 0


def _rows(name: str, args: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    scale = scales.TOY if args.toy else scales.FULL
    work = Path(args.work)
    if name in PEERS:
        if importlib.util.find_spec("torch") is None:
            kind = "left_out" if args.toy else "failed"
            yield {kind: f"{name}: torch is not installed"}
            return
        from benchmarks.gpu import peer

        yield from peer.run(name, scale, work / "model", deadline)
        return
    # Imported here: a peer's process must not touch the device through jax.
    from benchmarks import roofline
    from benchmarks.gpu import context, ours, stream

    measured = json.loads(args.ceilings)
    ctx = context.Context(
        scale,
        work / "model",
        work / "cache",
        Path(args.profile) if args.profile else work / "traces",
        args.begun,
        deadline,
        roofline.Limits(**measured) if measured else None,
    )
    run = stream.throughput if name == "throughput" else getattr(ours, name)
    try:
        yield from run(ctx)
    except context.OutOfTime:
        yield {"left_out": f"{name}: the rest, no time"}
