"""What the pages show is what happens: examples run, and every command line is one that the commands accept."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image

from datasetdm_fast.cli import COMMANDS
from datasetdm_fast.cli import main as cli_main
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.compat.showlab.generator import GENERATORS
from datasetdm_fast.compat.showlab.lines import NO_EFFECT, NO_EFFECT_SWITCHES
from datasetdm_fast.engine.loading.folder import DEMO
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.generate import main
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.training.recipes import LARGE

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "bench/README.md")),
    *(ROOT / "bench").glob("**/README.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]
README = PAGES[0].read_text(encoding="utf-8")
PARSED = 99  # exit code of a command that is stopped once its line was parsed
pytestmark = [
    pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not trained yet"),
    pytest.mark.usefixtures("one_engine_of_a_kind"),
]


def blocks(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def commands(text: str) -> list[str]:
    """The command lines of a page: those of its shell blocks, and those that stand in its sentences and tables."""
    shell = "".join(blocks(text, "bash", "console")).replace("\\\n", " ")
    inline = re.findall(
        r"`((?:python|torchrun|datasetdm-fast|make|pip) [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    lines = [line.removeprefix("$ ") for line in shell.splitlines() if line.strip()]
    return [*lines, *(line for line in inline if "NAME" not in line)]


LINES = [(page.relative_to(ROOT), line) for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]
LINES += [  # of --help
    ("help", f"python -m {module} {line}")
    for module, _ in COMMANDS.values()
    for line in getattr(import_module(module), "EXAMPLES", ())
]
README_GENERATE = [line for line in commands(README) if line.startswith("python -m datasetdm_fast.generate")]


def in_few_steps(make):
    return lambda pipe, *given, **choices: make(pipe, *given, **{**choices, "steps": 4})


def test_the_library_example_runs_as_it_stands(tmp_path, monkeypatch):
    """But for the number of steps, which changes what is drawn alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("__call__", "stream"):
        monkeypatch.setattr(Pipeline, name, in_few_steps(getattr(Pipeline, name)))
    assert main(["--number", "4", "--steps", "4", "--batch-size", "4", "--out", "runs/demo", "--quiet"]) == 0
    (example,) = blocks(README, "python")
    names: dict = {}
    exec(example, names)
    out, run = names["out"], names["run"]
    assert (
        out.images[0].shape == (128, 128, 3) and out.semantic[0].labels.shape == (128, 128) and out.meta[0]["seed"] == 7
    )
    assert len(run) == 4 and run[3].semantic.labels.shape == (128, 128)
    image, label = names["images_and_labels"][0]
    assert image.shape == (3, 128, 128) and label.shape == (128, 128)
    (example,) = blocks((ROOT / "docs" / "data-set.md").read_text(encoding="utf-8"), "python")
    exec(example, names)
    assert names["image"].shape == (4, 3, 128, 128) and names["label"].shape == (4, 128, 128)
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            *lines, shown = "".join(cell["source"]).splitlines()
            exec("\n".join(lines), names)
            value = eval(shown, names)  # what a notebook shows of it
            assert getattr(value, "_repr_html_", lambda: "<img")().count("<img") >= 1
    (example,) = blocks((ROOT / "docs" / "five-thousand.md").read_text(encoding="utf-8"), "python")
    exec(example.replace("runs/street", "runs/demo"), names)
    assert all(len(one["boxes"]) == len(one["masks"]) == len(one["labels"]) > 0 for one in names["targets"])
    names["things"][0]["boxes"] = names["things"][0]["boxes"][:0]  # of an image without things
    exec(next(line for line in example.splitlines() if line.startswith("targets")), names)
    assert len(names["targets"]) == len(names["images"]) == 4
    example, _ = blocks((ROOT / "docs" / "library.md").read_text(encoding="utf-8"), "python")
    exec(example, names)
    assert list(names["pyramid"]) == ["low", "mid", "high", "highest"]


def test_the_notebook_stores_what_its_cells_show():
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output["data"] for cell in cells for output in cell["outputs"]]
    assert len(shown) == len(cells) and sum("<img" in "".join(data.get("text/html", ())) for data in shown) == 2
    assert "pip" in "".join(cells[0]["source"])  # where the package is missing, as on Colab


def test_times_of_five_thousand_images_are_those_of_the_budget():
    """Estimated from the bytes and operations of every call; the share of a slower card is that of its tensor cores."""
    page = (ROOT / "docs" / "five-thousand.md").read_text(encoding="utf-8")
    budget = json.loads((ROOT / "bench" / "gpu_budget.json").read_text(encoding="utf-8"))
    calls = {name: call["milliseconds"] for name, call in budget["calls"].items()}
    batch = 50 * calls["UNet call, 8 images"] + sum(
        calls[f"{name}, 8 images"] for name in ("captured call", "label decoders", "autoencoder")
    )
    minutes = 5000 * batch / 8 / 60_000
    row = re.search(r"^\| generate 5,000 images .*? \| (\d+) min \| (\d+) min \|", page, re.MULTILINE)
    assert [int(number) for number in row.groups()] == [round(minutes), round(4.3 * minutes)]
    steps = f"{LARGE['steps']:,} steps of {LARGE['batch_size']} examples"
    assert steps in " ".join(page.split()) and f"{3 * calls['label decoders, 8 images']:.0f} ms for 8" in page
    assert f"{batch / 8:.0f} ms an image" in page and "**estimated, not measured**" in " ".join(page.split())


@pytest.mark.parametrize("line", README_GENERATE)
def test_generate_lines_of_the_readme_can_be_planned(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)[3:]
    for flag in {"--model", "--decoder"} & set(words):  # the line's own folders are the reader's
        words[words.index(flag) + 1] = "demo"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "prompts.txt").write_text("a red ball\n")
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out and not (tmp_path / "runs").exists()


@pytest.fixture
def parse_only(monkeypatch):
    """Every command ends with PARSED once its flags are known to be right."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *arguments):
        found, unknown = parse(self, *arguments)
        if unknown:
            return found, unknown
        raise SystemExit(PARSED)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", ["python"])  # one of the demo programs adds to it


def run_module(name: str, words: list[str]) -> int:
    """The exit code of `python -m NAME WORDS`."""
    programs = ("bench", "bench.world", "datasetdm_fast.export", "datasetdm_fast.compat.showlab")
    module = import_module(f"{name}.__main__" if name in programs else name)
    try:
        return run_command(module.dispatch, words) if name == "bench" else module.main(words)
    except SystemExit as stop:
        return stop.code


def check(words: list[str]) -> None:
    """Fails for a command line that would be refused."""
    program, *rest = words
    if program == "python" and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file()
    elif program == "python":
        assert rest[0] == "-m" and run_module(rest[1], rest[2:]) == PARSED
    elif program == "datasetdm-fast" and rest[0] == "completion":
        assert cli_main(rest) in (0, 3)  # its library is optional
    elif program == "datasetdm-fast":
        check(["python", "-m", f"datasetdm_fast.{rest[0]}", *rest[1:]])
    elif program == "source":
        assert rest == [".venv/bin/activate"]  # of `make demo`
    elif program == "torchrun":
        check(["python", *rest[rest.index("-m") :]])
    elif program == "srun":
        check(rest)
    elif program == "make":
        name, sets, _ = rest[0].partition("=")  # a target, or a variable
        assert re.search(rf"^{name} [?]=" if sets else f"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        extras = re.fullmatch(r"(?:\.|datasetdm-fast)(?:\[(.*)\])?", rest[1])[1]
        assert rest[0] == "install" and set((extras or "hf").split(",")) <= set(known)
    elif program == "ray":
        assert rest[0] in ("up", "exec") and (ROOT / rest[1]).is_file()
        for line in rest[2:]:
            check(shlex.split(line))
    else:
        subprocess.run([ROOT / program, *rest, "--dry-run"], check=True, capture_output=True)


@pytest.mark.parametrize("page, line", LINES, ids=lambda value: str(value))
def test_every_command_line_is_accepted(page, line, parse_only, capsys):
    check(shlex.split(re.split(" [>|] ", line)[0], comments=True))


def shell_lines(page: Path) -> list[list[str]]:
    """The words of each command in the shell blocks of a page, in its order."""
    lines = "".join(blocks(page.read_text(encoding="utf-8"), "bash", "console")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


OF_THE_PAGE = ("runs/", "exports/", "engines/", "decoders/", "models/")  # folders that only a command can have made
# what `make demo` and the reader's own downloads made
AT_HAND = ("runs/demo", "models/sd14", "models/sdxl", "models/klein-4b", "models/z-image-turbo")
RUN_MAKERS = ("generate", "vary", "edit", "label", "merge")
GROWN = ("--number", "--verify")  # with which the same line goes on with its run folder


IN_ORDER = [page for page in PAGES if page.name != "flags.md"]  # whose examples stand each for itself


@pytest.mark.parametrize("page", IN_ORDER, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_command_of_a_page_reads_was_made_there(page):
    """And a run folder is made by one line alone, as another one would be refused."""
    made, makers = list(AT_HAND), {}
    for words in shell_lines(page):
        out = words[words.index("--out") + 1] if "--out" in words else ""
        places = [part for word in words for part in re.split(r"[,:\[\]]", word) if word != out]
        for place in places:
            if place.startswith(OF_THE_PAGE) or place.endswith(".jsonl"):
                assert any(f"{place}/".startswith(f"{one.rstrip('/')}/") for one in made), f"{place}: {' '.join(words)}"
        if not out:
            continue
        made.append(out)
        if words[:2] == ["python", "-m"] and words[2].removeprefix("datasetdm_fast.") in RUN_MAKERS:
            same = [
                word
                for before, word in zip(["", *words], words)
                if word not in GROWN and not (before in GROWN and word.isdecimal())
            ]
            assert makers.setdefault(out, same) == same, out


SMALL = {
    "generate": ("--number", "3", "--steps", "2"),
    "vary": ("--steps", "2", "--limit", "6", "--batch-size", "2"),
    "edit": ("--steps", "2", "--limit", "2", "--batch-size", "2"),
    "train": ("--steps", "2", "--folds", "no", "--draws", "1"),
    "evaluate": ("--data", "demo:6@900000"),
}
RUN_AS_WRITTEN = ("attention", "compositions", "correcting", "data-set", "filtering", "formats", "gallery", "prompts")


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory, one_engine_of_a_kind):
    """The run folder of `make demo`, of fewer images in fewer steps."""
    run = tmp_path_factory.mktemp("pages") / "runs" / "demo"
    assert main(["--number", "10", "--steps", "8", "--out", str(run), "--quiet"]) == 0
    return run


@pytest.mark.parametrize("name", RUN_AS_WRITTEN)
def test_commands_of_a_page_run_in_its_order(name, demo_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_run, "runs/demo")
    Path("photos").mkdir()
    for path in sorted((demo_run / "images").iterdir())[:3]:
        shutil.copy(path, "photos")
    Path("captions.json").write_text(json.dumps({path.name: "a dog" for path in Path("photos").iterdir()}))
    Path("day.txt").write_text("a red ball on a brown table\n")
    Image.new("L", (128, 128), 255).save("mask.png")
    for words in shell_lines(ROOT / "docs" / f"{name}.md"):
        program, rest = words[2].removeprefix("datasetdm_fast."), words[3:]
        if program.startswith("bench.") or {"--serve", "--balance", "--llm-url"} & {*rest}:
            continue  # these need a browser, minutes of training, another's data or a language model
        code = run_module(f"datasetdm_fast.{program}", [*rest, *SMALL.get(program, ())])
        assert code == 0, f"{' '.join(words)}: {capsys.readouterr().err}"


def test_the_settings_file_is_accepted(tmp_path):
    (example,) = blocks((ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), "yaml")
    (tmp_path / "run.yaml").write_text(example)
    config, given = parse(["--config", str(tmp_path / "run.yaml")], RunConfig)
    assert config.number == 1000 and given == {"prompts", "number", "task", "out"}


@pytest.fixture(scope="module")
def known_flags():
    """Every flag of the commands, by command."""
    found = {}
    for name in COMMANDS:
        with redirect_stdout(StringIO()) as shown:
            assert run_module(f"datasetdm_fast.{name}", ["--help"]) == 0
        found[name] = set(re.findall(r"--[a-z_-]+", shown.getvalue()))
    found["showlab"] = {f"--{flag.name}" for script in GENERATORS.values() for flag in script.flags}
    found["showlab"] |= {f"--{name}" for name in (*NO_EFFECT, *NO_EFFECT_SWITCHES)}
    return found


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ROOT / "bench" not in page.parents], ids=lambda page: page.name
)
def test_every_flag_in_a_sentence_exists(page, known_flags):
    for name, flag in re.findall(r"`(?:([a-z]+) )?(--[a-z_-]+)", page.read_text(encoding="utf-8")):
        wanted = known_flags[name] if name in known_flags else set().union(*known_flags.values())
        assert flag in wanted, f"{name} {flag}"
