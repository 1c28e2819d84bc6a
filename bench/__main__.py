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
    "gpu": ("bench.gpu", "the suite at full size on a GPU; every part is stored, and the same command resumes"),
    "probe": ("bench.probe.command", "on a GPU: which form of each heavy operation is fastest, and whole calls"),
    "sd14": ("bench.sd14", "images at the size of Stable Diffusion 1.4 on this CPU, also in stored parts"),
    "rehearse": (
        "bench.rehearsal.command",
        "a run on simulated GPUs: launches, order, memory, and estimated costs",
    ),
    "report": ("bench.report.report", "tables and charts of the pages from the newest result files"),
    "claims": ("bench.proof.claims.run", "whether generated images help a student network, as in the papers' tables"),
    "student": ("bench.proof.students.command", "whether the images of a run help a student network"),
    "curve": ("bench.proof.curve", "figures of decoders by number of labelled images, and a forecast for more"),
    "labels": ("bench.proof.claims.labels", "scores of a student network by number of labelled scenes"),
    "attention": (
        "bench.rows.attention",
        "images with labels from attention on this CPU, compared with Dataset Diffusion based on diffusers",
    ),
    "epochs": ("bench.rows.epochs", "an epoch of training with stored captures, compared with recomputed ones"),
    "scale": ("bench.rows.sharded", "what a run in shards of up to a million samples costs its supervisor and readers"),
    "serving": ("bench.rows.serving", "images a second of the service under many clients, compared with generate"),
    "kernels": (
        "bench.kernels.audit",
        "registers, spills, shared memory of Triton kernels (--audit); their tuning (--tune)",
    ),
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
