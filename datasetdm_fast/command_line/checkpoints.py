"""python -m datasetdm_fast.convert FILE --to decoder: read and write checkpoints of other projects."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import check_output, print_end
from datasetdm_fast.config import UPSTREAM_KINDS
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.exporting.checkpoints import to_checkpoint, to_decoder, to_diffusers
from datasetdm_fast.settings import OutputSettings, setting

PROG = "python -m datasetdm_fast.convert"
EXAMPLES = (
    "latest_checkpoint.pth --to decoder --out decoders/voc",
    "model.ckpt --to diffusers --ema --out models/mine",
)
OPTIONS = {"decoder": ("kind", "model"), "pth": (), "diffusers": ("ema", "allow_download")}  # of each --to
WRITERS = {"decoder": to_decoder, "pth": to_checkpoint, "diffusers": to_diffusers}


@dataclass(frozen=True)
class CheckpointConfig(OutputSettings):
    source: str = setting(
        "", "checkpoint FILE.pth, a decoder's folder, or FILE.ckpt", metavar="FILE", positional=True, required=True
    )
    to: str = setting(
        "",
        "what to write: decoder, a folder for --decoder; pth, a checkpoint of DatasetDM; diffusers, a model folder",
        choices=tuple(WRITERS),
        required=True,
    )
    kind: str = setting(
        "", "with --to decoder: what it was trained on; default: as its tensors say", choices=UPSTREAM_KINDS
    )
    model: str = setting(
        "", "with --to decoder: model whose U-Net it was trained on; default: DatasetDM's", metavar="MODEL"
    )
    ema: bool = setting(False, "with --to diffusers: take the averaged weights of the U-Net")
    allow_download: bool = setting(False, "with --to diffusers: fetch the tokenizer's vocabulary where it is not here")
    out: str = setting("", "folder to write, or the file of --to pth", metavar="OUT", required=True)


def is_of_checkpoints(arguments: Sequence[str]) -> bool:
    """Whether a command line of convert is about checkpoints, not about runs."""
    values = [after for flag, after in zip(arguments, arguments[1:]) if flag == "--to"]
    values += [text.removeprefix("--to=") for text in arguments if text.startswith("--to=")]
    return any(value in WRITERS for value in values)


def convert_checkpoint(arguments: Sequence[str]) -> int:
    """The exit code of convert for a checkpoint."""
    config, _ = parse(arguments, CheckpointConfig, PROG, __doc__, EXAMPLES)
    for target, names in OPTIONS.items():
        if target != config.to and (used := [name for name in names if getattr(config, name)]):
            flag = "--" + used[0].replace("_", "-")
            raise Refused(f"{flag}: it belongs to --to {target}, and --to is {config.to}", f"Drop {flag}.")
    check_output("--out", config.out, "file" if config.to == "pth" else "folder")
    options = {name: getattr(config, name) for name in OPTIONS[config.to]}
    facts = WRITERS[config.to](Path(config.source), Path(config.out), **options, is_dry=config.dry_run)
    facts["path"] = config.out
    plan = [f"{config.out}: would be written"] if config.dry_run else []
    return print_end(config, facts, config.out, *plan, facts["told"])
