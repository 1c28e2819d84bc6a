"""README.md of a run folder: the data set card."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from datasetdm_fast.labels import by_kind, kind_of
from datasetdm_fast.run_folder.document import ASIDE, described_sides, maker, sets_aside
from datasetdm_fast.run_folder.ledger import DOUBTFUL, SET_ASIDE, Ledger

TITLES = ("# A labelled data set, made from prompts\n", "# Pictures and their labels\n")
ORIGINS = (
    "all synthetic: a diffusion model drew the images, and the labels were read from what it computed on the way. "
    "Nothing here was photographed, and the labels are a model's opinion, not ground truth.",
    "which were read from what a diffusion model computed of each picture: a model's opinion, not ground truth. The "
    "rights to the pictures are those of their authors.",
)
LOADING = """```python
from datasetdm_fast import open_run

run = open_run("THIS_FOLDER")
sample = run[0]  # {attributes}
pairs = run.as_dataset("{task}")  # (image, label) tensors for a torch DataLoader
```"""


def text(document: Mapping[str, Any], ledger: Ledger) -> Iterator[bytes]:
    """The card as Markdown; no prompt is quoted, as prompts are foreign text."""
    config, sampling, model = document["config"], document["sampling"], document["model"]
    done, aside = ledger.count(), ledger.indices(SET_ASIDE)
    licences = {
        "model": model["licence"],
        **{f"decoder {task}": entry["licence"] for task, entry in document["decoders"].items()},
    }
    parts = [
        TITLES[document.get("command") == "label"],
        f"{done} of {document['plan']['number']} images of {described_sides(document)} with their "
        f"labels ({', '.join(config['task'])}), {ORIGINS[document.get('command') == 'label']}\n",
        "## Contents\n",
        f"- `images/ID.{config['image_format']}`: the images; `samples.jsonl`: prompt, seed, files and SHA-256 of "
        "each sample",
        *(f"- {kind_of(task).contents}" for task in config["task"]),
        "- `gallery/index.html`: the page to look at them; `run.json`: everything that decided them; "
        "`state/ledger.sqlite`: one row a sample\n",
        *_trust(document, ledger),
        *_sections(document, ledger),
        *(
            [f"Set aside because a number was not finite: {', '.join(f'`{index:08d}`' for index in aside)}.\n"]
            if aside
            else []
        ),
        *([f"Samples that were looked at and dropped: {dropped}.\n"] if (dropped := ledger.count_dropped()) else []),
        "## How it was made\n",
        *([f"- {_code(document['composition']['told'])}"] if "composition" in document else []),
        f"- Model: {_code(model['name'])}; engine: {_code(document['engine'].get('engine', ''))}; datasetdm_fast "
        f"{document['versions']['datasetdm_fast']}",
        f"- Sampler {config['sampler']}, {sampling['steps']} steps ({sampling['calls']} network calls), guidance "
        f"{sampling['guidance']:g}",
        *(f"- Combined: {_code(text)}" for text in config.get("combine", ())),
        *_verified(document.get("verified")),
        f"- {_seeds(document)}; `{maker(document)} --out THIS_FOLDER --only ID` makes a sample again, byte for byte\n",
        "## Licence chain\n",
        *(f"- {name}: {_code(licence)}" for name, licence in licences.items()),
        "\n## How to load\n",
        LOADING.format(task=config["task"][0], attributes=_attributes(config["task"])),
    ]
    yield ("\n".join(parts) + "\n").encode()


def _attributes(labels: Sequence[str]) -> str:
    """What a sample of these labels offers."""
    named = [f'.label("{label}")' for label in labels if ":" in label]
    return " ".join((".image", *(named or (".semantic", ".instances", ".depth", ".keypoints")), ".prompt .seed"))


def _trust(document: Mapping[str, Any], ledger: Ledger) -> Iterator[str]:
    """How many samples are doubtful, where that was judged."""
    if sets_aside(document["config"]):
        yield f"Samples whose labels do not fit their prompt or one another, set aside in `{ASIDE}`: "
        yield f"{ledger.count(DOUBTFUL)}.\n"
    elif any(row.trust for row in islice(ledger.rows(parts=("trust",)), 1)):
        yield f"{ledger.count_doubtful()} of the samples are doubtful, as their labels do not fit their prompt or one "
        yield "another; `trust` in `samples.jsonl` says why.\n"


def _verified(verdict: Any) -> Iterator[str]:
    """What a comparison with the reference engine found, where there was one."""
    if not verdict:
        return
    engine, reference = verdict["engine"], _code(verdict["against"]["engine"])
    name = _code(f"{engine['engine']} {engine['dtype']} on {engine['device_name']}")
    if verdict["agrees"]:
        yield f"- {name} agrees with {reference} on {verdict['number']} of its samples"
    else:
        failed = _code(", ".join(row["measure"] for row in verdict["measures"] if not row["passed"]))
        yield f"- {name} does NOT agree with {reference}: {failed} is beyond its limit"


def _seeds(document: Mapping[str, Any]) -> str:
    if "seeds" in document["plan"]:
        return "`samples.jsonl` tells the seed of each sample"
    return f"Sample k has seed {document['config']['seed']} + k"


def _sections(document: Mapping[str, Any], ledger: Ledger) -> Iterator[str]:
    """What the labels hold in all, maps of classes first."""
    kinds = {task: kind_of(task) for task in by_kind(document["config"]["task"])}
    counts: dict[str, Counter] = {task: Counter() for task in kinds}
    for row in ledger.rows(parts=("labels",)):
        for task, counter in counts.items():
            if task in row.labels:
                counter.update(kinds[task].count(row.labels[task]))
    for task in sorted(kinds, key=lambda task: not kinds[task].is_map):
        yield from kinds[task].section(document["labels"][task], counts[task])


def _code(name: str) -> str:
    return "`" + " ".join(str(name).replace("`", "'").split()) + "`"
