"""python -m bench.world.judge --out DIR: do the pictures of a world's model show what their captions say?

Two small segmentation networks trained only on renders, one for kinds and one for colours, look for the named things in
generated pictures, with their own captions and with those of others, and in renders of the same scenes, which shows the
errors of the networks. Also measures the distance of the pictures from renders in the first network's features. Writes
judge.json and contact.png, and prints the tables.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from bench.world.distance import features, frechet
from bench.world.judge_net import CLASSES, COLOURS, STEPS, Judge, classes_in, held_out_miou, kept_judge
from bench.world.things_seen import SeenThing, shares, things_seen
from bench.world.worlds import ASKED, HELD_OUT, WORLDS, World
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.data import join_texts
from datasetdm_fast.engine.engines import Engine, build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.sampling import schedule as walk
from datasetdm_fast.engine.scenes.world import TableTop

MOST = 4  # things that a caption names
OTHERS = 4  # sets of captions of other pictures
OTHER_RENDERS = HELD_OUT + 100_000  # first seed of those that pictures are compared with
BATCH = 20


@dataclass(frozen=True)
class Judges:
    world: World
    kinds: Judge
    colours: Judge

    def things(self, images: np.ndarray) -> list[list[SeenThing]]:
        """The things of each image [N, H, W, 3]."""
        maps = zip(classes_in(self.kinds, images).numpy(), classes_in(self.colours, images).numpy(), strict=True)
        return [things_seen(*both, self.world.classes, tuple(self.world.colours)) for both in maps]


def draw(
    engine: Engine, captions: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, sampler: str
) -> np.ndarray:
    schedule, side = walk.make_schedule(engine.model.scheduler, sampler, steps), engine.model.size // 8
    images, started = [], time.monotonic()
    for start in range(0, len(captions), BATCH):
        some, chosen = captions[start : start + BATCH], seeds[start : start + BATCH]
        context = join_texts([engine.encode_text([""] * len(some)), engine.encode_text(list(some))])
        state = walk.ReferenceSampler(schedule, guidance, walk.ImageNoise(chosen, (4, side, side)).draw())
        for k, time_step in enumerate(schedule.timesteps):
            state.step(k, engine.denoise(state.latents, time_step, context))
        images.append(engine.decode_image(state.latents).numpy())
        seconds = time.monotonic() - started
        print(f"drawn {start + len(some)}/{len(captions)} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return np.concatenate(images)


def through_autoencoder(engine: Engine, images: np.ndarray) -> np.ndarray:
    parts = np.array_split(images, max(len(images) // BATCH, 1))
    return np.concatenate([engine.decode_image(engine.encode_image(torch.from_numpy(one))).numpy() for one in parts])


def asked_scenes(world: World, first: int, number: int) -> list[TableTop]:
    """So many scenes of each number of things from one to MOST, in turn."""
    return [world.sample_scene(first + k, count=1 + k % MOST) for k in range(MOST * number)]


def rendered(world: World, scenes: Sequence[TableTop], size: int) -> np.ndarray:
    return np.stack([world.render(scene, size).image for scene in scenes])


def mean_shares(rows: Sequence[dict[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    return {
        count: {name: round(float(np.mean([row[count][name] for row in rows])), 4) for name in some}
        for count, some in rows[0].items()
    }


def by_class(pictures: Sequence[Sequence[SeenThing]], scenes: Sequence[TableTop], world: World) -> dict[str, list]:
    """For each kind the share of the pictures that name it in which it is seen, and their number."""
    found = {}
    for name in world.things:
        asked = [k for k, scene in enumerate(scenes) if any(thing.kind == name for thing in scene.things)]
        if asked:
            hits = [any(thing.kind == name for thing in pictures[k]) for k in asked]
            found[name] = [round(float(np.mean(hits)), 3), len(asked)]
    return found


def distances(judge: Judge, sets: dict[str, np.ndarray], reference: np.ndarray) -> dict[str, float]:
    """The Fréchet distance of each set of pictures from the reference."""
    there = features(judge, reference)
    return {name: round(frechet(features(judge, images), there), 4) for name, images in sets.items()}


def tables(result: dict) -> str:
    """Markdown: what pictures show of their captions, and how far they are from renders."""
    lines = ["| pictures | things named | all there | in their colours | in their order | no more and no fewer |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for name in ("generated", "of other captions", "renders"):
        for count, row in result[name].items():
            lines.append(f"| {name} | {count} | {' | '.join(f'{100 * value:.1f} %' for value in row.values())} |")
    lines += ["", "| pictures | Fréchet distance from other renders |", "|---|---:|"]
    return "\n".join(lines + [f"| {name} | {value:.4g} |" for name, value in result["frechet"].items()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.world.judge", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--model", default="demo", help="demo, or a diffusers folder")
    parser.add_argument("--world", choices=tuple(WORLDS), default="demo", help="world that the model was trained on")
    parser.add_argument("--number", type=int, default=250, help=f"pictures of each number of things, 1 to {MOST}")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps of a picture")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale")
    parser.add_argument("--sampler", default="pndm", help="as for generate")
    parser.add_argument("--judge-steps", type=int, default=STEPS, help="training steps of a network")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = torch's choice")
    options = parser.parse_args(arguments)
    if options.number < 2:
        parser.error("--number: at least 2, so that there are other captions")
    if options.threads:
        torch.set_num_threads(options.threads)
    engine, world = build_engine("fast", load_model(options.model), {}), WORLDS[options.world]
    size = engine.model.size
    nets = [kept_judge(options.out, size, world, each, options.judge_steps) for each in (CLASSES, COLOURS)]
    judges = Judges(world, *nets)
    scenes = asked_scenes(world, ASKED, options.number)
    captions, seeds = [scene.caption for scene in scenes], [ASKED + k for k in range(len(scenes))]
    images = draw(engine, captions, seeds, options.steps, options.guidance, options.sampler)
    made, true = judges.things(images), rendered(world, scenes, size)
    shifts = {MOST * max(options.number * k // (OTHERS + 1), 1) for k in range(1, OTHERS + 1)}
    others = [shares(made, [*scenes[shift:], *scenes[:shift]]) for shift in shifts]
    kinds, colours = (held_out_miou(net, size, world, each) for net, each in zip(nets, (CLASSES, COLOURS)))
    result = {"judge_miou": round(kinds, 4), "colours_miou": round(colours, 4), "pictures": len(images)}
    result |= {name: getattr(options, name) for name in ("sampler", "steps", "guidance")}
    result |= {"generated": shares(made, scenes), "of other captions": mean_shares(others)}
    result["renders"] = shares(judges.things(true), scenes)
    usual = [k for k, scene in enumerate(scenes) if len(scene.things) < MOST]  # as many things as either world knows
    result["per_class"] = by_class([made[k] for k in usual], [scenes[k] for k in usual], world)
    reference = rendered(world, [asked_scenes(world, OTHER_RENDERS, options.number)[k] for k in usual], size)
    sets = {
        "renders": true[usual],
        "renders through the autoencoder": through_autoencoder(engine, true[usual]),
        "generated": images[usual],
    }
    result["frechet"] = distances(judges.kinds, sets, reference)
    (options.out / "judge.json").write_text(json.dumps(result, indent=2) + "\n")
    across = min(len(images), 12)
    starts = range(0, min(len(images) // across, 6) * across, across)
    rows = [np.concatenate(list(images[start : start + across]), 1) for start in starts]
    Image.fromarray(np.concatenate(rows, 0)).save(options.out / "contact.png")
    print(tables(result), file=sys.stderr)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
