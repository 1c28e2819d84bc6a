"""README.md of a run folder: the data set card."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from datasetdm_fast.config import ATTENTION, DEMO_PROMPTS, INVERSION, REFERENCE
from datasetdm_fast.engine.labels import by_kind, kind_of, markdown_cell, tasks_of
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.run_folder.document import (
    COMMANDS,
    QUARANTINE,
    engine_names,
    engines_of,
    made_by,
    maker,
    quarantines,
    runs_of,
    sampler_in_words,
    size_in_words,
    speed_in_words,
)
from datasetdm_fast.runs.run_folder.indexes.licences import DERIVED, conflicts, hub_names, licence_of
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, IndexFile, Ledger, Row
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.settings import flags_of

GENERATED, LABELLED = "generated", "labelled"  # origins of images: made from prompts, or the input of `label`
TITLES = {GENERATED: "# A labelled data set, made from prompts\n", LABELLED: "# Pictures and their labels\n"}
ORIGINS = {
    GENERATED: "all synthetic: a diffusion model generated the images, and the labels were predicted from its features "
    "and attention maps. None of the images is a photograph, and the labels are not ground truth.",
    LABELLED: "which were predicted from the features and attention maps of a diffusion model and are not ground "
    "truth. The rights to the pictures are those of their authors.",
}
BOTH_ORIGINS = (
    "which were predicted from the features and attention maps of a diffusion model and are not ground truth. That "
    "model generated some of the images; the others are pictures, and the rights to them are those of their authors."
)
CATEGORIES = {  # task -> how model hubs call it
    "semantic": "image-segmentation",
    "open-vocabulary": "image-segmentation",
    "instance": "object-detection",
    "depth": "depth-estimation",
    "pose": "keypoint-detection",
    ATTENTION: "image-segmentation",
}
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (2**63, "n>1M"))
UNVERIFIED = (
    "The outputs of this engine have not been compared with those of the reference engine on this machine; "
    "`generate --verify 8` compares them"
)
NO_PROMPTS = f"sha256:{hashlib.sha256(DEMO_PROMPTS.encode()).hexdigest()}"  # of --prompts, where none were given
LONGEST_LICENCE = 80  # letters of one that is not known
UNKNOWN_LICENCE = "Where a licence is unknown, ask its owner before you pass the data set on."
USE = (
    "- Meant for training and testing networks that predict the labels above, together with real images or before "
    "them. Evaluate on real images: a score on this data set only measures the agreement with its decoders.",
    "- Labels are wrong where the decoders are, most often for small, thin, hidden and rare things. `trust`, scores "
    "and confidences show where to look first.",
)
BIASES = {
    GENERATED: "- The images have the biases of the diffusion model and of its training data. Faces and texts in them "
    "may be invented or real.",
    LABELLED: "- The pictures are not the model's, but the labels have the biases of its training data.",
}
BIASES_OF_BOTH = (
    "- The generated images and all labels have the biases of the diffusion model and of its training data. Faces and "
    "texts in generated images may be invented or real."
)
NOT_FOR = " Not meant for identifying people, nor for decisions about them."
CITATIONS = {  # of labels of decoders, and of those from attention: of U-Nets, to the prompt, and to words beside it
    "decoders": """@inproceedings{wu2023datasetdm,
  title={{DatasetDM}: Synthesizing Data with Perception Annotations Using Diffusion Models},
  author={Wu, Weijia and Zhao, Yuzhong and Chen, Hao and Gu, Yuchao and Zhao, Rui and He, Yefei and Zhou, Hong and
    Shou, Mike Zheng and Shen, Chunhua},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023}
}""",
    "averages": """@inproceedings{nguyen2023dataset,
  title={{Dataset Diffusion}: Diffusion-based Synthetic Data Generation for Pixel-Level Semantic Segmentation},
  author={Nguyen, Quang and Vu, Truong and Tran, Anh and Nguyen, Khoi},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023}
}""",
    "text": """@inproceedings{kim2025seg4diff,
  title={{Seg4Diff}: Unveiling Open-Vocabulary Segmentation in Text-to-Image Diffusion Transformers},
  author={Kim, Chaehyun and Shin, Heeseong and Hong, Eunbeen and Yoon, Heeji and Arnab, Anurag and
    Seo, Paul Hongsuck and Hong, Sunghwan and Kim, Seungryong},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}""",
    "concepts": """@inproceedings{helbling2025conceptattention,
  title={{ConceptAttention}: Diffusion Transformers Learn Highly Interpretable Features},
  author={Helbling, Alec and Meral, Tuna Han Salih and Hoover, Ben and Yanardag, Pinar and Chau, Duen Horng},
  booktitle={International Conference on Machine Learning},
  year={2025}
}""",
}
LOADING = """```python
from datasetdm_fast import open_run

run = open_run("THIS_FOLDER")
sample = run[0]  # {attributes}
pairs = run.as_dataset("{task}")  # (image, label) tensors for a torch DataLoader
```"""


class Card(IndexFile):
    """The card as Markdown; no prompt is quoted, as prompts are foreign text."""

    def __init__(self, document: Mapping[str, Any], ledger: Ledger):
        super().__init__(document, ledger)
        self._counts: dict[str, Counter] = {task: Counter() for task in by_kind(document["config"]["task"])}
        self._digest = hashlib.sha256()

    def add(self, rows: Sequence[Row]) -> tuple[()]:
        for row in rows:
            self._digest.update(repr((row.request, row.files, row.labels, row.trust)).encode())
            for task, counter in self._counts.items():
                if task in row.labels:
                    counter.update(kind_of(task).count(row.labels[task]))
        return ()

    def end(self) -> Iterator[bytes]:
        document, ledger, counts = self.document, self.ledger, self._counts
        config, done = document["config"], ledger.count()
        origins = {LABELLED if run["config"]["sampler"] == INVERSION else GENERATED for run in runs_of(document)}
        origin = "".join(origins) if len(origins) == 1 else ""
        digests = {f"model {name}": digest for name, digest in document["model"]["digests"].items()}
        digests |= {f"decoder {name}": entry["digest"] for name, entry in document["decoders"].items()}
        parts = [
            *_header(document, done, origins, self._digest.hexdigest()),
            TITLES[origin or LABELLED],
            f"{done} of {document['plan']['number']} images of {size_in_words(document)} with their "
            f"labels ({', '.join(config['task'])}), {ORIGINS.get(origin, BOTH_ORIGINS)}\n",
            "## Contents\n",
            f"- `images/ID.{config['image_format']}`: the images; `samples.jsonl`: prompt, seed, files and SHA-256 of "
            "each sample",
            *(f"- {kind_of(task).contents}" for task in config["task"]),
            "- `gallery/index.html`: a page that shows them; `run.json`: settings, versions and digests; "
            "`state/ledger.sqlite`: one row per sample\n",
            *_trust(document, ledger),
            *(
                line  # what the labels hold in all, maps of classes first
                for task in sorted(counts, key=lambda task: not kind_of(task).is_map)
                for line in kind_of(task).section(document["labels"][task], counts[task])
            ),
            *(
                f"Quarantined ({_code(reason)}): {', '.join(f'`{index:08d}`' for index in indices)}.\n"
                for reason, indices in ledger.quarantined_by_reason().items()
            ),
            *([f"Dropped samples: {dropped}.\n"] if (dropped := ledger.count_dropped()) else []),
            "## How it was made\n",
            *_making(document),
            "\n## Intended use and limits\n",
            *USE,
            BIASES.get(origin, BIASES_OF_BOTH) + NOT_FOR,
            "\n## Licences\n",
            *_licences(document),
            "\n## Digests\n",
            "| weights | SHA-256 |\n|---|---|",
            *(f"| {_part(of)} | {_code(digest.removeprefix('sha256:'))} |" for of, digest in digests.items()),
            "\n`python -m datasetdm_fast.audit THIS_FOLDER` compares every file with its SHA-256.",
            "\n## How to load\n",
            LOADING.format(task=config["task"][0], attributes=_attributes(config["task"])),
            "\n## Citation\n",
            *_citations(document),
        ]
        yield ("\n".join(parts) + "\n").encode(errors="backslashreplace")


def _header(document: Mapping[str, Any], done: int, origins: Collection[str], digest: str) -> Iterator[str]:
    """What model hubs read of a card, as YAML. Without the `digest` of its samples, the library `datasets` would take
    what it has cached of another run of this folder's name, or of this one before it grew or lost some.
    """
    tasks = tasks_of(document["config"]["task"])
    lists = {
        "license": hub_names(text for _, text in _licence_names(document)),
        "task_categories": dict.fromkeys(CATEGORIES[task] for task in CATEGORIES if task in tasks),
        "size_categories": [next(name for most, name in SIZES if done < most)],
        "annotations_creators": ["machine-generated"],
        "tags": ["datasetdm", "synthetic"] if GENERATED in origins else ["datasetdm"],
    }
    yield "---"
    for name, values in lists.items():
        yield "\n- ".join([f"{name}:", *values])
    yield f"configs:\n- config_name: default\n  description: SHA-256 {digest}\n  data_files: samples.jsonl\n---\n"


def _making(document: Mapping[str, Any]) -> Iterator[str]:
    config, sampling, engine = document["config"], document["sampling"], document["engine"]
    if "composition" in document:
        yield f"- {_code(document['composition']['told'])}"
    yield f"- Model: {_code(document['model']['name'])}; engine: {', '.join(map(_code, engine_names(document)))}"
    on_cpu = [run for run in runs_of(document) if run.get("engine", engine).get("device") == "cpu"]
    processors = dict.fromkeys(run["processor"] for run in on_cpu if "processor" in run)
    device = {"device_name": ", ".join(processors)} if processors else {}
    yield f"- Versions and device: {_values({**document['versions'], **engine, **device})}"
    for entry in document.get("mixed", ()):
        facts = {"engine": "", "dtype": "", "device_name": "", **entry["engine"]}
        name = _code("{engine} {dtype} on {device_name}".format(**facts))
        samples = count_noun(entry["number"], "sample")
        yield f"- {name} continued the run: {samples} made again agreed in images and labels"
    if "mixed" not in document and len(engines := engines_of(document)) > 1:
        for facts in engines:
            yield f"- Engine {_code(facts.get('engine', ''))}" + (f": {values}" if (values := _values(facts)) else "")
    yield f"- Sampler {sampler_in_words(document)}"
    if speed := speed_in_words(document):
        yield f"- Speed {_code(speed)}"
    if package := document["model"].get("package"):
        yield f"- The model's family is that of the package {_code(package)}"
    if package := sampling.get("sampler_package"):
        yield f"- The sampler is that of the package {_code(package)}"
    foreign = sampling.get("labellers", {}).items()
    yield from (f"- Labels {_code(name)}: made by the package {_code(package)}" for name, package in foreign)
    yield from (f"- Combined: {_code(text)}" for text in config.get("combine", ()))
    runs = runs_of(document) if made_by(document) == "merge" else (document,)
    yield from dict.fromkeys(line for run in runs for line in _verification(run, run.get("engine", engine)))
    remake = f"; `{maker(document)} --out THIS_FOLDER --only ID` makes a sample again, byte for byte"
    seeds = f"Sample k has seed {config['seed']} + k"
    seeds = "`samples.jsonl` has the seed of each sample" if "seeds" in document["plan"] else seeds
    yield f"- {seeds}" + remake * (made_by(document) == COMMANDS[0])
    if (line := command_line(document)) is None:
        yield "- Its settings are `config` in `run.json`"
    else:
        # `samples.jsonl` has no prompts of quarantined samples
        source = "is the list that it was given" if quarantines(config) else "are those of `samples.jsonl`"
        notes = [f"PROMPTS {source}"] if " PROMPTS " in line else []
        notes += ["TABLE has the words that `run.json` holds as `class_table`"] if " TABLE " in line else []
        yield f"- The command{', where ' if notes else ''}{' and '.join(notes)}: {_code(line)}"


def command_line(document: Mapping[str, Any]) -> str | None:
    """The line of generate with every setting that decides the samples and is no default; None for other commands."""
    if document.get("command"):
        return None
    words, makes_prompts = [], bool(document["config"].get("per_class"))  # which then tells their number, too
    for flag in flags_of(RunConfig):
        if makes_prompts and flag.name in ("prompts", "number"):
            continue
        value = document["config"].get(flag.name, flag.default)
        value = tuple(value) if isinstance(value, list) else value
        if flag.name == "prompts":
            words += ["--prompts", "PROMPTS"] if value and value != NO_PROMPTS else []
        elif flag.name == "class_table" and value:  # of which run.json holds the digest
            words += ["--class-table", "TABLE"]
        elif value != flag.default:
            name = flag.name.rstrip("_").replace("_", "-")
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{'' if value is not False else 'no-'}{name}", *([] if isinstance(value, bool) else [text])]
    return f"{maker(document)} {shlex.join([*words, '--out', 'THIS_FOLDER'])}"


def _licence_names(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every set of weights with its licence, as its files name it; of the weights of several runs each licence once."""
    names: dict[tuple[str, str], None] = {}
    for run in runs_of(document):
        decoders = ((f"decoder {task}", entry["licence"]) for task, entry in run["decoders"].items())
        names |= dict.fromkeys([("model", run["model"]["licence"]), *decoders])
    return sorted(names, key=lambda pair: pair[0] != "model")


def _licences(document: Mapping[str, Any]) -> Iterator[str]:
    """What the weights' licences allow, and which contradict one another."""
    names = _licence_names(document)
    yield "| weights | licence | commercial use | modified copies | requires |\n|---|---|---|---|---|"
    for of, text in names:
        licence = licence_of(text)
        row = licence.row if licence else f"{_word(text[:LONGEST_LICENCE])} | unknown | unknown | unknown"
        yield f"| {_part(of)} | {row} |"
    yield ""
    yield from (f"**{sentence}**\n" for sentence in conflicts(text for _, text in names))
    if any(licence_of(text) is None for _, text in names):
        yield f"{UNKNOWN_LICENCE}\n"
    yield DERIVED


def _citations(document: Mapping[str, Any]) -> Iterator[str]:
    """BibTeX of the works whose method made the labels."""
    foreign = document["sampling"].get("labellers", {})
    is_attention = {task == ATTENTION for task in tasks_of(document["config"]["task"]) if task not in foreign}
    methods = ["decoders"] * (False in is_attention)
    if True in is_attention:
        methods += (_attention_method(run if "sampling" in run else document) for run in runs_of(document))
    citations = [CITATIONS[method] for method in dict.fromkeys(methods)]
    yield (
        "```bibtex\n" + "\n\n".join(citations) + "\n```"
        if citations
        else f"The works behind {', '.join(map(_code, foreign))}."
    )


def _attention_method(run: Mapping[str, Any]) -> str:
    """By whose method labels are read from attention."""
    if not run["sampling"].get(ATTENTION, {}).get("blocks"):
        return "averages"
    return "concepts" if run["config"].get("ask") == "all" else "text"


def _attributes(labels: Sequence[str]) -> str:
    """What a sample of these labels offers."""
    names = {label: kind_of(label).attribute for label in labels}
    accesses = (f'.label("{label}")' if ":" in label else f".{name}" for label, name in names.items())
    return " ".join((".image", *accesses, ".prompt .seed"))


def _trust(document: Mapping[str, Any], ledger: Ledger) -> Iterator[str]:
    """How many samples are doubtful, where that was judged."""
    doubtful, outside, measured = ledger.count_trust()
    if where := document["config"].get("accept"):
        yield f"Samples with {_code(where)}, the condition of `--accept`; set aside in `{QUARANTINE}`:"
        yield f"{ledger.count(DOUBTFUL)}.\n"
    elif quarantines(document["config"]):
        yield f"Samples whose labels contradict their prompt or one another, set aside in `{QUARANTINE}`:"
        yield f"{ledger.count(DOUBTFUL)}.\n"
    elif any(row.trust for row in islice(ledger.rows(parts=("trust",)), 1)):
        if not doubtful:
            agree = "None of the samples is doubtful: their labels agree with their prompts and with one another"
            like = "and their pictures are like those that the decoders learned from.\n"
            yield from (f"{agree},", like) if measured else (f"{agree}.\n",)
            return
        is_or_are, their = ("is", "its") if doubtful == 1 else ("are", "their")
        yield f"{doubtful} of the samples {is_or_are} doubtful, as {their} labels contradict {their} prompt or one"
        yield "another; `trust` in `samples.jsonl` gives the reasons.\n"
        if outside:
            shows = f"{outside} of these {'shows' if outside == 1 else 'show'}"
            yield f"{shows} what the decoders were not trained on: labels of such pictures mean little."
            yield "`trust.domain` is their distance from the training pictures, and above 1 for them.\n"


def _values(facts: Mapping[str, Any]) -> str:
    """Facts of an engine, without its name."""
    return ", ".join(f"{_word(name)} {_code(value)}" for name, value in facts.items() if name != "engine")


def _verification(run: Mapping[str, Any], used: Mapping[str, Any]) -> Iterator[str]:
    """What the comparison of a run's engine with the reference engine found, or that there was none."""
    verdict = run.get("verified")
    if not verdict:
        if used.get("engine") != REFERENCE:
            yield f"- {UNVERIFIED}"
        return
    engine, reference = verdict["engine"], _code(verdict["against"]["engine"])
    name = _code(f"{engine['engine']} {engine['dtype']} on {engine['device_name']}")
    if verdict["agrees"]:
        # The command verify compares images of its own prompts and seeds; what generate compares has a setting beside.
        compared = "of its samples" if "setting" in verdict else "other images of this model"
        yield f"- {name} agrees with {reference} on {verdict['number']} {compared}"
    else:
        failed = _code(", ".join(row["measure"] for row in verdict["measures"] if not row["passed"]))
        yield f"- {name} does NOT agree with {reference}: {failed} is beyond its limit"


def _word(name: str) -> str:
    """A name for a cell or a sentence."""
    return markdown_cell(" ".join(str(name).split()))


def _part(name: str) -> str:
    """What weights are of, with the name of the decoder or network as code."""
    kind, _, rest = name.partition(" ")
    return f"{kind} {_code(rest.replace('|', '/'))}" if rest else kind


def _code(name: Any) -> str:
    return "`" + " ".join(str(name).replace("`", "'").split()) + "`"
