"""The decoders without queries: metres, heatmaps of joints, and their columns and rows."""

from types import SimpleNamespace

from torch import Tensor, nn

from datasetdm_fast.data import AnyCapture
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import MASKS, Decoder, Upscale, wide_mixes
from datasetdm_fast.engine.models.layers import pointwise, sigmoid
from datasetdm_fast.errors import Refused
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

    def forward(self, capture: AnyCapture, text: Tensor | None = None) -> dict[str, Tensor]:
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


class HeatmapDecoder(Decoder):
    """`heatmaps` [B, J, h, w], one plane a joint, without an activation."""

    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        super().__init__(config, ops, wide_mixes(config.width))
        self.upscale = Upscale(4 * config.width, config.width, config.upscale) if config.upscale else nn.Identity()
        self.final_layer = nn.Conv2d(config.width if config.upscale else 4 * config.width, len(config.joints), 1)

    def forward(self, capture: AnyCapture, text: Tensor | None = None) -> dict[str, Tensor]:
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

    def forward(self, capture: AnyCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        side = capture.side
        if side != self.config.side:
            raise Refused(
                f"simcc decoder: the capture has {side} cells a side, expected the {self.config.side} it was trained "
                "on",
                f"Use --size {self.config.side * FACTOR}.",
            )
        joints = self.mix(capture, "mid", self.lowest(capture), side // 2).flatten(2)
        return {"x": self.mlp_head_x(joints), "y": self.mlp_head_y(joints)}
