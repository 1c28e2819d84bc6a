"""README.md of a run folder: the data set card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from datasetdm_fast.run_folder.ledger import SET_ASIDE, Ledger

CONTENTS = {
    "semantic": "`semantic/ID.png`: class numbers as palette PNG, 255 = ignore; `confidence/ID.png`: 0..255",
    "instance": "`instances.json`: COCO instances, compressed RLE with all parts and holes, scores",
    "depth": "`depth/ID.png`: 16-bit PNG, millimetres",
    "pose": "`keypoints.json`: COCO keypoints with visibility and scores",
    "open-vocabulary": "`open_vocabulary/ID.png`: class numbers of the asked words as palette PNG, 0 = none of them",
}
LOADING = """```python
from datasetdm_fast import open_run

run = open_run("THIS_FOLDER")
sample = run[0]  # .image .semantic .instances .depth .keypoints .prompt .seed
pairs = run.as_dataset("{task}")  # (image, label) tensors for a torch DataLoader
```"""


def text(document: Mapping[str, Any], ledger: Ledger) -> Iterator[bytes]:
    """The card as Markdown; no prompt is quoted, as prompts are foreign text."""
    config, sampling, model = document["config"], document["sampling"], document["model"]
    done, aside = ledger.count(), ledger.indices(SET_ASIDE)
    pixels, things, people = _counts(ledger)
    licences = {
        "model": model["licence"],
        **{f"decoder {task}": entry["licence"] for task, entry in document["decoders"].items()},
    }
    parts = [
        "# A labelled data set, made from prompts\n",
        f"{done} of {document['plan']['number']} images of {sampling['size']}×{sampling['size']} pixels with their "
        f"labels ({', '.join(config['task'])}), "
        "all synthetic: a diffusion model drew the images, and decoders read the labels from what it computed on the "
        "way. "
        "Nothing here was photographed, and the labels are a model's opinion, not ground truth.\n",
        "## Contents\n",
        f"- `images/ID.{config['image_format']}`: the images; `samples.jsonl`: prompt, seed, files and SHA-256 of "
        "each sample",
        *(f"- {CONTENTS[task]}" for task in config["task"]),
        "- `gallery/index.html`: the page to look at them; `run.json`: everything that decided them; "
        "`state/ledger.sqlite`: one row a sample\n",
        *_share_table(document, pixels, things),
        *([f"People with joints: {people}.\n"] if "pose" in config["task"] else []),
        *(
            [f"Set aside because a number was not finite: {', '.join(f'`{index:08d}`' for index in aside)}.\n"]
            if aside
            else []
        ),
        "## How it was made\n",
        f"- Model: {_code(model['name'])}; engine: {_code(document['engine'].get('engine', ''))}; datasetdm_fast "
        f"{document['versions']['datasetdm_fast']}",
        f"- Sampler {config['sampler']}, {sampling['steps']} steps ({sampling['calls']} network calls), guidance "
        f"{sampling['guidance']:g}",
        f"- Sample k has seed {config['seed']} + k; `python -m datasetdm_fast.generate --out THIS_FOLDER --only ID` "
        "makes it again, byte for byte\n",
        "## Licence chain\n",
        *(f"- {name}: {_code(licence)}" for name, licence in licences.items()),
        "\n## How to load\n",
        LOADING.format(task=config["task"][0]),
    ]
    yield ("\n".join(parts) + "\n").encode()


def _counts(ledger: Ledger) -> tuple[dict[str, Counter], Counter, int]:
    pixels, things, people = {"semantic": Counter(), "open-vocabulary": Counter()}, Counter(), 0
    for row in ledger.rows():
        for task, counter in pixels.items():
            counter.update({int(value): count for value, count in row.labels.get(task, {}).get("pixels", {}).items()})
        things.update(record["category_id"] - 1 for record in row.labels.get("instance", []))
        people += sum(record["num_keypoints"] > 0 for record in row.labels.get("pose", []))
    return pixels, things, people


def _share_table(document: Mapping[str, Any], pixels: dict[str, Counter], things: Counter) -> Iterator[str]:
    tables = document["labels"]
    for task, title in (("semantic", "Semantic classes"), ("open-vocabulary", "Open-vocabulary classes")):
        if task in tables and (total := pixels[task].total()):
            yield f"## {title}\n\n| number | class | share of pixels |\n|---:|---|---:|"
            for number, name in enumerate(tables[task]["classes"]):
                yield f"| {number} | {_cell(name)} | {pixels[task][number] / total:.2%} |"
            yield ""
    if "instance" in tables:
        yield "## Instances\n\n| category | class | instances |\n|---:|---|---:|"
        for number, name in enumerate(tables["instance"]["classes"]):
            yield f"| {number + 1} | {_cell(name)} | {things[number]} |"
        yield ""


def _cell(name: str) -> str:
    """A class word inside a Markdown table: nothing in it can open a tag, a link or a column."""
    return "".join(letter if letter.isalnum() or letter in " -_." else f"&#{ord(letter)};" for letter in name)


def _code(name: str) -> str:
    return "`" + " ".join(str(name).replace("`", "'").split()) + "`"
