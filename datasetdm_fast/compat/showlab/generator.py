"""DatasetDM's generators, one record each, and all images of one of their lines, from it and the user's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasetdm_fast.compat.showlab import files, prompts
from datasetdm_fast.compat.showlab.lines import COMMON, OURS, PROMPTS, Flag, Line
from datasetdm_fast.engine.labels import BACKGROUND, class_tables
from datasetdm_fast.engine.loop.prompts import PromptLine, PromptSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.untrusted import documents

CONFIG = Flag("config", "", "path", "its configuration, which names the data set", is_optional=True)
IMAGES = "Image"  # folder of its images
RUN = ".run"  # of a line's output: the run folder beside its files
SPOKEN = {"mouse": "computer mouse"}  # in DatasetDM's sentences and the names of its prompt files
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
    classes: str = ""  # data set whose classes it makes images of, one after the other
    guidance: float = 5.0
    count: str = "n_each_class"
    prompt_folder: str = "cityscapes"  # of the published prompt files
    asks_class: bool = True  # whether its images show the class that they are made for
    suffix: str = "png"  # of the file of a label

    @property
    def folder(self) -> str:
        """That of the labels."""
        return "Annotation" if self.task in ("depth", "pose") else "Mask"

    @property
    def flags(self) -> tuple[Flag, ...]:
        return (
            *COMMON,
            Flag(self.count, 20, "whole", f"images {'of each class' if self.classes else 'in all'}"),
            Flag("prompt_root", f"{PROMPTS}/{self.prompt_folder}", "path", "folder of prompt files", is_optional=True),
            *([CONFIG] if len(self.kinds) > 1 else []),
            Flag("grounding_ckpt", "grounding_module.pth", "path", "weights of the decoder"),
            *OURS,
        )

    def order(self, line: Line) -> Order:
        """All images of a line."""
        check_counts(line, self.count)
        classes = self.class_names()
        source = prompts.PromptTexts(line.root / "tools" / f"{self.name}.py", line.path("prompt_root"))
        samplers = [(name, self.sampler(source, name)) for name in classes or ("",)]
        items = prompts.make_items(samplers, line[self.count], line["thread_num"], line["seed"])
        return Order(self, line, self._kind(line), tuple(items), classes)

    def class_names(self) -> dict[str, str]:
        """A class as files and sentences name it -> as the decoder's labels do; empty without classes."""
        names = class_tables.builtin_table(self.classes).names if self.classes else ()
        return {SPOKEN.get(name, name): name for name in names if name != BACKGROUND}

    def _kind(self, line: Line) -> str:
        """The kind of checkpoint of a line; --config chooses among several."""
        if len(self.kinds) == 1 or not line["config"]:
            return self.kinds[0]
        path = line.path("config")
        section = prompts.read_settings(path).get("Depth_Decorder", {})
        farthest = section.get("max_depth") if isinstance(section, dict) else None
        if farthest is None:
            return self.kinds[0]
        if not isinstance(farthest, int | float) or FARTHEST.get(farthest) not in self.kinds:
            raise Refused(
                f"--config {path}: max_depth is {documents.quote(farthest)}, expected 10 or 80",
                "Name the configuration of NYU or KITTI.",
            )
        return FARTHEST[farthest]


@dataclass(frozen=True)
class Order:
    """All images of a line, and the decoder that labels them."""

    script: Generator
    line: Line
    kind: str  # of the decoder's checkpoint
    items: tuple[prompts.Item, ...]
    classes: Mapping[str, str]  # see Generator.class_names

    @property
    def out(self) -> Path:
        return self.line.path("outdir")

    @property
    def run_folder(self) -> Path:
        return self.out / RUN

    def names(self, index: int) -> list[str]:
        """The files of an image, below the output."""
        stem = self.items[index].stem
        return [f"{IMAGES}/{stem}.jpg", f"{self.script.folder}/{stem}.{self.script.suffix}"]

    def files(self, index: int, pixels: np.ndarray, raw: dict, configs: dict) -> dict[str, bytes]:
        """The files of an image with their contents."""
        item, script = self.items[index], self.script
        ids = {name: number for number, name in enumerate(self.classes, 1)}
        output = files.DecodedImage(pixels, raw[script.task], configs[script.task], ids.get(item.name, 0))
        return dict(zip(self.names(index), (files.jpeg(pixels), script.write(output)), strict=True))

    @property
    def prompts(self) -> tuple[PromptLine, ...]:
        """Of each image its prompt, the class that its label is requested for, and its seed."""
        labels = {name: (label,) for name, label in self.classes.items()} if self.script.asks_class else {}
        return tuple(PromptLine(0, item.prompt, labels.get(item.name, ()), item.seed) for item in self.items)

    @property
    def source(self) -> PromptSource:
        return PromptSource(self.prompts, self.line.script, (), 0, is_part=True, tokenizer_cuts=True)

    @property
    def config(self) -> RunConfig:
        line = self.line
        return RunConfig(
            model=model_of(line),
            decoder=f"{self.kind}:{line.path('grounding_ckpt')}",
            task=(self.script.task,),
            number=len(self.items),
            seed=prompts.FIRST_SEED,
            guidance=line["guidance"] or self.script.guidance,
            truncate_prompts=True,
            allow_unnamed=True,
            out=str(self.run_folder),
            **{name: line[name] for name in "engine batch_size steps profile dtype device threads limit quiet".split()},
        )


def model_of(line: Line) -> str:
    """The model of a line: one of ours by its name, else a folder or file that must exist."""
    from datasetdm_fast.engine.loading import PRESETS  # which needs torch, as no help does

    if line["model"] in PRESETS:
        return line["model"]
    remedy = "Put Stable Diffusion 1.4 there, or name its folder with --model."
    return str(prompts.check_present(line.path("model"), "model", remedy))


def check_counts(line: Line, count: str) -> None:
    """Refuses numbers of images and of processes that leave a process without images."""
    for name in (count, "thread_num"):
        if line[name] < 1:
            raise Refused(f"--{name} {line[name]}: expected a number of 1 or more", "Choose another number.")
    if line["thread_num"] > line[count]:
        raise Refused(
            f"--thread_num {line['thread_num']}: --{count} {line[count]} gives too few images for that many processes",
            f"Give a --thread_num of at most {line[count]}.",
        )


_GENERATORS = (
    Generator(
        "parallel_generate_Semantic_VOC_AnyClass",
        "VOC's classes one after the other, a mask of the one class of each image.",
        ("voc",),
        "open-vocabulary",
        prompts.voc,
        files.write_class_mask,
        "voc",
        guidance=7.0,
        prompt_folder="voc2012",
    ),
    Generator(
        "parallel_generate_Semantic_CityScapes_AnyClass",
        "Street scenes of Cityscapes' classes with label maps.",
        ("cityscapes",),
        "semantic",
        prompts.cityscapes,
        files.write_class_map,
        "cityscapes",
    ),
    Generator(
        "parallel_generate_Semantic_Medical_CT",
        "CT images, labelled by the decoder of Cityscapes.",
        ("cityscapes",),
        "semantic",
        prompts.medical,
        files.write_class_map,
        "cityscapes",
        asks_class=False,
    ),
    Generator(
        "parallel_generate_Semantic_DeepFashion",
        "People with label maps of their clothes.",
        ("deepfashion",),
        "semantic",
        prompts.sentence,
        files.write_class_map,
    ),
    Generator(
        "parallel_generate_Instance_COCO_AnyClass",
        "COCO's classes one after the other, with contours of instances.",
        ("coco",),
        "instance",
        prompts.coco,
        files.write_contours,
        "coco",
        prompt_folder="coco",
        suffix="txt",
    ),
    Generator(
        "parallel_generate_Depth_KITTI",
        "Street scenes with depth up to 80 m.",
        ("kitti", "nyu"),
        "depth",
        prompts.general,
        files.write_depth,
    ),
    Generator(
        "parallel_generate_Depth_NYU",
        "Rooms with depth up to 10 m.",
        ("nyu", "kitti"),
        "depth",
        prompts.general,
        files.write_depth,
        count="number_data",
    ),
    Generator(
        "parallel_generate_Pose_COCO_HeatMap",
        "People with the joints of one of them, from heatmaps.",
        ("pose",),
        "pose",
        prompts.sentence,
        files.write_heatmap_joints,
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
        count="number_data",
    ),
)
GENERATORS = {each.name: each for each in _GENERATORS}
