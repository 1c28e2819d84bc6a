"""The script `datasetdm-fast`: runs the command named first on its line."""

from collections.abc import Sequence
from importlib import import_module

from datasetdm_fast.command_line.completion import completion_script
from datasetdm_fast.command_line.ending import command
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.version import __version__

# name -> (module with main(arguments) -> exit code, what it does)
COMMANDS = {
    "prompts": ("datasetdm_fast.prompts", "write a list of prompts, balanced over classes"),
    "generate": ("datasetdm_fast.generate", "generate images and their labels from prompts"),
    "serve": ("datasetdm_fast.serve", "answer prompts with images and labels over HTTP"),
    "label": ("datasetdm_fast.label", "label existing pictures, as generate labels its images"),
    "edit": ("datasetdm_fast.edit", "regenerate a region of samples, with its labels"),
    "vary": ("datasetdm_fast.vary", "change the time of day or weather of samples, with their labels"),
    "filter": ("datasetdm_fast.filter", "score the samples of a run and keep those that pass"),
    "merge": ("datasetdm_fast.merge", "merge several runs into one, every sample once"),
    "split": ("datasetdm_fast.split", "assign the samples of a run to training, validation and test"),
    "convert": ("datasetdm_fast.convert", "write samples of runs in the layouts that trainers read"),
    "drop": ("datasetdm_fast.drop", "remove samples from a run folder"),
    "restore": ("datasetdm_fast.restore", "bring back dropped samples"),
    "example": ("datasetdm_fast.example", "lay out forty small labelled pictures, to train a first decoder on"),
    "train": ("datasetdm_fast.train", "train decoders on labelled images"),
    "evaluate": ("datasetdm_fast.evaluate", "measure the labels of trained decoders against ground truth"),
    "gallery": ("datasetdm_fast.gallery", "show the samples of a run in a browser, also while it is in progress"),
    "audit": ("datasetdm_fast.audit", "check a run folder and name what is damaged"),
    "doctor": ("datasetdm_fast.doctor", "report what is installed, which engines can run and why others cannot"),
    "verify": ("datasetdm_fast.verify", "compare the outputs of two engines"),
    "export": ("datasetdm_fast.export.__main__", "write a model and its decoders as ONNX graphs"),
}

PROGRAMS = {  # likewise; their first argument names a script of another project
    "compat.showlab": ("datasetdm_fast.compat.showlab.__main__", "run the command lines of DatasetDM's own scripts")
}


@command
def main(arguments: Sequence[str]) -> int:
    """The exit code of the command named by the first argument."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print("usage: datasetdm-fast COMMAND [flags]   (also: python -m datasetdm_fast.COMMAND)\n")
        for each, (_, sentence) in {**COMMANDS, **PROGRAMS}.items():
            print(f"  {each:{max(map(len, PROGRAMS))}}  {sentence}")
        print("\nCOMMAND --help lists its flags. `datasetdm-fast completion SHELL` prints a completion script.")
        return 0
    if name == "--version":
        print(f"datasetdm-fast {__version__}")
        return 0
    if name == "completion":
        print(completion_script(arguments[1] if len(arguments) > 1 else "", COMMANDS), end="")
        return 0
    if name not in COMMANDS and name not in PROGRAMS:
        known = (*COMMANDS, *PROGRAMS, "completion")
        cause = f"unknown command {name!r}{nearest(name, known)}" if name else "no command given"
        remedy = f"Commands: {', '.join(COMMANDS)}; `datasetdm-fast --help` says what they do"
        raise Refused(f"datasetdm-fast: {cause}", remedy)
    return import_module({**COMMANDS, **PROGRAMS}[name][0]).main(arguments[1:])
