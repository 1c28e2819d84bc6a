"""python -m bench NAME: hands the rest of its line to the measurement that is named first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from datasetdm_fast.errors import Refused
from datasetdm_fast.flags import nearest, run_command

# name -> (module with main(arguments) -> exit code, what it measures)
BENCHES = {
    "capture": ("bench.capture", "capture, level projection and depth head against their naive forms"),
    "kernels": ("bench.kernels", "registers, spills and shared memory of every kernel (--audit)"),
}


def dispatch(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        lines = [f"  {each:10}  {sentence}" for each, (_, sentence) in BENCHES.items()]
        print("\n".join(["usage: python -m bench NAME [flags]", "", *lines]))
        return 0
    if name not in BENCHES:
        said = f"unknown measurement {name!r}{nearest(name, BENCHES)}" if name else "no measurement named"
        raise Refused(f"bench: {said}", f"there are: {', '.join(BENCHES)}; `python -m bench --help` says what they measure")
    return import_module(BENCHES[name][0]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(run_command(dispatch))
