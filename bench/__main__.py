"""python -m bench [NAME]: the suite on this CPU, or the measurement that is named first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.command_line.flags import nearest
from datasetdm_fast.errors import Refused

# name -> (module with main(arguments) -> exit code, what it measures)
BENCHES = {
    "gpu": ("bench.gpu", "the suite at full size on a GPU, in parts that can be continued"),
    "report": (
        "bench.report.report",
        "tables and charts of README.md and bench/README.md from the newest result files",
    ),
    "capture": ("bench.rows.capture", "capture, level projection and depth head against their naive forms"),
    "claims": ("bench.claims", "whether generated images help a small student: the papers' tables in the demo world"),
    "epochs": ("bench.rows.epochs", "an epoch of training with captures kept on the disk against captures made anew"),
    "kernels": (
        "bench.kernels.audit",
        "registers, spills and shared memory of every kernel (--audit), or its fastest block sizes on this GPU "
        "(--tune)",
    ),
}


def dispatch(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        lines = [f"  {each:10}  {sentence}" for each, (_, sentence) in BENCHES.items()]
        print(
            "\n".join(
                [
                    "usage: python -m bench [NAME] [flags]",
                    "",
                    "  without NAME the suite on this CPU, with these flags:",
                    "",
                    *lines,
                    "",
                ]
            )
        )
    if not name or name.startswith("-"):
        from bench import run

        return run.main(arguments)
    if name not in BENCHES:
        known = f"there are: {', '.join(BENCHES)}; `python -m bench --help` says what they measure"
        raise Refused(f"bench: unknown measurement {name!r}{nearest(name, BENCHES)}", known)
    return import_module(BENCHES[name][0]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(run_command(dispatch))
