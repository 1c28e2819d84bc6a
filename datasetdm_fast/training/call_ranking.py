"""Which call of the denoiser, and which blocks of a transformer, tell most of the labels: linear probes of every level
or block at several timesteps, in one pass over the labelled images.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.data import Capture
from datasetdm_fast.engine.backbones.flow_models import spread_blocks
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import LEVELS
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.captures.targets import TrainingTarget
from datasetdm_fast.training.session import TrainingSession
from datasetdm_fast.training.splits import group_related

CANDIDATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)  # of the model's training steps
MOST_IMAGES = 50  # that are probed, evenly over all
FOLDS = 5  # of the images, each judged by a probe that has not seen it
MOST_CHANNELS = 256  # of a level; more are mixed into so many
MOST_BLOCKS = 16  # that are probed, evenly over the depth
MOST_TOGETHER = 768  # channels of all blocks
JOINT = 0.05  # width of a joint, as a share of the image's side
RIDGE = 1e-2  # of each channel's own sum of squares


class Probe:
    """A linear regression of cells on the truth, as sums for each fold of images; the cells are groups of channels."""

    def __init__(self, first: Sequence[Tensor], most: int = MOST_CHANNELS):
        self.mixings = [mix(cells, most) for cells in first]
        self.ends = [0, *accumulate(mixing.shape[1] for mixing in self.mixings)]
        self.inputs, self.products = ([torch.zeros(()) for _ in range(FOLDS)] for _ in range(2))
        self.squares = [0.0] * FOLDS

    def add(self, fold: int, groups: Sequence[Tensor], truth: Tensor) -> None:
        """Counts the cells [N, C] of an image, of each group, whose truth is [N, K]."""
        parts = [cells @ mixing for cells, mixing in zip(groups, self.mixings, strict=True)]
        mixed = F.pad(torch.cat(parts, 1), (0, 1), value=1.0).double().cpu()
        truth = truth.double()
        self.inputs[fold] = self.inputs[fold] + mixed.T @ mixed
        self.products[fold] = self.products[fold] + mixed.T @ truth
        self.squares[fold] += float(truth.square().sum())

    def score(self, groups: Sequence[int] = (0,)) -> float:
        """The share of the truth's variance in images of other folds that the probes of these groups explain together,
        at least 0.
        """
        read = [channel for group in groups for channel in range(*self.ends[group : group + 2])] + [self.ends[-1]]
        missed = spread = 0.0
        for inputs, products, squares in zip(self.inputs, self.products, self.squares, strict=True):
            if not inputs.ndim:
                continue
            others, theirs = sum(self.inputs) - inputs, sum(self.products) - products
            others, inputs = others[read][:, read], inputs[read][:, read]
            theirs, products = theirs[read], products[read]
            penalty = RIDGE * others.diag() + 1e-9  # also where a channel is always 0
            penalty[-1] = 0  # of the mean, in the last channel
            weights = torch.linalg.solve(others + penalty.diag(), theirs)
            missed += squares + float((weights * (inputs @ weights - 2 * products)).sum())
            mean = theirs[-1] / others[-1, -1]
            spread += squares + float((mean * (inputs[-1, -1] * mean - 2 * products[-1])).sum())
        return max(0.0, 1 - missed / spread) if spread > 0 else 0.0


def mix(cells: Tensor, most: int) -> Tensor:
    """The weights [C, at most `most`] by which channels of one size each become those of a probe."""
    spread = cells.std(0) if len(cells) > 1 else torch.zeros_like(cells[0])
    scale = torch.where(spread > 1e-6 * spread.max(), spread, torch.inf)  # nothing of a channel that is constant
    mixing = torch.eye(len(scale))
    if len(scale) > most:
        mixing = torch.randn(len(scale), most, generator=torch.Generator().manual_seed(0))
    return mixing.to(scale) / scale[:, None] / len(scale) ** 0.5


def truth_of(task: str, target: TrainingTarget, classes: int, size: int, side: int) -> tuple[Tensor, Tensor]:
    """What a level of `side` is to tell [N, K], and which of its cells [side * side] these are."""
    known = torch.ones(side * side, dtype=torch.bool)
    shown_by = TASKS[task].shown_by
    if shown_by == "depth":
        measured = (target.depth > 0).float()  # of a laser few pixels are
        depth, share = F.adaptive_avg_pool2d(torch.stack([target.depth, measured]), side).flatten(1)
        known = share > 0
        return (depth[known] / share[known])[:, None].log(), known
    if shown_by == "weights":
        rows, columns = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
        places = torch.stack([columns, rows], -1).flatten(0, 1)  # as points are
        distances = torch.cdist(places, target.points / size)
        return target.weights * torch.exp(-((distances / JOINT).square()) / 2), known
    shares = torch.zeros(classes, side * side)
    if len(target.masks):
        shares.index_add_(0, target.classes, F.adaptive_avg_pool2d(target.masks.float(), side).flatten(1))
    return shares.T, known


def probe_calls(
    session: TrainingSession,
    task: str,
    timesteps: Sequence[int],
    split: Callable[[Capture], list[list[Tensor]]],
    most: int = MOST_CHANNELS,
) -> list[list[Probe]]:
    """For each timestep the probes of a task's truth, each of the groups into which `split` divides a capture."""
    numbers, _ = session.split  # a figure of held-out images would not be one of unseen images otherwise
    count = min(len(numbers), MOST_IMAGES)
    chosen = [numbers[k * len(numbers) // count] for k in range(count)]
    related = group_related(session.source, chosen, FOLDS).values()
    if len(related) < 2:
        raise Refused(
            "--timestep auto, --blocks auto: these are compared on two pictures or more", "Add images, or name them."
        )
    fold_of = {number: k % FOLDS for k, group in enumerate(related) for number in group}
    views = session.plain_views(task, chosen, 1)
    source, size = session.source, session.engine.model.size
    classes = max(len(source.classes), len(source.thing_classes))
    inversion = replace(session.inversion, timesteps=tuple(timesteps))
    probes: list[list[Probe]] = []
    for view in range(count):
        target, items = views.target(view), [views.item(view)]
        for call, capture in enumerate(cache.captures(session.engine, views, items, [views.seed(view)], inversion)):
            parts = [[cells[0].float() for cells in groups] for groups in split(capture)]
            if not view:
                probes.append([Probe(groups, most) for groups in parts])
            for probe, groups in zip(probes[call], parts, strict=True):
                truth, known = truth_of(task, target, classes, size, round(len(groups[0]) ** 0.5))
                probe.add(fold_of[chosen[view]], [cells[known.to(cells.device)] for cells in groups], truth)
    return probes


def show_ranks(
    session: TrainingSession, task: str, names: Sequence[str], timesteps: Sequence[int], rows: Sequence[Sequence[float]]
) -> None:
    """Says what each of `names` tells of a task at each timestep."""
    width = max(6, *(len(name) + 2 for name in names))
    session.on_message(f"{task:<10} timestep {''.join(f'{name:>{width}}' for name in names)}")
    for timestep, row in zip(timesteps, rows, strict=True):
        session.on_message(f"{timestep:>19} {''.join(f'{value:>{width}.3f}' for value in row)}")


def with_best(session: TrainingSession, tasks: Sequence[str], *, calls: bool, blocks: bool) -> TrainingSession:
    """The session with the call, the blocks or both that tell most of the tasks; says what each tells."""
    steps = session.engine.model.scheduler.get("num_train_timesteps", 1000)
    timesteps = [round(share * steps) for share in CANDIDATES]
    if not blocks:
        return _with_best_call(session, tasks, timesteps)
    if not calls:
        timesteps = [*session.inversion.timesteps]
    return _with_best_blocks(session, tasks, timesteps, [[time] for time in timesteps] if calls else [timesteps])


def _with_best_call(session: TrainingSession, tasks: Sequence[str], timesteps: Sequence[int]) -> TrainingSession:
    """By the mean over levels and tasks."""
    layout, means = cache.Layout.of(session.engine.model.levels), torch.zeros(len(timesteps))
    for task in tasks:
        probes = probe_calls(session, task, timesteps, lambda capture: [[cells] for cells in layout.join(capture)])
        ranked = torch.tensor([[probe.score() for probe in call] for call in probes])
        means += ranked.mean(1)
        rows = torch.cat([ranked, ranked.mean(1, keepdim=True)], 1).tolist()
        show_ranks(session, task, (*LEVELS, "mean"), timesteps, rows)
    if not means.any():
        session.on_message(f"timestep   {session.inversion.timesteps[0]}, as no probe tells anything")
        return session
    best = timesteps[int(means.argmax())]
    session.on_message(f"timestep   {best}, whose levels tell most; the table has shares of the labels' variance")
    return replace(session, inversion=replace(session.inversion, timesteps=(best,)))


def _with_best_blocks(
    session: TrainingSession, tasks: Sequence[str], timesteps: Sequence[int], choices: Sequence[Sequence[int]]
) -> TrainingSession:
    """By what blocks tell together, as many at most as the model's levels read, in any of the choices of calls."""
    model = session.engine.model
    count = min(model.backbone.blocks(model.configs), MOST_BLOCKS) or 1
    candidates = [k * model.backbone.blocks(model.configs) // count for k in range(count)]
    wide = session.reading((candidates, candidates[:1], candidates[:1]))

    def split(capture: Capture) -> list[list[Tensor]]:
        """Of each block its tokens and its maps, which are mixed apart."""
        kinds, join = zip(capture.features[0], capture.maps[0], strict=True), cache.Layout.join_tensors
        return [[cells for feature, maps in kinds for cells in (join([feature], []), join([], [maps]))]]

    most = MOST_TOGETHER // (2 * count)
    probes = {
        task: {time: probe for time, (probe,) in zip(timesteps, probe_calls(wide, task, timesteps, split, most))}
        for task in tasks
    }
    del wide  # and what it holds on a GPU

    def tell(tasks: Sequence[str], times: Sequence[int], blocks: Sequence[int]) -> float:
        groups = [2 * candidates.index(block) + kind for block in blocks for kind in (0, 1)]
        return fmean(probes[task][time].score(groups) for task in tasks for time in times)

    usual = sorted({block for level in model.reading(()).levels for block in level.blocks})
    chosen = [choose(partial(tell, tasks, times), candidates, len(usual)) for times in choices]
    times, blocks = max(zip(choices, chosen), key=lambda choice: tell(tasks, *choice))
    for task in tasks:
        together = [(time, blocks) for times, blocks in zip(choices, chosen) for time in times]
        rows = [[tell([task], [time], read) for read in (*zip(candidates), blocks)] for time, blocks in together]
        show_ranks(session, task, (*map(str, candidates), "best"), timesteps, rows)
    if not blocks:
        session.on_message(f"blocks     {join_numbers(usual)}, the model's own, as no probe tells anything")
        return session
    shares = [f"{join_numbers(read)} {tell(tasks, times, read):.3f}" for read in (blocks, usual)]
    session.on_message(
        f"blocks     at timestep {join_numbers(times)} {shares[0]} of the labels' variance together, the model's own "
        f"{shares[1]}; the table has each alone"
    )
    return replace(session.reading(spread_blocks(blocks)), inversion=replace(session.inversion, timesteps=tuple(times)))


def choose(tell: Callable[[list[int]], float], candidates: Sequence[int], most: int) -> list[int]:
    """At most so many candidates, each the one that makes those before it tell most; no more than tell more."""
    chosen: list[int] = []
    share = 0.0
    while left := [candidate for candidate in candidates if candidate not in chosen and len(chosen) < most]:
        ranked = {candidate: tell([*chosen, candidate]) for candidate in left}
        best = max(left, key=ranked.__getitem__)
        if ranked[best] <= share:
            break
        chosen, share = [*chosen, best], ranked[best]
    return sorted(chosen)


def join_numbers(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
