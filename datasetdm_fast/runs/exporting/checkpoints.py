"""python -m datasetdm_fast.convert FILE --to decoder: checkpoints of other projects become what this package reads, and
decoders become checkpoints of DatasetDM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result
from datasetdm_fast.command_line.outputs import check_output
from datasetdm_fast.config import UPSTREAM_KINDS
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused, quote
from datasetdm_fast.settings import dry_run_setting, setting

PROG = "python -m datasetdm_fast.convert"
EXAMPLES = (
    "latest_checkpoint.pth --to decoder --out decoders/voc",
    "model.ckpt --to diffusers --ema --out models/mine",
)
TARGETS = ("decoder", "pth", "diffusers")


@dataclass(frozen=True)
class CheckpointConfig:
    source: str = setting(
        "", "a checkpoint FILE.pth, a decoder's folder, or a model FILE.ckpt", metavar="FILE", positional=True
    )
    to: str = setting(
        "",
        "what to write: decoder, a folder for --decoder; pth, a checkpoint of DatasetDM; diffusers, a model folder",
        choices=TARGETS,
    )
    kind: str = setting(
        "",
        "with --to decoder: what the checkpoint was trained on; default: inferred from its tensors",
        choices=UPSTREAM_KINDS,
    )
    model: str = setting(
        "", "with --to decoder: model whose U-Net it was trained on; default: Stable Diffusion 1.x", metavar="MODEL"
    )
    ema: bool = setting(False, "with --to diffusers: take the averaged weights of the U-Net")
    allow_download: bool = setting(False, "with --to diffusers: fetch the tokenizer's vocabulary where it is not here")
    out: str = setting("", "folder to write, or the file of --to pth", metavar="OUT")
    dry_run: bool = dry_run_setting()
    json: bool = setting(False, "machine-readable result on stdout")
    quiet: bool = setting(False, "show no message")

    def check(self) -> None:
        """Refuses what is missing, and flags of another --to."""
        for name in ("source", "to", "out"):
            if not getattr(self, name):
                flag = "FILE" if name == "source" else f"--{name}"
                raise Refused(
                    f"{PROG}: {flag} is missing",
                    f"For example: {PROG} latest_checkpoint.pth --to decoder --out decoders/voc",
                )
        for name, target in (
            ("kind", "decoder"),
            ("model", "decoder"),
            ("ema", "diffusers"),
            ("allow_download", "diffusers"),
        ):
            if getattr(self, name) and self.to != target:
                flag = "--" + name.replace("_", "-")
                raise Refused(f"{flag}: it belongs to --to {target}, and --to is {self.to}", f"Drop {flag}.")
        check_output("--out", self.out, "file" if self.to == "pth" else "folder")


def is_meant(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for what checkpoints become."""
    values = [after for flag, after in zip(arguments, arguments[1:]) if flag == "--to"]
    values += [one.removeprefix("--to=") for one in arguments if one.startswith("--to=")]
    return any(value in TARGETS for value in values)


def run(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, CheckpointConfig, PROG, __doc__, EXAMPLES)
    facts = convert(config)
    if config.dry_run:
        return print_plan(config, facts, facts["path"], f"{facts['path']}: would be written", facts["told"])
    print_lines(config, facts["told"])
    print_result(config, facts, facts["path"])
    return 0


def convert(config: CheckpointConfig) -> dict[str, Any]:
    """Writes what the settings ask for, unless on a dry run; its path, and what there is to say of it."""
    config.check()
    return {"decoder": _to_decoder, "pth": _to_checkpoint, "diffusers": _to_diffusers}[config.to](config)


def _to_decoder(config: CheckpointConfig) -> dict[str, Any]:
    from datasetdm_fast.engine.decoders.config import SD1_LEVELS
    from datasetdm_fast.engine.decoders.upstream import open_checkpoint
    from datasetdm_fast.engine.loading import load_model

    levels = load_model(config.model).levels if config.model else SD1_LEVELS
    checkpoint, folder = open_checkpoint(Path(config.source), config.kind, levels), Path(config.out)
    _publish(config, {folder / name: content for name, content in checkpoint.files().items()}, folder)
    told = f"{checkpoint.description}\nuse it with --decoder {quote(folder.parent)} --task {checkpoint.config.task}"
    return {"path": config.out, "told": told, "kind": checkpoint.kind, "task": checkpoint.config.task}


def _to_checkpoint(config: CheckpointConfig) -> dict[str, Any]:
    from datasetdm_fast.engine.decoders.upstream import as_checkpoint

    path = Path(config.out)
    if not path.suffix:
        raise Refused(f"--out {path}: expected a file such as latest_checkpoint.pth", "Name a file.")
    _publish(config, {path: as_checkpoint(Path(config.source))}, path)
    return {"path": config.out, "told": f"{path}: a state dict as DatasetDM saves and loads its decoders"}


def _to_diffusers(config: CheckpointConfig) -> dict[str, Any]:
    source, folder = Path(config.source), Path(config.out)
    if source.suffix not in (".ckpt", ".safetensors"):
        raise Refused(f"{source}: expected one file of a whole model, .ckpt or .safetensors", "Name such a file.")
    if not source.is_file():
        raise Missing(f"{source}: no such file{storage.named_alike(source)}", "Check the path.")
    from datasetdm_fast.engine.loading.saving import check_new, save_model
    from datasetdm_fast.engine.loading.single_file import load_file  # which needs diffusers

    check_new(folder)
    model = load_file(source, allow_download=config.allow_download, ema=config.ema)
    if not config.dry_run:
        save_model(model, folder)
    weights = "the averaged weights" if config.ema else "the weights"
    return {"path": config.out, "told": f"{folder}: {weights} of {source} as a diffusers folder, for --model {folder}"}


def _publish(config: CheckpointConfig, files: Mapping[Path, bytes], place: Path) -> None:
    """Writes files, or finds the very same there; where one has another content, nothing is written."""
    for path, content in files.items():
        if storage.is_there(path) and storage.read(path, 2**40) != content:
            raise Refused(f"--out {place}: {path} is there, with another content", "Choose another --out.")
    if not config.dry_run:
        storage.remove_parts_of(files)
        storage.publish(files)
