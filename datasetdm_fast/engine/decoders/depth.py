"""The decoder that answers with metres."""

from types import SimpleNamespace

from torch import Tensor, nn

from datasetdm_fast.data import Capture, ProjectedCapture
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.layers import MASKS, Upscale
from datasetdm_fast.engine.decoders.trunk import Decoder, wide_mixes
from datasetdm_fast.engine.models.layers import sigmoid
from datasetdm_fast.kernels import depth_head
from datasetdm_fast.stages import FACTOR


class DepthDecoder(Decoder):
    """`depth` [B, 1, H, W] in metres, between 0 and max_depth."""

    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        super().__init__(config, ops, wide_mixes(config.width))
        self.upscale = Upscale(4 * config.width, config.width, config.upscale) if config.upscale else None
        width = config.width if config.upscale else 4 * config.width
        self.last_layer_depth = nn.Sequential(
            nn.Conv2d(width, config.depth_width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.depth_width, 1, 3, padding=1),
        )
        for convolution in (self.last_layer_depth[0], self.last_layer_depth[2]):
            nn.init.normal_(convolution.weight, std=0.001)
            nn.init.zeros_(convolution.bias)

    def forward(self, capture: Capture | ProjectedCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        first, last = self.last_layer_depth[0], self.last_layer_depth[2]
        side = capture.side
        x = self.climb(capture)
        if self.upscale:
            x = self.upscale(x)
            sides: tuple[int, ...] = (side * FACTOR,)
        else:
            sides = (round(side * MASKS), side * FACTOR)
        head = depth_head.apply_trained if self.training else self.ops.depth_head
        logits = head(x, first.weight, first.bias, last.weight, last.bias, sides)
        return {"depth": sigmoid(logits) * self.config.max_depth}
