"""What a P-Decoder is: its kind, its widths, what it was trained on and how its answers are read; folders of them."""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from datasetdm_fast.config import FROM_DECODER, MOST_CALLS, OUTLINES, TASKS
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.backbones.sd import levels
from datasetdm_fast.engine.labels import DECODER_NAME, LabelName, task_of_label
from datasetdm_fast.engine.labels.class_tables import ClassTable, ClassWord, of_words
from datasetdm_fast.errors import Missing, Refused, nearest
from datasetdm_fast.stages import LEVELS, Level
from datasetdm_fast.untrusted import documents

REMEDY = "Correct that setting, train the decoder again, or name another with --decoder."
FORMAT = 1  # of config.json; without one it is the first
KINDS = ("segmentation", "open-vocabulary", "depth", "heatmap", "simcc")
KINDS_OF = {  # task of this package -> the kinds of decoder whose answers it reads
    "semantic": ("segmentation",),
    "instance": ("segmentation",),
    "depth": ("depth",),
    "pose": ("heatmap", "simcc"),
    "open-vocabulary": ("open-vocabulary",),
}
NORMALISATIONS = ("image", "running")
CLASS_SOURCES = ("decoder", "prompt")
SD1_LEVELS = levels(
    {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": 8}, tokens=77, size=512
)
COCO_JOINTS = tuple(
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist"
    " right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle".split()
)
LIMBS = "15-13 13-11 16-14 14-12 11-12 5-11 6-12 5-6 5-7 6-8 7-9 8-10 1-2 0-1 0-2 1-3 2-4 3-5 4-6"  # places of joints
COCO_LIMBS: Any = tuple(tuple(map(int, limb.split("-"))) for limb in LIMBS.split())


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder; the widths left out are upstream's.

    Sides follow the highest captured level of s cells: memory 20/64, 40/64 and 80/64 of s, masks 2.5 s, image 8 s.
    """

    kind: str  # one of KINDS
    task: str  # one of config.TASKS
    levels: tuple[Level, ...]  # of the UNet it was trained on
    width: int = 256  # channels of a projected level; for masks also those of the transformer
    heads: int = 8
    layers: int = 10
    feed_forward: int = 2048
    mask_dim: int = 256
    queries: int = 100
    # semantic: every id including a background; instance: things; open vocabulary: words trained on
    classes: tuple[str, ...] = ()
    # of them, those its captions always named: they are looked for only where a prompt names them
    named: tuple[str, ...] = ()
    # what a table of the user's own says of them, and its phrases of no class under an empty name
    class_words: tuple[ClassWord, ...] = ()
    # share of each cross-attention head, low to highest, in telling where the words of a prompt are; empty: things are
    # named by the class logits alone
    word_heads: tuple[float, ...] = ()
    text_width: int = 768
    # whether class embeddings are centred and scaled by those trained on; small text encoders hardly tell words apart
    text_centre: bool = False
    max_depth: float = 10.0  # metres
    depth_width: int = 1024  # hidden channels of the depth head
    joints: tuple[str, ...] = ()
    limbs: tuple[tuple[int, int], ...] = ()  # pairs of joint indices, for drawing
    upscale: int = 0  # 0 = upstream: only bilinear resizes; r = r x r learnt sub-cells per cell of the highest level
    # denoiser timestep it was trained at, or those of several calls; None = that of the last sampler call
    capture_timestep: int | tuple[int, ...] | None = None
    normalisation: str = "image"  # image = upstream: statistics of each image; running = the stored ones
    # instances and words below it are dropped; joints below it count as hidden, below half of it as absent
    score_threshold: float = 0.4
    overlap_threshold: float = 0.5  # of two instances with a larger mask IoU the worse is dropped
    # pixels at 512 x 512, scaled to the image: smaller instances are dropped, classes with less evidence zeroed
    min_area: int = 0
    # what gives an instance its class: the decoder, or, where it was taught but one, the prompt of the image
    instance_class_from: str = "decoder"
    # whether labels have the outlines of the decoder's masks, or such as follow the colours of the image near them
    outlines: str = FROM_DECODER

    def __post_init__(self) -> None:
        for value, name, known in (
            (self.kind, "kind", KINDS),
            (self.task, "task", TASKS),
            (self.normalisation, "normalisation", NORMALISATIONS),
            (self.instance_class_from, "instance_class_from", CLASS_SOURCES),
            (self.outlines, "outlines", OUTLINES),
        ):
            if value not in known:
                raise Refused(f"decoder config: {name} is {value!r}, expected one of {', '.join(known)}", REMEDY)
        if self.kind not in (fitting := KINDS_OF.get(self.task, KINDS)):
            raise Refused(
                f"decoder config: kind is {self.kind!r}, expected {' or '.join(fitting)} for the task {self.task}",
                REMEDY,
            )
        if tuple(level.name for level in self.levels) != LEVELS:
            raise Refused(
                f"decoder config: levels are {[level.name for level in self.levels]}, expected {', '.join(LEVELS)}",
                REMEDY,
            )
        if (named := [level.name for level in self.levels if level.blocks]) and named != [*LEVELS[:-1]]:
            raise Refused(
                f"decoder config: blocks are those of {', '.join(named)}, expected {', '.join(LEVELS[:-1])} or none",
                REMEDY,
            )
        if self.has_queries and (self.width % self.heads or self.width % 4):
            raise Refused(f"decoder config: width {self.width} must divide into {self.heads} heads and by 4", REMEDY)
        for name, needed in (("classes", self.kind == "segmentation"), ("joints", self.kind in ("heatmap", "simcc"))):
            if needed and not getattr(self, name):
                raise Refused(f"decoder config: a {self.kind} decoder needs at least one name in {name}", REMEDY)

        if stray := sorted(set(self.named) - set(self.classes)):
            raise Refused(
                f"decoder config: named holds {documents.quote(stray[0])}, which is none of its classes", REMEDY
            )
        heads = sum(sum(level.heads) for level in self.levels)
        if self.word_heads and (self.kind != "segmentation" or len(self.word_heads) != heads):
            raise Refused(
                f"decoder config: {len(self.word_heads)} word_heads of a {self.kind} decoder, expected none, or for "
                f"segmentation one for each of {heads} heads",
                REMEDY,
            )
        if self.word_heads and not (min(self.word_heads) >= 0 < max(self.word_heads)):
            raise Refused("decoder config: word_heads must not be negative, nor all of them 0", REMEDY)
        if self.task == "semantic" and len(self.classes) > 255:
            raise Refused(
                f"decoder config: {len(self.classes)} semantic classes, expected at most 255, the range of an 8-bit "
                "label map",
                "Choose data of fewer classes, or another --task.",
            )

    @property
    def calls(self) -> int:
        """How many calls it reads."""
        return len(self.capture_timestep) if isinstance(self.capture_timestep, tuple) else 1

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Those of a transformer that its levels low, mid and high read; () where they are the model's own."""
        return tuple(level.blocks for level in self.levels if level.blocks)

    @property
    def has_queries(self) -> bool:
        return self.kind in ("segmentation", "open-vocabulary")

    @property
    def has_text(self) -> bool:
        return self.kind == "open-vocabulary"

    @property
    def is_open(self) -> bool:
        """Whether its labels are called by the class words of a run, and not by its own classes."""
        return self.has_text or self.instance_class_from == "prompt"

    @property
    def logits(self) -> int:
        """Class logits of a query, the last "no object"; open-vocabulary has three: unused, object, none."""
        return 3 if self.has_text else len(self.classes) + 1

    @property
    def side(self) -> int:
        """Cells of a side of the highest level, where the decoder was trained."""
        return self.levels[-1].side

    def word_levels(self) -> dict[str, tuple[tuple[float, ...], ...]]:
        """The levels whose heads tell where words are, by name, with the shares of the heads of each of their maps."""
        left, shares_by_level = list(self.word_heads), {}
        for level in self.levels if self.word_heads else ():
            shares = tuple(tuple(left.pop(0) for _ in range(count)) for count in level.heads)
            if any(map(any, shares)):
                shares_by_level[level.name] = shares
        return shares_by_level

    @property
    def table(self) -> ClassTable | None:
        """The words of the user's own that its classes are found by."""
        return of_words(self.class_words) if self.class_words else None

    @property
    def values(self) -> dict[str, Any]:
        """The fields as JSON holds them, without idle ones that earlier versions did not have."""
        values = asdict(self)
        values["class_words"] = [
            {"name": word.name, "say": word.spoken, "words": word.words} for word in self.class_words
        ]
        for level in values["levels"]:
            if level["halves"] == 2:
                del level["halves"]
            if not level["blocks"]:
                del level["blocks"]
        idle = {"class_words": [], "outlines": FROM_DECODER}
        return {name: value for name, value in values.items() if name not in idle or value != idle[name]}

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **self.values}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> DecoderConfig:
        try:
            values = documents.parse_json(text, "it")
            documents.check_form(values, {})
            if (version := values.pop("format", FORMAT)) != FORMAT:
                raise ValueError(f"format {documents.quote(version)}, this version reads {FORMAT}")
            documents.check_form(values, {"levels": [LEVEL_FORM]})
            if absent := [name for name in ("kind", "task") if name not in values]:
                raise ValueError(f"{', '.join(absent)} not given, expected at least kind, task and levels")
            documents.check_form(values, {name: form for name, form in FORM.items() if name in values})
            _check_bounds(values)
        except ValueError as error:
            raise Refused(f"decoder config: not the JSON of a decoder ({str(error).splitlines()[0]})", REMEDY) from None
        names = {field.name for field in fields(DecoderConfig)}
        for settings, known, whose in (
            (values, names, ""),
            *((level, (*LEVEL_FORM, "halves", "blocks"), " of a level") for level in values["levels"]),
            *((word, WORD_FORM, " of a word") for word in values.get("class_words", ())),
        ):
            if unknown := sorted(set(settings) - set(known)):
                listed = documents.one_line(", ".join(unknown))
                raise Refused(
                    f"decoder config: unknown fields {listed}{whose}; it may come from a newer version",
                    "Update the package, train the decoder again, or name another with --decoder.",
                )
        values["levels"] = tuple(
            Level(**level | {name: tuple(level.get(name, ())) for name in ("features", "heads", "blocks")})
            for level in values["levels"]
        )
        for name in ("classes", "named", "word_heads", "joints"):
            values[name] = tuple(values.get(name, ()))
        if isinstance(several := values.get("capture_timestep"), list):
            values["capture_timestep"] = tuple(several)
        values["class_words"] = tuple(
            ClassWord(word["name"], word["say"], tuple(word["words"])) for word in values.get("class_words", ())
        )
        values["limbs"] = tuple(tuple(limb) for limb in values.get("limbs", ()))
        return DecoderConfig(**values)


WORD_FORM = {"name": str, "say": str, "words": [str]}
LEVEL_FORM = {"name": str, "side": int, "features": [int], "heads": [int], "tokens": int}
COUNTS = ("width", "heads", "layers", "feed_forward", "mask_dim", "queries", "text_width", "depth_width")
FORM: dict[str, Any] = dict.fromkeys((*COUNTS, "upscale", "min_area"), int)
FORM |= dict.fromkeys(("max_depth", "score_threshold", "overlap_threshold"), float)
FORM |= dict.fromkeys(("kind", "task", "normalisation", "instance_class_from", "outlines"), str) | {
    "text_centre": bool,
    "limbs": [[int]],
    "word_heads": [float],
    "class_words": [WORD_FORM],
}
FORM |= dict.fromkeys(("classes", "named", "joints"), [str])
LEAST_NUMBERS = {"upscale": 0, "min_area": 0, "max_depth": 0, "score_threshold": 0, "overlap_threshold": 0}  # others: 1
LARGEST_NUMBERS = {"layers": 64, "heads": 1024, "upscale": 16, "min_area": 2**30, "max_depth": 1e6}  # others: 65536
MOST_NAMES = 65536


def _check_bounds(values: Mapping[str, Any]) -> None:
    """A ValueError where a number is one no decoder has: networks are built by them before any weight is looked at."""
    for name, value in values.items():
        least, largest = LEAST_NUMBERS.get(name, 1), LARGEST_NUMBERS.get(name, 65536)
        if FORM.get(name) in (int, float) and not least <= value <= largest:
            raise ValueError(f"{name} is {value}, expected {least} to {largest}")
    named = values.get("capture_timestep")
    timesteps = named if isinstance(named, list) else [0 if named is None else named]
    is_several = 2 <= len(timesteps) <= MOST_CALLS and len(set(map(str, timesteps))) == len(timesteps)
    if not (
        all(type(time) is int and 0 <= time < 100_000 for time in timesteps) and (timesteps != named or is_several)
    ):
        raise ValueError(
            f"capture_timestep is {documents.quote(named)}, expected a timestep, 2 to {MOST_CALLS} of them, or null"
        )
    for level in values["levels"]:
        numbers = (level["side"], level["tokens"], *level["features"], *level["heads"])
        if not all(1 <= number <= 65536 for number in numbers) or len(numbers) > 128:
            raise ValueError("a level's numbers are out of range")
        if level.get("halves", 2) not in (1, 2):
            raise ValueError(f"a level's halves are {documents.quote(level['halves'])}, expected 1 or 2")
        blocks = level.get("blocks", [])
        documents.check_form(blocks, [int], "blocks of a level")
        is_read = len(blocks) == len(level["features"]) == len(level["heads"]) and blocks == sorted({*blocks})
        if blocks and not (is_read and 0 <= blocks[0] and blocks[-1] <= 65536):
            raise ValueError(f"blocks of a level are {documents.quote(blocks)}, expected one for each of its features")
    names = max(len(values.get(name, ())) for name in ("classes", "class_words"))
    if names > MOST_NAMES or len(values.get("joints", ())) > 1024:
        raise ValueError("it names more classes or joints than a decoder has")
    joints = len(values.get("joints", ()))
    if any(len(limb) != 2 or not all(0 <= joint < joints for joint in limb) for limb in values.get("limbs", ())):
        raise ValueError("its limbs do not join two of its joints")


def upstream(kind: str, **changes: Any) -> DecoderConfig:
    """DatasetDM's own decoder configuration of this kind on the U-Net that it was published with, and `changes`."""
    presets: dict[str, dict[str, Any]] = {
        "segmentation": {"task": "semantic", "classes": tuple(str(k) for k in range(19)), "min_area": 5000},
        "open-vocabulary": {"task": "open-vocabulary", "queries": 20},
        "depth": {"task": "depth"},
        "heatmap": {"task": "pose", "joints": COCO_JOINTS, "limbs": COCO_LIMBS, "score_threshold": 0.2},
        "simcc": {"task": "pose", "joints": COCO_JOINTS, "limbs": COCO_LIMBS, "score_threshold": 0.2},
    }
    return DecoderConfig(kind=kind, **{"levels": SD1_LEVELS, **presets.get(kind, {"task": "semantic"}), **changes})


DEMO = Path(__file__).parents[2] / "demo" / "decoders"
SHIPPED = {"demo": DEMO, "demo-dit": DEMO.with_name("decoders-dit")}  # by the model that they read
FOLDER_FORM = "Give a folder with one sub-folder per trained decoder, or a DatasetDM checkpoint FILE.pth."


def read_config(folder: Path) -> DecoderConfig:
    """The configuration in a decoder's folder."""
    try:
        return DecoderConfig.from_json(storage.read(folder / "config.json", documents.LARGEST_CONFIG).decode())
    except (Refused, UnicodeDecodeError) as error:
        raise Refused(
            f"decoder {folder}: {str(error).splitlines()[0]}",
            error.remedy if isinstance(error, Refused) else "Give a folder written by training or save_decoder.",
        ) from error


class DecoderFolders(dict[str, Path]):
    """The decoders of one or several folders by the labels they make: TASK:NAME of each, and TASK of the task's own.
    Where two folders have a decoder of one name, the first of them counts.

    A task's own decoder is the only one that the first folder with any has for the task, or the one called like it.
    """

    @property
    def labels(self) -> list[str]:
        """One label a decoder: its task where it is the task's own, else its name too."""
        tasks = {label: task_of_label(label) for label in self if ":" in label}
        return [task if self.get(task) == self[label] else label for label, task in tasks.items()]


def find_decoders(source: str | Path | Iterable[Path]) -> DecoderFolders:
    """The decoders of folders that have a sub-folder for each, named one by one or in one text."""
    folders = DecoderFolders()
    for folder in parts_of(source) if isinstance(source, (str, Path)) else source:
        configs = sorted(path.parent for path in folder.glob("*/config.json"))
        if not configs:
            remedy = f"Give the folder above: {folder.parent}." if (folder / "config.json").exists() else FOLDER_FORM
            lack = "no sub-folder holds a config.json"
            if not folder.exists():
                lack = f"no such folder{nearest(str(folder), SHIPPED) or storage.named_alike(folder)}"
            elif any(folder.glob("*/training/**/log.jsonl")):
                lack, remedy = "its training has not ended", "Run the command that trains it again, which resumes it."
            raise Missing(f"decoders {folder}: {lack}", remedy)
        here = {LabelName(read_config(path).task, path.name): path for path in configs}
        for name, path in here.items():
            folders.setdefault(str(name), path)
        for task in {name.task for name in here} - folders.keys():
            paths = {name.decoder: path for name, path in here.items() if name.task == task}
            if len(paths) == 1 or task in paths:  # otherwise several have the same claim
                folders[task] = paths.get(task, next(iter(paths.values())))
        for name, path in here.items():
            if folders.get(name.task) != path and not DECODER_NAME.fullmatch(name.decoder):
                raise Refused(
                    f"decoders {folder}: {documents.quote(name.decoder)} is one of several for {name.task}, and "
                    "its name is not up to 63 letters, digits, - or _",
                    "Rename the folder.",
                )
    return folders


def parts_of(source: str | Path) -> list[Path]:
    """The paths of one text, with commas between them; demo and demo-dit name the decoders shipped with the package. A
    comma belongs to a path where that is there, with KIND: before it or not.
    """
    words, folders = str(source).split(","), []
    while words:
        joined = (",".join(words[:count]) for count in range(len(words), 0, -1))
        existing = (text for text in joined if any(map(os.path.exists, (text, text.partition(":")[2]))))
        part = next((text for text in existing if text not in SHIPPED), words[0].strip())
        words = words[part.count(",") + 1 :]
        folders += [SHIPPED.get(part, Path(part))] if part else []
    if not folders:
        raise Refused(f"decoders: {str(source)!r} names none", "Name a folder of trained decoders, or demo.")
    return folders
