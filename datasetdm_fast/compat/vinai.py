"""python -m datasetdm_fast.compat.vinai gen_data: the command lines of Dataset Diffusion, run by this package."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_result, print_unfinished
from datasetdm_fast.command_line.outputs import check_output
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.compat.vinai_lists import KINDS, PromptList, classes_of, read_list
from datasetdm_fast.config import ATTENTION, ENGINE_NAMES, PARITIES, SCHEDULERS
from datasetdm_fast.cores import count_cores
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.loading import PRESETS
from datasetdm_fast.errors import Missing, Refused, nearest, renamed_flags
from datasetdm_fast.runs.jobs.resume import prepare_job
from datasetdm_fast.runs.jobs.run import RunQueue
from datasetdm_fast.runs.jobs.summary import describe_job
from datasetdm_fast.runs.jobs.writing import write_missing
from datasetdm_fast.runs.run_folder.document import DOCUMENT, read_document
from datasetdm_fast.runs.run_folder.reader import StoredSample, open_run
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.settings import OutputSettings, setting
from datasetdm_fast.untrusted import documents

PROG = "python -m datasetdm_fast.compat.vinai"
PARITY = "dataset-diffusion"
EXAMPLES = ("--sd-path SD --json-path voc_prompts.json --work-dir OUT",)
# ours -> the original's
OTHER_FLAGS = {
    "--out": "--work-dir",
    "--model": "--sd-path",
    "--self-cells": "--self-res",
    "--cross-cells": "--cross-res",
}
RUN = ".run"  # the run folder in the folder of the data set
PART = re.compile(re.escape(RUN) + r"-(\d+)-(\d+)")  # that of a part of the list
# mmsegmentation's colours of COCO's classes, 1 to 80
COCO_COLOURS = """
00c040 00c040 004060 80c0c0 004040 00c0e0 00c0c0 80c040 00c060 80c040 8020c0 0000e0 000040 00a0c0 800060 8000c0
0020c0 8080e0 0000c0 80a0c0 808000 800020 802000 800080 408020 00a000 000000 c080a0 002000 008080 4080a0 80a000
008000 c08020 806080 000080 400020 00e080 800000 c000a0 006080 808080 4000a0 80e080 808040 c00020 806000 8000c0
008020 40e000 000040 8080a0 406000 0080c0 0080a0 c0e000 008040 808020 c02080 0040c0 000020 40a080 804040 8000a0
402080 80c0c0 0000a0 c0a080 80c000 800060 c02000 804080 408060 40a000 004000 c080e0 402000 00c080 4080e0 c0a000
"""


@dataclass(frozen=True)
class GenDataConfig(OutputSettings):
    work_dir: str = setting("", "folder of the data set: image/, mask/ and the run folder .run", metavar="OUT")
    sd_path: str = setting("", "Stable Diffusion: a diffusers folder or a single file", metavar="MODEL")
    json_path: str = setting("data/prompts/voc_prompts.json", "list of prompts", metavar="FILE")
    data_type: str = setting("", "classes of the list; default: those that its class prompts name", choices=KINDS)
    batch_size: int = setting(1, "images per batch", metavar="N")
    self_res: int = setting(0, "cells of a side of the self-attention, 0 = half the latents' side, 32", metavar="N")
    cross_res: int = setting(0, "cells of a side of the cross-attention, 0 = a quarter of it, 16", metavar="N")
    threshold: float = setting(0.6, "least value of a class", metavar="X")
    uncertainty_threshold: float = setting(0.5, "values from here to the threshold are 255", metavar="X")
    start: int = setting(-1, "first entry of the list", metavar="N")
    end: int = setting(-1, "entry before which to stop, -1 = none", metavar="N")
    seed: int = setting(1111, "seed of the noise", metavar="N")
    corrected: bool = setting(
        False, "all tokens of a class word, and noise of each image from a seed of its own: shards add up to one run"
    )
    steps: int = setting(100, "sampler steps", metavar="N")
    root: str = setting("", "folder that relative paths start from; default: the current one", metavar="DIR")
    engine: str = setting("auto", "engine that runs the networks", choices=ENGINE_NAMES)
    dtype: str = setting("auto", "precision", choices=("auto", "fp32", "tf32", "fp16", "bf16"))
    device: str = setting("auto", "cpu, cuda or cuda:N", metavar="DEVICE")
    threads: int = setting(0, "CPU threads, 0 = all cores", metavar="N")
    limit: int = setting(0, "stop after N new images; the same command resumes", metavar="N")

    def path(self, name: str) -> Path:
        """The path in a setting; a relative one starts from --root."""
        return Path(self.root) / getattr(self, name)

    def check(self) -> None:
        for name in ("work_dir", "sd_path"):
            if not getattr(self, name):
                raise Refused(f"--{name.replace('_', '-')} is missing", f"Add it; see {PROG} gen_data --help.")
        if not 0 < self.uncertainty_threshold <= self.threshold <= 1:
            raise Refused(
                f"--uncertainty-threshold {self.uncertainty_threshold:g} --threshold {self.threshold:g}: expected "
                "numbers from 0 to 1, of which the second is not smaller",
                "Give both, such as --threshold 0.6 --uncertainty-threshold 0.5.",
            )


@command
def main(arguments: Sequence[str]) -> int:
    name = PurePosixPath(arguments[0]).name if arguments else ""
    name = name.removesuffix(".sh").removesuffix(".py").replace("-", "_")
    if name in ("_h", "__help"):
        print(f"usage: {PROG} SCRIPT [flags]; SCRIPT --help lists its flags\n\nscripts: {', '.join(SCRIPTS)}")
        return 0
    if name not in SCRIPTS:
        cause = f"unknown script {arguments[0]!r}{nearest(name, SCRIPTS)}" if name else "no script is named"
        raise Refused(f"{PROG}: {cause}", f"Scripts: {', '.join(SCRIPTS)}.")
    return SCRIPTS[name](arguments[1:])


def gen_data(arguments: Sequence[str], script: str = "gen_data", **defaults: object) -> int:
    """Makes images and masks of a prompt list; `defaults` are the settings in the shell script of that name."""
    config, named = parse(arguments, GenDataConfig, f"{PROG} {script}", __doc__, EXAMPLES)
    config = replace(config, **{name: value for name, value in defaults.items() if name not in named})
    config.check()
    path = config.path("json_path")
    prompts = read_list(path, config.data_type, config.start, config.end)
    settings = _run_config(config, prompts)
    out = config.path("work_dir")
    check_output("--work-dir", str(out), "folder")
    _check_folder(out, Path(settings.out), prompts)
    source = prompts.source(path, settings.negative_prompt, tokenizer_cuts=not config.corrected)
    interruption = Interruption(config.quiet)
    with renamed_flags(OTHER_FLAGS):
        spec, run = read_spec(settings, source), RunQueue.open(Path(settings.out))
        result = run.decide(spec, is_dry=config.dry_run).result
    if result is None:
        _check_model(config)
    print_lines(config, *_summary(config, prompts, settings))
    if result is None:
        with renamed_flags(OTHER_FLAGS):
            job = prepare_job(spec, run.stored)
        print_lines(config, *describe_job(job))
        if config.dry_run:
            return 0
        progress = ImageProgress(job.images_left, config.quiet, job.plan.batch_size, len(job.recipe.schedule))
        with interruption, progress:
            calls = {"on_commit": progress.on_commit, "on_unet_call": progress.on_unet_call}
            result = write_missing(job, **calls, is_stopping=interruption.is_stopping)
    if config.dry_run:
        return 0
    write_data_set(Path(settings.out), out, prompts)
    print_result(config, {"path": str(out), "run": str(result.path), **result.facts()}, str(out))
    if not result.is_complete:
        print_unfinished(result.done, result.number, f"resume with: {PROG} {shlex.join([script, *arguments])}")
    result.check()
    return interruption.exit_code(0)


def _run_config(config: GenDataConfig, prompts: PromptList) -> RunConfig:
    """The run whose samples are the images and masks of this part of the list."""
    model = config.path("sd_path")
    part = "" if prompts.is_whole else f"-{prompts.first}-{prompts.first + len(prompts.prompts)}"
    shared = "batch_size steps threshold engine dtype device threads limit json quiet dry_run".split()
    settings = PARITIES[PARITY] | {name: getattr(config, name) for name in shared}
    return RunConfig(
        **settings
        | {
            "model": str(model) if model.exists() else config.sd_path,
            "task": (ATTENTION,),
            "classes": prompts.classes,
            "sampler": _sampler(model),
            "parity": "" if config.corrected else PARITY,
            "number": len(prompts.prompts),
            # The one generator of all images starts again with a part; seeds of images count through the whole list.
            "seed": config.seed + (prompts.first if config.corrected else 0),
            "truncate_prompts": True,
            "allow_unnamed": True,
            "uncertainty": config.uncertainty_threshold,
            "self_cells": config.self_res,
            "cross_cells": config.cross_res,
            "out": str(config.path("work_dir") / (RUN + part)),
        }
    )


def _check_model(config: GenDataConfig) -> None:
    model = config.path("sd_path")
    if config.sd_path not in PRESETS and not model.exists():
        raise Missing(f"--sd-path: {model} is not there{storage.named_alike(model)}", "Name Stable Diffusion's folder.")


def _sampler(model: Path) -> str:
    """The sampler that the model folder names, as its pipeline would take it."""
    path = model / "scheduler" / "scheduler_config.json"
    scheduler = documents.read_object(path).get("_class_name", "PNDMScheduler") if path.is_file() else "PNDMScheduler"
    if scheduler not in SCHEDULERS:
        raise Refused(
            f"{path}: the scheduler {documents.quote(scheduler)} is none of {', '.join(SCHEDULERS)}",
            "Put one of these there; --sd-path may name a copy of the folder with links to its weights.",
        )
    return SCHEDULERS[scheduler]


def _check_folder(out: Path, run_folder: Path, prompts: PromptList) -> None:
    """Refuses a folder with images of another program, and entries whose images another run in it has."""
    others = [path for name in ("image", "mask") if (out / name).is_dir() for path in (out / name).iterdir()]
    if others and not any((path / DOCUMENT).is_file() for path in out.glob(RUN + "*")):
        raise Refused(
            f"--work-dir {out}: holds {others[0].relative_to(out)}, which no run of {run_folder.name} made",
            "Choose another folder.",
        )
    for other in sorted(out.glob(RUN + "*")):
        if other == run_folder or (document := read_document(other)) is None:
            continue
        part = PART.fullmatch(other.name)
        first, stop = map(int, part.groups()) if part else (0, document["plan"]["number"])
        if (begin := max(first, prompts.first)) < (end := min(stop, prompts.first + len(prompts.prompts))):
            raise Refused(
                f"--work-dir {out}: {other.name} has images of the {_entries(begin, end - 1)} already",
                "Choose another folder, or other entries with --start and --end.",
            )


def _entries(first: int, last: int) -> str:
    return f"entry {first}" if first == last else f"entries {first} to {last}"


def _summary(config: GenDataConfig, prompts: PromptList, settings: RunConfig) -> list[str]:
    """The part of the list, and the settings that the command line does not name."""
    noise = "--seed + k for image k of the list" if config.corrected else "one generator for all images of this command"
    entries = _entries(prompts.first, prompts.first + len(prompts.prompts) - 1)
    return [
        f"list       {entries} of {prompts.length}, classes of {prompts.kind}",
        f"settings   {settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}; noise: {noise}",
        f"run        {settings.out}: for gallery, audit and convert",
    ]


def palette(kind: str) -> bytes:
    """Red, green and blue of each class number, as the masks of that data set have them."""
    if kind == "coco":
        return bytes(3) + bytes.fromhex("".join(COCO_COLOURS.split()))
    colours = class_tables.builtin_table(kind)
    return bytes(3) + bytes(value for name in classes_of(kind) for value in colours.colour(name))


def write_data_set(run_folder: Path, out: Path, prompts: PromptList) -> None:
    """Writes image/NAME.jpg and mask/NAME.png of every sample of the run where they are not there already."""
    colours = palette(prompts.kind)
    places = (("image", "jpg"), ("mask", "png"))
    storage.remove_parts_of(out / folder / f"{name}.{end}" for folder, end in places for name in prompts.names)

    def write(sample: StoredSample) -> None:
        name = prompts.names[sample.row.request.index]
        files = {
            out / "image" / f"{name}.jpg": _encode(sample.image, "JPEG"),
            out / "mask" / f"{name}.png": _encode(sample.label(ATTENTION).labels, "PNG", colours),
        }
        storage.publish({path: data for path, data in files.items() if not _holds(path, data)})

    with open_run(run_folder) as samples, ThreadPoolExecutor(count_cores()) as threads:
        for folder, _ in places:
            storage.make_folder(out / folder)
        for _ in threads.map(write, samples):
            pass


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _encode(pixels, form: str, colours: bytes = b"") -> bytes:
    """The file that Pillow writes with its own settings, as the original does."""
    from PIL import Image

    image, data = Image.fromarray(pixels), io.BytesIO()
    if colours:
        image.putpalette(colours)
    image.save(data, form)
    return data.getvalue()


def gen_data_voc(arguments: Sequence[str]) -> int:
    return gen_data(arguments, "gen_data_voc", work_dir="data/gen_voc", batch_size=4, data_type="voc")


def gen_data_coco(arguments: Sequence[str]) -> int:
    """The original passes no --data-type, and so reads COCO's prompts as VOC's."""
    defaults = {"work_dir": "data/gen_coco", "json_path": "data/prompts/coco_prompts.json"}
    return gen_data(arguments, "gen_data_coco", **defaults, batch_size=4, data_type="coco")


SCRIPTS: dict[str, Callable[[Sequence[str]], int]] = {
    "gen_data": gen_data,
    "gen_data_voc": gen_data_voc,
    "gen_data_coco": gen_data_coco,
}

if __name__ == "__main__":
    sys.exit(main())
