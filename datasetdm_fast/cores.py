"""CPU cores of this process."""

import os


def count_cores() -> int:
    """Cores this process may run on; macOS does not tell, and gives it all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
