"""DatasetDM's generators, one record each: their flags, labels, prompts and files."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from datasetdm_fast.compat.showlab import files, prompts
from datasetdm_fast.compat.showlab.checkout import Script, check_present, read_settings
from datasetdm_fast.compat.showlab.lines import COMMON, NO_EFFECT, OURS, PROMPTS, Flag, Line
from datasetdm_fast.compat.showlab.order import ClassName, Order, read_counts
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.semantic import BACKGROUND
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.json_stream import JsonStream

SPOKEN = {"mouse": "computer mouse"}  # in DatasetDM's sentences and the names of its prompt files
SECTIONS = {"num_classes": "SEG_Decorder", "num_queries": "SEG_Decorder", "max_depth": "Depth_Decorder"}
FARTHEST = {10: "nyu", 80: "kitti"}  # metres -> kind of depth decoder


@dataclass(frozen=True)
class Generator:
    """A script that makes images with one kind of label."""

    name: str
    description: str
    kinds: tuple[str, ...]  # of checkpoints, the default first; --config chooses among several
    task: str
    sampler: prompts.SamplerOf
    write: files.Write
    folder: str  # of the labels
    classes: str = ""  # data set whose classes it makes images of, one after the other
    guidance: float = 5.0
    count: str = "n_each_class"
    prompt_root: Flag = Flag("prompt_root", f"{PROMPTS}/cityscapes", "path", "folder of prompt files", is_optional=True)
    reads_config: bool = True
    extra: tuple[Flag, ...] = ()
    without: tuple[str, ...] = ()  # flags of the others that it lacks
    script: str = ""  # of the checkout that holds its sentences, if not its own
    asks_class: bool = True  # whether its images show the class that they are made for
    suffix: str = "png"  # of the file of a label

    @property
    def folders(self) -> tuple[str, str]:
        """Folders of its output, for images and labels."""
        return "Image", self.folder

    @property
    def flags(self) -> tuple[Flag, ...]:
        flags = (
            *COMMON,
            Flag(self.count, 20, "whole", f"images {'of each class' if self.classes else 'in all'}"),
            self.prompt_root,
            Flag("config", "", "path", "its configuration, checked against the weights", self.reads_config, True),
            Flag("grounding_ckpt", "grounding_module.pth", "path", "weights of the decoder"),
            *self.extra,
            *NO_EFFECT,
            *OURS,
        )
        return tuple(flag for flag in flags if flag.name not in self.without)

    def order(self, line: Line) -> Order:
        """All images of a line."""
        counts = read_counts(line, self.count)
        settings = _read_decoder_settings(line) if self.reads_config and line["config"] else {}
        kind = self.kinds[0]
        if len(self.kinds) > 1 and (farthest := settings.pop("max_depth", None)) is not None:
            if FARTHEST.get(farthest) not in self.kinds:
                raise Refused(
                    f"--config {line.path('config')}: max_depth is {documents.quote(farthest)}, expected 10 or 80",
                    "Name the configuration of NYU or KITTI.",
                )
            kind = FARTHEST[farthest]
        classes = self._read_classes(line)
        source = prompts.PromptTexts(
            Script(line.root / "tools" / f"{self.script or self.name}.py"),
            line.path("prompt_root"),
            may_lack_folder=bool(self.script),
        )
        samplers = [
            (each.file, self.sampler(source, each.file, each.spoken)) for each in classes or (ClassName("", "", ""),)
        ]
        return Order(
            self,
            line,
            {self.task: (kind, "grounding_ckpt")},
            self.guidance,
            tuple(prompts.make_items(samplers, counts, line["seed"], whole=line["all"], apart=line["fixed"])),
            classes,
            self.asks_class,
            tuple(each.label for each in classes) if self.classes == "lvis" else (),
            settings,
        )

    def _read_classes(self, line: Line) -> tuple[ClassName, ...]:
        if not self.classes:
            return ()
        if self.classes == "lvis":
            path = check_present(line.path("lvis_train_json"), "--lvis_train_json", "Name LVIS's annotation file.")
            try:
                categories = [each.value for each in JsonStream(path) if each.key == "categories"]
                table = class_tables.of_categories(categories, "lvis")
            except ValueError as error:
                raise Refused(f"{path}: {error}", "Name LVIS's annotation file.") from error
            return tuple(ClassName(word.name, word.spoken, word.name) for word in table.classes)
        names = [name for name in class_tables.builtin_table(self.classes).names if name != BACKGROUND]
        return tuple(ClassName(SPOKEN.get(name, name), SPOKEN.get(name, name), name) for name in names)

    def names(self, order: Order, index: int) -> list[str]:
        """The files of an image, below the output."""
        images, labels = self.folders
        stem = order.items[index].stem
        return [f"{images}/{stem}.jpg", f"{labels}/{stem}.{self.suffix}"]

    def files(self, order: Order, index: int, pixels: np.ndarray, raw: dict, configs: dict) -> dict[str, bytes]:
        """The files of an image with their contents."""
        images, labels = self.folders
        item = order.items[index]
        ids = {each.file: number for number, each in enumerate(order.classes, 1)}
        output = files.Output(pixels, raw[self.task], configs[self.task], ids.get(item.name, 0), order.line["fixed"])
        contents = {f"{labels}/{item.stem}.{suffix}": content for suffix, content in self.write(output).items()}
        return {f"{images}/{item.stem}.jpg": files.jpeg(pixels)} | contents


def _read_decoder_settings(line: Line) -> dict[str, Any]:
    """The sizes of the decoder in the configuration of a line."""
    path = line.path("config")
    settings = read_settings(path)
    values = {}
    for name, section in SECTIONS.items():
        part = settings.get(section, {})
        if isinstance(part, dict) and name in part:
            values[name] = part[name]
            try:
                documents.check_form(values[name], float, f"{section}.{name}")
            except ValueError as error:
                raise Refused(f"--config {path}: {error}", "Name a file of the checkout's config folder.") from error
    return values


def _root(folder: str) -> Flag:
    return replace(Generator.prompt_root, default=f"{PROMPTS}/{folder}")


LAION = Flag("laion400m", False, "switch", has_effect=False)
LVIS_JSON = Flag("lvis_train_json", "./data/lvis/lvis_v1_train.json", "path", "annotation file that names the classes")
_GENERATORS = (
    Generator(
        "parallel_generate_Semantic_VOC_AnyClass",
        "VOC's classes one after the other, a mask of the one class of each image.",
        ("voc",),
        "open-vocabulary",
        prompts.voc,
        files.write_class_mask,
        "Mask",
        "voc",
        guidance=7.0,
        prompt_root=_root("voc2012"),
        extra=(LAION,),
    ),
    Generator(
        "parallel_generate_Semantic_CityScapes_AnyClass",
        "Street scenes of Cityscapes' classes with label maps.",
        ("cityscapes",),
        "semantic",
        prompts.cityscapes,
        files.write_class_map,
        "Mask",
        "cityscapes",
        reads_config=False,
    ),
    Generator(
        "parallel_generate_Semantic_Medical_CT",
        "CT images, labelled by the decoder of Cityscapes.",
        ("cityscapes",),
        "semantic",
        prompts.medical,
        files.write_class_map,
        "Mask",
        "cityscapes",
        reads_config=False,
        asks_class=False,
    ),
    Generator(
        "parallel_generate_Semantic_DeepFashion",
        "People with label maps of their clothes.",
        ("deepfashion",),
        "semantic",
        prompts.sentence,
        files.write_class_map,
        "Mask",
    ),
    Generator(
        "parallel_generate_Instance_COCO_AnyClass",
        "COCO's classes one after the other, with contours of instances.",
        ("coco",),
        "instance",
        prompts.coco,
        files.write_contours,
        "Mask",
        "coco",
        prompt_root=_root("coco"),
        without=("category",),
        suffix="txt",
    ),
    Generator(
        "parallel_generate_Instance_LVIS_AnyClass",
        "LVIS's classes in the way of the script for COCO: DatasetDM names this script, but lacks it.",
        ("lvis",),
        "instance",
        prompts.coco,
        files.write_contours,
        "Mask",
        "lvis",
        prompt_root=_root("LVIS"),
        extra=(LVIS_JSON,),
        without=("category",),
        suffix="txt",
        script="parallel_generate_Instance_COCO_AnyClass",
    ),
    Generator(
        "parallel_generate_Depth_KITTI",
        "Street scenes with depth up to 80 m.",
        ("kitti", "nyu"),
        "depth",
        prompts.general,
        files.write_depth,
        "Annotation",
    ),
    Generator(
        "parallel_generate_Depth_NYU",
        "Rooms with depth up to 10 m.",
        ("nyu", "kitti"),
        "depth",
        prompts.general,
        files.write_depth,
        "Annotation",
        count="number_data",
    ),
    Generator(
        "parallel_generate_Pose_COCO_HeatMap",
        "People with the joints of one of them, from heatmaps.",
        ("pose",),
        "pose",
        prompts.sentence,
        files.write_heatmap_joints,
        "Annotation",
        count="number_data",
        suffix="txt",
    ),
    Generator(
        "parallel_generate_Pose_COCO",
        "People with the joints of one of them, from bins.",
        ("pose-simcc",),
        "pose",
        prompts.pose,
        files.write_bin_joints,
        "Annotation",
        count="number_data",
    ),
)
GENERATORS = {each.name: each for each in _GENERATORS}
