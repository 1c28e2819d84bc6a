"""python -m datasetdm_fast.demo.judge --out DIR: do the pictures of a world's model show what their captions say?

A small segmentation net that has only ever seen renders looks for the captioned classes in generated pictures, under
the right captions and under shuffled ones. Writes judge.json and contact.png.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from datasetdm_fast import sampling
from datasetdm_fast.engines import build_engine
from datasetdm_fast.loading import load_model
from datasetdm_fast.sampling import times, walk
from datasetdm_fast.scenes.world import TableTop
from datasetdm_fast.scenes.worlds import ASKED, HELD_OUT, LEARN, WORLDS, World

ENOUGH = 100  # pixels of 128 x 128 that count as seen


class Judge(nn.Module):
    """A plain U-Net of three resolutions."""

    def __init__(self, classes: int = len(WORLDS["demo"].classes), width: int = 24):
        super().__init__()

        def block(channels_in: int, channels_out: int) -> nn.Sequential:
            layers = []
            for given in (channels_in, channels_out):
                layers += [nn.Conv2d(given, channels_out, 3, padding=1), nn.GroupNorm(8, channels_out), nn.SiLU()]
            return nn.Sequential(*layers)

        sizes = ((3, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width))
        self.down = nn.ModuleList([block(*pair) for pair in sizes])
        self.up = nn.ModuleList([block(8 * width, 2 * width), block(4 * width, width), block(2 * width, width)])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = F.avg_pool2d(images, 2), []  # half resolution is enough to name a shape
        for k, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if k else x)
            skips.append(x)
        for block, skip in zip(self.up, reversed(skips[:-1])):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear")


def softened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Renders with random blur and noise, so that softness alone does not fool the judge."""
    scale = float(torch.rand((), generator=generator) * 0.6 + 0.4)
    small = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    soft = F.interpolate(small, size=images.shape[2:], mode="bilinear")
    return soft + 0.04 * torch.randn(soft.shape, generator=generator)


def train_judge(count: int, steps: int, size: int, world: World = WORLDS["demo"]) -> Judge:
    views = [world.view(LEARN + k, size) for k in range(count)]
    images = torch.stack([torch.from_numpy(view.image) for view in views]).permute(0, 3, 1, 2)
    labels = torch.stack([torch.from_numpy(view.semantic) for view in views])
    torch.manual_seed(0)
    judge, generator = Judge(len(world.classes)).train(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(count, (16,), generator=generator)
        loss = F.cross_entropy(judge(softened(images[chosen].float() / 127.5 - 1, generator)), labels[chosen].long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"judge {step + 1}/{steps} loss {loss.item():.4f}", file=sys.stderr, flush=True)
    return judge.eval()


@torch.inference_mode()
def probabilities(judge: Judge, images: np.ndarray) -> Tensor:
    """[N, K, H, W] of each class, as the judge sees images [N, H, W, 3]."""
    parts = np.array_split(images, max(len(images) // 32, 1))
    pixels = (torch.from_numpy(one).permute(0, 3, 1, 2).float() / 127.5 - 1 for one in parts)
    return torch.cat([judge(one).softmax(1) for one in pixels])


def classes_in(judge: Judge, images: np.ndarray) -> Tensor:
    """[N, H, W] the class of each pixel, as the judge sees images [N, H, W, 3]."""
    return probabilities(judge, images).argmax(1)


def seen(judge: Judge, images: np.ndarray) -> np.ndarray:
    """[N, K] pixels of each class."""
    return F.one_hot(classes_in(judge, images), judge.head.out_channels).sum((1, 2)).numpy()


def held_out_miou(judge: Judge, count: int, size: int, world: World) -> float:
    confusion = np.zeros((len(world.classes),) * 2)
    for start in range(0, count, 32):
        views = [world.view(HELD_OUT + k, size) for k in range(start, min(start + 32, count))]
        guess = classes_in(judge, np.stack([view.image for view in views])).numpy()
        pairs = np.stack([view.semantic for view in views]).ravel() * len(world.classes) + guess.ravel()
        confusion += np.bincount(pairs, minlength=confusion.size).reshape(confusion.shape)
    both = np.diag(confusion)
    return float((both / (confusion.sum(0) + confusion.sum(1) - both)).mean())


def draw(
    engine,
    captions: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    sampler: str,
    batch_size: int = 20,
) -> np.ndarray:
    schedule, side = sampling.make_schedule(engine.model.scheduler, sampler, steps), engine.model.size // 8
    images, started = [], time.monotonic()
    for start in range(0, len(captions), batch_size):
        some, chosen = captions[start : start + batch_size], seeds[start : start + batch_size]
        context = torch.cat([engine.encode_text([""] * len(some)), engine.encode_text(list(some))])
        state = walk.start(torch.stack([times.initial_noise(seed, 4, side, side) for seed in chosen]))
        for k, time_step in enumerate(schedule.timesteps):
            state = walk.step(
                schedule, k, state, walk.guide(engine.denoise(state.latents, time_step, context), guidance)
            )
        images.append(engine.decode_image(state.latents).numpy())
        seconds = time.monotonic() - started
        print(f"drawn {start + len(some)}/{len(captions)} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return np.concatenate(images)


def score(counts: np.ndarray, scenes: Sequence[TableTop], classes: Sequence[str]) -> dict:
    """Shares of captioned objects seen, and of pictures in which every captioned class is seen."""
    wanted = [sorted({classes.index(thing.kind) for thing in scene.things}) for scene in scenes]
    hits = [[bool(count[k] >= ENOUGH) for k in numbers] for count, numbers in zip(counts, wanted)]
    one = [all(hit) for hit, scene in zip(hits, scenes) if len(scene.things) == 1]
    two = [all(hit) for hit, scene in zip(hits, scenes) if len(scene.things) == 2]
    objects = [flag for hit in hits for flag in hit]
    shares = {"objects": objects, "pictures": [all(hit) for hit in hits], "one_object": one, "two_objects": two}
    return {name: round(float(np.mean(values)), 4) for name, values in shares.items() if values}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m datasetdm_fast.demo.judge", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--world", choices=tuple(WORLDS), default="demo", help="the world whose model it is")
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sampler", default="pndm")
    parser.add_argument("--judge-steps", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    engine = build_engine("torch", load_model(options.model), {})
    size, path, world = engine.model.size, options.out / "judge.pt", WORLDS[options.world]
    options.out.mkdir(parents=True, exist_ok=True)
    judge = Judge(len(world.classes)).eval()
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
    else:
        judge = train_judge(2000, options.judge_steps, size, world)
        torch.save(judge.state_dict(), path)
    scenes = [world.sample_scene(ASKED + k, count=1 + k % 2) for k in range(options.number)]
    captions, seeds = [scene.caption for scene in scenes], [ASKED + k for k in range(options.number)]
    images = draw(engine, captions, seeds, options.steps, options.guidance, options.sampler)
    counts = seen(judge, images)
    shifts = (2, 38, 134, 222)  # even ones keep the number of objects
    shuffled = [score(counts, scenes[shift:] + scenes[:shift], world.classes) for shift in shifts]
    per_class = {}
    for k, name in enumerate(world.classes):
        shows = [any(thing.kind == name for thing in scene.things) for scene in scenes]
        if (asked := counts[shows, k] >= ENOUGH).size:
            per_class[name] = [round(float(np.mean(asked)), 3), len(asked)]
    result = {"judge_miou": round(held_out_miou(judge, 320, size, world), 4), "pictures": options.number}
    result |= {name: getattr(options, name) for name in ("sampler", "steps", "guidance")}
    means = {name: round(float(np.mean([row[name] for row in shuffled])), 4) for name in shuffled[0]}
    result |= {"captions": score(counts, scenes, world.classes), "shuffled": means, "per_class": per_class}
    (options.out / "judge.json").write_text(json.dumps(result, indent=2) + "\n")
    starts = range(0, min(len(images) // 12 * 12, 72), 12)
    rows = [np.concatenate(list(images[start : start + 12]), 1) for start in starts]
    Image.fromarray(np.concatenate(rows, 0)).save(options.out / "contact.png")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
