"""DatasetDM's trainers: each line becomes one of `train`, with DatasetDM's recipe, and its decoder a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.compat.showlab.generator import model_of
from datasetdm_fast.compat.showlab.lines import OURS, Flag, Line
from datasetdm_fast.compat.showlab.prompts import check_present, read_settings
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.untrusted import documents

CHECKPOINT = "latest_checkpoint.pth"
RUN = ".train"  # of a checkpoint's folder: what `train` writes
FLAGS = (
    Flag("config", "./config/", "path", "its configuration: data set, and for VOC the split", True, True),
    Flag("seed", 42, "whole", "seed of weights, noise and order"),
    Flag("batch_size", 1, "whole", has_effect=False),
    Flag("image_limitation", 5, "whole", "labelled images, of each class where there are classes"),
    Flag("dataset", "Cityscapes", help="KITTI or VirtualKITTI, which train_depth_KITTI reads"),
    Flag("save_name", "Test", help="folder in checkpoint to write"),
    *(flag for flag in OURS if flag.name in ("root", "model", "engine", "device", "threads", "dry_run", "quiet")),
    Flag("steps", 0, "whole", "optimiser steps, 0 = DatasetDM's epochs"),
)


@dataclass(frozen=True)
class DataSet:
    """Where DatasetDM keeps a data set, and which images of it are taken."""

    reader: str
    folder: str
    select: str
    limit: str = "limit-per-class"  # what --image_limitation limits; empty: nothing


DATA = {
    "VOC": DataSet("voc", "PascalVOC12", "voc"),
    "VOC zero-shot": DataSet("voc", "PascalVOC12", "voc-zero-shot"),
    "VOC long-tail": DataSet("voc", "PascalVOC12", "voc-long-tail", ""),
    "Cityscapes": DataSet("cityscapes", "cityscapes", "cityscapes"),
    "DeepFashion": DataSet("deepfashion-mm", "deepfashion-mm", "deepfashion"),
    "COCO": DataSet("coco", "COCO2017", "coco"),
    "LVIS": DataSet("lvis", "lvis", "lvis"),
    "KITTI": DataSet("kitti", "kitti", "kitti", "limit-images"),
    "VirtualKITTI": DataSet("vkitti2", "VirtualKITTI2", "vkitti2", ""),
    "NYU": DataSet("nyu", "nyudepthv2", "nyu", "limit-images"),
    "coco_pose": DataSet("coco", "COCO2017", "coco-pose", "limit-images"),
}


@dataclass(frozen=True)
class TrainingScript:
    """A script that trains decoders of one task."""

    name: str
    task: str
    data: tuple[str, ...]  # of DATA, the usual one first
    quirk: str = ""
    pose_head: str = "heatmap"
    is_named_by_flag: bool = False  # whether --dataset chooses, and not --config
    flags: tuple[Flag, ...] = FLAGS

    @property
    def description(self) -> str:
        return f"Trains a decoder for {self.task} from labelled images of {' or '.join(self.data)}."


TRAINERS = {
    each.name: each
    for each in (
        TrainingScript("train_semantic_voc", "open-vocabulary", ("VOC", "VOC zero-shot", "VOC long-tail"), "Q11"),
        TrainingScript("train_semantic_cityscapes", "semantic", ("Cityscapes", "DeepFashion")),
        TrainingScript("train_instance_coco", "instance", ("COCO",), "Q12"),
        TrainingScript("train_instance_LVIS", "instance", ("LVIS",), "Q12"),
        TrainingScript("train_depth_NYU", "depth", ("NYU",), "Q13"),
        TrainingScript("train_depth_KITTI", "depth", ("KITTI", "VirtualKITTI"), "Q13", is_named_by_flag=True),
        TrainingScript("train_pose_coco_heatmap", "pose", ("coco_pose",), "Q14"),
        TrainingScript("train_pose_coco", "pose", ("coco_pose",), "Q14", "simcc"),
    )
}


def line_of_train(trainer: TrainingScript, line: Line) -> list[str]:
    """The flags of `train` that a line stands for."""
    if line["image_limitation"] < 1:
        raise Refused(f"--image_limitation {line['image_limitation']}: expected 1 or more", "Choose another number.")
    try:
        documents.check_inside(line["save_name"])
    except ValueError as error:
        raise Refused(f"--save_name: {error}", "Name a folder in checkpoint.") from error
    data = DATA[_data_of(trainer, line)]
    folder = check_present(line.root / "data" / data.folder, "data", f"Put {data.folder} there, as DatasetDM has it.")
    words = ["--data", f"{data.reader}:{folder}", "--select", data.select, "--task", trainer.task]
    words += [
        "--preset",
        "upstream",
        "--timestep",
        "0",
        "--held-out",
        "0",
        "--folds",
        "no",
        "--accumulate",
        "1",
        "--by-name",
        "no",
    ]
    words += ["--seed", str(line["seed"]), "--model", model_of(line), "--out", str(out_of(line) / RUN)]
    words += [f"--{data.limit}", str(line["image_limitation"])] if data.limit else []
    words += ["--quirks", trainer.quirk] if trainer.quirk else []
    words += ["--pose-head", trainer.pose_head] if trainer.task == "pose" else []
    words += [word for name in ("engine", "device", "threads", "steps") for word in (f"--{name}", str(line[name]))]
    return words + [f"--{name.replace('_', '-')}" for name in ("dry_run", "quiet") if line[name]]


def out_of(line: Line) -> Path:
    return line.root / "checkpoint" / line["save_name"]


def _data_of(trainer: TrainingScript, line: Line) -> str:
    """The data set of a line: by --dataset in one script, by the configuration in the others."""
    if trainer.is_named_by_flag:
        return _check_data(trainer, "--dataset", line["dataset"])
    if "config" not in line.arguments or line["config"] == "./config/":
        return trainer.data[0]
    path = line.path("config")
    settings = read_settings(path)
    try:
        documents.check_form(settings, {"DATASETS": {"dataset": str}})
    except ValueError as error:
        raise Refused(f"--config {path}: {error}", "Name a file of the checkout's config folder.") from error
    section = settings["DATASETS"]
    name = _check_data(trainer, f"--config {path}: DATASETS.dataset", section["dataset"])
    if name == "VOC" and section.get("is_zero") is True:
        return "VOC zero-shot"
    return "VOC long-tail" if name == "VOC" and section.get("long_tail") is True else name


def _check_data(trainer: TrainingScript, where: str, name: str) -> str:
    if name not in trainer.data:
        raise Refused(
            f"{where} is {documents.quote(name)}, and {trainer.name} takes {' or '.join(trainer.data)}"
            f"{nearest(name, trainer.data)}",
            "Name one of these, or use the script of that data set.",
        )
    return name


def checkpoint_of(trainer: TrainingScript, line: Line) -> Path | None:
    """The checkpoint of a finished training, as DatasetDM names it; None of one that is not finished."""
    from datasetdm_fast.engine.decoders.upstream import as_checkpoint  # loads torch

    folder, path = out_of(line) / RUN / trainer.task, out_of(line) / CHECKPOINT
    if not (folder / "config.json").is_file():
        return None
    content = as_checkpoint(folder)
    if not path.is_file() or storage.read(path, 2**40) != content:
        storage.publish({path: content})
    return path
