"""The page of a training: its figures and curves, and held-out pictures beside what the decoder says of them."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.data import Annotation
from datasetdm_fast.evaluation.meter import Meter
from datasetdm_fast.labels import LABEL_KINDS
from datasetdm_fast.labels.colours import colour
from datasetdm_fast.tasks import TASKS
from datasetdm_fast.training.loop import TrainingViews
from datasetdm_fast.truth.labelled import LabelledSource

SHOWN = 12  # images of the page
WIDTH, HEIGHT = 440, 170  # pixels of a chart
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 24  # pixels between its sides and the curve
POINTS = 200  # of a curve
STYLE = """
:root{color-scheme:light dark;--ink:#222;--dim:#666;--back:#fff;--line:#d5d5d5;--curve:#2563c4}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--dim:#aaa;--back:#161616;--line:#444;--curve:#7cb0ff}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;background:var(--back);
color:var(--ink)}
h1,h2,h3{line-height:1.2}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse}td,th{padding:.15rem 1.5rem .15rem 0;text-align:left;vertical-align:top}
td{overflow-wrap:anywhere}
th{font-weight:normal;color:var(--dim);white-space:nowrap}
figure{margin:0 0 1.5rem}figcaption,.dim{color:var(--dim)}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:0 2rem}
.views{display:grid;grid-template-columns:repeat(3,1fr);gap:.4rem}.views img{width:100%;image-rendering:pixelated}
.legend span{display:inline-block;margin-right:1rem;overflow-wrap:anywhere}
.legend i{display:inline-block;width:.9rem;height:.9rem;margin-right:.35rem;vertical-align:-.1rem;
border:1px solid var(--line)}
svg{max-width:100%;height:auto}polyline{fill:none;stroke:var(--curve);stroke-width:1.5}
rect{fill:none;stroke:var(--line)}.end{text-anchor:end}text{font-size:11px;fill:var(--dim)}circle{fill:var(--curve)}
"""


def page(
    task: str,
    lessons: TrainingViews,
    found: Sequence[Annotation],
    facts: Mapping[str, object],
    meter: Meter,
    intervals: Mapping[str, Any],
    log: Sequence[Mapping[str, float]],
    cautions: Sequence[str] = (),
    folds: Mapping[str, Any] | None = None,
) -> bytes:
    """One HTML file that needs nothing else: what was trained and how, the figures with their intervals of 95 %, those
    of each class, the curves of the log, and image, truth and answer of some held-out images.
    """
    source, figures = lessons.views.source, meter.result()
    single = {name: value for name, value in figures.items() if isinstance(value, float)}
    body = [
        f"<h1>{html.escape(task)} decoder</h1>",
        _table((name, str(value)) for name, value in facts.items()),
        "<h2>On the held-out images (95 % intervals)</h2>",
        _table((name, f"{value:.4g}{_between(intervals.get(name))}") for name, value in single.items()),
        *(f"<p><b>Note:</b> {html.escape(one)}.</p>" for one in cautions),
        *_of_each(meter, figures, intervals),
    ]
    if folds:
        body.append(
            f"<h2>{title_of(folds)}</h2><p>All {folds['images']} images, each judged by a decoder that has learnt from "
            "others only.</p>"
        )
        bounds = folds["held_out_intervals"]
        given = {name: value for name, value in folds["held_out"].items() if isinstance(value, float)}
        body.append(_table((name, f"{value:.4g}{_between(bounds.get(name))}") for name, value in given.items()))
    body += _curves(log)
    body.append("<h2>Image, truth and answer, on images it was not taught from</h2>")
    body += _legend(task, source)
    body += [_views(task, source, lessons.views.item(view), found[view]) for view in range(min(lessons.count, SHOWN))]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(task)} decoder</title><style>{STYLE}</style>{''.join(body)}</html>\n"
    ).encode()


def title_of(folds: Mapping[str, Any]) -> str:
    """The heading over figures of cross-validation."""
    return f"{folds['folds']}-fold cross-validation"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = (f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>' for name, value in rows)
    return f"<table>{''.join(lines)}</table>"


def _of_each(meter: Meter, figures: Mapping[str, Any], intervals: Mapping[str, Any]) -> list[str]:
    """The figure of each class or joint, and the names of those that no held-out image shows."""
    if not meter.columns:
        return []
    values, bounds = figures.get(meter.each, {}), intervals.get(meter.each, {})
    rows = [(name, f"{value:.4g}{_between(bounds.get(name))}") for name, value in values.items()]
    absent = [name for name in meter.columns if name not in values]
    found = [f"<h3>{meter.each.replace('_', ' ').capitalize()}</h3>", *([_table(rows)] if rows else [])]
    if absent:
        found.append(f'<p class="dim">In no held-out image: {html.escape(", ".join(absent))}.</p>')
    return found


def _curves(log: Sequence[Mapping[str, float]]) -> list[str]:
    """The loss and the held-out figure over the steps."""
    names = dict.fromkeys(name for line in log for name in line if name == "loss" or name.startswith("held_out_"))
    found = []
    for name in names:
        points = [(line["step"], line[name]) for line in log if name in line]
        found.append(_curve(name.removeprefix("held_out_") + (", held out" if name != "loss" else ""), points))
    return ["<h2>Curves</h2>", f'<div class="curves">{"".join(found)}</div>'] if any(found) else []


def _curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """Means over equal numbers of steps, so that a long training stays a small picture."""
    parts = np.array_split(np.array(points, np.float64), min(POINTS, len(points)))
    means = np.array([part.mean(0) for part in parts])
    means = means[np.isfinite(means).all(1)]
    if not len(means):
        return ""
    (first, low), (last, high) = means.min(0), means.max(0)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    x = LEFT + (means[:, 0] - first) / max(last - first, 1e-9) * (right - LEFT)
    y = bottom - (means[:, 1] - low) / max(high - low, 1e-12) * (bottom - TOP)
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2"/>' for a, b in zip(x, y)) if len(means) <= 30 else ""
    scale = [(LEFT - 8, bottom + 4, f"{low:.3g}", "end"), (LEFT, HEIGHT - 6, f"step {first:.0f}", "")]
    scale += [(LEFT - 8, TOP + 4, f"{high:.3g}", "end")] if high > low else []
    scale += [(right, HEIGHT - 6, f"step {last:.0f}", "end")] if last > first else []
    words = "".join(f'<text x="{a}" y="{b}" class="{kind}">{said}</text>' for a, b, said, kind in scale)
    ends = [means[0], means[-1]] if last > first else [means[0]]
    said = f"{name}: " + ", ".join(f"{value:.4g} at step {step:.0f}" for step, value in ends)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{html.escape(said)}"><rect x="{LEFT - 4}" y="{TOP - 4}" width="{right - LEFT + 8}" '
        f'height="{bottom - TOP + 8}"/><polyline points="{path}"/>{dots}{words}</svg>'
        f"<figcaption>{html.escape(said)}</figcaption></figure>"
    )


def _legend(task: str, source: LabelledSource) -> list[str]:
    """The colours of the classes, for labels that have some."""
    if task == "semantic":
        named = list(enumerate(source.classes))
    elif task in ("instance", "open-vocabulary"):
        named = list(enumerate(source.thing_classes, 1))
    else:
        return []
    spans = "".join(
        f'<span><i style="background:rgb{colour(number)}"></i>{html.escape(name)}</span>' for number, name in named
    )
    return [f'<p class="legend">{spans}</p>']


def _views(task: str, source: LabelledSource, item: Any, answer: Annotation) -> str:
    label = LABEL_KINDS[task]
    pictures = (item.image, *(label.picture(one, item.image) for one in (TASKS[task].truth(source, item), answer)))
    cells = "".join(
        f'<img src="{_address(picture)}" alt="{what}">' for picture, what in zip(pictures, ("image", "truth", "answer"))
    )
    said = f"{html.escape(item.id)} &middot; {html.escape(item.caption)}"
    return f'<figure><div class="views">{cells}</div><figcaption>{said}</figcaption></figure>'


def _between(bounds: object) -> str:
    return f" ({bounds[0]:.4g} to {bounds[1]:.4g})" if isinstance(bounds, list) else ""


def _address(pixels: np.ndarray | Image.Image) -> str:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
