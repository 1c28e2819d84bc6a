"""A small perception net of fixed shape: what a labelled set is worth is what this net scores after learning from it.

One U-Net with dense answers: a class per pixel, centres of things and the way to them, depth, joints. It trains in
under a minute of one core.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.proof.students.student_data import CELL, CELLS, IGNORED, PERSON, StudentData, Vocabulary
from bench.proof.students.student_views import AUGMENTATIONS, StudentView
from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap

WIDTHS = {"small": (12, 32, 64, 96), "large": (24, 48, 96, 128)}  # channels at 1/2, 1/4, 1/8 and 1/16
REACH = 8.0  # cells an offset of 1 stands for
CENTRE_SIGMA, JOINT_SIGMA = 1.25, 0.75  # cells
PEAK, NEIGHBOURHOOD, MOST = 0.15, 5, 20  # of centres: least height, cells around one without another, most of them
LEAST_THING, LEAST_PERSON = 6, 12  # pixels
WEIGHTS = {"semantic": 1.0, "centre": 4.0, "offset": 1.0, "depth": 2.0, "joints": 0.1}
THING = 4.0  # weight of a thing's pixel beside that of a background's
NEAR = 2  # cells each side of a peak that belong to it
TOLERANCE = 1e-6


@dataclass(frozen=True)
class StudentSchedule:
    """How a student is taught; arms that are compared have the same one."""

    steps: int = 800
    batch_size: int = 8
    rate: float = 3e-3
    weight_decay: float = 0.02
    synthetic_share: float = 0.5  # of a batch, where there are both
    size: str = "small"
    augmentation: str = "mild"


class Student(nn.Module):
    """Raw answers [B, channels, CELLS, CELLS] for images [B, 3, SIDE, SIDE] in -1..1."""

    def __init__(self, vocabulary: Vocabulary, size: str = "small"):
        super().__init__()
        self.vocabulary = vocabulary
        self.sizes = {"semantic": len(vocabulary.classes), "centre": 1, "offset": 2, "depth": 1}
        self.sizes["joints"] = len(vocabulary.joints)
        a, b, c, d = WIDTHS[size]
        self.stem = _layer(3, a, 2)
        self.down = nn.ModuleList(
            [nn.Sequential(*_layer(given, own, 2), *_layer(own, own)) for given, own in ((a, b), (b, c), (c, d))]
        )
        self.up = nn.ModuleList([_layer(d + c, c), _layer(c + b, b), _layer(b + a, b)])
        self.head = nn.Conv2d(b, sum(self.sizes.values()), 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        skips = [self.stem(images)]
        for block in self.down:
            skips.append(block(skips[-1]))
        x = skips.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return dict(zip(self.sizes, self.head(x).float().split(list(self.sizes.values()), 1)))


def _layer(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class TaughtStep(NamedTuple):
    """A student after a step."""

    student: Student
    loss: Tensor


def teach(
    sets: Sequence[StudentData],
    course: StudentSchedule,
    seed: int,
    tasks: Sequence[str] | None = None,  # None = all it can learn
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> Student:
    """A student taught from one labelled set, or from a real and a synthetic one mixed in every batch."""
    for step, taught in enumerate(taught_by_step(sets, course, seed, tasks)):
        told(step, float(taught.loss))
    return taught.student.eval().requires_grad_(False)


def taught_by_step(
    sets: Sequence[StudentData], course: StudentSchedule, seed: int, tasks: Sequence[str] | None = None
) -> Iterator[TaughtStep]:
    """The student, which goes on learning, and its loss after every step of its course."""
    tasks = LEARNT_TASKS if tasks is None else tasks
    vocabulary = sets[0].vocabulary
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(vocabulary, course.size).to(memory_format=torch.channels_last)
    counts = shares(course, len(sets))
    optimiser = torch.optim.AdamW(student.parameters(), course.rate, weight_decay=course.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, course.rate, total_steps=course.steps, pct_start=0.1)
    for _ in range(course.steps):
        views = [AUGMENTATIONS[course.augmentation](some, count, random) for some, count in zip(sets, counts)]
        view = StudentView(*map(torch.cat, zip(*views)))
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            raw = student(view.images)
        loss = loss_of(raw, view, vocabulary, tasks)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        yield TaughtStep(student, loss.detach())


def has_bf16() -> bool:
    """Whether this CPU multiplies in bf16; elsewhere students learn in fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def shares(course: StudentSchedule, sets: int) -> list[int]:
    """Images of a batch from each set: all, or real and synthetic."""
    if sets == 1:
        return [course.batch_size]
    synthetic = round(course.batch_size * course.synthetic_share)
    return [course.batch_size - synthetic, synthetic]


def loss_of(answers: dict[str, Tensor], view: StudentView, vocabulary: Vocabulary, tasks: Sequence[str]) -> Tensor:
    """The sum of what each task misses by; what is not known costs nothing."""
    parts = {}
    if "semantic" in tasks or "instance" in tasks:
        weight = torch.tensor([THING if name in vocabulary.things else 1.0 for name in vocabulary.classes])
        error = F.cross_entropy(answers["semantic"], view.semantic, weight, ignore_index=IGNORED, reduction="sum")
        parts["semantic"] = error / (view.semantic != IGNORED).sum().clamp(min=1)
    if "instance" in tasks:
        heat, offset, is_thing = centre_targets(view.instance)
        known = view.instance != IGNORED
        error = F.binary_cross_entropy_with_logits(answers["centre"][:, 0], heat, reduction="none") * (1 + 10 * heat)
        parts["centre"] = (error * known).sum() / known.sum().clamp(min=1)
        parts["offset"] = ((answers["offset"] - offset).abs().sum(1) * is_thing).sum() / is_thing.sum().clamp(min=1)
    if "depth" in tasks:
        known = view.depth > 0
        error = (answers["depth"][:, 0] - view.depth.clamp(min=TOLERANCE).log()).abs()
        parts["depth"] = (error * known).sum() / known.sum().clamp(min=1)
    if "pose" in tasks:
        weight = (view.joints[..., 2] > 0).float()
        heat = gaussians(view.joints[..., :2], JOINT_SIGMA).flatten(2)
        heat = heat / heat.sum(2, keepdim=True).clamp(min=TOLERANCE)
        error = -(heat * answers["joints"].flatten(2).log_softmax(2)).sum(2)
        parts["joints"] = (error * weight).sum() / weight.sum().clamp(min=1)
    return sum(WEIGHTS[name] * part for name, part in parts.items())


def gaussians(places: Tensor, sigma: float) -> Tensor:
    """Hills [B, N, CELLS, CELLS] of height 1 around places [B, N, 2] (column, row) in cells from the outer edge."""
    axis = torch.arange(CELLS) + 0.5
    across = torch.exp(-((axis - places[..., 0, None]) ** 2) / (2 * sigma**2))
    along = torch.exp(-((axis - places[..., 1, None]) ** 2) / (2 * sigma**2))
    return along[..., :, None] * across[..., None, :]


def centre_targets(instance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centre's heat [B, S, S], offsets [B, 2, S, S] from each pixel to its own centre, and where they hold."""
    is_thing = (instance > 0) & (instance != IGNORED)
    most = int((instance * is_thing).max())
    if not most:
        empty = instance.new_zeros(instance.shape, dtype=torch.float32)
        return empty, torch.stack([empty, empty], 1), is_thing.float()
    masks = (instance[:, None] == torch.arange(1, most + 1)[:, None, None]).float()  # [B, M, S, S]
    axis = torch.arange(CELLS) + 0.5
    areas = masks.sum((2, 3))
    x, y = (masks.sum(2) * axis).sum(2) / areas.clamp(min=1), (masks.sum(3) * axis).sum(2) / areas.clamp(min=1)
    heat = (gaussians(torch.stack([x, y], -1), CENTRE_SIGMA) * (areas > 0)[..., None, None]).amax(1)
    own_x, own_y = torch.einsum("bmhw,bm->bhw", masks, x), torch.einsum("bmhw,bm->bhw", masks, y)
    offset = torch.stack([own_x - axis, own_y - axis[:, None]], 1) / REACH
    return heat, offset, is_thing.float()


@dataclass(frozen=True)
class Answers:
    """What a student says of one image."""

    semantic: SemanticMap
    instance: Instances
    depth: DepthMap
    pose: Keypoints


LEARNT_TASKS = tuple(Answers.__dataclass_fields__)


@torch.inference_mode()
def answers(student: Student, images: Tensor, batch_size: int = 50) -> list[Answers]:
    """What the student says of images [N, SIDE, SIDE, 3] uint8."""
    found = []
    for some in images.split(batch_size):
        raw = student((some.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last))
        for name in ("semantic", "offset", "depth"):
            raw[name] = F.interpolate(raw[name], scale_factor=float(CELL), mode="bilinear")
        raw |= {"semantic": raw["semantic"].softmax(1), "centre": raw["centre"].sigmoid()}
        if raw["joints"].shape[1]:
            raw["joints"] = raw["joints"].flatten(2).softmax(2).unflatten(2, (CELLS, CELLS))
        images_of = zip(*(value.numpy() for value in raw.values()))
        found += [_answer(dict(zip(raw, one)), student.vocabulary) for one in images_of]
    return found


def _answer(raw: dict[str, np.ndarray], vocabulary: Vocabulary) -> Answers:
    labels = raw["semantic"].argmax(0)
    semantic = SemanticMap(labels.astype(np.uint8), raw["semantic"].max(0), vocabulary.classes)
    depth = DepthMap(np.exp(raw["depth"][0]), vocabulary.max_depth)
    return Answers(semantic, _instances(raw, labels, vocabulary), depth, _person(raw, labels, vocabulary))


def _instances(raw: dict[str, np.ndarray], labels: np.ndarray, vocabulary: Vocabulary) -> Instances:
    """Thing pixels gathered around the centre each points to; the class is the likeliest over all of them."""
    numbers = np.array([vocabulary.classes.index(name) for name in vocabulary.things], np.int64)
    centre = raw["centre"][0]
    highest = F.max_pool2d(torch.from_numpy(centre)[None, None], NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2)[0, 0].numpy()
    rows, columns = np.nonzero((centre == highest) & (centre >= PEAK))
    best = np.argsort(-centre[rows, columns], kind="stable")[:MOST]
    rows, columns = rows[best], columns[best]
    y, x = np.nonzero(np.isin(labels, numbers))
    masks, classes, scores = np.zeros((0, *labels.shape), bool), [], []
    if len(rows) and len(y):
        to_x = (x + 0.5) / CELL + REACH * raw["offset"][0][y, x]
        to_y = (y + 0.5) / CELL + REACH * raw["offset"][1][y, x]
        owner = ((to_x[:, None] - columns - 0.5) ** 2 + (to_y[:, None] - rows - 0.5) ** 2).argmin(1)
        owners = [k for k in range(len(rows)) if (owner == k).sum() >= LEAST_THING]
        masks = np.zeros((len(owners), *labels.shape), bool)
        for mask, k in zip(masks, owners):
            mask[y[owner == k], x[owner == k]] = True
            likely = raw["semantic"][numbers][:, mask].mean(1)
            classes.append(int(likely.argmax()))
            scores.append(float(centre[rows[k], columns[k]] * likely.max()))
    return Instances(masks, np.array(classes, np.int64), np.array(scores, np.float32), vocabulary.things)


def _person(raw: dict[str, np.ndarray], labels: np.ndarray, vocabulary: Vocabulary) -> Keypoints:
    """The joints of the one person, where enough pixels are a person's."""
    joints = len(vocabulary.joints)
    number = vocabulary.classes.index(PERSON) if joints and PERSON in vocabulary.classes else -1
    is_person = labels == number
    if is_person.sum() < LEAST_PERSON:
        none = np.zeros((0, joints, 3), np.float32), np.zeros((0, joints), np.int64), np.zeros(0, np.float32)
        return Keypoints(*none, vocabulary.joints)
    heat, axis = raw["joints"], np.arange(CELLS)
    row, column = np.unravel_index(heat.reshape(joints, -1).argmax(1), heat.shape[1:])
    in_rows, in_columns = (np.abs(axis - peak[:, None]) <= NEAR for peak in (row, column))
    close = heat * in_rows[:, :, None] * in_columns[:, None, :]
    mass = close.sum((1, 2)) + TOLERANCE
    x, y = (close.sum(1) * (axis + 0.5)).sum(1) / mass * CELL, (close.sum(2) * (axis + 0.5)).sum(1) / mass * CELL
    points = np.stack([x, y, mass], 1)[None].astype(np.float32)
    score = raw["semantic"][number][is_person].mean() * mass.mean()
    return Keypoints(points, np.full((1, joints), 2), np.array([score], np.float32), vocabulary.joints)
