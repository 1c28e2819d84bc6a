"""The page that shows where two engines differ."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence

import numpy as np

from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.image_files import image_bytes, picture_bytes
from datasetdm_fast.runs.agreement.observe import Observation
from datasetdm_fast.runs.agreement.verify import Verdict

SHOWN = 4  # worst samples on the page
STYLE = (
    ":root{color-scheme:light dark;--line:#ddd;--failed:#b00020}"
    "@media(prefers-color-scheme:dark){:root{--line:#444;--failed:#ff8a80}}"
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 "
    "1rem}table{border-collapse:collapse}"
    ".wide{overflow-x:auto}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid "
    "var(--line)}td:first-child,th:first-child{text-align:left}"
    ".failed{color:var(--failed);font-weight:600}figure{display:inline-block;margin:.4rem;vertical-align:top}"
    "figcaption{max-width:min(13rem,42vw)}img{width:min(13rem,42vw);image-rendering:pixelated;display:block}"
    ".facts td{text-align:left}.facts td+td{overflow-wrap:anywhere}.facts{margin-top:2rem}"
)


def page(verdict: Verdict) -> str:
    """An HTML page of its own: the table, and the samples that are worst in any measure, both engines side by side."""
    judged = [row for row in verdict.rows if row.limit[1]]  # weights belong to no sample
    worst = list(dict.fromkeys(row.worst for row in sorted(judged, key=lambda row: -row.p99 / row.limit[1])))[:SHOWN]
    samples = "".join(_sample(verdict, k) for k in worst)
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'"
    rows = "".join(
        f"<tr{'' if row.is_passed else ' class=failed'}><td>{html.escape(row.measure)}</td><td>{row.median:.2e}</td>"
        f"<td>{row.p99:.2e}</td><td>{row.limit[0]:.1e}</td><td>{row.limit[1]:.1e}</td><td>{row.worst}</td></tr>"
        for row in verdict.rows
    )
    facts = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_told(value))}</td></tr>"
        for name, value in {"engine": verdict.engine, "against": verdict.against, **verdict.facts}.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Agreement of two engines</title><style>{STYLE}</style></head><body><h1>The engines "
        f"{'agree' if verdict.agrees else 'disagree'}</h1>"
        '<div class="wide" tabindex="0"><table><tr><th>measure</th><th>median</th><th>p99</th>'
        "<th>limit of median</th><th>limit of p99</th><th>worst sample</th></tr>"
        f'{rows}</table></div><table class="facts">{facts}</table><h2>Worst samples</h2>{samples}</body></html>\n'
    )


def _told(value: object) -> str:
    """A fact in words: nested names beside their values."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_told, value))
    return value if isinstance(value, str) else json.dumps(value)


def _sample(verdict: Verdict, place: int) -> str:
    """One sample, each engine on its own: reference, engine, and where the images differ."""
    truth, found = _located(verdict.truth, place), _located(verdict.found, place)
    (right, k), (ours, _) = truth, found
    spread = np.clip(np.abs(right.images[k].astype(int) - ours.images[k]) * 16, 0, 255).astype(np.uint8)
    figures = [
        ("reference", image_bytes(right.images[k], "png")),
        ("engine", image_bytes(ours.images[k], "png")),
        ("difference, 16 times", image_bytes(spread, "png")),
    ]
    for task in right.labels:
        for side, observed in (("reference", right), ("engine", ours)):
            if kind_of(task).roles:  # masks and joints have no picture of their own here
                picture = kind_of(task).picture(observed.labels[task][k], observed.images[k])
                figures.append((f"{task}, {side}", picture_bytes(picture)))
    shown = "".join(
        f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{name}</figcaption></figure>"
        for name, data in figures
    )
    return f"<section><h3>Sample {place}: {html.escape(verdict.prompts[place])}</h3>{shown}</section>"


def _located(observations: Sequence[Observation], place: int) -> tuple[Observation, int]:
    for observed in observations:
        if place < len(observed.images):
            return observed, place
        place -= len(observed.images)
    raise AssertionError("a sample of no batch")
