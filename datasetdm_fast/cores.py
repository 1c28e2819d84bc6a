"""The processor, and its cores for this process."""

import os
import platform
import re
from contextlib import suppress
from pathlib import Path


def count_cores() -> int:
    """Cores this process may run on; macOS does not tell, and gives it all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name_processor() -> str:
    """What Linux calls the processor; where that is not told its kind, such as arm64."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"model name\s*: (.+)", text)
    return model[1].strip() if model else platform.machine()
