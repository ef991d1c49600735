"""Where it was timed: processor or GPU, drivers, versions, the build."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from typing import Any

import torch

from benchmarks.measure import cache_bytes
from dsct_kernels.__main__ import cpu_model


def cpu_flags() -> list[str]:
    """The vector instruction sets that this processor offers."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith("flags")).split(":")[1].split()
    except (OSError, StopIteration):
        return []
    return [flag for flag in flags if flag.startswith(("avx", "fma", "f16c", "amx"))]


def huge_pages() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            setting = file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        setting = "unknown"
    return f"{setting}, THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', 'unset')}"


def driver_version() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def build_info() -> dict[str, Any]:
    from dsct_kernels import backends

    try:
        return {key: str(value) for key, value in backends.build_info().items()}
    except ImportError as error:
        return {"native": f"not built: {error}"}


def describe(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to know what machine the figures are from."""
    import dsct_kernels

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    machine: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "name": cpu_model(),
        "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": huge_pages(),
        "cache_bytes": cache_bytes(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "dsct_kernels": getattr(dsct_kernels, "__version__", "unknown"),
        "build": build_info(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }
    return machine
