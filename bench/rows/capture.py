"""python -m bench capture: what reading the captured tensors costs, as upstream writes it and as we do, at Stable
Diffusion 1.4's sizes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench.machine.measure import compare
from datasetdm_fast.data import Capture
from datasetdm_fast.decoders.checkpoint import build_decoder, fold, upstream
from datasetdm_fast.errors import GateFailed, Missing
from datasetdm_fast.kernels import compiled, depth_head, pyramid, reference
from datasetdm_fast.kernels.case import noise
from datasetdm_fast.stages import Level, levels

SIDES = {"low": 16, "mid": 32, "high": 64, "highest": 64}  # cells of a side that each level is resized to
LIMIT = 1e-5  # relative L2 in fp32; the naive form's own distance from fp64 is some 1e-6
QUARTER = 4
WIDTHS = (320, 640, 1280, 1280)
HEAD_WIDTHS = {"low": 160, "mid": 160, "high": 80, "highest": 40}  # of SD 1.x's cross-attentions
Pair = tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]


def captured(found: tuple[Level, ...]) -> Capture:
    """Seeded noise in the place of what a UNet of these levels yields for one image."""
    features = tuple(
        tuple(noise(1, 2 * channels, level.side, level.side) for channels in level.features) for level in found
    )
    maps = tuple(
        tuple(torch.softmax(noise(1, heads, level.side**2, level.tokens), -1) for heads in level.heads)
        for level in found
    )
    return Capture(features, maps)


def weights(found: tuple[Level, ...], width: int) -> list[Tensor]:
    return [noise(width, level.channels, 1, 1, scale=level.channels**-0.5) for level in found]


def capture(divisor: int) -> Pair:
    """Every level at the decoder's width, from features and maps as they were captured."""
    found = sd_levels(divisor)
    given, projections = captured(found), weights(found, 256 // divisor)

    def run(form: Callable) -> list[Tensor]:
        return [
            form(x, maps, weight, SIDES[level.name])
            for level, x, maps, weight in zip(found, given.features, given.maps, projections)
        ]

    return lambda: run(pyramid.reference), lambda: run(pyramid.projected)


def capture_attention(divisor: int) -> Pair:
    """The same with the cross-attentions themselves: naive writes their maps for the capture, ours never does."""
    found = sd_levels(divisor)
    features, projections = captured(found).features, weights(found, 256 // divisor)
    attention = [[layer(level, heads, HEAD_WIDTHS[level.name] // divisor) for heads in level.heads] for level in found]

    def naive() -> list[Tensor]:
        answers, levels_out = [], []
        maps = [
            [torch.softmax(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)), -1) for q, k, _ in level]
            for level in attention
        ]
        for level, layers, written, x, weight in zip(found, attention, maps, features, projections):
            answers += [torch.matmul(one, v) for one, (_, _, v) in zip(written, layers)]
            levels_out.append(pyramid.reference(x, written, weight, SIDES[level.name]))
        return levels_out + answers

    def ours() -> list[Tensor]:
        done = [
            pyramid.without_maps(x, layers, weight, SIDES[level.name])
            for level, layers, x, weight in zip(found, attention, features, projections)
        ]
        return [level for level, _ in done] + [answer for _, answers in done for answer in answers]

    return naive, ours


def layer(level: Level, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        noise(1, heads, level.side**2, width),
        noise(1, heads, level.tokens, width),
        noise(1, heads, level.tokens, width, scale=0.5),
    )


def depth_head_row(divisor: int) -> Pair:
    channels = 1024 // divisor
    weight, last = (
        noise(channels, channels, 3, 3, scale=(9 * channels) ** -0.5),
        noise(1, channels, 3, 3, scale=(9 * channels) ** -0.5),
    )
    inputs = noise(1, channels, 64, 64), weight, noise(channels, scale=0.1), last, noise(1), (160, 512)
    return lambda: [depth_head.reference(*inputs)], lambda: [depth_head.compiled(*inputs)]


def depth_decoder(divisor: int) -> Pair:
    """The whole decoder, spectral norms folded on both sides as loading does."""
    config = upstream("depth", levels=sd_levels(divisor), width=256 // divisor, depth_width=1024 // divisor)
    given = captured(config.levels)
    torch.manual_seed(0)
    naive = fold(build_decoder(config, reference))
    for parameter in (
        naive.last_layer_depth.parameters()
    ):  # as initialised, the head says the same depth everywhere and hides what it is given
        torch.nn.init.normal_(parameter, std=(9 * config.depth_width) ** -0.5)
    ours = fold(build_decoder(config, compiled))
    ours.load_state_dict(naive.state_dict())
    return lambda: [naive(given)["depth"]], lambda: [ours(given)["depth"]]


ROWS: dict[str, Callable[[int], Pair]] = {
    "capture": capture,
    "capture_attention": capture_attention,
    "depth_head": depth_head_row,
    "depth_decoder": depth_decoder,
}


def sd_levels(divisor: int) -> tuple[Level, ...]:
    """The levels of Stable Diffusion 1.x at 512 pixels, every width divided."""
    unet = {
        "block_out_channels": tuple(width // divisor for width in WIDTHS),
        "layers_per_block": 2,
        "attention_head_dim": 8,
    }
    return levels(unet, tokens=77, size=512)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench capture", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the rows as JSON on stdout")
    parser.add_argument("--quick", action="store_true", help="a quarter of every width")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds of each row (default 3)")
    parser.add_argument(
        "--rows", default=",".join(ROWS), metavar="LIST", help="rows to measure, comma-separated (default: %(default)s)"
    )
    settings = parser.parse_args(arguments)
    names = settings.rows.split(",")
    if settings.rounds < 1 or not set(names) <= set(ROWS):
        parser.error(
            f"--rounds is {settings.rounds}, expected at least 1; --rows is {settings.rows}, expected some of "
            f"{', '.join(ROWS)}"
        )
    rows, code = {}, 0
    for name in names:
        try:
            warm_up(*ROWS[name](QUARTER))
            rows[name] = compare(name, *ROWS[name](QUARTER if settings.quick else 1), settings.rounds, LIMIT)
        except (GateFailed, Missing) as error:
            print(error, file=sys.stderr)
            code = error.exit_code
            continue
        say(name, rows[name])
    device = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if settings.json:
        print(
            json.dumps(
                {
                    **rows,
                    "settings": {
                        **device,
                        "dtype": "fp32",
                        "batch": 1,
                        "quick": settings.quick,
                        "rounds": settings.rounds,
                    },
                }
            )
        )
    return code


def warm_up(naive: Callable, ours: Callable) -> None:
    """Code, primitive caches and thread stacks are in memory from now on."""
    with torch.inference_mode():
        naive(), ours()


def say(name: str, row: dict) -> None:
    naive, ours = row["seconds"]["naive"], row["seconds"]["ours"]
    print(
        f"{name:18} {row['time_ratio']:7.2f} x faster ({naive[1]:.3f} s -> {ours[1]:.3f} s, {ours[0]:.3f} .. "
        f"{ours[2]:.3f}), "
        f"{row['memory_ratio']:7.2f} x less memory ({row['peak_mib']['naive']:.0f} MiB -> "
        f"{row['peak_mib']['ours']:.0f} MiB), error {row['error']:.1e}",
        file=sys.stderr,
    )
