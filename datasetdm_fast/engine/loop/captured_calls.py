"""What labels read of the captured calls: the capture of one, or the sum of several with a decoder's shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datasetdm_fast.data import Capture, ProjectedCapture

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.engines.engine import Engine

AnyCapture = Capture | ProjectedCapture


def timesteps_of(reader: Any) -> tuple[int | None, ...]:
    """The timesteps that a decoder's configuration or a labeller names, None for that of the last sampler call."""
    named = reader.capture_timestep
    return named if isinstance(named, tuple) else (named,)


class CapturedCalls:
    """The captures of labels while their calls are made: of a label that reads several calls, one sum is held."""

    def __init__(self, engine: Engine, calls: Mapping[str, tuple[int, ...]]):
        self.calls, self.read = calls, dict[str, AnyCapture]()
        several = (label for label, places in calls.items() if len(places) > 1)
        self._shares = {label: engine.decoders[label].call_shares().detach() for label in several}

    def add(self, call: int, capture: AnyCapture) -> None:
        """Reads the capture of a call for all labels that name it."""
        for label, calls in self.calls.items():
            if label not in self._shares:
                self.read |= {label: capture} if calls == (call,) else {}
                continue
            part = capture.of(label) if isinstance(capture, ProjectedCapture) else capture
            for place, named in enumerate(calls):
                if named == call:
                    self.read[label] = add_share(self.read.get(label), part, self._shares[label][place])


def add_share(total: Any, capture: AnyCapture, shares: Tensor) -> AnyCapture:
    """The total, None for nothing yet, with so large a share [levels] of each level of a capture added."""

    def add(sums: Any, value: Tensor, share: Tensor) -> Tensor:
        part = value.float() * share.to(value.device)
        return part if sums is None else sums.add_(part)

    if isinstance(capture, ProjectedCapture):
        sums = total.sums if total else [None] * len(shares)
        return ProjectedCapture(tuple(map(add, sums, capture.sums, shares)), capture.slices)
    parts = []
    for name in ("features", "maps"):
        levels = getattr(capture, name)
        sums = getattr(total, name) if total else [[None] * len(level) for level in levels]
        parts.append(
            tuple(
                tuple(add(part, value, share) for part, value in zip(held, level, strict=True))
                for held, level, share in zip(sums, levels, shares, strict=True)
            )
        )
    return Capture(*parts)
