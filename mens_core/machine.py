"""This machine, as far as it can be known without a tensor library."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from mens_core.plan import Machine

__all__ = ["processors", "this_machine"]

# What a driver leaves in the file system while it is loaded: NVIDIA's, AMD's.
_DRIVERS = {"nvidia": ("/dev/nvidiactl", "/dev/dxg"), "amd": ("/dev/kfd",)}
_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def this_machine() -> Machine:
    """Look at the operating system; nothing is measured."""
    return Machine(
        platform=platform.platform(),
        processor=_processor(),
        python=platform.python_version(),
        cpu_count=processors(),
        memory_bytes=_memory(),
        accelerators=tuple(name for name, files in _DRIVERS.items() if any(Path(file).exists() for file in files)),
    )


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> int:
    """Bytes of memory, or of the control group this process lives in if that has less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _GROUP_LIMITS:
        try:
            limit = Path(path).read_text(encoding="ascii").strip()
        except OSError:  # no control groups, or of the other version
            continue
        sizes += [int(limit)] if limit.isdigit() else []
    return min(sizes)
