"""Capture hooks of the exported UNet stages."""

from collections.abc import Mapping
from types import SimpleNamespace

from torch import nn

from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.models.capture import NoCapture, Projection, RawCapture, Slot
from datasetdm_fast.export.onnx.graph import BATCH, Value
from datasetdm_fast.export.onnx.operations import probabilities


class ProjectingHook(NoCapture):
    """Adds up what the decoders' first layers make of features and maps: level sums [B, F, h, w] fp32."""

    def __init__(self, projection: Projection, ops: SimpleNamespace):
        super().__init__(ops)
        self.projection = projection
        self.sums: dict[int, Value] = {}

    def feature(self, slot: Slot | None, x: Value) -> None:
        if slot is None or not self.projection.widths[slot[0]]:
            return
        level, place = slot
        for half, weight in zip(x.chunk(2), self.projection.features[level][place]):
            self._add(level, nn.functional.conv2d(half, weight.transpose(0, 1).unsqueeze(2).unsqueeze(3)))

    def attend(self, slot: Slot, q: Value, k: Value, v: Value) -> Value:
        level, place = slot
        if not self.projection.widths[level]:
            return self.ops.attention(q, k, v)
        output, maps = self.ops.attention_maps(q, k, v)
        maps = maps.chunk(2)[1]
        weight = self.projection.maps[level][place].flatten(0, 1).transpose(0, 1)
        planes = weight @ maps.transpose(2, 3).flatten(1, 2)  # [B, F, S]
        side = int(planes.shape[2] ** 0.5)
        self._add(level, planes.unflatten(2, (side, side)))
        return output

    def _add(self, level: int, planes: Value) -> None:
        planes = planes.float()
        self.sums[level] = self.sums[level] + planes if level in self.sums else planes


class AveragingHook(NoCapture):
    """Adds up the attention probabilities of the conditional half, the means of the layers and heads of one side: those
    of self-attention, and those of the queries of cross-attention over a class prompt.
    """

    def __init__(self, model: Model, sides: tuple[int, int], class_keys: Mapping[Slot, Value], ops: SimpleNamespace):
        super().__init__(ops)
        self.counts = [side**2 for side in sides]
        self.class_keys = class_keys
        self.shares = [1 / len(level.heads) for level in model.levels]  # of a layer in the mean of its level
        self.sums: dict[str, Value] = {}

    def attend_self(self, slot: Slot, q: Value, k: Value, v: Value) -> Value:
        if q.shape[2] == self.counts[0]:
            self._add("cells", slot, _conditional(q), _conditional(k))
        return self.ops.attention(q, k, v)

    def attend(self, slot: Slot, q: Value, k: Value, v: Value) -> Value:
        if q.shape[2] == self.counts[1]:
            self._add("tokens", slot, _conditional(q), self.class_keys[slot])
        return self.ops.attention(q, k, v)

    def _add(self, name: str, slot: Slot, q: Value, k: Value) -> None:
        maps = probabilities(q, k, q.shape[-1] ** -0.5).float().mean(1) * self.shares[slot[0]]
        self.sums[name] = self.sums[name] + maps if name in self.sums else maps


def _conditional(x: Value) -> Value:
    """The conditional half, which before the halves differ is all there is."""
    return x if x.shape[0] == BATCH else x.chunk(2)[1]


class RawHook(RawCapture):
    """Keeps the maps that the attention itself uses."""

    def attend(self, slot: Slot, q: Value, k: Value, v: Value) -> Value:
        output, maps = self.ops.attention_maps(q, k, v)
        self.maps[slot] = maps.chunk(2)[1]
        return output
