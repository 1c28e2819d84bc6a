"""Settings of the runs that generate and label make, in groups; functions take a group, or single values of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.config import LABELLER_KINDS, LABELLERS, LABELS, MOST_TRIES, PARITIES
from datasetdm_fast.engine.loop.prompts import PromptSource
from datasetdm_fast.engine.loop.recipe import LARGEST_BATCH
from datasetdm_fast.settings import (
    MOST_THREADS,
    CommandSettings,
    EngineSettings,
    ModelSettings,
    OutputSettings,
    SamplingSettings,
    setting,
)


@dataclass(frozen=True)
class PromptSettings:
    """What images are made of, and how many."""

    prompts: str = setting(
        "", "a prompt, a file with one prompt per line or JSON lines; default: the demo's captions", metavar="FILE|TEXT"
    )
    classes: tuple[str, ...] = setting(
        (),
        "class words, comma-separated, or the name of a set (voc, coco, cityscapes, deepfashion, demo): for "
        "open-vocabulary labels, labels from attention and --per-class",
        metavar="LIST",
    )
    class_table: str = setting(
        "", "class words of your own: a CSV file, or LVIS's or COCO's annotations", identity="if given", metavar="FILE"
    )
    negative_prompt: str = setting(
        "", "text to steer images away from; dataset-diffusion: that project's", identity="if given", metavar="TEXT"
    )
    allow_unnamed: bool = setting(
        False, "accept prompts that name none of the class words; their label maps are empty", identity=False
    )
    truncate_prompts: bool = setting(
        False, "cut prompts beyond 77 tokens where no class word is lost, instead of refusing them"
    )
    number: int = setting(16, "images to make in all; prompts are repeated in turn", metavar="N", least=1)
    per_class: int = setting(
        0, "images per class of --classes, from templates; replaces --number and --prompts", metavar="N", least=0
    )
    seed: int = setting(0, "seed of image 0; image k has seed + k, of which the last 32 bits count", metavar="N")


@dataclass(frozen=True)
class LabelSettings:
    """The labels to make, and how."""

    task: tuple[str, ...] = setting(
        ("semantic", "instance", "depth", "pose"),
        f"labels to make, comma-separated: {', '.join(LABELS)}; TASK:NAME takes the decoder in the folder NAME, so "
        "that a task may have several; with --decoder DIR by default all that DIR makes",
        choices=LABELS,
        has_names=True,
        metavar="LIST",
    )
    combine: tuple[str, ...] = setting(
        (), 'keep a label only where another is, as "semantic within instance:dog"', metavar="LIST", identity="if given"
    )
    labeller: tuple[str, ...] = setting(
        (),
        "what makes the labels, comma-separated: decoder, those of --task; attention, the class words of the prompts "
        "without any decoder; a labeller that another package registers, by its name"
        + (f": {', '.join(sorted(LABELLER_KINDS.others))}" if LABELLER_KINDS.others else ""),
        identity=False,
        choices=LABELLERS,
        metavar="LIST",
    )
    ask: str = setting(
        "named", "class words to label: those the prompt names, or all", identity="if given", choices=("named", "all")
    )
    exponent: int = setting(
        -1,
        "attention: times a map is multiplied by self-attention, -1 = default",
        identity="if given",
        metavar="N",
        least=-1,
        most=1000,
    )
    threshold: float = setting(
        0.0, "attention: minimum value of a class, 0 = the model's default", identity="if given", metavar="X"
    )
    uncertainty: float = setting(
        0.0, "attention: values from here to the threshold are 255, 0 = default", identity="if given", metavar="X"
    )
    self_cells: int = setting(
        0, "attention: cells per side of the self-attention read, 0 = default", identity="if given", metavar="N"
    )
    cross_cells: int = setting(
        0, "attention: cells per side of the cross-attention read, 0 = default", identity="if given", metavar="N"
    )
    parity: str = setting(
        "", "attention: settings of dataset-diffusion", identity="if given", choices=("", *PARITIES), metavar="PROJECT"
    )
    ignore: str = setting(
        "nothing", "disagreeing: 255 where labels differ", choices=("nothing", "disagreeing"), identity="if given"
    )
    ignore_below: float = setting(
        0.0, "pixels with a confidence below this are 255", metavar="SHARE", least=0, most=1, identity="if given"
    )


@dataclass(frozen=True)
class WorkerSettings:
    """The processes that share a run."""

    gpus: str = setting(
        "", "GPUs to use, a process each: all, how many, or a list such as 0,2,5", identity=False, metavar="all|N|LIST"
    )
    ranks: int = setting(0, "processes that share the work on a CPU", identity=False, metavar="N", least=0)
    cluster: str = setting(
        "",
        "make a run in shards on a Ray cluster: ray starts one on this machine, ray://HEAD[:PORT] joins a running one",
        identity=False,
        metavar="ray[://HEAD]",
    )


@dataclass(frozen=True)
class RunConfig(
    ModelSettings,
    EngineSettings,
    PromptSettings,
    SamplingSettings,
    LabelSettings,
    WorkerSettings,
    OutputSettings,
    CommandSettings,
):
    FLAGS = (
        "model lora decoder outlines task combine labeller classes class_table ask exponent threshold uncertainty "
        "self_cells cross_cells parity engine prompts negative_prompt allow_unnamed truncate_prompts number "
        "per_class keep accept most_tries ignore ignore_below seed steps guidance sampler profile speed size "
        "batch_size image_format palette out layout shard_size only mixed limit force_domain verify "
        "dry_run allow_download json quiet threads gpus ranks cluster store make_bucket dtype compile "
        "device provider streams"
    ).split()

    # which samples the data set takes, and how many this command makes
    keep: str = setting(
        "all", "trusted: doubtful samples are quarantined and replaced", choices=("all", "trusted"), identity="if given"
    )
    accept: str = setting(
        "", 'condition on scores, such as "score >= 0.5", that samples must meet', metavar="COND", identity="if given"
    )
    most_tries: int = setting(
        MOST_TRIES, "with --keep or --accept: samples made per requested one", metavar="N", least=1, identity="if given"
    )
    limit: int = setting(
        0,
        "stop after N new images (in shards each process, at the end of a shard); the same command resumes",
        identity=False,
        metavar="N",
        least=0,
    )
    force_domain: bool = setting(
        False, "make the run even if its first pictures are unlike those that decoders were trained on", identity=False
    )
    # where samples are stored, and in which form
    out: str = setting(
        "runs/demo", "run folder; default: in runs/, named after flags", identity=False, metavar="RUN", output="folder"
    )
    only: str = setting("", "regenerate this one sample of the run folder", identity=False, metavar="ID")
    batch_size: int = setting(
        0, "images per batch (rounding only); 0 = as many as fit into memory", metavar="N", least=0, most=LARGEST_BATCH
    )
    image_format: str = setting("png", "image files", choices=("png", "jpg"))
    palette: str = setting(
        "ours",
        "colours of the label maps: ours, those of a data set that has all of their classes, or with --class-table "
        "those of that table",
        choices=("ours", "voc", "cityscapes", "coco", "table"),
        identity="if given",
    )
    layout: str = setting(
        "folder",
        "folder: a file for each image and label; shards: tar files that WebDataset reads, each with a Parquet index, "
        "for runs of many samples or in an object store; by default shards above 100,000 samples, with --store and "
        "with --cluster",
        choices=("folder", "shards"),
        identity="if given",
    )
    shard_size: int = setting(
        0,
        "with --layout shards: samples of a shard; by default 1,000, or the whole batches that take 256 MB at most",
        metavar="N",
        least=1,
        identity="if given",
    )
    store: str = setting(
        "", "with --layout shards: fsspec URL in place of --out, such as s3://bucket/run", identity=False, metavar="URL"
    )
    make_bucket: bool = setting(False, "create the bucket of --store where there is none", identity=False)
    # when an engine is compared with the reference, or with the one that began the run
    verify: int = setting(
        0, "compare N samples with the reference, write nothing if they fail", identity=False, metavar="N", least=0
    )
    mixed: str = setting(
        "verified",
        "verified: another engine, dtype, device or version may continue a run folder, once it has made some of the "
        "stored samples again and their images and labels agree; no: it is refused, and so is another --batch-size",
        identity=False,
        choices=("verified", "no"),
    )
    threads: int = setting(
        0, "CPU threads of a process, 0 = all cores, shared by ranks", identity=False, metavar="N", most=MOST_THREADS
    )
    dtype: str = setting(
        "auto",
        "precision of the fast engines; auto is fp32 on a CPU and fp16 on a GPU, and in a new run of 100 images or "
        "more bf16 or fp16 where the device has it and four samples agree with the reference, else fp32; tf32 is fp32 "
        "with TF32 convolutions on a GPU",
        choices=("auto", "fp32", "tf32", "fp16", "bf16"),
    )


@dataclass(frozen=True)
class RunSpec:
    """A run as it is requested: settings in groups, its prompts, and what decides the bytes of its data set."""

    folder: Path
    identity: Mapping[str, Any]  # the settings that decide the bytes, as run.json has them
    number: int  # samples of the data set
    source: PromptSource
    prompts: PromptSettings
    model: ModelSettings
    engine: EngineSettings
    sampling: SamplingSettings
    labels: LabelSettings
    batch_size: int = 0  # 0: as many as fit into memory
    limit: int = 0  # samples that this command makes; 0: all
    may_mix: bool = True  # whether another engine may continue the run
    url: str = ""  # of a run in an object store, not on a disk
    force_domain: bool = False  # whether its first batch is not judged


@dataclass(frozen=True)
class LabelConfig(RunConfig):
    FLAGS = (
        "images captions tiles model decoder outlines task labeller classes class_table exponent threshold uncertainty "
        "self_cells cross_cells timesteps engine size seed batch_size image_format out limit dry_run "
        "allow_download json quiet threads dtype compile device"
    ).split()

    images: str = setting(
        "", "folder of PNG and JPEG files", identity=False, metavar="IMAGES", positional=True, required=True
    )
    captions: str = setting(
        "", 'JSON file {"a.jpg": "a dog"}; without it all --classes are searched', identity=False, metavar="FILE"
    )
    tiles: bool = setting(
        False, "read larger pictures in overlapping tiles, at their own size; not depth and pose", identity="if given"
    )
    ask: str = "named"
    timesteps: tuple[str, ...] = setting(
        ("100", "200", "300", "400"), "with --labeller attention: noise levels, a UNet call each", metavar="LIST"
    )
    seed: int = setting(0, "seed of the noise of picture 0; picture k has seed + k", metavar="N")
    limit: int = setting(0, "stop after N new pictures; the same command resumes", identity=False, metavar="N", least=0)
    dtype: str = setting("auto", "precision of the fast engines", choices=("auto", "fp32", "tf32", "fp16", "bf16"))
    out: str = setting("runs/labelled", "run folder", identity=False, metavar="RUN", output="folder")
