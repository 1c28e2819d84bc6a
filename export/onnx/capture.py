"""Capture hooks of the exported UNet stages: each holds what its stage returns besides the noise."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from torch import nn

from datasetdm_fast.data import Capture
from datasetdm_fast.engine.models.capture import AttentionSlot, CaptureHook, Projection, RawCapture, Slot
from datasetdm_fast.export.onnx.graph import BATCH, Value
from datasetdm_fast.export.onnx.operations import probabilities
from datasetdm_fast.stages import LEVELS, Level


class ExportHook(CaptureHook):
    """Adds up what its stage returns besides the noise, of a call of so many rows an image."""

    def __init__(self, ops: SimpleNamespace, rows: int = 2):
        super().__init__(ops)
        self.rows = rows
        self.sums: dict[str, Value] = {}

    def _add(self, name: str, value: Value) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def outputs(self) -> dict[str, Value]:
        return self.sums


class ProjectingHook(ExportHook):
    """Adds up what the decoders' first layers make of features and maps: level sums [B, F, h, w] fp32."""

    def __init__(self, projection: Projection, ops: SimpleNamespace, rows: int):
        super().__init__(ops, rows)
        self.projection = projection

    def feature(self, slot: Slot, x: Value) -> None:
        level, place = slot
        if not self.projection.widths[level]:
            return
        weights = list(self.projection.features[level][place])
        for half, weight in zip(x.chunk(self.rows)[-len(weights) :], weights):
            planes = nn.functional.conv2d(half, weight.transpose(0, 1).unsqueeze(2).unsqueeze(3))
            self._add(f"sums_{LEVELS[level]}", planes.float())

    def attend(self, slot: AttentionSlot, q: Value, k: Value, v: Value) -> Value:
        level, place, _, blocks = slot
        if not self.projection.widths[level]:
            return self.ops.attention(q, k, v)
        output, maps = self.ops.attention_maps(q, k, v)
        maps = maps.chunk(self.rows)[-1]
        weight = self.projection.maps[level][place].flatten(0, 1).transpose(0, 1)
        planes = weight @ maps.transpose(2, 3).flatten(1, 2)  # [B, F, S]
        planes = planes if blocks == 1 else planes * (1 / blocks)
        side = int(planes.shape[2] ** 0.5)
        self._add(f"sums_{LEVELS[level]}", planes.unflatten(2, (side, side)).float())
        return output


class AveragingHook(ExportHook):
    """Adds up the attention probabilities of the conditional half, the means of the layers and heads of one side: those
    of self-attention, and those of the queries of cross-attention over a class prompt.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        sides: Sequence[int],
        class_keys: Mapping[AttentionSlot, Value],
        ops: SimpleNamespace,
        rows: int,
    ):
        super().__init__(ops, rows)
        self.self_count, self.cross_count = (side**2 for side in sides)
        self.class_keys = class_keys
        self.layers = Counter(levels[slot.level].side for slot in class_keys)  # of each side
        self.sides = [level.side for level in levels]

    def attend_self(self, slot: AttentionSlot, q: Value, k: Value, v: Value) -> Value:
        if q.shape[2] == self.self_count:
            self._average("cells", slot, q, _select_conditional(k))
        return self.ops.attention(q, k, v)

    def attend(self, slot: AttentionSlot, q: Value, k: Value, v: Value) -> Value:
        if q.shape[2] == self.cross_count:
            self._average("tokens", slot, q, self.class_keys[slot])
        return self.ops.attention(q, k, v)

    def _average(self, name: str, slot: AttentionSlot, q: Value, k: Value) -> None:
        maps = probabilities(_select_conditional(q), k, q.shape[-1] ** -0.5)
        self._add(name, maps.float().mean(1) * (1 / self.layers[self.sides[slot.level]]))


def _select_conditional(x: Value) -> Value:
    """The conditional half, which before the halves differ is all there is."""
    return x if x.shape[0] == BATCH else x.chunk(2)[1]


class RawHook(RawCapture, ExportHook):
    """Keeps every feature, and the maps that the attention itself uses."""

    def attend(self, slot: AttentionSlot, q: Value, k: Value, v: Value) -> Value:
        output, maps = self.ops.attention_maps(q, k, v)
        self.add_map(slot, maps.chunk(self.rows)[-1])
        return output

    def outputs(self) -> dict[str, Value]:
        return raw_outputs(self.result())


def raw_outputs(capture: Capture) -> dict[str, Value]:
    """The features and maps of a capture by the names of the outputs that they are."""
    return {
        f"{kind}_{level}_{place}": value
        for kind in ("features", "maps")
        for level, row in zip(LEVELS, getattr(capture, kind))
        for place, value in enumerate(row)
    }
