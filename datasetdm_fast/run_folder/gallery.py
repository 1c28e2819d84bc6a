"""gallery/index.html: one page to look at a run, opened from the disk; it loads nothing but the run's own pictures."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.labels import mask_rle
from datasetdm_fast.labels.colours import colour
from datasetdm_fast.labels.label_files import colour_numbers, read_image
from datasetdm_fast.labels.pictures import depth_png, outline
from datasetdm_fast.run_folder.ledger import Ledger, Row

PAGE = "gallery/index.html"
TEMPLATE = Path(__file__).with_name("gallery.html")
LAYERS = {
    "semantic": ("semantic", "confidence"),
    "instance": ("instance",),
    "depth": ("depth",),
    "pose": ("pose",),
    "open-vocabulary": ("open-vocabulary",),
}
FIRST = ("instance", "semantic", "open-vocabulary", "depth", "pose")  # the layer shown when the page opens
BLOCK = 64  # pictures published at once


def write(folder: Path, document: Mapping[str, Any], ledger: Ledger, *, has_samples: bool = True) -> None:
    """Writes the page and, where the folder has the samples, the coloured depth pictures it needs."""
    if has_samples and "depth" in document["config"]["task"]:
        wanted = (row for row in ledger.rows() if not (folder / depth_name(row)).exists())
        while block := list(islice(wanted, BLOCK)):
            storage.publish(
                {folder / depth_name(row): depth_png(read_image(folder / row.files["depth"][0])) for row in block}
            )
    storage.publish({folder / PAGE: page(document, ledger)})


def depth_name(row: Row) -> str:
    """Where the coloured depth picture of a sample lies."""
    return f"gallery/depth/{row.request.id}.png"


def page(document: Mapping[str, Any], ledger: Ledger) -> Iterator[bytes]:
    """The page in pieces, one a sample."""
    template = TEMPLATE.read_text(encoding="utf-8")
    before, after = template.replace("{{policy}}", _policy(template)).split("{{samples}}")
    yield before.replace("{{run}}", _embedded(_facts(document, ledger))).encode()
    yield b"["
    for k, row in enumerate(ledger.rows()):
        yield ((",\n" if k else "\n") + _embedded(_sample(document, row))).encode()
    yield b"]"
    yield after.encode()


def _policy(template: str) -> str:
    """Only this page's own style and script run, only pictures load, and nothing leaves the page."""
    digests = {}
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digests[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    return f"default-src 'none'; img-src 'self' file:; style-src {digests['style']}; script-src {digests['script']}; base-uri 'none'; form-action 'none'"


def _embedded(value: Any) -> str:
    """JSON that no HTML parser can leave, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _facts(document: Mapping[str, Any], ledger: Ledger) -> dict[str, Any]:
    config, sampling, labels = document["config"], document["sampling"], document["labels"]
    layers = [layer for task in LAYERS if task in config["task"] for layer in LAYERS[task]]
    counts = Counter(word for row in ledger.rows() for word in _classes(document, row))
    return {
        "title": f"Labelled images from {document['model']['name']}",
        "size": sampling["size"],
        "format": config["image_format"],
        "layers": layers,
        "first": next((layer for layer in FIRST if layer in layers), ""),
        "limbs": labels.get("pose", {}).get("limbs", []),
        "colours": _colours(document, list(counts)),
        "classes": counts.most_common(),
        "summary": ", ".join(config["task"]),
        "facts": [
            ["Model", document["model"]["name"]],
            ["Sampler", f"{config['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance']:g}"],
            ["Engine", document["engine"].get("engine", "")],
        ],
        "command": "python -m datasetdm_fast.generate --out RUN",
    }


def _colours(document: Mapping[str, Any], words: list[str]) -> dict[str, str]:
    """One colour a class word, that of its pixels where a label map shows it."""
    labels = document["labels"]
    semantic, asked = (labels.get(task, {}).get("classes", []) for task in ("semantic", "open-vocabulary"))
    numbers = {name: number for number, name in enumerate(semantic)}
    numbers |= (
        dict(zip(asked[1:], colour_numbers(semantic, asked)[1:], strict=True))
        if semantic
        else {name: number for number, name in enumerate(asked)}
    )
    for name in [*labels.get("instance", {}).get("classes", []), *words]:
        numbers.setdefault(name, len(numbers) + 1)
    return {name: "#{:02x}{:02x}{:02x}".format(*colour(number)) for name, number in numbers.items()}


def _classes(document: Mapping[str, Any], row: Row) -> list[str]:
    """Class words of one sample: those its prompt names and those its labels hold."""
    labels, words = document["labels"], dict.fromkeys(row.request.classes)
    words |= dict.fromkeys(
        labels["instance"]["classes"][record["category_id"] - 1] for record in row.labels.get("instance", [])
    )
    for task in ("semantic", "open-vocabulary"):
        names, pixels = labels.get(task, {}).get("classes", []), row.labels.get(task, {}).get("pixels", {})
        least = document["sampling"]["size"] ** 2 / 500
        words |= dict.fromkeys(
            names[int(number)] for number, count in pixels.items() if int(number) < len(names) and count >= least
        )
    words.pop("background", None)
    return list(words)


def _sample(document: Mapping[str, Any], row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "id": row.request.id,
        "prompt": row.request.prompt,
        "seed": str(row.request.seed),
        "classes": _classes(document, row),
    }
    if "instance" in row.labels:
        names = document["labels"]["instance"]["classes"]
        values["instances"] = [
            [
                names[record["category_id"] - 1],
                round(record["score"], 3),
                outline(mask_rle.decode(record["segmentation"])),
            ]
            for record in row.labels["instance"]
        ]
    if "pose" in row.labels:
        values["people"] = [
            [round(value, 1) for value in record["keypoints"]]
            for record in row.labels["pose"]
            if record["num_keypoints"]
        ]
    if "depth" in row.labels:
        values["depth"] = [row.labels["depth"]["min"], row.labels["depth"]["max"]]
    return values
