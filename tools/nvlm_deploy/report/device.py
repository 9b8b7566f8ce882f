"""What a measurement ran on, in one line."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPU_FACTS = Path("/proc/cpuinfo")


def device_name() -> str:
    """As `Intel(R) Xeon(R) Platinum 8481C, 2 cores, Linux x86_64`; counts the cores this process may use."""
    cores = len(os.sched_getaffinity(0))
    return f"{_processor()}, {cores} cores, {platform.system()} {platform.machine()}"


def _processor() -> str:
    lines = _CPU_FACTS.read_text(encoding="utf-8").splitlines() if _CPU_FACTS.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"
