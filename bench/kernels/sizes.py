"""Inputs of every kernel as Stable Diffusion 1.x at 512 pixels has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

BATCH = 8
FEATURES = 256  # channels of a projected level


def model_sizes(op: str, empty: Callable) -> Iterator[tuple[str, tuple]]:
    """Inputs of `op` as SD 1.x at 512 pixels and its decoders have them, made by empty(*shape)."""
    for side, width in ((64, 320), (32, 640), (16, 1280)):
        cells, heads = side * side, 8
        image = empty(BATCH, side, side, width).permute(0, 3, 1, 2)
        if op == "group_norm_silu":
            yield f"{width} channels", (image, empty(width), empty(width), 32, 1e-5, empty(BATCH, width))
            yield f"{width} channels, no SiLU", (image, empty(width), empty(width), 32, 1e-6, None, False)
        elif op == "layer_norm":
            yield f"{width} channels", (empty(BATCH, cells, width), empty(width), empty(width), 1e-5)
        elif op == "geglu":
            yield f"{4 * width} channels", (empty(BATCH, cells, 8 * width),)
        elif op == "attention":
            q, k, v = empty(BATCH, cells, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
            text = empty(BATCH, 77, 2, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
            yield f"{cells} cells, heads of {width // heads}", (q, k, v)
            yield f"{cells} cells over 77 tokens, heads of {width // heads}", (q, *text)
        elif op == "attention_capture":
            q = empty(BATCH, cells, heads, width // heads).transpose(1, 2)
            k, v = empty(BATCH, 77, 2, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
            yield f"heads of {width // heads}", (q, k, v, empty(heads, 77, FEATURES))
        elif op == "pyramid":
            yield (
                f"{width} channels",
                (
                    [image, empty(BATCH, 2 * width, side, side)],
                    [empty(BATCH, heads, cells, 77)],
                    empty(FEATURES, 3 * width + 616, 1, 1),
                    64,
                ),
            )
    if op == "attention_capture":
        yield (
            "heads of 64",
            (*(empty(BATCH, size, 10, 64).transpose(1, 2) for size in (1024, 77, 77)), empty(10, 77, FEATURES)),
        )
    elif op == "layer_norm":
        yield "text encoder", (empty(BATCH, 77, 768), empty(768), empty(768), 1e-5)
    elif op == "attention":
        for width in (16, 32, 64, 128):
            yield f"1024 cells, heads of {width}", tuple(empty(BATCH, 8, 1024, width) for _ in range(3))
    elif op == "guided_step":
        for slots in (0, 1, 3):
            yield (
                f"{slots} earlier entries",
                (
                    empty(2 * BATCH, 4, 64, 64),
                    empty(BATCH, 4, 64, 64),
                    empty(slots, BATCH, 4, 64, 64),
                    empty(5 + slots),
                ),
            )
    elif op == "image_norm":
        yield "channels last", (empty(BATCH, 64, 64, 1024).permute(0, 3, 1, 2),)
        yield "planes", (empty(BATCH, 1024, 64, 64),)
    elif op == "masked_attention":
        for cells in (100, 1600):
            q, k, v = (empty(BATCH, 8, size, 32) for size in (100, cells, cells))
            yield f"{cells} cells", (q, k, v, None if cells == 100 else empty.bools(BATCH, 100, cells))
    elif op == "mask_head":
        for side in (40, 160):
            yield f"{side} cells a side", (empty(BATCH, 100, 256), empty(BATCH, 256, 160, 160), side, side == 40)
    elif op == "depth_head":
        hidden = 1024
        weights = empty(hidden, 1024, 3, 3), empty(hidden), empty(1, hidden, 3, 3), empty(1)
        yield "64 cells to 512 pixels", (empty(BATCH, 1024, 64, 64), *weights, (160, 512))
