"""Which class word of a prompt stands where, from the attention of the calls that drew the image: no decoder is needed.

Dataset Diffusion's rule (Nguyen et al. 2023): a class's cross-attention, spread along the self-attention.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.data import IGNORE, AttentionSums, SemanticMap
from datasetdm_fast.engine.labels.tiles import Tiling
from datasetdm_fast.kernels.transfer import to_device, to_host

FLAT = 1e-6  # of its largest value: a map whose values lie no farther apart is flat but for rounding


def class_maps(averages: AttentionSums, columns: Sequence[Sequence[Sequence[int]]], exponent: int) -> list[Tensor]:
    """Per image the maps [K, s, s] of its classes, 0 to 1; `columns` names the tokens of each class of each image."""
    return [scale_maps(maps) for maps in spread_maps(averages, columns, exponent)]


def spread_maps(averages: AttentionSums, columns: Sequence[Sequence[Sequence[int]]], exponent: int) -> list[Tensor]:
    """Per image the maps [K, s, s] of its classes as shares of attention, which are comparable between images."""
    side, cross = (round(average.shape[1] ** 0.5) for average in (averages.cells, averages.tokens))
    maps = []
    for cells, tokens, named in zip(averages.cells, averages.tokens, columns, strict=True):
        if not named:
            maps.append(cells.new_zeros(0, side, side))
            continue
        # one column at a time: a list of them would be copied to a GPU while the host waits
        class_tokens = [torch.stack([tokens[:, place] for place in places], 1).mean(1) for places in named]
        seen = torch.stack(class_tokens).unflatten(1, (cross, cross))
        spread = F.interpolate(seen[None], (side, side), mode="bicubic")[0].flatten(1).T  # [S, K]
        for _ in range(exponent):
            spread = cells @ spread
        maps.append(spread.T.unflatten(1, (side, side)))
    return maps


def concept_maps(averages: AttentionSums) -> list[Tensor]:
    """Per image the maps [K, s, s] of its concepts but the last, the background: their shares beside that of it."""
    side = round(averages.tokens.shape[1] ** 0.5)
    words, background = averages.tokens[..., :-1], averages.tokens[..., -1:]
    either = (words + background).clamp(min=torch.finfo(words.dtype).tiny)  # of a third word's cells both may be 0
    return [*(words / either).mT.unflatten(2, (side, side))]


def scale_maps(maps: Tensor) -> Tensor:
    """Maps [K, h, w] moved and stretched to 0 .. 1; one without differences is 0 everywhere."""
    lowest, highest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    room = highest - lowest
    return torch.where(room > FLAT * highest, (maps - lowest) / room.where(room > 0, 1.0), 0.0)


def label_maps(
    maps: Sequence[Tensor],
    numbers: Sequence[Sequence[int]],
    classes: tuple[str, ...],
    size: int,
    threshold: float,
    uncertainty: float,
) -> list[SemanticMap]:
    """A label of each image, `size` pixels a side: of its classes, whose numbers are given, the one of the largest
    value where that reaches `threshold`, 255 where it reaches `uncertainty` alone, 0 elsewhere.
    """
    labels, values = [], []
    for values_of_classes, class_numbers in zip(maps, numbers, strict=True):
        if not class_numbers:
            values.append(values_of_classes.new_zeros(size, size))
            labels.append(values[-1].to(torch.uint8))
            continue
        largest, winner = F.interpolate(values_of_classes[None], (size, size), mode="bicubic")[0].max(0)
        named = to_device(torch.tensor(list(class_numbers), dtype=torch.uint8), values_of_classes.device)[winner]
        weak = torch.where(largest >= uncertainty, IGNORE, 0).to(torch.uint8)
        labels.append(torch.where(largest >= threshold, named, weak))
        values.append(largest.clamp(0, 1))
    numbered, sure = to_host(torch.stack(labels), torch.stack(values))
    return [SemanticMap(numbered[b], sure[b], classes) for b in range(len(numbered))]


def joined_label(
    tiling: Tiling,
    maps: Sequence[Tensor],
    numbers: Sequence[int],
    classes: tuple[str, ...],
    threshold: float,
    uncertainty: float,
) -> SemanticMap:
    """The label of a picture from the maps [K, s, s] of `spread_maps` of its tiles: joined, then scaled to 0 .. 1 over
    the whole picture, so that a tile without a class shows none of it; one class at a time, as pictures are large.
    """
    best, labels = torch.zeros(tiling.sides), torch.zeros(tiling.sides, dtype=torch.uint8)
    weights = torch.from_numpy(tiling.weights)
    for k, number in enumerate(numbers):
        total, covered = torch.zeros(tiling.sides), torch.zeros(tiling.sides)
        for part, tile_maps in zip(tiling.parts, maps, strict=True):
            tile = F.interpolate(tile_maps[None, k : k + 1].cpu(), (tiling.side, tiling.side), mode="bicubic")[0, 0]
            total[part] += tile * weights
            covered[part] += weights
        values = scale_maps((total / covered)[None])[0]
        labels = torch.where(values > best, number, labels)
        best = torch.maximum(best, values)
    certain = torch.where(best >= threshold, labels, torch.where(best >= uncertainty, IGNORE, 0).to(torch.uint8))
    return SemanticMap(certain.numpy(), best.numpy(), classes)
