"""DatasetDM's AttentionStore: the attention probabilities of a call, by their place in the U-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from datasetdm_fast.data import Capture

PLACES = ("down", "mid", "up")


class AttentionStore:
    """Cross-attention probabilities [B * heads, h * w, T] of the conditional half, layer by layer in the order in which
    they are computed. Self-attention has its keys and no entries: no script of DatasetDM reads it.
    """

    def __init__(self) -> None:
        self.activate = True
        self.num_att_layers = -1
        self.reset()

    @staticmethod
    def get_empty_store() -> dict[str, list[Tensor]]:
        return {f"{place}_{kind}": [] for kind in ("cross", "self") for place in PLACES}

    def reset(self) -> None:
        self.cur_step = 0
        self.attention_store: dict[str, list[Tensor]] = {}

    def step_callback(self, latents: Tensor) -> Tensor:
        """The latents for the next step."""
        return latents

    def get_average_attention(self) -> dict[str, list[Tensor]]:
        """The maps of each place, divided by the number of calls."""
        return {key: [total / self.cur_step for total in maps] for key, maps in self.attention_store.items()}


def add_capture(store: AttentionStore, capture: Capture) -> None:
    """Adds the maps of a call to those of the calls before, in a store of ours or of a script's own class."""
    if not store.activate:
        return
    maps = split_by_place(capture)
    if totals := store.attention_store:
        maps = {key: [old + new for old, new in zip(totals[key], tensors)] for key, tensors in maps.items()}
    store.attention_store = maps
    store.cur_step += 1


def split_by_place(capture: Capture) -> dict[str, list[Tensor]]:
    """The maps of a capture by place, in the order of the U-Net's layers."""
    maps = AttentionStore.get_empty_store()
    low, *others = [[tensor.float().flatten(0, 1) for tensor in level] for level in capture.maps]
    ups = [(len(level) + 1) // 2 for level in others]  # an up block has one layer more than a down block
    maps["mid_cross"] = low
    maps["up_cross"] = [tensor for level, count in zip(others, ups) for tensor in level[:count]]
    maps["down_cross"] = [tensor for level, count in zip(others[::-1], ups[::-1]) for tensor in level[count:]]
    return maps


def split_by_level(
    average: Mapping[str, Sequence[Tensor]], cells: Sequence[int], batch: int
) -> tuple[tuple[Tensor, ...], ...]:
    """Maps [B, heads, h * w, T] per level of so many cells: of the middle block for the lowest, else up, then down."""
    return tuple(
        tuple(
            tensor.unflatten(0, (batch, -1))
            for place in (("up", "down") if level else ("mid",))
            for tensor in average[f"{place}_cross"]
            if tensor.shape[1] == count
        )
        for level, count in enumerate(cells)
    )
