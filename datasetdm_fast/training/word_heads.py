"""Cross-attention heads that locate the words of a caption, learnt from masks of known class."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.labels.class_tables import token_places
from datasetdm_fast.engine.tasks.captions import LEAST_MEAN
from datasetdm_fast.training.captures.views import TrainingViews

MOST_IMAGES = 400  # whose masks are used
LEAST_MASKS = 20  # below which nothing is learnt
LEAST_RIGHT = 0.75  # share of masks that the attention has to name rightly to be used
LEAST_SHARE = 0.2  # of all heads: a level with less is not read
SPREAD = 0.003  # weight of the divergence from equal heads, so that a few dozen masks do not leave one head alone
POWER = 3.0  # of the attention in the probability of a class; unbounded, uninformative heads would suffice
DIGITS = 4  # of stored shares, equal on every machine


@dataclass(frozen=True)
class WordHeads:
    """Shares of the heads that locate words; none where too few masks were there or were named rightly."""

    shares: tuple[float, ...] = ()
    masks: int = 0
    right: float = 0.0

    def add_to(self, config: DecoderConfig) -> DecoderConfig:
        return replace(config, word_heads=self.shares) if self.shares else config


@dataclass(frozen=True)
class NamedMask:
    """Attention to each of n named classes by H heads: inside a mask, and over the image."""

    inside: Tensor  # [H, n]
    overall: Tensor  # [H, n]
    name: int  # of the n, that of the mask


def learn_heads(views: TrainingViews, config: DecoderConfig, tokenizer: Callable[..., object]) -> WordHeads:
    """The heads for a decoder of segmentation, by the images whose captions name several of its `named` classes."""
    if config.kind != "segmentation" or not config.named:
        return WordHeads()
    masks = list(_masks(views, config, tokenizer))
    if len(masks) < LEAST_MASKS:
        return WordHeads(masks=len(masks))
    (inside, overall), names = _pad(masks), torch.tensor([mask.name for mask in masks])
    with torch.enable_grad():
        shares = _drop_idle_levels(_fit_shares(inside, overall, names), config)
    right = float((_log_ratios(inside, overall, shares).argmax(1) == names).float().mean())
    if right < LEAST_RIGHT:
        return WordHeads(masks=len(masks), right=right)
    rounded = tuple(round(share, DIGITS) for share in shares.tolist())
    return WordHeads(rounded, len(masks), round(right, DIGITS))


def _masks(views: TrainingViews, config: DecoderConfig, tokenizer: Callable[..., object]) -> Iterator[NamedMask]:
    """The masks of named classes in the first view of each image whose caption names several."""
    for view in views.first_views(MOST_IMAGES):
        caption = views.item(view).caption
        places = token_places(caption, config.named, tokenizer, config.levels[0].tokens, config.table)
        if len(places) < 2:
            continue
        levels, names = _attention(views, config, view), list(places)
        seen = [torch.stack([maps[..., list(tokens)].mean(-1) for tokens in places.values()], 1) for maps in levels]
        overall = torch.cat([maps.mean(2) for maps in seen])
        target = views.target(view)
        for number, mask in zip(target.classes.tolist(), target.masks):
            if config.classes[number] not in names:
                continue
            inside = []
            for maps in seen:
                side = round(maps.shape[2] ** 0.5)
                cells = F.adaptive_avg_pool2d(mask[None].float(), side).flatten()
                inside.append(maps @ cells / cells.sum().clamp(min=LEAST_MEAN))
            yield NamedMask(torch.cat(inside), overall, names.index(config.classes[number]))


def _attention(views: TrainingViews, config: DecoderConfig, view: int) -> list[Tensor]:
    """Per level the attention [heads, cells, T] of a view, a mean over its calls."""
    captured, features = views.captures.batch([view]), views.captures.layout.features
    maps = [level[0, :, width:].unflatten(0, (config.calls, -1)).mean(0) for level, width in zip(captured, features)]
    return [
        level.unflatten(1, (-1, config_level.tokens)).transpose(0, 1).float().cpu()
        for level, config_level in zip(maps, config.levels, strict=True)
    ]


def _pad(masks: Sequence[NamedMask]) -> tuple[Tensor, Tensor]:
    """Attention inside and over the image [M, H, n], that inside 0 for the classes that an image does not name."""
    most = max(mask.inside.shape[1] for mask in masks)
    inside = torch.stack([F.pad(mask.inside, (0, most - mask.inside.shape[1])) for mask in masks])
    return inside, torch.stack([F.pad(mask.overall, (0, most - mask.overall.shape[1]), value=1.0) for mask in masks])


def _log_ratios(inside: Tensor, overall: Tensor, shares: Tensor) -> Tensor:
    """[M, n] logarithm of the attention to each class inside each mask, as a multiple of that over the image."""
    within, everywhere = ((shares @ values).clamp(min=LEAST_MEAN) for values in (inside, overall))
    return (within / everywhere).log()


def _fit_shares(inside: Tensor, overall: Tensor, names: Tensor) -> Tensor:
    """The shares of the heads that make the classes of the masks most likely."""
    values = torch.zeros(inside.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([values], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        shares = values.log_softmax(0)
        loss = F.cross_entropy(POWER * _log_ratios(inside, overall, shares.exp()), names) - SPREAD * shares.mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    return values.detach().softmax(0)


def _drop_idle_levels(shares: Tensor, config: DecoderConfig) -> Tensor:
    """The shares with those of unimportant levels set to 0, so that these need not be read."""
    parts = shares.split([sum(level.heads) for level in config.levels])
    shares = torch.cat([part if part.sum() >= LEAST_SHARE else torch.zeros_like(part) for part in parts])
    return shares / shares.sum()
