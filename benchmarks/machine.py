"""What a figure was measured on: the machine's name, parts and versions. No jax in this process: a
parent that holds the accelerator would leave none to its children.
"""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("jaxinfer", "jax", "jaxlib", "flax", "numpy", "transformers", "torch")


# What a processor's speed at matrix products hangs on: the flag that Linux has for it, its name.
_INSTRUCTIONS = (
    ("amx_tile", "AMX"),
    ("avx512_bf16", "AVX-512 with bf16"),
    ("avx512_vnni", "AVX-512 with VNNI"),
    ("avx512f", "AVX-512"),
    ("avx2", "AVX2"),
)


def _cpuinfo(field: str) -> str:
    """The first processor's line; "" where the system has none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instructions() -> str:
    """The CPU's widest vector instructions; "" where the system does not say. Machines of one model
    name may differ in them, and then in every ratio."""
    flags = set(_cpuinfo("flags").split())
    return next((name for flag, name in _INSTRUCTIONS if flag in flags), "")


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Of the machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return 0


def load() -> float | None:
    """Processes that ran or waited for a core in the last minute, on average; None where the
    system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@functools.cache
def device() -> tuple[str, str]:
    """(platform, device kind) of jax's first device, asked in another process.

    Raises SystemExit where jax finds none.
    """
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"jax finds no device: {done.stderr.strip()[-500:]}")
    found, kind = done.stdout.strip().splitlines()[-1].split("|")
    return found, kind


def name() -> str:
    """Of the folder of results: the accelerator's kind, or the CPU's model, instructions, cores."""
    found, kind = device()
    text = f"{_cpu_model()} {instructions()} {num_cores()} cores" if found == "cpu" else kind
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def about() -> dict[str, Any]:
    """Machine and versions, for the head of a result file."""
    found, kind = device()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "name": name(),
        "platform": found,
        "device": kind,
        "cpu": _cpu_model(),
        "instructions": instructions(),
        "cores": num_cores(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }
