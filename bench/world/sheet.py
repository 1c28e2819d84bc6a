"""python -m bench.world.sheet RUN --out FILE.png: samples of a run side by side, each with its labels below
it.
"""

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasetdm_fast import open_run
from datasetdm_fast.engine.labels.class_tables import colour
from datasetdm_fast.engine.labels.pictures import borders, depth_picture
from datasetdm_fast.runs.run_folder.reader import StoredSample

GAP, PAPER, INK = 10, (250, 249, 246), (60, 58, 54)


def picture(sample: StoredSample, side: int) -> Image.Image:
    return Image.fromarray(sample.image).resize((side, side), Image.Resampling.LANCZOS)


def semantic(sample: StoredSample, side: int) -> Image.Image:
    table = np.array([colour(k) for k in range(256)], np.uint8)
    return Image.fromarray(table[sample.semantic.labels]).resize((side, side), Image.Resampling.NEAREST)


def outlined(sample: StoredSample, side: int) -> Image.Image:
    """Instances and joints over the dimmed picture."""
    scale = side / sample.image.shape[0]
    sheet = Image.blend(picture(sample, side), Image.new("RGB", (side, side), (20, 22, 28)), 0.35)
    pen = ImageDraw.Draw(sheet, "RGBA")
    for mask, category in zip(sample.instances.masks, sample.instances.class_ids):
        shade = colour(2 + int(category))
        for ring in borders(mask):
            points = [(x * scale, y * scale) for x, y in ring]
            pen.polygon(points, fill=(*shade, 70))
            pen.line([*points, points[0]], fill=(*shade, 255), width=2)
    if sample.keypoints:
        for points, seen in zip(sample.keypoints.points, sample.keypoints.visibility):
            for a, b in sample.keypoints.limbs:
                if seen[a] and seen[b]:
                    pen.line(
                        [tuple(points[a, :2] * scale), tuple(points[b, :2] * scale)], fill=(255, 255, 255, 255), width=3
                    )
            for (x, y), visible in zip(points[:, :2] * scale, seen):
                if visible:
                    pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=(255, 70, 90, 255))
    return sheet


def depth(sample: StoredSample, side: int) -> Image.Image:
    millimetres = (sample.depth.metres * 1000).astype(np.uint16)
    return depth_picture(millimetres).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)


ROWS = (("image", picture), ("semantic", semantic), ("instances, pose", outlined), ("depth", depth))


def sheet(samples: list[StoredSample], side: int) -> Image.Image:
    """One column a sample: prompt, picture, labels."""
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    head, margin = 54, 24
    page = Image.new("RGB", (margin + len(samples) * (side + GAP) + GAP, head + len(ROWS) * (side + GAP)), PAPER)
    pen = ImageDraw.Draw(page)
    for k, sample in enumerate(samples):
        left = margin + GAP + k * (side + GAP)
        pen.multiline_text((left, 6), "\n".join(textwrap.wrap(sample.prompt, side // 7)[:3]), INK, font=font, spacing=1)
        for row, (_, draw) in enumerate(ROWS):
            page.paste(draw(sample, side), (left, head + row * (side + GAP)))
    for row, (name, _) in enumerate(ROWS):
        label = Image.new("RGB", (side, 16), PAPER)
        ImageDraw.Draw(label).text((side / 2, 8), name, INK, font=small, anchor="mm")
        page.paste(label.rotate(90, expand=True), (6, head + row * (side + GAP)))
    return page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.world.sheet", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ids", default="", help="positions, comma-separated; default: the first eight")
    parser.add_argument("--side", type=int, default=160, help="pixels of a picture")
    options = parser.parse_args(arguments)
    run = open_run(options.run)
    chosen = [int(word) for word in options.ids.split(",") if word] or list(range(min(8, len(run))))
    sheet([run[k] for k in chosen], options.side).save(options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
