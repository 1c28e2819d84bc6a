"""The page of a training: its figures, and held-out images with the truth and the decoder's labels."""

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.data import IGNORE, Annotation, Instances, Sample, SemanticMap
from datasetdm_fast.engine.labels import BACKGROUND, LABEL_KINDS
from datasetdm_fast.engine.labels.class_tables import colour
from datasetdm_fast.engine.labels.label_files import encode_picture
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.evaluation.meter import figure_name
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.report import format_figure

SHOWN = 12  # images of the page
FLAG, FLAG_SPAN = re.compile(r"--[a-z-]+"), r"<span>\g<0></span>"
COMMAND = "command"  # the fact that has a line of its own
STYLE = """
:root{color-scheme:light dark;--ink:#222;--dim:#666;--back:#fff;--line:#d5d5d5}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--dim:#aaa;--back:#161616;--line:#444}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;background:var(--back);
color:var(--ink)}
h1,h2,h3{line-height:1.2}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse}td,th{padding:.15rem 1.5rem .15rem 0;text-align:left;vertical-align:top}
td{overflow-wrap:anywhere}p span{white-space:nowrap}
code{color:var(--ink);overflow-wrap:anywhere}
th{font-weight:normal;color:var(--dim);overflow-wrap:anywhere;min-width:min(6rem,25vw)}td{min-width:min(9rem,40vw)}
figure{margin:0 0 1.5rem}figcaption,.dim{color:var(--dim)}figcaption{overflow-wrap:anywhere}
.views{display:grid;grid-template-columns:repeat(3,1fr);gap:.4rem}.views img{width:100%;image-rendering:pixelated}
p.legend span{white-space:normal;display:inline-block;margin-right:1rem;overflow-wrap:anywhere}
.legend i{display:inline-block;width:.9rem;height:.9rem;margin-right:.35rem;vertical-align:-.1rem;
border:1px solid var(--line)}
"""


def page(
    task: str,
    source: LabelledSource,
    facts: Mapping[str, object],
    result: Mapping[str, Any],
    cautions: Sequence[str] = (),
    folds: Mapping[str, Any] | None = None,
    views: TrainingViews | None = None,
    labels: Sequence[Annotation] = (),
    shown: str = "",
    samples: Sequence[Sample] = (),
) -> bytes:
    """One HTML file that needs nothing else: what was trained and how, the figures with their intervals of 95 %, those
    of each class, image, ground truth and prediction of some images, which `shown` describes, and generated samples.
    """
    body = [f"<h1>{html.escape(task)} decoder</h1>", _facts(facts)]
    notes = [f"<p><b>Note:</b> {FLAG.sub(FLAG_SPAN, html.escape(note))}.</p>" for note in cautions]
    if result["held_out"]:
        intervals = " (95 % intervals)" if result.get("held_out_intervals") else ""
        body += [f"<h2>On the held-out images{intervals}</h2>", *_figures(task, source, result, notes)]
    else:
        body += notes
    if folds:
        body.append(
            f"<h2>{folds_title(folds)} (95 % intervals)</h2><p>All {folds['images']} images, each judged by a decoder "
            "that has learnt from others only.</p>"
        )
        body += _figures(task, source, folds)
    if views is not None:
        body.append(f"<h2>{html.escape(shown)}: image, ground truth and prediction</h2>")
        body += _legend(task, source)
        body += [_views(task, source, views.item(view), labels[view]) for view in range(min(len(views), SHOWN))]
    if samples:
        body.append("<h2>Generated from captions of training images: image and prediction</h2>")
        body += [_sample(task, source, sample) for sample in samples]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(task)} decoder</title><style>{STYLE}</style>{''.join(body)}</html>\n"
    ).encode(errors="replace")  # names of files need not be valid UTF-8


def folds_title(folds: Mapping[str, Any]) -> str:
    """The heading over figures of cross-validation."""
    return f"{folds['folds']}-fold cross-validation"


def shows_folds(path: Path, folds: Mapping[str, Any] | None) -> bool:
    """Whether a page is there and has the figures of this cross-validation."""
    return path.exists() and (not folds or folds_title(folds).encode() in path.read_bytes())


def _facts(facts: Mapping[str, object]) -> str:
    """What was trained and how."""
    command = f'<p class="dim">{COMMAND}<br><code>{html.escape(str(facts.get(COMMAND)))}</code></p>'
    table = _table((name, str(value)) for name, value in facts.items() if name != COMMAND)
    return table + (command if COMMAND in facts else "")


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = (f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>' for name, value in rows)
    return f"<table>{''.join(lines)}</table>"


def _figures(task: str, source: LabelledSource, result: Mapping[str, Any], notes: Sequence[str] = ()) -> list[str]:
    """The figures over all images, then those of each class or joint and the names of those that no image shows."""
    figures, bounds, meter = result["held_out"], result.get("held_out_intervals", {}), METRICS[task](source)
    single = {name: value for name, value in figures.items() if isinstance(value, float)}
    parts = [
        _table((figure_name(name), format_figure(value, bounds.get(name))) for name, value in single.items()),
        *notes,
    ]
    if not meter.columns:
        return parts
    values, limits = figures.get(meter.each, {}), bounds.get(meter.each, {})
    alone = " (no interval, as only one image shows it)" if meter.each in bounds else ""
    rows = [
        (name, format_figure(value, limits.get(name)) + ("" if name in limits else alone))
        for name, value in values.items()
    ]
    each = figure_name(meter.each)
    parts += [f"<h3>{each.capitalize()}</h3>", *([_table(rows)] if rows else [])]
    if absent := meter.not_shown(figures):
        parts.append(f'<p class="dim">In none of these images: {html.escape(", ".join(absent))}.</p>')
    return parts


def _legend(task: str, source: LabelledSource) -> list[str]:
    """The colours of the classes, for labels that have some."""
    if task not in ("semantic", "instance", "open-vocabulary"):
        return []
    numbers = _numbers(source)
    spans = "".join(
        f'<span><i style="background:rgb{colour(numbers[name])}"></i>{html.escape(name)}</span>'
        for name in (source.classes if task == "semantic" else source.thing_classes)
    )
    return [f'<p class="legend">{spans}</p>']


def _numbers(source: LabelledSource) -> dict[str, int]:
    """Class -> the number whose colour it has, in the gallery of a run with semantic maps, too."""
    names = dict.fromkeys((*(source.classes or (BACKGROUND,)), *source.thing_classes))
    return {name: number + (number >= IGNORE) for number, name in enumerate(names)}


def _recolour(source: LabelledSource, label: Annotation) -> Annotation:
    """A label under the numbers whose colours its classes have."""
    if not isinstance(label, (Instances, SemanticMap)):
        return label
    numbers = [_numbers(source).get(name, 0) for name in label.classes]
    if isinstance(label, Instances):  # whose pictures count from the first thing
        return replace(label, class_ids=np.array(numbers, np.int64)[label.class_ids] - 1)
    table = np.array([*numbers, *range(len(numbers), 256)], np.int32)
    return replace(label, labels=table[label.labels])


def _views(task: str, source: LabelledSource, item: Any, answer: Annotation) -> str:
    kind, both = LABEL_KINDS[task], (TASKS[task].truth(source, item), answer)
    truth, answered = (kind.picture(_recolour(source, label), item.image) for label in both)
    caption = f"{html.escape(item.id)} &middot; {html.escape(item.caption)}"
    return _figure({"image": item.image, "truth": truth, "answer": answered}, caption)


def _sample(task: str, source: LabelledSource, sample: Sample) -> str:
    """A generated sample, and how far it is from the domain of the decoder."""
    answer = LABEL_KINDS[task].picture(_recolour(source, sample.annotations[task]), sample.image)
    distance = sample.trust.domain if sample.trust else None
    what = (
        "" if distance is None else f" &middot; distance {distance:.2f}{', out of the domain' if distance > 1 else ''}"
    )
    return _figure({"image": sample.image, "answer": answer}, f"{html.escape(sample.request.prompt)}{what}")


def _figure(pictures: Mapping[str, np.ndarray | Image.Image], caption: str) -> str:
    cells = "".join(f'<img src="{_address(picture)}" alt="{what}">' for what, picture in pictures.items())
    return f'<figure><div class="views">{cells}</div><figcaption>{caption}</figcaption></figure>'


def _address(pixels: np.ndarray | Image.Image) -> str:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    return "data:image/png;base64," + base64.b64encode(encode_picture(picture, "PNG")).decode()
