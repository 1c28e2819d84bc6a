"""The decoders that answer with the joints of one person."""

from types import SimpleNamespace

from torch import Tensor, nn

from datasetdm_fast.data import Capture, ProjectedCapture
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.layers import Upscale
from datasetdm_fast.engine.decoders.trunk import Decoder, wide_mixes
from datasetdm_fast.engine.models.layers import pointwise
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import FACTOR


class HeatmapDecoder(Decoder):
    """`heatmaps` [B, J, h, w], one plane a joint, without an activation."""

    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        super().__init__(config, ops, wide_mixes(config.width))
        self.upscale = Upscale(4 * config.width, config.width, config.upscale) if config.upscale else nn.Identity()
        self.final_layer = nn.Conv2d(config.width if config.upscale else 4 * config.width, len(config.joints), 1)

    def forward(self, capture: Capture | ProjectedCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        return {
            "heatmaps": pointwise(self.upscale(self.climb(capture)), self.final_layer.weight, self.final_layer.bias)
        }


class SimccDecoder(Decoder):
    """Logits of each joint's column `x` [B, J, W] and row `y` [B, J, H]; bound to the image size it was trained on."""

    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        super().__init__(config, ops, {"mid": (2 * config.width, len(config.joints))})
        tokens, bins = (config.side // 2) ** 2, config.side * FACTOR
        self.mlp_head_x = nn.Linear(tokens, bins)
        self.mlp_head_y = nn.Linear(tokens, bins)

    def forward(self, capture: Capture | ProjectedCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        side = capture.side
        if side != self.config.side:
            raise Refused(
                f"simcc decoder: the capture has {side} cells a side, expected the {self.config.side} it was trained "
                "on",
                f"Use --size {self.config.side * FACTOR}.",
            )
        joints = self.mix(capture, "mid", self.lowest(capture), side // 2).flatten(2)
        return {"x": self.mlp_head_x(joints), "y": self.mlp_head_y(joints)}
