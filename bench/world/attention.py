"""python -m bench.world.attention --out DIR: how accurate are the demo model's labels from attention?

They are compared with the predictions of a small segmentation network trained only on renders, on pictures of one or
two things: IoU of the named things by default, without self-attention, with the class prompts of other pictures, and of
the labels of other pictures, which lie where things usually do. Writes attention.json and masks.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.world.judge_net import classes_in, kept_judge
from bench.world.worlds import ASKED
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.data import IGNORE, AttentionSums, Request, join_texts
from datasetdm_fast.engine.engines import Engine, build_engine
from datasetdm_fast.engine.labels.pictures import paint_map
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.class_prompts import class_columns
from datasetdm_fast.engine.loop.recipe import Recipe, make_recipe
from datasetdm_fast.engine.sampling import schedule as walk
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.tasks.attention import class_maps, label_maps
from datasetdm_fast.stages import FACTOR

BATCH = 10
APART = 2  # pictures between one and the one whose class prompt it is given: as many things, of other kinds
SEEN = 30  # pixels that the judge must see of a thing for it to count


@dataclass(frozen=True)
class Drawn:
    images: np.ndarray  # [N, H, W, 3] uint8
    own: list[AttentionSums]  # of each batch, over all calls
    others: list[AttentionSums]  # with class prompts of other pictures


@torch.inference_mode()
def draw(engine: Engine, recipe: Recipe, requests: Sequence[Request], prompts: Sequence[str]) -> Drawn:
    """The pictures of the requests and their attention, over their own class prompts and over `prompts`."""
    images, found = [], ([], [])
    side, numbers = recipe.size // FACTOR, recipe.attention
    for first in range(0, len(requests), BATCH):
        some = requests[first : first + BATCH]
        texts = [each.prompt for each in some]
        context = join_texts([engine.encode_text([""] * len(some)), engine.encode_text(texts)])
        asked = [list(map(recipe.class_prompt, some)), list(prompts[first : first + BATCH])]
        class_contexts = [engine.encode_text(each) for each in asked]
        tokens = class_contexts[0].context.shape[1]
        shapes = (len(some), numbers.self_cells**2, numbers.self_cells**2), (len(some), numbers.cross_cells**2, tokens)
        sums = [AttentionSums(*map(torch.zeros, shapes)) for _ in asked]
        noise = walk.ImageNoise([each.seed for each in some], (4, side, side)).draw()
        state = walk.ReferenceSampler(recipe.schedule, recipe.guidance, noise)
        for call, timestep in enumerate(recipe.schedule.timesteps):
            for k, class_context in enumerate(class_contexts):
                output, sums[k] = engine.denoise_and_average(state.latents, timestep, context, class_context, sums[k])
            state.step(call, output)
        images.append(engine.decode_image(state.latents).numpy())
        for kept, one in zip(found, sums):
            kept.append(one.over(len(recipe.schedule)))
        print(f"drawn {first + len(some)}/{len(requests)}", file=sys.stderr, flush=True)
    return Drawn(np.concatenate(images), *found)


def labelled(
    engine: Engine,
    recipe: Recipe,
    requests: Sequence[Request],
    averages: Sequence[AttentionSums],
    prompts: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """[N, H, W] the labels as a run would write them, and with the uncertain pixels filled in."""
    numbers, places, maps = recipe.attention, [], []
    for k, request in enumerate(requests):
        named = class_columns(prompts[k], request.classes, engine.model.tokenizer, by_words=False)
        places.append([own for _, own in named])
    for k, one in enumerate(averages):
        maps += class_maps(one, places[k * BATCH : (k + 1) * BATCH], numbers.exponent)
    known = [[world.CLASSES.index(word) for word in each.classes] for each in requests]
    both = [
        np.stack([label.labels for label in label_maps(maps, known, world.CLASSES, recipe.size, threshold, lowest)])
        for threshold, lowest in ((numbers.threshold, numbers.uncertainty), (numbers.uncertainty,) * 2)
    ]
    return both[0], both[1]


def by_things(labels: np.ndarray, truth: np.ndarray, requests: Sequence[Request]) -> dict[str, float]:
    """`thing_iou` of all pictures, and of those of one and of two things alone."""
    return {
        name: thing_iou(labels, truth, requests, counts)
        for name, counts in (("all", (1, 2)), ("one_thing", (1,)), ("two_things", (2,)))
    }


def thing_iou(
    labels: np.ndarray, truth: np.ndarray, requests: Sequence[Request], counts: Sequence[int] = (1, 2)
) -> float:
    """Mean over classes of the IoU of named things the judge sees, in pictures that name so many classes; pixels of 255
    are left out.
    """
    inside, union = np.zeros(len(world.CLASSES)), np.zeros(len(world.CLASSES))
    for found, seen, request in zip(labels, truth, requests):
        if len(request.classes) not in counts:
            continue
        is_certain = found != IGNORE
        for number in map(world.CLASSES.index, request.classes):
            if (seen == number).sum() >= SEEN:
                ours, theirs = (found == number) & is_certain, (seen == number) & is_certain
                inside[number] += (ours & theirs).sum()
                union[number] += (ours | theirs).sum()
    return round(float((inside[union > 0] / union[union > 0]).mean()), 4)


def following(count: int) -> list[int]:
    """For each of so many pictures, another one of as many things."""
    return [(k + APART) % count for k in range(count)]


def renamed(labels: np.ndarray, own: Request, other: Request) -> np.ndarray:
    """The labels of a picture with the classes of another one, in their order."""
    numbers = np.arange(256, dtype=np.uint8)
    for place, word in enumerate(own.classes):
        numbers[world.CLASSES.index(word)] = world.CLASSES.index(other.classes[min(place, len(other.classes) - 1)])
    return numbers[labels]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.world.attention", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--number", type=int, default=200, help="pictures")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps of a picture")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    engine = build_engine("fast", load_model("demo"), {})
    recipe = make_recipe(engine, ("attention",), steps=options.steps, classes=world.THINGS)
    judge = kept_judge(options.out, recipe.size)
    requests = []
    for k in range(options.number):
        scene = world.sample_scene(ASKED + k, count=1 + k % 2)
        named = tuple(word for word in world.THINGS if any(thing.kind == word for thing in scene.things))
        requests.append(Request(k, scene.caption, ASKED + k, named))
    prompts = list(map(recipe.class_prompt, requests))
    strangers = [requests[k] for k in following(len(requests))]
    other_prompts = list(map(recipe.class_prompt, strangers))
    drawn = draw(engine, recipe, requests, other_prompts)
    truth = classes_in(judge, drawn.images).numpy()
    labels, filled = labelled(engine, recipe, requests, drawn.own, prompts)
    alone = replace(recipe, attention=replace(recipe.attention, exponent=0))
    flat, _ = labelled(engine, alone, requests, drawn.own, prompts)
    shuffled, _ = labelled(engine, recipe, strangers, drawn.others, other_prompts)
    elsewhere = [renamed(labels[k], requests[k], request) for k, request in zip(following(len(requests)), requests)]
    result = {
        "pictures": options.number,
        "calls": len(recipe.schedule),
        **recipe.facts["attention"],
        "iou": by_things(labels, truth, requests),
        "iou_filled": by_things(filled, truth, requests),
        "uncertain": round(float((labels == IGNORE).mean()), 4),
        "iou_exponent_0": by_things(flat, truth, requests),
        "iou_shuffled": by_things(shuffled, truth, requests),
        "iou_elsewhere": by_things(np.stack(elsewhere), truth, requests),
    }
    (options.out / "attention.json").write_text(json.dumps(result, indent=2) + "\n")
    rows = [
        np.concatenate([image, *(np.array(paint_map(one).convert("RGB")) for one in both)], 1)
        for image, *both in zip(drawn.images[:32], truth.astype(np.uint8)[:32], labels[:32])
    ]
    columns_of = [np.concatenate(rows[start : start + 8]) for start in range(0, len(rows) // 8 * 8, 8)]
    if columns_of:
        Image.fromarray(np.concatenate(columns_of, 1)).save(options.out / "masks.png")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
