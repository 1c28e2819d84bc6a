"""parallel_demo: one picture with all seven labels, out of one diffusion pass."""

import random
from dataclasses import dataclass

import numpy as np

from datasetdm_fast.compat.showlab import drawing, files
from datasetdm_fast.compat.showlab.files import Answer, encoded, jpeg
from datasetdm_fast.compat.showlab.lines import Flag, Line
from datasetdm_fast.compat.showlab.order import ClassName, Order, check_counts
from datasetdm_fast.compat.showlab.prompts import Item
from datasetdm_fast.compat.showlab.scripts import COMMON, NO_EFFECT, OURS, PROMPTS
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
ALPHA = 0.5
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
    """The script, beside those that make one kind of label."""

    name: str = "parallel_demo"
    told: str = "Pictures of one prompt with seven labels each, from one diffusion pass."
    flags: tuple[Flag, ...] = FLAGS
    folders: tuple[str, ...] = ("",)  # its files lie flat in the output

    def order(self, line: Line) -> Order:
        """What a line asks for; all of DatasetDM's processes draw the same seeds and write the same files."""
        counts, word = check_counts(line, "number_data"), line["open_word"].strip()
        if not word:
            raise Refused("--open_word: it is empty", "Give the word to look for.")
        count = sum(share for process, share in counts.shares(whole=line["all"]) if process in (0, counts.processes))
        generator = random.Random(line["seed"])
        seeds = dict.fromkeys(generator.randint(1, LARGEST_SEED) for _ in range(count))
        made = tuple(Item(0, place, seed, line["prompt"], "") for place, seed in enumerate(seeds))
        checkpoints = {label: (kind, f"grounding_ckpt_{name}") for name, (label, kind, _) in LABELS.items()}
        asked = (ClassName("", word, word),)
        return Order(line, line.path("outdir"), checkpoints, 5.0, made, asked, True, (word,))

    def names(self, order: Order, index: int) -> list[str]:
        stem = order.items[index].stem
        return [f"{stem}.jpg", *(f"{stem}_{ending}.png" for ending in ENDINGS)]

    def files(self, order: Order, index: int, pixels: np.ndarray, raw: dict, configs: dict) -> dict[str, bytes]:
        """The picture and a drawing of each label."""
        from datasetdm_fast.engine.labels.pictures import masked, skeletons

        answers = {kind: Answer(pixels, raw[label], configs[label]) for label, kind, _ in LABELS.values()}
        metres = {kind: answers[kind].raw["depth"][0].float().cpu().numpy() for kind in BRIGHTEST}
        best, classes, _ = files.candidates(answers["coco"], 2)
        masks, _, scores = files.candidates(answers["voc"], 1)
        word = masks[files.best_of(scores, 1)[0]]
        clothes = files.class_map(answers["deepfashion"], least=0) * word
        places, heights, _ = files.joints(answers["pose"])
        drawn = (
            drawing.Image.fromarray(drawing.near_to_far(metres["vkitti2"] / BRIGHTEST["vkitti2"])),
            drawing.Image.fromarray(drawing.jet(metres["nyu"] / BRIGHTEST["nyu"])),
            masked(pixels, best, np.array(classes)),
            masked(pixels, word[None], np.zeros(1, int)),
            drawing.over(pixels, files.class_map(answers["cityscapes"]), "cityscapes", ALPHA),
            drawing.over(pixels, clothes, "deepfashion", ALPHA),
            skeletons(pixels, [(places, heights >= LEAST_HEIGHT)], answers["pose"].config.limbs),
        )
        stem = order.items[index].stem
        found = {
            f"{stem}_{ending}.png": encoded(picture, "PNG") for ending, picture in zip(ENDINGS, drawn, strict=True)
        }
        return {f"{stem}.jpg": jpeg(pixels)} | found
