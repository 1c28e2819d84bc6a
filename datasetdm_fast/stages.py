"""The one table of what crosses an engine's boundary: size letters, pyramid levels, tensor names, shapes and dtypes.

Size letters: B images, C channels, H W pixels, h w latent cells, S tokens in space, T text tokens, D text width, N queries,
K classes, J joints. A CFG batch is [uncond_0 .. uncond_{B-1}, cond_0 .. cond_{B-1}].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LEVELS = ("low", "mid", "high", "highest")
FACTOR = 8  # pixels per latent cell in every SD 1.x and 2.x autoencoder


@dataclass(frozen=True)
class Level:
    """One level of the captured pyramid; channels of a feature are those of one CFG half."""

    name: str
    side: int  # cells
    features: tuple[int, ...]  # channels of each captured feature, in capture order
    heads: tuple[int, ...]  # heads of each captured cross-attention layer: up blocks first, then down
    tokens: int

    @property
    def channels(self) -> int:
        """Channels of the concatenated level: both CFG halves of every feature, then every head and token of the maps."""
        return 2 * sum(self.features) + sum(self.heads) * self.tokens


def heads_per_block(unet: Mapping) -> tuple[int, ...]:
    """Attention heads of the four down blocks; diffusers calls this number attention_head_dim."""
    heads = unet.get("num_attention_heads") or unet["attention_head_dim"]
    return (heads,) * 4 if isinstance(heads, int) else tuple(heads)


def levels(unet: Mapping, tokens: int, size: int) -> tuple[Level, ...]:
    """The four levels a UNet of this diffusers config yields at size x size pixels, low to highest."""
    width, count, heads = unet["block_out_channels"], unet["layers_per_block"], heads_per_block(unet)
    side = size // FACTOR
    low = Level("low", side // 8, (width[2],) + (width[3],) * count + (width[3],) + (width[3],) * (count + 1), (heads[3],), tokens)
    rest = []
    for depth, name in ((2, "mid"), (1, "high"), (0, "highest")):
        entry = width[depth] if depth == 0 else width[depth - 1]  # conv_in, or the downsampler of the block above
        features = (entry,) + (width[depth],) * count + (width[depth + 1],) + (width[depth],) * (count + 1)
        rest.append(Level(name, side >> depth, features, (heads[depth],) * (2 * count + 1), tokens))
    return (low, *rest)


@dataclass(frozen=True)
class Tensors:
    """Named tensors of one stage: name -> (shape in size letters or numbers, dtype; `float` = the engine's own)."""

    inputs: dict[str, tuple[tuple[str | int, ...], str]]
    outputs: dict[str, tuple[tuple[str | int, ...], str]]


STAGES = {
    "encode_text": Tensors({"tokens": (("B", "T"), "int64")}, {"context": (("B", "T", "D"), "float")}),
    "denoise": Tensors(
        {"latents": (("B", 4, "h", "w"), "float"), "timestep": ((), "float32"), "context": (("2B", "T", "D"), "float")},
        {"noise": (("2B", 4, "h", "w"), "float")},
    ),
    "denoise_and_capture": Tensors(
        {"latents": (("B", 4, "h", "w"), "float"), "timestep": ((), "float32"), "context": (("2B", "T", "D"), "float")},
        {
            "noise": (("2B", 4, "h", "w"), "float"),
            **{f"features_{name}": (("B", "C", "h", "w"), "float") for name in LEVELS},
            **{f"maps_{name}": (("B", "heads", "S", "T"), "float") for name in LEVELS},
        },
    ),
    "decode_image": Tensors({"latents": (("B", 4, "h", "w"), "float")}, {"image": (("B", "H", "W", 3), "uint8")}),
}
