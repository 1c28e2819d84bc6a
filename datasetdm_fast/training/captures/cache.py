"""Captures cached on the disk in half precision, so that an epoch reads them instead of running the UNet.

One shard holds the captures of all views of one image at one call. Its name is a digest of everything that decides its
content. So shards serve every training with the same views of an image, and an interrupted filling of the cache
resumes. Its last 32 bytes are the SHA-256 of the rest. Its time of access is when a training last needed it.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import Capture
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.loop.inversion import POSTERIOR, invert_at
from datasetdm_fast.errors import Missing, Refused, is_out_of_gpu
from datasetdm_fast.stages import Level
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.settings import Inversion

DIGEST = 32  # bytes
BATCH_SIZE = 12  # views of a call, or fewer where memory is short
SHARE = 0.5  # of the free disk that more captures may take by default
DAY = 86400.0  # seconds, after which a half-written shard has no writer any more
UNUSED = 30  # days without a training that needs it, after which the next one deletes a shard
SHARD = re.compile(r"[0-9a-f]{64}\.f16")


@dataclass(frozen=True)
class Layout:
    """One view's levels end to end; a level is its cells, a cell all features and then all maps."""

    shapes: tuple[tuple[int, int], ...]  # per level: cells, channels
    features: tuple[int, ...]  # channels that are features

    @classmethod
    def of(cls, levels: Sequence[Level]) -> Self:
        """The layout of the captures of a UNet with these levels."""
        return cls(
            tuple((level.side**2, level.channels) for level in levels),
            tuple(level.halves * sum(level.features) for level in levels),
        )

    @property
    def values(self) -> int:
        return sum(cells * channels for cells, channels in self.shapes)

    @staticmethod
    def join_tensors(features: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
        """[B, cells, channels] fp32."""
        parts = [feature.flatten(2).transpose(1, 2) for feature in features]
        parts += [level_maps.permute(0, 2, 1, 3).flatten(2) for level_maps in maps]
        return torch.cat([part.float() for part in parts], 2)

    def join(self, capture: Capture) -> tuple[Tensor, ...]:
        """Per level [B, cells, channels] fp32, free to be trained on; a 1x1 projection is one product with it."""
        levels = []
        for features, maps, shape in zip(capture.features, capture.maps, self.shapes, strict=True):
            levels.append(self.join_tensors(features, maps))
            assert levels[-1].shape[1:] == shape, (
                f"captured {list(levels[-1].shape[1:])}, the levels promise {list(shape)}"
            )
        return tuple(levels)

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Per level [B, cells, channels] fp32 of rows [B, values] fp16."""
        parts = rows.split([cells * channels for cells, channels in self.shapes], 1)
        return tuple(part.float().unflatten(1, shape) for part, shape in zip(parts, self.shapes))


def join_calls(calls: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Per level [B, calls * cells, channels] of the levels of each call."""
    return calls[0] if len(calls) == 1 else tuple(torch.cat(level, 1) for level in zip(*calls, strict=True))


class RecomputedCaptures:
    is_stored = False

    def __init__(self, engine, views: TrainingViews, inversion: Inversion):
        self.engine, self.views, self.inversion = engine, views, inversion
        self.layout = Layout.of(engine.model.levels)

    def batch(self, views: Sequence[int]) -> tuple[Tensor, ...]:
        """Per level [B, calls * cells, channels]."""
        items = [self.views.item(view) for view in views]
        seeds = [self.views.seed(view) for view in views]
        return join_calls(list(map(self.layout.join, captures(self.engine, self.views, items, seeds, self.inversion))))


class StoredCaptures:
    is_stored = True

    def __init__(self, paths: Sequence[Sequence[Path]], layout: Layout, draws: int, device: torch.device):
        self.paths, self.layout, self.draws, self.device = tuple(paths), layout, draws, device  # of each image's calls
        self._cached_file = lru_cache(512)(self._open)

    def _open(self, path: Path) -> np.ndarray:
        return np.memmap(path, np.float16, "r", shape=(self.draws, self.layout.values))

    def batch(self, views: Sequence[int]) -> tuple[Tensor, ...]:
        # Read where a GPU can fetch them from, so that the host goes on.
        is_queued, calls = self.device.type == "cuda", len(self.paths[0])
        rows = torch.empty(calls, len(views), self.layout.values, dtype=torch.float16, pin_memory=is_queued)
        try:
            for call, part in enumerate(rows.numpy()):
                paths = [self.paths[view // self.draws][call] for view in views]
                stored = zip(map(self._cached_file, paths), views, strict=True)
                np.stack([file[view % self.draws] for file, view in stored], out=part)
        except OSError as error:
            raise storage.refusal(error, error.filename or "captures") from error
        return join_calls(list(map(self.layout.unpack, rows.to(self.device, non_blocking=is_queued))))


def captures(
    engine, views: TrainingViews, items: Sequence, seeds: Sequence[int], inversion: Inversion
) -> Iterator[Capture]:
    """The capture of each call."""
    return invert_at(
        engine,
        views.pixels(items),
        [item.caption for item in items],
        inversion.timesteps,
        seeds,
        is_raw=True,
        is_sampled=inversion.is_sampled,
        ddim_steps=inversion.ddim_steps,
    )


@dataclass(frozen=True)
class CachePlan:
    """Whether the captures of some views fit on the disk, decided before anything is made."""

    folder: Path
    bytes: int
    budget: int
    is_stored: bool

    def __str__(self) -> str:
        size, room = self.bytes / 1e9, self.budget / 1e9
        if not self.is_stored and not self.budget:
            return "features and maps made anew at every step"
        if self.is_stored:
            return f"features and maps kept in {self.folder}: at most {size:.3g} GB of the {room:.3g} GB allowed"
        why = f"{size:.3g} GB would not fit in the {room:.3g} GB allowed for {self.folder}"
        return f"features and maps made anew at every step: {why}"


def plan(
    folder: Path,
    levels: Sequence[Level],
    count: int,  # of views, times the calls that are captured of each
    mode: str,
    gigabytes: float = 0.0,
    cached: Callable[[], int] = lambda: 0,
) -> CachePlan:
    """Where `count` captures go: `mode` is auto, disk or off; `gigabytes` 0 = half of the free space and the
    bytes that are cached of them. `cached` counts these bytes, which takes time, and is called only where it decides.
    """
    size = count * Layout.of(levels).values * 2
    if mode == "off":
        return CachePlan(folder, size, 0, False)
    budget = int(gigabytes * 1e9) if gigabytes else int(storage.free_bytes(folder.absolute()) * SHARE)
    if size > budget and not gigabytes:
        budget += cached()
    if mode == "disk" and size > budget:
        raise Refused(
            f"--cache disk: the captures take {size / 1e9:.3g} GB, more than the {budget / 1e9:.3g} GB allowed in "
            f"{folder}",
            "Raise --cache-gb, name another --cache-dir, or use --cache auto.",
        )
    return CachePlan(folder, size, budget, size <= budget)


def cached_bytes(engine, views: TrainingViews, inversion: Inversion, folder: Path) -> int:
    """Bytes that the captures of these views take already."""
    size = views.settings.draws * Layout.of(engine.model.levels).values * 2 + DIGEST
    paths = (path for paths, _, _ in _shards(engine, views, inversion, folder) for path in paths)
    return sum(size for path in paths if path.is_file() and path.stat().st_size == size)


def cache_captures(
    engine,
    views: TrainingViews,
    inversion: Inversion,
    folder: Path,
    on_views: Callable[[int], None] = lambda count: None,
) -> StoredCaptures:
    """The captures of all views; missing or damaged ones are computed now."""
    layout, draws, shards = Layout.of(engine.model.levels), views.settings.draws, []
    for paths, items, seeds in _shards(engine, views, inversion, folder):
        shards.append(paths)
        missing = {}
        for path, timestep in zip(paths, inversion.timesteps, strict=True):
            with suppress(OSError):  # not there yet, or of another user
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            if not _is_whole(path, draws * layout.values * 2):
                missing[path] = timestep
        if missing:
            needed = replace(inversion, timesteps=tuple(missing.values()))
            for path, rows in zip(missing, _compute(engine, views, items, seeds, needed, layout), strict=True):
                content = rows.tobytes()
                storage.publish({path: [content, hashlib.sha256(content).digest()]})
        on_views(draws)
    _sweep(folder)
    return StoredCaptures(shards, layout, draws, engine.device)


def _shards(
    engine, views: TrainingViews, inversion: Inversion, folder: Path
) -> Iterator[tuple[list[Path], list, list[int]]]:
    """The file of each call of every image, its views, and the seeds of their noise."""
    draws = views.settings.draws
    numerics = {name: engine.fingerprint().get(name) for name in ("engine", "dtype")}
    layout = asdict(Layout.of(engine.model.levels))
    common = {"model": engine.model.digests, **numerics, "latent": inversion.latent, "layout": layout}
    common |= {"blocks": engine.model.blocks} if engine.model.blocks else {}
    common |= {"ddim_steps": inversion.ddim_steps} | ({"draw": POSTERIOR} if inversion.is_sampled else {})
    calls = [common | {"timestep": timestep} for timestep in inversion.timesteps]
    identities = [json.dumps(call, sort_keys=True, default=str) for call in calls]
    for image in range(len(views.numbers)):
        items = views.items(image)
        seeds = [views.seed(image * draws + draw) for draw in range(draws)]
        texts = json.dumps([[item.caption for item in items], seeds, items[0].image.shape]).encode()
        pixels = views.pixels(items).numpy().tobytes()
        names = [hashlib.sha256(identity.encode() + texts + pixels).hexdigest() for identity in identities]
        yield [folder / f"{name}.f16" for name in names], items, seeds


def _compute(
    engine, views: TrainingViews, items: Sequence, seeds: Sequence[int], inversion: Inversion, layout: Layout
) -> np.ndarray:
    """[calls, views, values] fp16 of one image's views."""
    rows: list[np.ndarray] = []
    batch_size = BATCH_SIZE
    while (start := sum(part.shape[1] for part in rows)) < len(items):
        part = slice(start, start + batch_size)
        try:
            calls = map(layout.join, captures(engine, views, items[part], seeds[part], inversion))
            halves = [torch.cat([level.half().flatten(1) for level in levels], 1).cpu() for levels in calls]
            rows.append(torch.stack(halves).numpy())
        except RuntimeError as error:
            if not is_out_of_gpu(error):
                raise
            if len(items[part]) == 1:
                raise Missing(
                    "memory: the GPU does not have enough memory for the features and maps of one image",
                    "Choose a smaller --size, or free its memory.",
                ) from error
            batch_size = -(-len(items[part]) // 2)
    captured = np.concatenate(rows, 1)
    if not np.isfinite(captured).all():
        raise Refused(
            f"image {items[0].id}: {int((~np.isfinite(captured)).sum())} captured values exceed half precision",
            "Use --cache off, which keeps them in fp32.",
        )
    return captured


def _is_whole(path: Path, size: int) -> bool:
    try:
        if path.stat().st_size != size + DIGEST:
            return False
        content = np.memmap(path, np.uint8, "r")
    except OSError:
        return False
    return hashlib.sha256(content[:size]).digest() == content[size:].tobytes()


def _sweep(folder: Path) -> None:
    """Removes what killed processes left half-written, and shards that no training has needed for a long time."""
    now = time.time()
    for path in folder.glob("*"):
        with suppress(OSError):  # another process was faster
            times = path.stat()
            is_abandoned = storage.is_temporary(path) and now - times.st_mtime > DAY
            is_unused = SHARD.fullmatch(path.name) and now - max(times.st_atime, times.st_mtime) > UNUSED * DAY
            if is_abandoned or is_unused:
                path.unlink()
