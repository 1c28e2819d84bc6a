"""DatasetDM's decoder classes by name and call, each filled with one of this package's decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.compat.showlab_modules.attention import AttentionStore, split_by_level
from datasetdm_fast.compat.showlab_modules.unet import MODELS
from datasetdm_fast.data import Capture
from datasetdm_fast.engine.decoders.checkpoint import build_decoder, load_upstream
from datasetdm_fast.engine.decoders.config import SD1_LEVELS, DecoderConfig, upstream
from datasetdm_fast.engine.decoders.upstream import PREFIX, fit_config, unused_shapes
from datasetdm_fast.stages import LEVELS


class NamedDecoder(nn.Module):
    """A decoder that takes the features and attention of a script. As in DatasetDM it is never put into eval mode, so
    its spectral norms change from image to image. Without a checkpoint it has fresh weights, to be trained.
    """

    kind = ""

    def __init__(self, **settings: Any):
        super().__init__()
        self.levels = MODELS[-1].levels if MODELS else SD1_LEVELS
        if MODELS and "queries" in settings:
            settings |= {"text_width": MODELS[-1].text_width}
        self.settings = settings
        self.place = torch.device("cpu")
        self.decoder: nn.Module | None = None

    def to(self, device: Any) -> NamedDecoder:
        self.place = torch.device(device)
        return super().to(device)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters to train; without a checkpoint the first call builds a decoder with fresh weights."""
        if self.decoder is None:
            self.decoder = build_decoder(self.config).train().to(self.place)
        return self.decoder.parameters(recurse)

    @property
    def config(self) -> DecoderConfig:
        return upstream(self.kind, levels=self.levels, **self.settings)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """A checkpoint as DatasetDM saves it; weights that its class has and never reads are zeros."""
        if self.decoder is None:
            raise RuntimeError(f"{type(self).__name__}: it has no weights yet")
        unread = {name: torch.zeros(shape) for name, shape in unused_shapes(self.decoder.config).items()}
        return {**self.decoder.state_dict(), **unread}

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Loads a checkpoint of DatasetDM, with or without `module.` before its names; layer widths follow it."""
        shapes = {name.removeprefix(PREFIX): tuple(value.shape) for name, value in state.items()}
        config = fit_config(self.config, shapes)
        self.decoder = load_upstream(build_decoder(config), state, strict=True).to(self.place)

    def forward(
        self,
        features: Mapping[str, Sequence[Tensor]],
        controller: AttentionStore,
        prompts: Sequence[str],
        tokenizer: Any = None,
        class_embedding: Tensor | None = None,
    ):
        if self.decoder is None:
            raise RuntimeError(f"{type(self).__name__}: no checkpoint was loaded into it, nor is it trained")
        levels = tuple(tuple(features[level]) for level in LEVELS)
        cells = [level[0].shape[-2] * level[0].shape[-1] for level in levels]
        capture = Capture(levels, split_by_level(controller.get_average_attention(), cells, len(prompts)))
        text = None if class_embedding is None else class_embedding[:, 0].expand(len(prompts), -1)
        return self.unpack(self.decoder(capture, text))

    def unpack(self, raw: dict[str, Tensor]) -> Any:
        """The outputs in the form that DatasetDM's class returns."""
        return raw


class seg_decorder(NamedDecoder):
    """Masks and class logits of queries; DatasetDM's own defaults are those of Cityscapes."""

    kind = "segmentation"

    def __init__(self, num_queries: int = 100, num_classes: int = 19, **_: Any):
        super().__init__(queries=num_queries, classes=tuple(f"class {k}" for k in range(num_classes)))


class seg_decorder_open_word(NamedDecoder):
    """Masks and logits of queries for the word whose embedding is passed with the features."""

    kind = "open-vocabulary"

    def __init__(self, num_queries: int = 100, num_classes: int = 2, **_: Any):
        super().__init__(queries=num_queries)


class Depthmodule(NamedDecoder):
    """Depth in metres [B, 1, H, W]."""

    kind = "depth"

    def __init__(self, max_depth: float = 10.0, **_: Any):
        super().__init__(max_depth=float(max_depth))

    def unpack(self, raw: dict[str, Tensor]) -> Tensor:
        return raw["depth"]


class PoseModule_HeatMap(NamedDecoder):
    """Heatmaps of joints [B, J, h, w]."""

    kind = "heatmap"

    def __init__(self, cfg: Any = None):
        super().__init__()

    def unpack(self, raw: dict[str, Tensor]) -> Tensor:
        return raw["heatmaps"]


class PoseModule(NamedDecoder):
    """Logits of the columns and of the rows of joints."""

    kind = "simcc"

    def __init__(self, cfg: Any = None):
        super().__init__()

    def unpack(self, raw: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return raw["x"], raw["y"]
