"""Chips that need not be there: what their compilers are called, one compile, and what it says.

XLA and Mosaic compile to machine code on any x86 machine: libtpu for TPUs; for GPUs jax's CUDA
plugin with a description of the chip (h200_target.txtpb, a GpuTargetConfigProto). Neither needs the
hardware, a driver or a toolkit.
"""

import importlib.util
import inspect
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels import tuning
from pallas_kernels.common import Target

# What jax, libtpu and the CUDA plugin read when they are loaded: no device is looked for, no cloud
# metadata server is asked, and the GPU compiler says what it made of each kernel.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it libtpu locks out every other process
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
}
H200_TARGET = Path(__file__).parent / "h200_target.txtpb"

# A donated array below this may be copied: index vectors and the like.
MIN_POOL_BYTES = 1 << 20


@dataclass(frozen=True)
class Chip:
    """`device_kind` is jax's name; `topology` what its compiler calls a machine of few chips;
    `page_size` the tokens of a page that programs for it use."""

    name: str
    platform: str
    device_kind: str
    topology: str
    page_size: int

    @property
    def target(self) -> Target:
        return Target(self.platform, self.device_kind)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", "TPU v4", "v4:2x2x1", 128),
        Chip("v5e", "tpu", "TPU v5 lite", "v5e:1x1", 128),
        Chip("v5p", "tpu", "TPU v5", "v5p:2x2x1", 128),
        Chip("v6e", "tpu", "TPU v6 lite", "v6e:1x1", 128),
        Chip("tpu7x", "tpu", "TPU7x", "tpu7x:1x1x1", 128),
        Chip("h200", "gpu", "NVIDIA H200", "h200", 64),
    )
}


@dataclass(frozen=True)
class Program:
    """Something to compile: `function(*args)`, where args are pytrees of ShapeDtypeStruct.

    `donate` names the arguments (or gives their positions) whose memory the outputs take: every
    array among them of 1 MiB or more must be aliased and never copied. `packed` names those with
    quantised weights, none of which may be written whole as floats. `refused` says why the
    implementation does not do this; then nothing is compiled. `may_copy` says why a copy of the
    donated arrays (with `may_copy_dtype`, of those of that dtype alone) is no failure here. `tuned`
    is the entry of the chip's file that must be what decides the block sizes.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    donate: tuple[str | int, ...] = ()
    packed: tuple[str | int, ...] = ()
    note: str = ""
    refused: str | None = None
    may_copy: str | None = None
    may_copy_dtype: str | None = None
    tuned: tuning.Entry | None = None


@dataclass(frozen=True)
class Result:
    """What came of one program on one chip. Memory in bytes; None where there is nothing to say.

    `kernel_memory` is the largest VMEM or shared memory of its kernels; `registers` the most of any
    GPU kernel and `spills` the bytes that their threads spill; `memory` the program's arguments,
    temporaries, outputs and aliased outputs; `copies` says that donated memory is copied, and why
    that is tolerated.
    """

    chip: str
    name: str
    note: str = ""
    refused: str | None = None
    problems: tuple[str, ...] = ()
    copies: str | None = None
    kernel_memory: int | None = None
    registers: int | None = None
    spills: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        if self.problems:
            return "FAILED"
        return "refused" if self.refused else "copies" if self.copies else "ok"


def missing_compilers(chips: Sequence[Chip]) -> list[str]:
    """For each platform of `chips` whose compiler is not installed, what to install."""
    platforms = {chip.platform for chip in chips}
    version = jax.__version__
    wanted = []
    if "tpu" in platforms and not _installed("libtpu"):
        wanted.append("the TPU compiler is not installed: pip install libtpu")
    if "gpu" in platforms and not any(map(_installed, _CUDA_PLUGINS)):
        wheels = f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} absl-py"
        wanted.append(f"the GPU compiler is not installed: pip install --no-deps {wheels}")
    return wanted


_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not there
        return False


@lru_cache
def device_of(chip: Chip) -> Any:
    """jax's device for `chip`, to compile for and nothing else."""
    if chip.platform == "tpu":
        found = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    else:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip.topology,
            target_config=H200_TARGET.read_text(),
            topology="1x1x1",
        )
    device = found.devices[0]
    if device.device_kind != chip.device_kind:
        raise RuntimeError(f"{chip.name} is {device.device_kind!r}, not {chip.device_kind!r}")
    return device


def lower(program: Program, chip: Chip) -> Any:
    """`program` traced and lowered for `chip`."""
    device = device_of(chip)
    sharding = SingleDeviceSharding(device)
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), program.args
    )
    names = tuple(x for x in program.donate if isinstance(x, str))
    numbers = tuple(x for x in program.donate if isinstance(x, int))
    # Kernels ask which chip they are traced for; there is no default device to tell them.
    abstract = AbstractDevice(
        device_kind=device.device_kind,
        num_cores=device.num_cores if chip.platform == "tpu" else device.core_count,
        platform=chip.platform,
    )
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        jitted = jax.jit(
            program.function, donate_argnames=names or None, donate_argnums=numbers or None
        )
        return jitted.lower(*args)


def compile_program(program: Program, chip: Chip, log_path: Path | None = None) -> Result:
    """Compiles `program` for `chip` and judges what came out; errors become `problems`. What the
    compilers print is in `log_path` until the next one, if that is given."""
    if program.refused:
        return Result(chip.name, program.name, program.note, refused=program.refused)
    begun = time.perf_counter()
    log: list[str] = []
    try:
        with captured(log, log_path), tuning.trial() as lookups:
            compiled = lower(program, chip).compile()
            text = compiled.as_text()
            stats = compiled.memory_analysis()
    except Exception as error:
        return Result(
            chip.name,
            program.name,
            program.note,
            problems=(f"{type(error).__name__}: {error}",),
            seconds=time.perf_counter() - begun,
        )
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "output": stats.output_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
    }
    report = ptxas_report("".join(log)) if chip.platform == "gpu" else {}
    pools = large_arrays(program, program.donate)
    copies = problems = pool_problems(text, pools, memory["alias"])
    if program.may_copy:
        kept = [x for x in pools if program.may_copy_dtype not in (None, x.dtype.name)]
        problems = pool_problems(text, kept, memory["alias"])
    problems += float_copies(text, large_arrays(program, program.packed))
    if program.tuned and program.tuned.id not in lookups.asked:
        problems.append(f"its tuned entry is never looked up, but {sorted(set(lookups.asked))} are")
    if 'custom_call_target="mosaic_gpu' in text and "registers" not in report:
        problems.append("the GPU compiler said nothing about the kernel's registers")
    if report.get("spills"):
        where = ", ".join(spilling(log[0]))
        problems.append(f"{report['spills']} bytes of registers are spilled: {where}")
    if report.get("serialised"):
        problems.append("ptxas serialises the wgmma instructions: a potential performance loss")
    return Result(
        chip.name,
        program.name,
        program.note,
        problems=tuple(problems),
        copies=program.may_copy if copies else None,
        kernel_memory=report.get("shared_memory", vmem_of(text)),
        registers=report.get("registers"),
        spills=report.get("spills"),
        memory=memory,
        seconds=time.perf_counter() - begun,
    )


@contextmanager
def captured(log: list[str], path: Path | None = None) -> Iterator[None]:
    """What anything in this process prints, compilers in C++ too, goes to `log` instead, by way of
    a file, which is `path` if given: that outlives a compiler which takes the process with it."""
    streams: tuple[TextIO, ...] = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with open(path, "w+") if path else tempfile.TemporaryFile("w+") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            for stream in streams:
                stream.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            size = os.fstat(file.fileno()).st_size
            log.append(os.pread(file.fileno(), size, 0).decode(errors="replace"))


def ptxas_report(log: str) -> dict[str, int]:
    """Registers (the most of any kernel), bytes spilled (all kernels), dynamic shared memory (the
    most) and whether wgmma is serialised, from what ptxas and the host code's dump say."""
    report: dict[str, int] = {}
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", log)]
    if registers:
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        report = {
            "registers": max(registers),
            "spills": sum(int(stores) + int(loads) for stores, loads in spills),
            "serialised": int("wgmma.mma_async instructions are serialized" in log),
        }
    # call i32 @mosaic_gpu_launch_kernel(function, grid x 3, cluster x 3, block x 3, bytes, ...)
    launches = re.findall(r"@mosaic_gpu_launch_kernel\((ptr [^)]*)\)", log)
    sizes = [x.split(",")[10].split()[-1] for x in launches if x.count(",") >= 10]
    numbers = [int(x) for x in sizes if x.isdigit()]
    if numbers:
        report["shared_memory"] = max(numbers)
    return report


def spilling(log: str) -> list[str]:
    """Which kernels spill, by the names ptxas gives them, and how much they store."""
    found = re.findall(r"Function properties for (\S+)\s+.*?(\d+) bytes spill stores", log)
    return [f"{name} {count}" for name, count in found if int(count)]


def vmem_of(hlo: str) -> int | None:
    """The most VMEM that a Mosaic TPU kernel of the compiled program uses."""
    sizes = []
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line)
            found = re.findall(r'"memory_space":"1".*?"size":"(\d+)"', used[1]) if used else []
            sizes.append(sum(map(int, found)))
    return max(sizes, default=None)


def large_arrays(program: Program, arguments: Sequence[str | int]) -> list[jax.ShapeDtypeStruct]:
    """The arrays of these arguments, by name or position, that are as large as a pool."""
    names = list(inspect.signature(program.function).parameters) if arguments else []
    numbers = [names.index(x) if isinstance(x, str) else x for x in arguments]
    arrays = [x for i in numbers for x in jax.tree.leaves(program.args[i])]
    return [x for x in arrays if _nbytes(x) >= MIN_POOL_BYTES]


def _nbytes(x: Any) -> int:
    return int(np.prod(x.shape)) * x.dtype.itemsize


# Instructions that write their whole result. A fusion's result may be its operand, updated in
# place; what the fusion holds is in the text too.
_WRITERS = "copy|copy-start|transpose|convert|concatenate|pad|broadcast|select|reverse"
_WRITE = re.compile(rf"= \(?\w+\[([\d,]+)\](?:\{{[^}}]*\}})?[^=]*? (?:{_WRITERS})\(")


def pool_problems(hlo: str, pools: Sequence[Any], alias_bytes: int) -> list[str]:
    """What is wrong with how a compiled program treats its donated `pools`."""
    wanted = sum(map(_nbytes, pools))
    problems = []
    if alias_bytes < wanted:
        problems.append(f"{alias_bytes} of {wanted} donated bytes are aliased to an output")
    sizes = {int(np.prod(x.shape)) for x in pools}
    for line in hlo.splitlines():
        written = _WRITE.search(line)
        if written and int(np.prod([int(n) for n in written[1].split(",")])) in sizes:
            problems.append(f"a copy as large as the pool: {line.strip()[:160]}")
    return problems


_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_FLOATS = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = \(?(?:bf16|f16|f32)\[([\d,]+)\][^=]*? ([\w\-]+)\(")
_NOT_WRITTEN = ("bitcast", "parameter", "tuple", "get-tuple-element")
"""Operations that hand on what there is: a float embedding of the head's size, too."""


def float_copies(hlo: str, weights: Sequence[Any]) -> list[str]:
    """Where a compiled program writes one of the quantised `weights` (8 bits, or two values of 4 in
    a uint8) to memory as floats: results of as many floats, but for those inside fusions."""
    sizes = {
        int(np.prod(x.shape)) * (2 if x.dtype == np.uint8 else 1)
        for x in weights
        if x.dtype.itemsize == 1
    }
    fused = set(re.findall(r"fusion\([^\n]*calls=%?([\w.\-]+)", hlo))
    problems, computation = [], ""
    for line in hlo.splitlines():
        if begins := _COMPUTATION.match(line):
            computation = begins[1]
        elif computation not in fused and (written := _FLOATS.match(line)):
            size = int(np.prod([int(n) for n in written[1].split(",")]))
            if size in sizes and written[2] not in _NOT_WRITTEN:
                problems.append(f"a whole weight in floats: {line.strip()[:160]}")
    return problems
