"""The page of a training: its figures and held-out pictures."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from datasetdm_fast.data import Annotation
from datasetdm_fast.labels import LABEL_KINDS
from datasetdm_fast.tasks import TASKS
from datasetdm_fast.training.loop import TrainingViews

SHOWN = 12  # images of the page


def page(
    task: str,
    lessons: TrainingViews,
    found: Sequence[Annotation],
    facts: Mapping[str, object],
    figures: Mapping[str, object],
    intervals: Mapping[str, object],
    cautions: Sequence[str] = (),
) -> bytes:
    """One HTML file: image, truth and answer of some held-out images, and the figures with their intervals of 95 % and
    what to know of them; it needs nothing else.
    """
    rows, label, truth = [], LABEL_KINDS[task], TASKS[task].truth
    for view in range(min(lessons.count, SHOWN)):
        item = lessons.views.item(view)
        cells = "".join(
            f'<img src="{_address(picture)}" alt="">'
            for picture in (
                item.image,
                *(label.picture(some, item.image) for some in (truth(lessons.views.source, item), found[view])),
            )
        )
        rows.append(
            f"<figure>{cells}<figcaption>{html.escape(item.id)} &middot; "
            f"{html.escape(item.caption)}</figcaption></figure>"
        )
    told = {
        name: f"{value:.4g}{_between(intervals.get(name))}"
        if isinstance(value, float)
        else json.dumps(value)
        if isinstance(value, dict)
        else str(value)
        for name, value in {**facts, **figures}.items()
    }
    table = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(value)}</td></tr>" for name, value in told.items()
    )
    notes = "".join(f"<p><b>Note:</b> {html.escape(one)}.</p>" for one in cautions)
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 "
        "1rem;background:#fff;color:#222}"
        "img{width:32%;image-rendering:pixelated;margin-right:1%}figure{margin:0 0 1.5rem}figcaption{color:#666}"
        "th{text-align:left;padding-right:2rem;font-weight:normal;color:#666;vertical-align:top}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{task} decoder</title><style>{style}</style>'
        f"<h1>{task} decoder</h1><table>{table}</table>{notes}<p>Image, truth and answer, on images it was not taught "
        f"from.</p>{''.join(rows)}</html>\n"
    ).encode()


def _between(bounds: object) -> str:
    return f" ({bounds[0]:.4g} to {bounds[1]:.4g})" if isinstance(bounds, list) else ""


def _address(pixels: np.ndarray | Image.Image) -> str:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
