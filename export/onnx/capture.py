"""Capture hooks of the exported UNet stages: each holds what its stage returns besides the noise."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from torch import nn

from datasetdm_fast.engine.models.capture import AttentionSlot, CaptureHook, Projection, RawCapture, Slot
from datasetdm_fast.export.onnx.graph import BATCH, Value
from datasetdm_fast.export.onnx.operations import probabilities
from datasetdm_fast.stages import LEVELS, Level


class ExportHook(CaptureHook):
    """Adds up what its stage returns besides the noise."""

    def __init__(self, ops: SimpleNamespace):
        super().__init__(ops)
        self.sums: dict[str, Value] = {}

    def _add(self, name: str, value: Value) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def outputs(self) -> dict[str, Value]:
        return self.sums


class ProjectingHook(ExportHook):
    """Adds up what the decoders' first layers make of features and maps: level sums [B, F, h, w] fp32."""

    def __init__(self, projection: Projection, ops: SimpleNamespace):
        super().__init__(ops)
        self.projection = projection

    def feature(self, slot: Slot | None, x: Value) -> None:
        if slot is None or not self.projection.widths[slot[0]]:
            return
        level, place = slot
        for half, weight in zip(x.chunk(2), self.projection.features[level][place]):
            planes = nn.functional.conv2d(half, weight.transpose(0, 1).unsqueeze(2).unsqueeze(3))
            self._add(f"sums_{LEVELS[level]}", planes.float())

    def attend(self, slot: AttentionSlot, q: Value, k: Value, v: Value) -> Value:
        level, place = slot.map
        if not self.projection.widths[level]:
            return self.ops.attention(q, k, v)
        output, maps = self.ops.attention_maps(q, k, v)
        maps = maps.chunk(2)[1]
        weight = self.projection.maps[level][place].flatten(0, 1).transpose(0, 1)
        planes = weight @ maps.transpose(2, 3).flatten(1, 2)  # [B, F, S]
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
    ):
        super().__init__(ops)
        self.self_count, self.cross_count = (side**2 for side in sides)
        self.class_keys = class_keys
        self.shares = [1 / len(level.heads) for level in levels]  # of a layer in the mean of its level

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
        self._add(name, maps.float().mean(1) * self.shares[slot[0]])


def _select_conditional(x: Value) -> Value:
    """The conditional half, which before the halves differ is all there is."""
    return x if x.shape[0] == BATCH else x.chunk(2)[1]


class RawHook(RawCapture, ExportHook):
    """Keeps every feature, and the maps that the attention itself uses."""

    def attend(self, slot: AttentionSlot, q: Value, k: Value, v: Value) -> Value:
        output, maps = self.ops.attention_maps(q, k, v)
        self.add_map(slot, maps.chunk(2)[1])
        return output

    def outputs(self) -> dict[str, Value]:
        capture = self.result()
        return {
            f"{kind}_{level}_{place}": value
            for kind in ("features", "maps")
            for level, row in zip(LEVELS, getattr(capture, kind))
            for place, value in enumerate(row)
        }
