"""What the gallery's page knows: the facts of a run, the index of its samples, and the details drawn over pictures."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasetdm_fast.engine.labels import by_kind, kind_of, mean_certainty
from datasetdm_fast.engine.labels.class_tables import OURS, colour_in
from datasetdm_fast.engine.labels.kind import GalleryLayer, LabelName, by_task
from datasetdm_fast.engine.labels.trust import NO_THING
from datasetdm_fast.runs.gallery import sheets
from datasetdm_fast.runs.run_folder.document import (
    COMMANDS,
    engine_names,
    made_by,
    maker,
    sampler_in_words,
    sides,
    size_in_words,
    speed_in_words,
)
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger, Row, canonical
from datasetdm_fast.runs.run_folder.page_files import SHEET_SAMPLES
from datasetdm_fast.runs.run_folder.scores import LEAST_SHARE

SAFE = 2**53  # below it a script's numbers are exact
NO_FIGURE = "hash"  # the score of `filter` that no number can be compared with


class RunFacts:
    """Collects what all samples share, while the index of each thousand is made; classes are numbers in its words."""

    def __init__(self, document: Mapping[str, Any], ledger: Ledger):
        self.document = document
        self.scores = {name: dict(ledger.scores(name)) for name in ledger.score_names() if name != NO_FIGURE}
        self.tasks = [*by_kind(document["config"]["task"])]
        self.layers = layers_of(document)
        tables = document["labels"]
        words = dict.fromkeys(word for task in self.tasks for word in tables.get(task, {}).get("classes", ()))
        self._numbers, self._known = {word: number for number, word in enumerate(words)}, set(words)
        self.named: Counter[str] = Counter()
        self.shown: Counter[str] = Counter()
        self.missing = self.doubtful = self.excluded = 0
        self.pages: list[tuple[int, int]] = []
        self.figures: dict[str, None] = {}

    def number(self, word: str) -> int:
        return self._numbers.setdefault(word, len(self._numbers))

    def index(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        """One column a fact: what the page filters and sorts a thousand samples by."""
        samples = [self._sample(row) for row in rows]
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        return {name: column for name, column in columns.items() if name != "picture" or any(column)}

    def _sample(self, row: Row) -> dict[str, Any]:
        request, tables = row.request, self.document["labels"]
        height, width = sides(self.document, row.recipe)
        shown, things, figures = {}, [], {}
        for task in self.tasks:
            if task not in row.labels:
                continue
            kind, record, table = kind_of(task), row.labels[task], tables.get(task, {})
            shown |= dict.fromkeys(kind.words(record, table, height * width * LEAST_SHARE))
            things += kind.things(record, table, (height, width))
            decoder = LabelName.parse(task).decoder
            figures |= {
                f"{name}: {decoder}" if decoder else name: value for name, value in kind.figures(record).items()
            }
        certainty = mean_certainty(row.labels)
        figures |= {} if certainty is None else {"score": round(certainty, 4)}
        figures |= {"disagreeing": row.trust.disagreeing} if row.trust else {}
        figures |= {"domain": row.trust.domain} if row.trust and row.trust.domain is not None else {}
        figures |= {name: each[request.index] for name, each in self.scores.items() if request.index in each}
        self.figures |= dict.fromkeys(figures)
        visible = [word for word in shown if word not in NO_THING]
        missing = (
            row.trust.missing if row.trust else [w for w in request.classes if w in self._known and w not in shown]
        )
        reasons = row.trust.reasons if row.trust else ()
        if row.status == DOUBTFUL and row.reason != "; ".join(reasons):
            reasons = (row.reason,)
        self.named.update(request.classes)
        self.shown.update(visible)
        self.missing += bool(missing)
        self.doubtful += bool(reasons)
        self.excluded += row.status == DOUBTFUL
        return {
            "index": request.index,
            "prompt": request.prompt,
            "seed": request.seed if abs(request.seed) < SAFE else str(request.seed),
            "sides": [height, width],
            "named": [self.number(word) for word in request.classes],
            "shown": sorted(map(self.number, visible)),
            "missing": [self.number(word) for word in missing],
            "reasons": list(reasons),
            "aside": int(row.status == DOUBTFUL),
            "picture": str(row.recipe.get("picture", "")),
            "source": int(row.recipe["source"]) if str(row.recipe.get("source", "")).isdecimal() else request.index,
            "things": [
                [self.number(word), round(100 * score), *(round(1000 * share) for share in (area, x, y))]
                for word, score, area, x, y in things
            ],
            "figures": [figures.get(name) for name in self.figures],
        }

    def details(self, rows: Sequence[Row]) -> list[Any]:
        """What is drawn over the pictures of some samples, each with its index."""
        return [
            [
                row.request.index,
                {
                    layer.name: layer.values(
                        row.labels[task],
                        self.document["labels"][task],
                        row.tracings.get(layer.name, []) if layer.trace else [],
                    )
                    for layer, task in self.layers.items()
                    if layer.values and task in row.labels
                },
            ]
            for row in rows
        ]

    def whole(self, *, has_sheets: bool, is_in_progress: bool) -> dict[str, Any]:
        """What all samples share."""
        document, words = self.document, list(self._numbers)
        config = document["config"]
        layers = [
            {
                "name": layer.name,
                "label": task,
                "title": layer.title,
                "drawing": layer.drawing,
                "file": layer.role and f"{layer.role}/ID.png",
                "is_drawn": layer.picture is not None,
                "unit": layer.unit,
                "classes": {
                    number: self.number(word) for number, word in kind_of(task).names(document["labels"][task]).items()
                },
                "ignored": _css(kind_of(task).ignored_colour(document["labels"][task])),
                "steps": kind_of(task).steps(document["labels"][task]),
                "limbs": document["labels"][task].get("limbs", []),
            }
            for layer, task in self.layers.items()
        ]
        return {
            "key": key_of(document),
            "pixels": size_in_words(document),
            "format": config["image_format"],
            "layers": layers,
            "first": next((kind_of(label).layers[0].name for label in self.tasks), ""),
            "words": words,
            "colours": self._colours(words),
            "named": [self.named[word] for word in words],
            "shown": [self.shown[word] for word in words],
            "missing": self.missing,
            "doubtful": self.doubtful,
            "aside": self.excluded,
            "figures": list(self.figures),
            "pages": self.pages,
            "samples": sum(count for _, count in self.pages),
            "planned": document["plan"]["number"],
            "is_in_progress": is_in_progress,
            "sheet": {"side": sheets.SIDE, "columns": sheets.COLUMNS, "rows": sheets.ROWS} if has_sheets else None,
            "group": SHEET_SAMPLES,
            "summary": ", ".join(config["task"]),
            "facts": [
                ["Model", document["model"]["name"]],
                ["Sampler", sampler_in_words(document)],
                *([["Speed", speed]] if (speed := speed_in_words(document)) else []),
                ["Engine", ", ".join(engine_names(document))],
                *([["Composition", composition["told"]]] if (composition := document.get("composition")) else []),
            ],
            "command": maker(document) if made_by(document) == COMMANDS[0] else "",  # that makes one sample again
        }

    def _colours(self, words: Sequence[str]) -> list[str]:
        """One colour a class word, that of its pixels where a label map shows it."""
        tables, numbers, others = self.document["labels"], {}, []
        for label in self.tasks:
            if kind_of(label).is_map:
                numbers |= kind_of(label).colours(tables[label], tables)
            else:
                others += tables[label].get("classes", [])
        for name in [*others, *words]:
            numbers.setdefault(name, len(numbers) + 1)
        palette = next((table["palette"] for table in tables.values() if "palette" in table), OURS)
        custom = {
            name: each
            for table in tables.values()
            for name, each in zip(table.get("classes", ()), table.get("colours", ()))
        }
        usual = OURS if custom else palette
        return [_css(custom.get(word) or colour_in(usual, word, numbers[word])) for word in words]


def key_of(document: Mapping[str, Any]) -> str:
    """What a browser keeps the marks of a run under: the same where it is given more images."""
    growing = ("number", "per_class", "keep")
    settings = {name: value for name, value in document["config"].items() if name not in growing}
    plan = {name: value for name, value in document["plan"].items() if name != "number"}
    return hashlib.sha256(canonical([settings, plan, document["decoders"]]).encode()).hexdigest()[:16]


def _css(colour: Iterable[int]) -> str:
    """A colour as style sheets write it, nothing of nothing."""
    return "".join(("#", *(f"{value:02x}" for value in colour))) if colour else ""


def layers_of(document: Mapping[str, Any]) -> dict[GalleryLayer, str]:
    """The layers of a run with their labels, in the order of the tasks."""
    files = {label: kind_of(label).files(document["labels"][label]) for label in by_task(document["config"]["task"])}
    return {
        layer: label
        for label, roles in files.items()
        for layer in kind_of(label).layers
        if not layer.role or layer.role in roles
    }
