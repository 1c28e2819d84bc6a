"""The recipes of docs/extending.md, carried out on a copy of the package and used through its commands: the files lie
in tests/extending, the edited lines stand here, and the page has to say the same.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import forked
import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import UMT5Config, UMT5EncoderModel

from datasetdm_fast import _C

HERE = Path(__file__).parents[1]
FILES = HERE / "tests" / "extending"
PAGE = HERE / "docs" / "extending.md"
LONGEST_RECIPE = 15  # lines
FOLDERS = ("datasetdm_fast", "kernels", "export", "bench")  # kernels and export are packages inside the first


@dataclass(frozen=True)
class Recipe:
    """New files, and in others the text that is replaced; at most so many of these change by more than one line beside
    their imports.
    """

    files: tuple[str, ...]
    edits: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    most_files: int = 2
    most_edited: int = 0


RECIPES = {
    "A task": Recipe(
        files=(
            "datasetdm_fast/engine/labels/edges.py",
            "datasetdm_fast/engine/tasks/edges.py",
            "datasetdm_fast/training/evaluation/edges.py",
        ),
        edits={
            "datasetdm_fast/config.py": (
                (
                    '    "open-vocabulary": TaskKind(\n',
                    '    "edges": TaskKind(\n        "datasetdm_fast.engine.labels.edges:EdgesKind",\n'
                    '        "datasetdm_fast.engine.tasks.edges:EdgesTask",\n'
                    '        "datasetdm_fast.training.evaluation.edges:Edges",\n    ),\n'
                    '    "open-vocabulary": TaskKind(\n',
                ),
            )
        },
        most_files=4,
        most_edited=1,
    ),
    "A reader": Recipe(
        files=("datasetdm_fast/training/readers/pairs.py",),
        edits={
            "datasetdm_fast/training/readers/__init__.py": (
                (
                    '    "hf": "datasetdm_fast.training.readers.hf:HuggingFace",\n',
                    '    "hf": "datasetdm_fast.training.readers.hf:HuggingFace",\n'
                    '    "pairs": "datasetdm_fast.training.readers.pairs:Pairs",\n',
                ),
            )
        },
    ),
    "A writer": Recipe(
        files=("datasetdm_fast/runs/run_folder/indexes/captions.py",),
        edits={
            "datasetdm_fast/runs/run_folder/indexes/__init__.py": (
                ("import card, coco", "import captions, card, coco"),
                (
                    '    "README.md": card.Card,\n',
                    '    "README.md": card.Card,\n    "captions.tsv": captions.Captions,\n',
                ),
            )
        },
    ),
    "A kernel": Recipe(
        files=("kernels/quick_gelu.py", "bench/kernels/inputs/quick_gelu.py"),
        edits={
            "kernels/__init__.py": (
                ("        pyramid,\n", "        pyramid,\n        quick_gelu,\n"),
                (
                    '        "layer_norm": layer_norm,\n',
                    '        "layer_norm": layer_norm,\n        "quick_gelu": quick_gelu,\n',
                ),
            ),
            "datasetdm_fast/engine/models/text_encoder.py": (
                (
                    "activation = ACTIVATIONS[config.hidden_act]\n",
                    'activation = ops.quick_gelu if config.hidden_act == "quick_gelu" else F.gelu\n',
                ),
            ),
        },
        most_files=4,
        most_edited=1,
    ),
    "An engine": Recipe(
        files=("datasetdm_fast/engine/engines/halves.py",),
        edits={
            "datasetdm_fast/config.py": (
                (
                    '    "ort": EngineKind(\n',
                    '    "halves": EngineKind("datasetdm_fast.engine.engines.halves:HalvesEngine"),\n'
                    '    "ort": EngineKind(\n',
                ),
            )
        },
    ),
    "A backbone": Recipe(
        files=(
            "datasetdm_fast/engine/backbones/aura_flow.py",
            "datasetdm_fast/engine/backbones/aura_flow_reference.py",
        ),
        edits={
            "datasetdm_fast/engine/backbones/__init__.py": (
                (
                    '    "FluxPipeline": ',
                    '    "AuraFlowPipeline": "datasetdm_fast.engine.backbones.aura_flow:AURA_FLOW",\n'
                    '    "FluxPipeline": ',
                ),
            )
        },
        most_files=3,
    ),
    "A sampler": Recipe(
        files=("datasetdm_fast/engine/sampling/trailing.py",),
        edits={
            "datasetdm_fast/config.py": (
                (
                    '    "dpm-solver++": "',
                    '    "trailing": "datasetdm_fast.engine.sampling.trailing:SAMPLER",\n    "dpm-solver++": "',
                ),
            )
        },
    ),
}

# Runs every command in one process, then the kernel's own test, and says how each ended.
COMMANDS = """
import contextlib, io, json, sys
import datasetdm_fast, pytest, torch
from datasetdm_fast import cli
from datasetdm_fast.command_line import probes
ended = {"package": datasetdm_fast.__file__}
*judged, lines = sys.argv[1:]
for name, line in json.loads(lines).items():
    said, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
        code = cli.main(line)
    ended[name] = [code, said.getvalue(), error.getvalue()]
with open("other/captions.tsv", "a") as file, contextlib.redirect_stdout(error), contextlib.redirect_stderr(error):
    file.write("one more line")
    file.flush()
    ended["changed"] = cli.main(["audit", "other"]), error.getvalue()
exec(probes.PROBES["engine halves"], {"report": lambda **answer: ended.update(doctor=answer)})
from datasetdm_fast.kernels import choice
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.models.text_encoder import TextEncoder
ops = choice.operations(torch.device("cpu"), torch.float32)
layers = TextEncoder(load_model("demo").modules["text_encoder"], ops).layers
ended["kernel"] = all(layer.activation is ops.quick_gelu for layer in layers)
with contextlib.redirect_stdout(io.StringIO()) as said:
    ended["judged"] = int(pytest.main(judged)), said.getvalue()
print(json.dumps(ended))
"""


def carried_out(recipe: Recipe, root: Path) -> None:
    """Adds the files of a recipe and edits the others."""
    for name in recipe.files:
        assert not (root / name).exists(), name
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FILES / name, root / name)
    for name, changes in recipe.edits.items():
        text = (root / name).read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (root / name).write_text(text, encoding="utf-8")


def sources(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
    }


def changed_lines(before: str, after: str) -> tuple[list[str], list[str]]:
    """The lines that went, and those that came."""
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return [line[2:] for line in lines if line[:2] == "- "], [line[2:] for line in lines if line[:2] == "+ "]


def without_imports(text: str) -> str:
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    gone = {number for node in imports for number in range(node.lineno, node.end_lineno + 1)}
    return "\n".join(line for number, line in enumerate(text.splitlines(), 1) if number not in gone)


def is_one_line(before: str, after: str) -> bool:
    """Whether one line was added, and nothing else but imports changed."""
    went, came = changed_lines(without_imports(before), without_imports(after))
    return not went and len(came) == 1


def sections() -> dict[str, str]:
    """The recipes of the page by their headings."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {heading: text.strip() for heading, text in zip(parts[::2], parts[1::2])}


def named_files(text: str) -> Iterator[str]:
    """The files in backticks, tests aside."""
    yield from re.findall(r"`((?!tests/)\w+/[\w/]+\.py)`", text)


def test_the_page_has_these_recipes():
    assert list(sections()) == [*RECIPES, "From a package of your own"]


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_is_short_and_says_what_is_done(title, tmp_path):
    recipe, text = RECIPES[title], sections()[title]
    for folder in FOLDERS:
        shutil.copytree(HERE / folder, tmp_path / folder, ignore=lambda _, names: [n for n in names if is_data(n)])
    before = sources(tmp_path)
    carried_out(recipe, tmp_path)
    after = sources(tmp_path)
    touched = {name for name in after if after[name] != before.get(name)}
    edited = [name for name in touched & before.keys() if not is_one_line(before[name], after[name])]
    assert len(touched) <= recipe.most_files
    assert len(edited) <= recipe.most_edited, edited

    assert len(text.splitlines()) <= LONGEST_RECIPE
    assert set(named_files(text)) == touched
    for name in touched & before.keys():
        for line in changed_lines(before[name], after[name])[1]:
            assert line.strip() in text, (name, line)


def is_data(name: str) -> bool:
    """Whether a name in a folder of the package is neither a folder nor Python."""
    return name == "__pycache__" or ("." in name and not name.endswith(".py"))


def copy_with_all(root: Path) -> None:
    """A copy of the package in which every recipe was carried out, as it lies in a checkout."""
    for folder in FOLDERS:
        shutil.copytree(HERE / folder, root / folder, symlinks=True)
    shutil.copy(_C.__file__, root / "datasetdm_fast")
    for folder in FOLDERS[1:3]:
        if not (root / "datasetdm_fast" / folder).is_symlink():
            (root / "datasetdm_fast" / folder).symlink_to(root / folder)
    for recipe in RECIPES.values():
        carried_out(recipe, root)


def written_pairs(folder: Path) -> None:
    """A data set for the toy reader: one picture whose left half is a ball."""
    (folder / "val").mkdir(parents=True)
    (folder / "classes.txt").write_text("background\nball\n")
    labels = np.zeros((64, 64), np.uint8)
    labels[:, :32] = 1
    Image.fromarray(labels).save(folder / "val" / "a.classes.png")
    Image.fromarray(np.repeat(labels[..., None] * 200, 3, 2)).save(folder / "val" / "a.png")


def aura_flow(folder: Path) -> AuraFlowPipeline:
    """A tiny pipeline of the family that the recipe adds, saved there, with seeded weights."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    width = {"num_attention_heads": 4, "attention_head_dim": 8, "joint_attention_dim": 32, "caption_projection_dim": 32}
    layers = {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "sample_size": 8, "pos_embed_max_size": 256}
    pipeline = AuraFlowPipeline(
        tiny_pipelines.t5_tokenizer(),
        UMT5EncoderModel(UMT5Config(vocab_size=64, feed_forward_proj="gated-gelu", **sizes)),
        tiny_pipelines.vae(4, scaling_factor=0.7),
        AuraFlowTransformer2DModel(**width, **layers),
        FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_everything_the_recipes_add_is_used_by_the_commands(tmp_path):
    root = tmp_path / "copy"
    copy_with_all(root)
    written_pairs(tmp_path / "pairs")
    stock = aura_flow(tmp_path / "aura")
    same, taught = ["--size", "64", "--threads", "1", "--quiet"], ["--decoder", "decoder", "--task", "edges"]
    few = ["--number", "2", "--steps", "2", *same]
    lines = {
        "train": "train --data demo:4 --task edges --steps 8 --batch-size 4 --draws 1 --folds no --out decoder".split()
        + same,
        "generate": ["generate", *taught, "--out", "run", *few],
        "generate otherwise": "generate --task semantic --engine halves --sampler trailing --out other".split() + few,
        "generate aura": "generate --model aura --decoder random --task depth --prompts photo --out drawn".split()
        + few,
        "audit": ["audit", "run"],
        "audit otherwise": ["audit", "other"],
        "evaluate": ["evaluate", *taught, "--data", "demo:2@100", "--json", "--quiet"],
        "evaluate pairs": "evaluate --task semantic --data pairs:pairs[val] --json --quiet".split(),
        "verify": ["verify", *taught, "--engine", "fast", "--dtype", "fp32", *few],
        "verify halves": ["verify", *taught, "--engine", "halves", *few],
        "export": ["export", "--decoder", "decoder", "--size", "64", "--out", "graphs", "--quiet"],
    }
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    judged = ["-q", "-p", "no:cacheprovider", "-k", "quick_gelu", str(HERE / "tests" / "test_kernels.py")]
    ended = forked.run(["-c", COMMANDS, *judged, json.dumps(lines)], cwd=tmp_path, env=environment, timeout=500)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found.pop("package") == str(root / "datasetdm_fast" / "__init__.py")
    assert found.pop("doctor")["runs"]
    assert found.pop("kernel")
    code, said = found.pop("judged")
    assert code == 0 and " passed" in said, said
    code, said = found.pop("changed")
    assert code and "captions.tsv" in said
    assert {name: error for name, (code, _, error) in found.items() if code} == {}

    page = (tmp_path / "run" / "gallery" / "run.js").read_text(encoding="utf-8")
    assert "Class edges" in page
    assert sorted(path.name for path in (tmp_path / "run" / "edges").iterdir()) == ["00000000.png", "00000001.png"]
    assert 0 <= json.loads(found["evaluate"][1])["edges"]["f1"] <= 1
    assert "ball" in json.loads(found["evaluate pairs"][1])["semantic"]["per_class"]
    prompts = [line.split("\t") for line in (tmp_path / "run" / "captions.tsv").read_text().splitlines()]
    assert [name for name, _ in prompts] == ["images/00000000.png", "images/00000001.png"]
    document = json.loads((tmp_path / "other" / "run.json").read_text())
    assert (document["engine"]["engine"], document["config"]["sampler"]) == ("halves", "trailing")
    assert any("edges" in path.name for path in (tmp_path / "graphs").rglob("*.onnx"))

    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        (wanted,) = stock("photo", generator=generator, num_inference_steps=2, height=64, width=64).images
        drawn = Image.open(tmp_path / "drawn" / "images" / f"{seed:08d}.png")
        assert np.abs(np.asarray(wanted, int) - np.asarray(drawn, int)).max() <= 1
        assert (tmp_path / "drawn" / "depth" / f"{seed:08d}.png").exists()
    assert json.loads((tmp_path / "drawn" / "run.json").read_text())["model"]["licence"] == "apache-2.0"
