"""python -m bench [NAME]: the suite on this CPU, or the measurement that is named first."""

import sys
from collections.abc import Sequence
from importlib import import_module

from bench.options import prepare
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.command_line.flags import nearest
from datasetdm_fast.errors import Refused

# name -> (module with main(arguments) -> exit code, what it measures)
BENCHES = {
    "gpu": ("bench.gpu", "the suite at full size on a GPU, in parts that can be continued"),
    "probe": ("bench.probe.command", "on a GPU: which form of each heavy operation is fastest, and whole calls"),
    "sd14": ("bench.sd14", "the peers at the size of Stable Diffusion 1.4 on this CPU, in parts that can be continued"),
    "rehearse": ("bench.rehearsal.command", "the CUDA path without a GPU: launches, order, lifetimes, and a budget"),
    "report": ("bench.report.report", "tables and charts of the pages from the newest result files"),
    "claims": ("bench.claims.run", "whether generated images help a small student: the papers' tables in small"),
    "labels": ("bench.claims.labels", "how many labelled scenes of a world are few: students by number of scenes"),
    "attention": (
        "bench.rows.attention",
        "images with labels from attention on this CPU, against Dataset Diffusion over diffusers",
    ),
    "epochs": ("bench.rows.epochs", "an epoch of training with stored captures against captures computed anew"),
    "kernels": ("bench.kernels.audit", "registers, spills, shared memory of kernels (--audit), or tuning (--tune)"),
}


def dispatch(arguments: Sequence[str]) -> int:
    prepare()
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print("usage: python -m bench [NAME] [flags]\n\n  without NAME the suite on this CPU, with these flags:\n")
        print("\n".join(f"  {each:10}  {sentence}" for each, (_, sentence) in BENCHES.items()) + "\n")
    if not name or name.startswith("-"):
        from bench import run

        return run.main(arguments)
    if name not in BENCHES:
        known = f"there are: {', '.join(BENCHES)}; `python -m bench --help` says what they measure"
        raise Refused(f"bench: unknown measurement {name!r}{nearest(name, BENCHES)}", known)
    return import_module(BENCHES[name][0]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(run_command(dispatch))
