"""Which call of the denoiser tells most of the labels: linear probes of every level at several timesteps, in one pass
over the labelled images.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import LEVELS
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.captures.targets import TrainingTarget
from datasetdm_fast.training.session import TrainingSession

CANDIDATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)  # of the model's training steps
MOST_IMAGES = 50  # that are probed, evenly over all
FOLDS = 5  # of the images, each judged by a probe that has not seen it
MOST_CHANNELS = 256  # of a level; more are mixed into so many
JOINT = 0.05  # width of a joint, as a share of the image's side
RIDGE = 1e-2  # of each channel's own sum of squares


class Probe:
    """A linear regression of a level's cells on the truth, as sums for each fold of images."""

    def __init__(self, first: Tensor):
        spread = first.std(0)
        scale = torch.where(spread > 1e-6 * spread.max(), spread, torch.inf)  # nothing of a channel that is constant
        mixing = torch.eye(len(scale))
        if len(scale) > MOST_CHANNELS:
            mixing = torch.randn(len(scale), MOST_CHANNELS, generator=torch.Generator().manual_seed(0))
        self.mixing = mixing.to(scale) / scale[:, None] / len(scale) ** 0.5
        self.inputs, self.products = ([torch.zeros(()) for _ in range(FOLDS)] for _ in range(2))
        self.squares = [0.0] * FOLDS

    def add(self, fold: int, cells: Tensor, truth: Tensor) -> None:
        """Counts the cells [N, C] of an image, whose truth is [N, K]."""
        mixed = F.pad(cells @ self.mixing, (0, 1), value=1.0).double().cpu()
        truth = truth.double()
        self.inputs[fold] = self.inputs[fold] + mixed.T @ mixed
        self.products[fold] = self.products[fold] + mixed.T @ truth
        self.squares[fold] += float(truth.square().sum())

    def score(self) -> float:
        """The share of the truth's variance in images of other folds that the probes explain, at least 0."""
        missed = spread = 0.0
        for inputs, products, squares in zip(self.inputs, self.products, self.squares, strict=True):
            if not inputs.ndim:
                continue
            others, theirs = sum(self.inputs) - inputs, sum(self.products) - products
            penalty = RIDGE * others.diag() + 1e-9  # also where a channel is always 0
            penalty[-1] = 0  # of the mean, in the last channel
            weights = torch.linalg.solve(others + penalty.diag(), theirs)
            missed += squares + float((weights * (inputs @ weights - 2 * products)).sum())
            mean = theirs[-1] / others[-1, -1]
            spread += squares + float((mean * (inputs[-1, -1] * mean - 2 * products[-1])).sum())
        return max(0.0, 1 - missed / spread) if spread > 0 else 0.0


def truth_of(task: str, target: TrainingTarget, classes: int, size: int, side: int) -> tuple[Tensor, Tensor]:
    """What a level of `side` is to tell [N, K], and which of its cells [side * side] these are."""
    known = torch.ones(side * side, dtype=torch.bool)
    if task == "depth":
        depth = F.adaptive_avg_pool2d(target.depth[None], side).flatten()
        known = depth > 0
        return depth[known, None].log(), known
    if task == "pose":
        rows, columns = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
        places = torch.stack([columns, rows], -1).flatten(0, 1)  # as points are
        distances = torch.cdist(places, target.points / size)
        return target.weights * torch.exp(-((distances / JOINT).square()) / 2), known
    shares = torch.zeros(classes, side * side)
    if len(target.masks):
        shares.index_add_(0, target.classes, F.adaptive_avg_pool2d(target.masks.float(), side).flatten(1))
    return shares.T, known


def rank_calls(session: TrainingSession, task: str, timesteps: Sequence[int]) -> list[list[float]]:
    """How much of a task's truth the probes of each level explain, at each timestep."""
    numbers = session.numbers
    count = min(len(numbers), MOST_IMAGES)
    if count < 2:
        raise Refused("--timestep auto: calls are compared on two images or more", "Add images, or name a timestep.")
    views = session.plain_views(task, [numbers[k * len(numbers) // count] for k in range(count)], 1)
    source, layout = session.source, cache.Layout.of(session.engine.model.levels)
    classes, size = max(len(source.classes), len(source.thing_classes)), session.engine.model.size
    inversion = replace(session.inversion, timesteps=tuple(timesteps))
    probes: dict[tuple[int, int], Probe] = {}
    for view in range(count):
        target, items = views.target(view), [views.item(view)]
        calls = cache.captures(session.engine, views, items, [views.seed(view)], inversion)
        for call, capture in enumerate(calls):
            for place, level in enumerate(layout.join(capture)):
                cells = level[0].float()
                if (call, place) not in probes:
                    probes[call, place] = Probe(cells)
                truth, known = truth_of(task, target, classes, size, round(len(cells) ** 0.5))
                probes[call, place].add(view % FOLDS, cells[known.to(cells.device)], truth)
    return [[probes[call, place].score() for place in range(len(LEVELS))] for call in range(len(timesteps))]


def with_best_call(session: TrainingSession, tasks: Sequence[str]) -> TrainingSession:
    """The session with the call that tells most, a mean over levels and tasks; says what each tells."""
    steps = session.engine.model.scheduler.get("num_train_timesteps", 1000)
    timesteps = [round(share * steps) for share in CANDIDATES]
    means = torch.zeros(len(timesteps))
    for task in tasks:
        ranked = torch.tensor(rank_calls(session, task, timesteps))
        means += ranked.mean(1)
        session.on_message(f"{task:<10} timestep {''.join(f'{name:>9}' for name in (*LEVELS, 'mean'))}")
        for timestep, row in zip(timesteps, ranked, strict=True):
            session.on_message(f"{timestep:>19} {''.join(f'{value:>9.3f}' for value in (*row, row.mean()))}")
    if not means.any():
        session.on_message(f"timestep   {session.inversion.timesteps[0]}, as no probe tells anything")
        return session
    best = timesteps[int(means.argmax())]
    session.on_message(f"timestep   {best}, whose levels tell most; the table has shares of the labels' variance")
    return replace(session, inversion=replace(session.inversion, timesteps=(best,)))
