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
        """The latents to go on with after a step."""
        return latents

    def get_average_attention(self) -> dict[str, list[Tensor]]:
        """The maps of each place, divided by the number of calls."""
        return {key: [one / self.cur_step for one in maps] for key, maps in self.attention_store.items()}


def keep(store: AttentionStore, capture: Capture) -> None:
    """Adds the maps of a call to those of the calls before, in a store of ours or of a script's own class."""
    if not store.activate:
        return
    found = by_place(capture)
    if store.attention_store:
        found = {key: [old + new for old, new in zip(store.attention_store[key], maps)] for key, maps in found.items()}
    store.attention_store = found
    store.cur_step += 1


def by_place(capture: Capture) -> dict[str, list[Tensor]]:
    """The maps of a capture by place, in the order of the U-Net's layers."""
    found = AttentionStore.get_empty_store()
    low, *others = [[one.float().flatten(0, 1) for one in level] for level in capture.maps]
    ups = [(len(level) + 1) // 2 for level in others]  # an up block has one layer more than a down block
    found["mid_cross"] = low
    found["up_cross"] = [one for level, count in zip(others, ups) for one in level[:count]]
    found["down_cross"] = [one for level, count in zip(others[::-1], ups[::-1]) for one in level[count:]]
    return found


def by_level(
    average: Mapping[str, Sequence[Tensor]], cells: Sequence[int], batch: int
) -> tuple[tuple[Tensor, ...], ...]:
    """Maps [B, heads, h * w, T] per level of so many cells: of the middle block for the lowest, else up, then down."""
    return tuple(
        tuple(
            one.unflatten(0, (batch, -1))
            for place in (("up", "down") if level else ("mid",))
            for one in average[f"{place}_cross"]
            if one.shape[1] == count
        )
        for level, count in enumerate(cells)
    )
