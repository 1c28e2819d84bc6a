"""The nets of bench.world.judge: small segmentation nets that have only ever seen renders of a world."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.world.worlds import HELD_OUT, LEARN, WORLDS, World
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.scenes.world import View

RENDERS, STEPS, TESTED = 2_000, 1_200, 320  # scenes to learn from, optimiser steps, scenes to be tested on


@dataclass(frozen=True)
class PixelTruth:
    """What a net is taught to say of each pixel."""

    name: str  # of its file
    of: Callable[[World, View], np.ndarray]  # [H, W] its number
    count: Callable[[World], int]


def class_map(world: World, view: View) -> np.ndarray:
    return view.semantic


def colour_map(world: World, view: View) -> np.ndarray:
    """[H, W] the colour that the caption gives the thing of a pixel, from 1 on; 0 is no thing."""
    names = list(world.colours)
    return np.array([0, *(1 + names.index(thing.colour) for thing in view.scene.things)])[view.instance]


CLASSES = PixelTruth("judge", class_map, lambda world: len(world.classes))
COLOURS = PixelTruth("colours", colour_map, lambda world: 1 + len(world.colours))


class Judge(nn.Module):
    """A plain U-Net of three resolutions."""

    def __init__(self, classes: int, width: int = 24):
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

    def encode(self, images: Tensor) -> list[Tensor]:
        """What each resolution sees, the finest first."""
        x, found = F.avg_pool2d(images, 2), []  # half resolution is enough to name a shape
        for k, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if k else x)
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Tensor:
        *skips, x = self.encode(images)
        for block, skip in zip(self.up, reversed(skips)):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear")


def softened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Renders with random blur and noise, so that softness alone does not fool the judge."""
    scale = float(torch.rand((), generator=generator) * 0.6 + 0.4)
    small = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    soft = F.interpolate(small, size=images.shape[2:], mode="bilinear")
    return soft + 0.04 * torch.randn(soft.shape, generator=generator)


def train_judge(steps: int, size: int, world: World, truth: PixelTruth = CLASSES) -> Judge:
    views = [world.view(LEARN + k, size) for k in range(RENDERS)]
    images = torch.stack([torch.from_numpy(view.image) for view in views]).permute(0, 3, 1, 2)
    labels = torch.stack([torch.from_numpy(truth.of(world, view)) for view in views])
    torch.manual_seed(0)
    judge, generator = Judge(truth.count(world)).train(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(RENDERS, (16,), generator=generator)
        loss = F.cross_entropy(judge(softened(images[chosen].float() / 127.5 - 1, generator)), labels[chosen].long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"{truth.name} {step + 1}/{steps} loss {loss.item():.4f}", file=sys.stderr, flush=True)
    return judge.eval()


def kept_judge(
    folder: Path, size: int, world: World = WORLDS["demo"], truth: PixelTruth = CLASSES, steps: int = STEPS
) -> Judge:
    """The net that lies in a folder, which is trained first where none lies there."""
    path = folder / f"{truth.name}.pt"
    if not path.exists():
        print(f"{path} is not there: the net is trained first, in {steps} steps", file=sys.stderr, flush=True)
        content = io.BytesIO()
        torch.save(train_judge(steps, size, world, truth).state_dict(), content)
        storage.publish({path: content.getvalue()})
    judge = Judge(truth.count(world)).eval()
    judge.load_state_dict(torch.load(path, weights_only=True))
    return judge


def batches(images: np.ndarray) -> Iterator[Tensor]:
    """Images [N, H, W, 3] uint8 as a judge reads them."""
    for one in np.array_split(images, max(len(images) // 32, 1)):
        yield torch.from_numpy(one).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def probabilities(judge: Judge, images: np.ndarray) -> Tensor:
    """[N, K, H, W] of each class, as the judge sees images [N, H, W, 3]."""
    return torch.cat([judge(one).softmax(1) for one in batches(images)])


@torch.inference_mode()
def classes_in(judge: Judge, images: np.ndarray) -> Tensor:
    """[N, H, W] the class of each pixel, as the judge sees images [N, H, W, 3]."""
    return torch.cat([judge(one).argmax(1) for one in batches(images)])


def held_out_miou(judge: Judge, size: int, world: World, truth: PixelTruth = CLASSES) -> float:
    count = truth.count(world)
    confusion = np.zeros((count, count))
    for start in range(0, TESTED, 32):
        views = [world.view(HELD_OUT + k, size) for k in range(start, min(start + 32, TESTED))]
        guess = classes_in(judge, np.stack([view.image for view in views])).numpy()
        pairs = np.stack([truth.of(world, view) for view in views]).ravel() * count + guess.ravel()
        confusion += np.bincount(pairs, minlength=confusion.size).reshape(confusion.shape)
    both = np.diag(confusion)
    return float((both / (confusion.sum(0) + confusion.sum(1) - both)).mean())
