"""gallery/index.html: one page to look at a run, opened from the disk; it loads nothing but the run's own pictures."""

import base64
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.foreign import images
from datasetdm_fast.labels import LABEL_KINDS, by_kind, kind_of
from datasetdm_fast.labels.colours import colour
from datasetdm_fast.labels.image_files import picture_bytes
from datasetdm_fast.labels.kind import GalleryLayer
from datasetdm_fast.labels.label_files import Files
from datasetdm_fast.labels.names import by_task, own_stem
from datasetdm_fast.run_folder.document import ASIDE, LEDGER, described_sides, maker, sides
from datasetdm_fast.run_folder.kept import Kept, read_kept
from datasetdm_fast.run_folder.ledger import DONE, DOUBTFUL, Ledger, Row

PAGE = "gallery/index.html"
TEMPLATE = Path(__file__).with_name("gallery.html")
DRAWN = {  # role of a file of a task's own decoder -> the layer whose picture of it the gallery makes
    layer.role: layer for kind in LABEL_KINDS.values() for layer in kind.layers if layer.picture
}
LEFT_OUT = b'<script type="application/json" id="left-out">'  # how the line of the page begins that `mark` writes anew
BLOCK = 64  # pictures published at once


def pictures(files: Files) -> Iterator[tuple[str, bytes]]:
    """The pictures the gallery shows of a sample's files, each with its path inside the run folder."""
    for role, (name, content) in files.items():
        if drawn_layer(role):
            yield f"gallery/{name.removeprefix(ASIDE)}", picture_of(role, content)


def tracings(records: Mapping[str, Any]) -> dict[str, Any]:
    """What the page draws of a sample's labels and would take long to find for all samples at once, by layer."""
    return {
        layer.name: layer.trace(records[task])
        for task in records
        for layer in kind_of(task).layers
        if layer.trace and records[task]
    }


def write(folder: Path, document: Mapping[str, Any], ledger: Ledger, *, has_samples: bool = True) -> None:
    """Writes the page and, where the folder has the samples, the pictures for it that are missing."""
    for role in [layer.role for layer in _layers(document) if layer.picture and has_samples]:
        _draw(folder, ledger, role)
    storage.publish({folder / PAGE: page(document, ledger, _left_out(read_kept(folder)))})


def mark(folder: Path, document: Mapping[str, Any], decided: Kept | None) -> None:
    """Writes down in the page, where there is one, which samples a filter left out; the rest of it stays as it is."""
    if not (folder / PAGE).exists():
        return
    with open(folder / PAGE, "rb") as lines:
        if any(line.startswith(LEFT_OUT) for line in lines):
            lines.seek(0)
            new = LEFT_OUT + f"{_embedded(_left_out(decided))}</script>\n".encode()
            storage.publish({folder / PAGE: (new if line.startswith(LEFT_OUT) else line for line in lines)})
            return
    with Ledger(folder / LEDGER, read_only=True) as ledger:  # the page of an earlier version
        write(folder, document, ledger)


def _left_out(decided: Kept | None) -> dict[str, str]:
    return {f"{index:08d}": reason for index, reason in decided.left_out.items()} if decided else {}


def _draw(folder: Path, ledger: Ledger, role: str) -> None:
    """Draws the pictures of a role that are missing, as in the folder of an earlier version they are."""
    there = {path.name for path in (folder / "gallery" / role).glob("*.png")}
    indices = sorted([*ledger.indices(), *ledger.indices(DOUBTFUL)])
    wanted = (index for index in indices if f"{index:08d}.png" not in there)
    while block := list(islice(wanted, BLOCK)):
        rows = [ledger.row(index) for index in block]
        contents = {picture_name(role, row): (folder / row.files[role][0]).read_bytes() for row in rows}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            drawn = pool.map(partial(picture_of, role), contents.values())
            storage.publish(dict(zip((folder / name for name in contents), drawn, strict=True)))


def picture_of(role: str, content: bytes) -> bytes:
    """The picture the gallery shows of a file."""
    return picture_bytes(drawn_layer(role).picture(np.array(images.decode_image(content, role))))


def drawn_layer(role: str) -> GalleryLayer | None:
    """The layer whose picture of the files of a role the gallery makes, None where it shows the files themselves."""
    return DRAWN.get(own_stem(role))


def picture_name(role: str, row: Row) -> str:
    """Where the picture lies that the gallery shows of a sample's file."""
    return f"gallery/{role}/{row.request.id}.png"


def page(document: Mapping[str, Any], ledger: Ledger, left_out: Mapping[str, str] | None = None) -> Iterator[bytes]:
    """The page in pieces, one a sample; `left_out` says why a filter left out some of them."""
    shown = ", ".join(f".show-{layer.name} .layer-{layer.name}" for layer in _layers(document))
    template = TEMPLATE.read_text(encoding="utf-8").replace("{{shown}}", shown or ".layer-none")
    start, rest = template.replace("{{policy}}", _policy(template)).split("{{run}}")
    middle, rest = rest.split("{{left_out}}")
    before, after = rest.split("{{samples}}")
    yield (start + _embedded(_facts(document, ledger)) + middle + _embedded(left_out or {}) + before).encode()
    yield b"["
    for k, row in enumerate(ledger.rows(DONE, DOUBTFUL, parts=("labels", "trust", "tracings"))):
        yield ((",\n" if k else "\n") + _embedded(_sample(document, row))).encode()
    yield b"]"
    yield after.encode()


def _policy(template: str) -> str:
    """Only this page's own style and script run, only pictures load, and nothing leaves the page."""
    digests = {}
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digests[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    sources = f"style-src {digests['style']}; script-src {digests['script']}"
    return f"default-src 'none'; img-src 'self' file:; {sources}; base-uri 'none'; form-action 'none'"


def _embedded(value: Any) -> str:
    """JSON that no HTML parser can leave, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _facts(document: Mapping[str, Any], ledger: Ledger) -> dict[str, Any]:
    config, sampling = document["config"], document["sampling"]
    rows = ledger.rows(parts=("labels",))
    counts = Counter(word for row in rows for word in _classes(document, row))
    return {
        "title": f"Labelled images from {document['model']['name']}",
        "pixels": described_sides(document),
        "format": config["image_format"],
        "layers": [
            {
                "name": layer.name,
                "title": layer.title,
                "drawing": layer.drawing,
                "file": layer.role and f"{layer.role}/ID.png",
                "is_drawn": layer.picture is not None,
                "unit": layer.unit,
                "limbs": document["labels"][task].get("limbs", []),
            }
            for layer, task in _layers(document).items()
        ],
        "first": next((kind_of(label).layers[0].name for label in by_kind(config["task"])), ""),
        "colours": _colours(document, list(counts)),
        "classes": counts.most_common(),
        "summary": ", ".join(config["task"]),
        "facts": [
            ["Model", document["model"]["name"]],
            ["Sampler", f"{config['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance']:g}"],
            ["Engine", document["engine"].get("engine", "")],
            *([["Composition", composition["told"]]] if (composition := document.get("composition")) else []),
        ],
        "command": f"{maker(document)} --out RUN",
    }


def _layers(document: Mapping[str, Any]) -> dict[GalleryLayer, str]:
    """The layers of a run with their labels, in the order of the tasks."""
    return {layer: label for label in by_task(document["config"]["task"]) for layer in kind_of(label).layers}


def _colours(document: Mapping[str, Any], words: list[str]) -> dict[str, str]:
    """One colour a class word, that of its pixels where a label map shows it."""
    tables, numbers, others = document["labels"], {}, []
    for label in by_kind(document["config"]["task"]):
        if kind_of(label).is_map:
            numbers |= kind_of(label).colours(tables[label], tables)
        else:
            others += tables[label].get("classes", [])
    for name in [*others, *words]:
        numbers.setdefault(name, len(numbers) + 1)
    return {name: "#{:02x}{:02x}{:02x}".format(*colour(number)) for name, number in numbers.items()}


def _classes(document: Mapping[str, Any], row: Row) -> list[str]:
    """Class words of one sample: those its prompt names and those its labels hold."""
    words, least = dict.fromkeys(row.request.classes), math.prod(sides(document, row.recipe)) / 500
    for label in by_kind(document["config"]["task"]):
        if label in row.labels:
            words |= dict.fromkeys(kind_of(label).words(row.labels[label], document["labels"].get(label, {}), least))
    words.pop("background", None)
    return list(words)


def _sample(document: Mapping[str, Any], row: Row) -> dict[str, Any]:
    return {
        "id": row.request.id,
        "prompt": row.request.prompt,
        "seed": str(row.request.seed),
        "sides": sides(document, row.recipe),
        **({"doubts": row.trust.reasons} if row.trust and row.trust.reasons else {}),
        **({"aside": True} if row.status == DOUBTFUL else {}),
        "classes": _classes(document, row),
        "values": {
            layer.name: layer.values(row.labels[task], document["labels"][task], _traced(layer, row, task))
            for layer, task in _layers(document).items()
            if layer.values and task in row.labels
        },
    }


def _traced(layer: GalleryLayer, row: Row, task: str) -> Any:
    """What was traced when the sample was written; by earlier versions nothing was."""
    if layer.trace is None or not row.labels[task]:
        return []
    return row.tracings[layer.name] if layer.name in row.tracings else layer.trace(row.labels[task])
