"""parallel_demo: drawings of seven labels of one picture, from one diffusion pass."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datasetdm_fast.compat.showlab import files
from datasetdm_fast.compat.showlab.files import Output, encode, jpeg
from datasetdm_fast.compat.showlab.lines import COMMON, NO_EFFECT, OURS, PROMPTS, Flag, Line
from datasetdm_fast.compat.showlab.order import ClassName, Order, read_counts
from datasetdm_fast.compat.showlab.prompts import Item
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.colours import colour_in
from datasetdm_fast.engine.labels.pictures import HEAT, draw_skeletons, paint_masks
from datasetdm_fast.errors import Refused

LARGEST_SEED = 1_000_000
# the ending of its flags -> label, kind of checkpoint, ending of its --config
LABELS = {
    "semantic": ("semantic:cityscapes", "cityscapes", "semantic"),
    "depth_Virtual_KITTI_2": ("depth:vkitti2", "vkitti2", "depth_Virtual_KITTI_2"),
    "depth_NYU": ("depth:nyu", "nyu", "depth_NYU"),
    "instance": ("instance:coco", "coco", "instance"),
    "semantic_open": ("open-vocabulary:voc", "voc", "open_word_seg"),
    "human_pose": ("pose:pose", "pose", "pose"),
    "human_seg": ("semantic:deepfashion", "deepfashion", "human_seg"),
}
ENDINGS = ("VKITTI2_depth", "NYU_depth", "instance", "open_world", "semantic", "deepfashion", "human_pose")
BRIGHTEST = {"vkitti2": 10.0, "nyu": 10.0}  # metres at the end of the colours
LEAST_HEIGHT = 0.2  # of a joint that is drawn
ALPHA = 0.5  # of a label map over its picture
SENTENCE = "a photo of a lion on a mountain top at sunset"
FLAGS = (
    *COMMON,
    Flag("number_data", 20, "whole", "pictures in all"),
    Flag("prompt", SENTENCE, help="what all pictures show", is_optional=True),
    Flag("open_word", SENTENCE, help="what the open-vocabulary decoder looks for", is_optional=True),
    Flag("prompt_root", f"{PROMPTS}/cityscapes", has_effect=False, is_optional=True),
    *(
        Flag(f"grounding_ckpt_{name}", "grounding_module.pth", "path", f"weights of {LABELS[name][1]}")
        for name in LABELS
    ),
    *(Flag(f"config_{each[2]}", "", "path", has_effect=False, is_optional=True) for each in LABELS.values()),
    *(flag for flag in NO_EFFECT if flag.name != "prompt"),
    *OURS,
)


@dataclass(frozen=True)
class Demo:
    """The script beside those that make one kind of label."""

    name: str = "parallel_demo"
    description: str = "Pictures of one prompt with seven labels each, from one diffusion pass."
    flags: tuple[Flag, ...] = FLAGS
    folders: tuple[str, ...] = ("",)  # its files lie flat in the output

    def order(self, line: Line) -> Order:
        """All images of a line; all of DatasetDM's processes draw the same seeds and write the same files."""
        counts, word = read_counts(line, "number_data"), line["open_word"].strip()
        if not word:
            raise Refused("--open_word: it is empty", "Give the word to look for.")
        count = sum(share for process, share in counts.shares(whole=line["all"]) if process in (0, counts.processes))
        generator = random.Random(line["seed"])
        seeds = dict.fromkeys(generator.randint(1, LARGEST_SEED) for _ in range(count))
        items = tuple(Item(0, seed, line["prompt"]) for seed in seeds)
        checkpoints = {label: (kind, f"grounding_ckpt_{name}") for name, (label, kind, _) in LABELS.items()}
        return Order(self, line, checkpoints, 5.0, items, (ClassName("", word, word),), True, (word,))

    def names(self, order: Order, index: int) -> list[str]:
        """The files of a picture, below the output."""
        stem = order.items[index].stem
        return [f"{stem}.jpg", *(f"{stem}_{ending}.png" for ending in ENDINGS)]

    def files(self, order: Order, index: int, pixels: np.ndarray, raw: dict, configs: dict) -> dict[str, bytes]:
        """The picture and a drawing of each label."""
        outputs = {kind: Output(pixels, raw[label], configs[label]) for label, kind, _ in LABELS.values()}
        metres = {kind: outputs[kind].raw["depth"][0].float().cpu().numpy() for kind in BRIGHTEST}
        things, classes, _ = files.candidates(outputs["coco"], 2)
        masks, _, scores = files.candidates(outputs["voc"], 1)
        word = masks[files.best_indices(scores, 1)[0]]
        clothes = files.class_map(outputs["deepfashion"], least=0) * word
        places, heights, _ = files.joints(outputs["pose"])
        drawings = (
            Image.fromarray(near_to_far(metres["vkitti2"] / BRIGHTEST["vkitti2"])),
            Image.fromarray(jet(metres["nyu"] / BRIGHTEST["nyu"])),
            paint_masks(pixels, things, np.array(classes)),
            paint_masks(pixels, word[None], np.zeros(1, int)),
            over(pixels, files.class_map(outputs["cityscapes"]), "cityscapes"),
            over(pixels, clothes, "deepfashion"),
            draw_skeletons(pixels, [(places, heights >= LEAST_HEIGHT)], outputs["pose"].config.limbs),
        )
        contents = [jpeg(pixels), *(encode(drawing, "PNG") for drawing in drawings)]
        return dict(zip(self.names(order, index), contents, strict=True))


DEMO = Demo()


def near_to_far(share: np.ndarray) -> np.ndarray:
    """Values 0 to 1 from light to dark, DatasetDM's magma reversed: [H, W, 3] uint8."""
    anchors = np.array([list(bytes.fromhex(text)) for text in HEAT])
    place = share.clip(0, 1) * (len(HEAT) - 1)
    channels = [np.interp(place, np.arange(len(HEAT)), anchors[:, k]) for k in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def jet(share: np.ndarray) -> np.ndarray:
    """Values 0 to 1 from blue over green to red: [H, W, 3] uint8."""
    distance = np.abs(4 * share.clip(0, 1)[..., None] - np.array([3, 2, 1]))
    return ((1.5 - distance).clip(0, 1) * 255).round().astype(np.uint8)


def over(pixels: np.ndarray, labels: np.ndarray, palette: str) -> Image.Image:
    """A label map in the colours of a data set over its image."""
    names = class_tables.builtin_table(palette).names
    table = np.array([colour_in(palette, names[k] if k < len(names) else "", k) for k in range(256)], np.float32)
    return Image.fromarray((pixels * (1 - ALPHA) + table[labels] * ALPHA).astype(np.uint8))
