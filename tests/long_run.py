"""As a script: one long run in this process with every sample different, telling as JSON how memory, descriptors and
threads went.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from array import array
from collections import deque
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main(number: int, out: Path, with_torch: bool) -> None:
    from datasetdm_fast import generate
    from datasetdm_fast.disk import sqlite
    from datasetdm_fast.engine import engines

    # Memory is measured here, not the disk.
    os.fsync = lambda handle: None
    sqlite.SYNCHRONOUS = "PRAGMA synchronous=OFF"
    if with_torch:
        from stub_engine import StubEngine

        class Forgetful(StubEngine):
            """One that does not write down every call."""

            def __init__(self, **choices):
                super().__init__(**choices)
                self.log = deque(maxlen=8)

        engines.open_engine = lambda model, decoder, tasks, **choices: (
            Forgetful(tasks=tasks),
            {task: {"digest": "stub", "licence": "none"} for task in tasks},
        )
    else:
        import torchless

        torchless.install()
    memory, handles, threads = array("q"), array("q"), array("q")  # which grow by eight bytes a value, and no more
    write_missing = generate.write_missing

    def measured(job, *, on_commit, **rest):
        def tell(count: int) -> None:
            memory.append(resident())
            handles.append(len(os.listdir("/proc/self/fd")))
            threads.append(threading.active_count())
            on_commit(count)

        return write_missing(job, on_commit=tell, **rest)

    generate.write_missing = measured
    others = ["--sampler", "ddim", "--steps", "2"] if with_torch else []
    others += ["--dtype", "fp32"]  # else so many samples begin with a trial of half precision, which imports torch
    code = generate.main(["--number", str(number), "--batch-size", "1", "--quiet", "--out", str(out), *others])
    leftovers = [path.name for path in out.rglob(".*")]
    print(
        json.dumps(
            {
                "code": code,
                "memory": list(memory),
                "handles": list(handles),
                "threads": list(threads),
                "leftovers": leftovers,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] == ["torch"])
