"""Flags from RunConfig: spellings, types, YAML under flags, refusals in two lines, and how a command ends."""

import errno
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from inspect import get_annotations
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import datasetdm_fast
from datasetdm_fast import cli, verify
from datasetdm_fast.cli import COMMANDS
from datasetdm_fast.command_line import ending, flags, output
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.command_line.interruption import SignalWatch
from datasetdm_fast.command_line.output import print_lines, shows_bar
from datasetdm_fast.drop import DropConfig
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.export_cli import ExportConfig
from datasetdm_fast.gallery import GalleryConfig
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.compositions.settings import EditSettings
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.training.evaluation.settings import EvaluateConfig
from datasetdm_fast.training.settings import TrainConfig
from datasetdm_fast.verify import VerifyConfig
from datasetdm_fast.version import __version__

pytestmark = pytest.mark.core

parse_run = partial(flags.parse, cls=RunConfig)


def test_no_flags_give_the_defaults():
    assert parse_run([]) == (RunConfig(), set())


def test_hyphens_and_underscores_name_the_same_flag():
    for line in (["--batch-size", "4"], ["--batch_size", "4"], ["--batch_size=4"], ["--batch-size=4"]):
        config, given = parse_run(line)
        assert config.batch_size == 4 and given == {"batch_size"}


def test_words_of_a_list_count_once_and_adapters_as_often_as_they_are_named():
    config, _ = parse_run(["--classes", "ball,cube,ball", "--lora", "a.safetensors,b.safetensors:2,a.safetensors"])
    assert config.classes == ("ball", "cube")
    assert config.lora == ("a.safetensors", "b.safetensors:2", "a.safetensors")  # as the library fuses them


def test_values_keep_their_underscores_and_equals_signs():
    assert parse_run(["--prompts=a_b = c_d"])[0].prompts == "a_b = c_d"
    assert parse_run(["--out", "my_run"])[0].out == "my_run"


@pytest.mark.parametrize(("value", "is_allowed"), [("-0.1", False), ("0", True), ("1", True), ("1.1", False)])
def test_the_bounds_of_a_number_are_allowed(value, is_allowed):
    if is_allowed:
        assert parse_run(["--ignore-below", value])[0].ignore_below == float(value)
    else:
        with pytest.raises(Refused, match="expected 0 to 1"):
            parse_run(["--ignore-below", value])


@pytest.mark.parametrize("text", ["true", "Yes", "on", "false", "No", "off"])
def test_yes_and_on_are_true_as_in_yaml(text):
    assert flags._truth(text) is (text in ("true", "Yes", "on"))


@pytest.mark.parametrize("line", [["--run", "RUN"], ["--run=RUN"]])
def test_a_setting_that_has_no_flag_is_not_suggested_as_one(line):
    with pytest.raises(Refused, match="gallery: --run is not a flag"):
        flags.parse(line, GalleryConfig, "gallery")


def test_every_type_is_read():
    config, given = parse_run(
        [
            "--task",
            "depth, semantic,depth",
            "--seed",
            "-3",
            "--guidance",
            "2.5",
            "--quiet",
            "--no-json",
            "--classes",
            "",
        ]
    )
    assert config.task == ("depth", "semantic") and config.seed == -3 and config.guidance == 2.5
    assert config.quiet is True and config.json is False and config.classes == ()
    assert given == {"task", "seed", "guidance", "quiet", "json", "classes"}


WRONG = [
    (["--sede", "3"], "unknown flag --sede (did you mean --seed?)"),
    (["--batch"], "unknown flag --batch (did you mean --batch-size?)"),  # no abbreviations
    (["--xyzzy=1"], "unknown flag --xyzzy"),
    (
        ["--task", "semantic,depht"],
        "--task: 'depht' is not one of semantic, instance, depth, pose, open-vocabulary, attention (did you mean",
    ),
    (["--task", ","], "--task: the list is empty"),
    (
        ["--engine", "torhc"],
        "--engine: 'torhc' is not one of auto, torch, fast, ort, openvino, trt (did you mean torch?)",
    ),
    (["--parity", "other"], "--parity: 'other' is not one of dataset-diffusion"),  # no empty name in the list
    (["--seed", "three"], "--seed: 'three' is not a whole number"),
    (["--steps", "2.5"], "--steps: '2.5' is not a whole number"),
    (["--guidance", "nan"], "--guidance: 'nan' is not a finite number"),
    (["--seed"], "--seed: expected one argument"),
    (["--seed", "-5,105"], "--seed: '-5,105' is not a whole number"),
    (["--quiet=yes"], "--quiet"),
    (["a red ball"], "unexpected argument 'a red ball'"),
]


def test_flags_may_stand_between_what_needs_none():
    for line in (["runs/demo", "--dry-run", "3", "7"], ["--dry-run", "runs/demo", "3", "7"]):
        config, _ = flags.parse(line, DropConfig)
        assert config.dry_run and (config.run, config.ids) == ("runs/demo", ("3", "7"))


@pytest.mark.parametrize(("line", "said"), WRONG)
def test_wrong_lines_end_in_two_lines_and_exit_2(line, said, capsys):
    assert run_command(lambda arguments: parse_run(arguments) and None, line) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2
    assert said in err.splitlines()[0] and "--help" in err.splitlines()[1]


def test_a_yaml_file_lies_under_the_flags(tmp_path):
    file = tmp_path / "run.yaml"
    text = "seed: 3\nbatch-size: 2\nguidance: 1e-1\ntask: [depth, pose]\nclasses: a, b\nquiet: true\nonly: 00000003\n"
    file.write_text(text)
    config, given = parse_run(["--config", str(file), "--seed", "9", "--no-quiet"])
    assert (config.seed, config.batch_size, config.guidance, config.quiet) == (9, 2, 0.1, False)
    assert config.task == ("depth", "pose") and config.classes == ("a", "b")
    assert config.only == "00000003"  # YAML would make a number of it
    assert given == {"seed", "batch_size", "guidance", "task", "classes", "quiet", "only"}


@pytest.mark.parametrize("text, value", [("010", 10), ("-1", -1), ("+7", 7), ("08", 8)])
def test_whole_numbers_of_a_yaml_file_are_decimal(text, value, tmp_path):
    (tmp_path / "run.yaml").write_text(f"seed: {text}\n")
    assert parse_run(["--config", str(tmp_path / "run.yaml")])[0].seed == value


@pytest.mark.parametrize("text, value", [("7.5", 7.5), (".5", 0.5), ("5.", 5.0), ("1e-1", 0.1), ("+2.5e+1", 25.0)])
def test_fractions_of_a_yaml_file_are_decimal(text, value, tmp_path):
    (tmp_path / "run.yaml").write_text(f"guidance: {text}\n")
    assert parse_run(["--config", str(tmp_path / "run.yaml")])[0].guidance == value


def test_a_tilde_is_the_home_folder_where_no_shell_has_read_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("out: ~/runs\nlora: [~/a.safetensors, '~b']\n")
    config, _ = parse_run(["--config", str(tmp_path / "run.yaml"), "--decoder=~/a,~/b", "--model", "~"])
    assert (config.out, config.decoder, config.model) == (f"{tmp_path}/runs", f"{tmp_path}/a,{tmp_path}/b", "~")
    assert config.lora == (f"{tmp_path}/a.safetensors", "~b")


def test_an_empty_yaml_file_changes_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert parse_run(["--config", str(tmp_path / "run.yaml")]) == (RunConfig(), set())


WRONG_YAML = [
    ("sed: 3", "unknown setting 'sed' (did you mean seed?)"),
    ("7: 3", "unknown setting '7'"),
    ("task: [depht]", "task: 'depht' is not one of"),
    ("seed: three", "seed: 'three' is not a whole number"),
    ("seed: 1.5", "'1.5' is not a whole number"),
    ("seed: true", "seed: 'true' is not a whole number"),
    ("seed: 1:30", "seed: '1:30' is not a whole number"),  # YAML 1.1 reads 90
    ("seed: 1_0", "seed: '1_0' is not a whole number"),
    ("seed: 0x1f", "seed: '0x1f' is not a whole number"),
    ("guidance: 1_0.5", "guidance: '1_0.5' is not a finite number"),
    ("guidance: 1:30.5", "guidance: '1:30.5' is not a finite number"),
    ("guidance: .inf", "guidance: '.inf' is not a finite number"),
    ("keep: no", "keep: 'no' is not one of"),
    ("quiet: 1", "quiet: '1' is neither true nor false"),
    ("seed:", "seed: '' is not a whole number"),
    ("seed: [1, 2]", "seed: ['1', '2'] has the wrong type"),
    ("- seed", "holds a list, expected settings"),
    ("seed: 1\nnumber: 3\nseed: 2", "is not valid YAML at line 3 (the key 'seed' occurs twice)"),
    ("batch-size: 1\nbatch_size: 2", "has the setting batch_size twice"),
    ("seed: [", "is not valid YAML at line 1"),
    ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    (b"\xff\xfe", "is not valid YAML"),
]


@pytest.mark.parametrize(("text", "said"), WRONG_YAML)
def test_wrong_yaml_is_refused(text, said, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Refused) as refusal:
        parse_run(["--config", str(file)])
    assert said in refusal.value.cause and refusal.value.remedy


def test_a_missing_yaml_file_is_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        parse_run(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("flag", ["model", "decoder"])
def test_an_empty_value_is_not_the_current_folder(flag):
    with pytest.raises(Refused, match=f"--{flag}: no value was given"):
        parse_run([f"--{flag}", ""])


@dataclass(frozen=True)
class Other:
    data: str = field(metadata={"help": "what to read"})
    share: float = field(default=0.5, metadata={"help": "100% means all"})


def test_another_dataclass_makes_another_command(capsys):
    assert flags.parse(["--data", "demo:5@9"], Other, prog="datasetdm-fast evaluate") == (Other("demo:5@9"), {"data"})
    with pytest.raises(Refused, match="datasetdm-fast evaluate: --data is missing"):
        flags.parse([], Other, prog="datasetdm-fast evaluate")
    assert run_command(lambda arguments: flags.parse(arguments, Other) and None, ["--help"]) == 0
    assert "100% means all (default: 0.5)" in capsys.readouterr().out


def test_help_names_every_setting(capsys):
    assert run_command(lambda arguments: parse_run(arguments) and None, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in shown for name in RunConfig.__dataclass_fields__)
    assert run_command(lambda arguments: parse_run(arguments) and None, ["--version"]) == 0
    assert capsys.readouterr().out == f"datasetdm-fast {__version__}\n"


@pytest.mark.parametrize("cls", [RunConfig, TrainConfig, EvaluateConfig, VerifyConfig, ExportConfig])
def test_what_a_command_settles_itself_is_a_flag_of_it(cls):
    assert set(get_annotations(cls)) <= set(cls.FLAGS) and len(set(cls.FLAGS)) == len(cls.FLAGS)


def ends_with(error):
    def command(arguments):
        raise error

    return run_command(command, [])


@pytest.mark.parametrize(("kind", "code"), [(Refused, 2), (Missing, 3), (GateFailed, 4)])
def test_a_no_is_two_lines_and_its_exit_code(kind, code, capsys):
    assert ends_with(kind("the cause\n goes on", "the remedy")) == code
    assert capsys.readouterr().err == "the cause goes on\nthe remedy\n"


def test_bounds_of_a_number_are_told_as_far_as_there_are_any(tmp_path):
    for line, said in (
        (["--threads", "1025"], "--threads 1025: expected at most 1024$"),
        (["--number", "0"], "--number 0: expected 1 or more$"),
        (["--ignore-below", "1.5"], "--ignore-below 1.5: expected 0 to 1$"),
    ):
        with pytest.raises(Refused) as stop:
            parse_run(line)
        assert re.search(said, stop.value.cause)
    assert parse_run(["--threads", "1024"])[0].threads == 1024
    helps = {field.name: flags._help(field) for field in flags.flags_of(RunConfig)}
    assert helps["number"].endswith("(default: 16)") and helps["task"].endswith(
        "(default: semantic,instance,depth,pose)"
    )
    assert "default:" not in helps["shard_size"] and "(default" not in helps["compile"]  # which are told in words
    (tmp_path / "run.yaml").write_text("class: ball\n")
    config, given = flags.parse(["run", "--config", str(tmp_path / "run.yaml"), "--prompt", "a"], EditSettings)
    assert config.class_ == "ball" and given == {"run", "class_", "prompt"}
    with pytest.raises(Refused, match="control characters in the name of a folder"):
        output.check_output("--out", os.fsdecode(b"b\xffd"), "folder")


@pytest.mark.parametrize(
    ("raised", "number", "code"),
    [
        (SystemExit("told"), None, 1),
        (SystemExit(), None, 0),
        (SystemExit(5), None, 5),
        (OSError(errno.ENOSPC, "No space left on device"), None, 3),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), None, 3),
        (OSError(errno.ENOSPC, "No space left on device"), signal.SIGTERM, 3),  # whatever came before it
        (KeyError("an import that was cut short"), signal.SIGTERM, 143),
        (KeyError("an import that was cut short"), signal.SIGINT, 130),
    ],
)
def test_a_command_that_a_signal_ends_amid_anything_has_its_code(raised, number, code, capsys):
    def command(arguments):
        SignalWatch.active.signal = number
        raise raised

    assert run_command(command, []) == code
    assert ("told" in capsys.readouterr().err) == (raised.args == ("told",))


def test_exit_codes_of_success_and_interruption():
    assert run_command(lambda arguments: None, []) == 0
    assert run_command(lambda arguments: 4, []) == 4
    assert ends_with(KeyboardInterrupt()) == 130


def test_a_name_too_long_for_any_file_is_refused_wherever_it_is_met(capsys):
    from datasetdm_fast import audit, prompts

    for line in ((audit.main, ["x" * 300]), (prompts.main, ["--classes", "voc", "--out", "x" * 300])):
        assert line[0](line[1]) == 2
        assert len(capsys.readouterr().err.splitlines()) <= 2


@pytest.mark.parametrize("name", ["", " "])
@pytest.mark.parametrize(
    "line",
    [
        "generate",
        "generate --config",
        "train",
        "prompts --set voc",
        "label x",
        "convert x --to coco",
        "vary x --domain d",
    ],
)
def test_an_output_without_a_name_is_not_the_current_folder(line, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(f"out: '{name}'\n")
    command, *rest = line.split()
    rest += ["run.yaml"] if "--config" in rest else ["--out", name]
    assert cli.main([command, *rest]) == 2
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause.startswith("--out is empty, expected the name of a f") and remedy == "Name one, or leave the flag out."
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("url", ["s3://bucket/run", "memory://run", "file:///run"])
def test_a_url_to_write_to_is_no_folder_of_that_name(url, tmp_path, monkeypatch, capsys):
    from datasetdm_fast import generate, prompts

    monkeypatch.chdir(tmp_path)
    assert generate.main(["--dry-run", "--out", url]) == 2 and "--store" in capsys.readouterr().err
    assert prompts.main(["--set", "voc", "--out", url]) == 2 and "not a URL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO])
def test_a_folder_that_may_not_be_entered_is_no_bug_of_ours(code, tmp_path, capsys):
    folder = tmp_path / f"{'long_' * 20}name"  # whole: the end of a path says which it is
    assert ends_with(OSError(code, os.strerror(code), str(folder))) == 3
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause == f"{folder}: {os.strerror(code)}"
    assert ("the disk" if code == errno.EIO else "its permissions") in remedy


def test_the_file_of_another_image_is_not_suggested_for_one_that_is_not_there(tmp_path):
    from datasetdm_fast.disk import storage

    (tmp_path / "masks").mkdir()
    for name in ("000.png", "001.png", "011.png"):
        (tmp_path / "masks" / name).touch()
    assert storage.named_alike(tmp_path / "masks" / "010.png") == ""
    assert storage.named_alike(tmp_path / "masks" / "001.jpg") == " (did you mean 001.png?)"
    assert storage.named_alike(tmp_path / "mask2") == " (did you mean masks?)"
    (tmp_path / "masks" / "e\u0301tude.png").touch()  # as a Mac writes an é
    unlike = " (its name there has its accents in another Unicode form, NFC or NFD: rename it)"
    assert storage.named_alike(tmp_path / "masks" / "\u00e9tude.png") == unlike
    (tmp_path / "mask2.log").touch()
    assert storage.named_alike(tmp_path / "mask2" / "001.png") == " (did you mean masks?)"  # a folder is missing
    (link := tmp_path / "mask3").symlink_to(tmp_path / "gone")
    assert storage.named_alike(link) == " (it is a symbolic link that leads nowhere)"
    assert storage.named_alike(link / "001.png") == f" ({link} is a symbolic link that leads nowhere)"


def test_a_file_that_is_not_there_is_told_from_one_of_nearly_its_name(tmp_path, capsys):
    from datasetdm_fast import audit, train

    (tmp_path / "runs").mkdir()
    (tmp_path / "photos").mkdir()
    assert audit.main([str(tmp_path / "rusn")]) == 2 and "did you mean runs?" in capsys.readouterr().err
    line = ["--data", f"folder:{tmp_path / 'photo'}", "--model", "tiny", "--dry-run"]
    assert train.main(line) == 2 and "did you mean photos?" in capsys.readouterr().err
    assert train.main(["--model", "dmeo", "--dry-run"]) == 2 and "did you mean demo?" in capsys.readouterr().err
    assert train.main(["--data", "demo:9", "--only-classes", "bal", "--model", "tiny", "--dry-run"]) == 2
    assert "did you mean ball?" in capsys.readouterr().err


def test_one_of_a_thing_is_in_the_singular():
    assert [count_noun(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert count_noun(1, "batch", "batches") == "1 batch" and count_noun(3, "batch", "batches") == "3 batches"


def test_tqdm_disable_leaves_lines_in_place_of_bars(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert shows_bar(False) and not shows_bar(True)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(output, "SECONDS_PER_LINE", 0.0)
    assert not shows_bar(False)
    with output.ImageProgress(2, False) as images:
        images.on_commit(1)
        images.on_commit(2)  # more than the share of this process
    assert capsys.readouterr().err == "1/2 images, 50%\n3/3 images, 100%\n"


def test_a_bar_counts_calls_images_and_steps_and_has_lines_above_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.ImageProgress(4, False, batch=4, calls=2) as images:
        images.print("a line")
        images.on_unet_call(2)
        images.on_commit(3)
        images.on_unet_call()  # of a batch in the place of what was set aside
        assert (images._bar.n, images._bar.total, images._bar.desc) == (3, 4, "3/4 images: ")
    assert "a line\n" in capsys.readouterr().err
    with output.StepProgress("semantic", "mIoU", 6, False) as steps:
        steps.on_step(1, 0.5, 0.25)
        steps.on_step(4, 0.125, None)
        assert steps._bar.n == 4 and steps._bar.postfix == "loss 0.1250, held-out mIoU 0.2500"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(9.94, "9.9 s"), (10, "10 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h")],
)
def test_a_duration_has_the_unit_that_suits_it(seconds, told):
    assert format_duration(seconds) == told


def test_progress_is_never_more_than_all_of_it(monkeypatch, capsys):
    """Nor where samples were set aside, so that further batches are made than were planned."""
    monkeypatch.setattr(output, "SECONDS_PER_LINE", 0.0)
    with output.ImageProgress(4, False, batch=4, calls=2) as images:
        images.on_unet_call(2)
        images.on_commit(3)
        images.on_unet_call()
    assert [line.split(", about")[0] for line in capsys.readouterr().err.splitlines()] == [
        "0/4 images, 100%",
        "3/4 images, 75%",
    ]


def test_the_last_batch_counts_and_the_time_left_is_that_of_what_is_left(monkeypatch, capsys):
    seconds = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: seconds[0])
    with output.ImageProgress(5, False, batch=2, calls=3) as images:
        seconds[0] = 60.0  # until the model is loaded
        images.on_unet_call()  # of 9
        seconds[0] = 70.0
        images.on_unet_call(2)
    assert capsys.readouterr().err == "0/5 images, 11%\n0/5 images, 33%, about 30 s left\n"


def test_comparisons_before_a_run_show_progress_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(output, "SECONDS_PER_LINE", 0.0)
    with output.CountProgress(False, "fast25", 2) as on_call:
        on_call()
        assert capsys.readouterr().err == "fast25, 1/2 calls\n"  # whose time is mostly that of loading
    with output.CountProgress(False, "folder:photos", 0, "image") as images:
        images.on_count(0, 8)
        images.on_count(4, 8)
    assert capsys.readouterr().err == "folder:photos, 4/8 images, about 0.0 s left\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.CountProgress(False, "photos", 0, "image") as images:  # whose number is not known yet
        images.on_count(8, 8)
    assert "8/8" in (shown := capsys.readouterr().err) and shown.count("\n") == 1 and shown.endswith("\n")
    print_lines(VerifyConfig())
    assert capsys.readouterr().err == ""


def test_a_training_counts_its_time_from_the_end_of_the_first_step(monkeypatch, capsys):
    now = iter([0.0, 90.0, 90.0, 100.0, 100.0, 400.0, 400.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(now))
    with output.StepProgress("semantic", "mIoU", 6, False) as steps:
        for step in (1, 2, 6):
            steps.on_step(step, 0.5, None)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "semantic 1/6, loss 0.5000",
        "semantic 2/6, loss 0.5000, about 40 s left",
        "semantic 6/6, loss 0.5000",
    ]
    now = iter([0.0, 90.0, 90.0, 100.0, 100.0])
    with output.StepProgress("semantic", "mIoU", 6, False, later=5) as steps:
        steps.on_step(1, 0.5, None)
        steps.on_step(2, 0.25, 0.75)
    told = "semantic 2/6, loss 0.2500, held-out mIoU 0.7500, about 40 s left, 90 s with what follows"
    assert capsys.readouterr().err.splitlines() == ["semantic 1/6, loss 0.5000", told]


def test_the_last_step_of_a_training_is_told_however_soon_it_comes(monkeypatch, capsys):
    monkeypatch.setattr(output.time, "monotonic", lambda: 0.0)
    with output.StepProgress("depth", "AbsRel", 3, False) as steps:
        for step in (1, 2, 3):
            steps.on_step(step, 0.25, 0.5 if step == 2 else None)
    assert capsys.readouterr().err == "depth 3/3, loss 0.2500, held-out AbsRel 0.5000\n"


def test_a_path_may_not_be_too_long_with_the_folder_that_it_begins_in(monkeypatch):
    monkeypatch.setattr(output.Path, "absolute", lambda self: Path("/a" * 1790 + f"/{self}"))
    output.check_output("--out", "b", "folder")
    with pytest.raises(Refused, match="--out 'bbbbb.': .* at most 223 and 3584"):
        output.check_output("--out", "bbbbbb", "folder")


def test_the_plan_of_a_comparison_counts_the_calls_of_its_last_batch(monkeypatch, capsys):
    """Five images in batches of four, each drawn three times in six calls."""
    recipe = SimpleNamespace(schedule=range(6))
    monkeypatch.setattr("datasetdm_fast.runs.agreement.comparing.open_pair", lambda *_: (None, None))
    monkeypatch.setattr("datasetdm_fast.runs.agreement.comparing.choose_requests", lambda *_: (recipe, range(5)))
    assert verify.main(["--number", "5", "--batch-size", "4", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"number": 5, "calls": 36, "engine": "fast", "against": "torch"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_flags_and_values(shell, capsys, tmp_path):
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS) and "no-quiet" in script and "openvino" in script
    if shell == "bash":
        (tmp_path / "bash").write_text(script)
        (tmp_path / "lines.txt").touch()
        for words, matches in (
            ("ge", ["generate"]),
            ("train --imag", ["--images"]),
            ("generate --engine f", ["fast"]),
            ("verify --no-qu", ["--no-quiet"]),
            ("generate --prompts li", ["lines.txt"]),
        ):
            count = len(words.split())
            call = f'COMP_WORDS=(datasetdm-fast {words}); COMP_CWORD={count}; COMP_LINE="datasetdm-fast {words}"; '
            call += '_shtab_datasetdm_fast; echo "${COMPREPLY[@]}"'
            line = ["bash", "-c", f"source {tmp_path}/bash; {call}"]
            ended = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
            assert ended.stdout.split() == matches and not ended.stderr


def test_completion_names_the_shells_that_there_are(capsys):
    pytest.importorskip("shtab")
    for shell, said in (("bsh", "unknown shell 'bsh' (did you mean bash?)"), ("", "unknown shell ''")):
        assert cli.main(["completion", *([shell] if shell else [])]) == 2
        cause, remedy = capsys.readouterr().err.splitlines()
        assert said in cause and "bash" in remedy and "zsh" in remedy


def test_what_a_command_needs_first_is_told(monkeypatch, capsys, tmp_path):
    from datasetdm_fast import convert, example, export_cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export_cli, "find_spec", lambda name: None)
    monkeypatch.setattr("datasetdm_fast.runs.exporting.hf.check_hub", lambda name: None)
    monkeypatch.setattr(convert, "open_target", lambda place: (tmp_path / "x", object()))
    for command, line, code, said in (
        (example.main, [], 2, "FOLDER is missing"),
        (export_cli.main, ["--out", "graphs"], 3, "export: the library onnx is not installed"),
        (convert.main, ["s3://bucket/run", "--to", "coco"], 2, "--out is missing"),
        (convert.main, ["x", "--to", "coco", "--out", "y", "--push-to-hub", "a/b"], 2, "the export is made at y"),
        (convert.main, ["x", "--to", "pth", "--out", "weights"], 2, "expected a file such as latest_checkpoint.pth"),
    ):
        assert command(line) == code
        cause, remedy = capsys.readouterr().err.splitlines()
        assert said in cause and remedy
    assert not list(tmp_path.iterdir())


def test_the_version_is_told_alone(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"datasetdm-fast {__version__}\n"


def test_completion_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 3
    assert "shtab is not installed" in capsys.readouterr().err


def test_a_bug_leaves_a_report_and_no_traceback_on_the_screen(capsys, tmp_path_factory, tmp_path, monkeypatch):
    assert Path(tempfile.gettempdir()).is_relative_to(tmp_path_factory.getbasetemp())  # that of all other tests
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ends_with(KeyError("lost\nkey")) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    report = Path(err.split("the report is ")[1].strip())
    assert report.parent == tmp_path and "Traceback" in report.read_text() and __version__ in report.read_text()


def test_a_bug_where_no_report_can_be_written_is_shown_with_its_traceback(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert ends_with(KeyError("lost")) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "KeyError: 'lost'" in err and "report" not in err


def test_a_broken_pipe_under_a_closed_output_is_not_taken_for_its_end(monkeypatch):
    for stream in (io.StringIO(), open(os.devnull, "w")):
        stream.close()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert not ending._is_output_closed()


def test_a_disk_that_fails_under_a_place_for_results_is_no_bug_of_ours(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("datasetdm_fast.command_line.output._check_place", fail)
    assert cli.main(["prompts", "--set", "voc", "--out", str(tmp_path / "x.jsonl")]) == 3
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause == f"--out {tmp_path / 'x.jsonl'}: {os.strerror(errno.EIO)}" and "permissions" in remedy


def child(code, **options):
    imports = "import os, sys, time\nfrom datasetdm_fast.command_line.ending import run_command"
    lines = f"{imports}\n{code}\nsys.exit(run_command(command))"
    return subprocess.Popen(
        [sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(("raised", "code"), [("Refused('no', 'do')", 2), ("OSError(28, 'No space left')", 3)])
def test_where_no_message_can_be_written_the_exit_code_still_tells(raised, code):
    body = f"from datasetdm_fast.errors import Refused\ndef command(_):\n    raise {raised}"
    with open("/dev/full", "w") as full:
        lines = f"import sys\nfrom datasetdm_fast.command_line.ending import run_command\n{body}"
        lines += "\nsys.exit(run_command(command))"
        assert subprocess.run([sys.executable, "-c", lines], stderr=full).returncode == code


def test_sigterm_unwinds_and_exits_143():
    code = """
def command(arguments):
    try:
        print('ready', flush=True)
        time.sleep(60)
    finally:
        print('unwound', flush=True)
"""
    with child(code) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, "unwound\n", "interrupted; run the same command again\n")


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_goes_away_is_not_reported(flush):
    code = f"""
def command(arguments):
    sys.stdin.read()
    print('x' * 1000, flush={flush})
"""
    with child(code, stdin=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert (process.returncode, err) == (141, "")


def test_nor_is_one_of_messages(tmp_path):
    code = """
def command(arguments):
    sys.stdin.read()
    print('x' * 1000, file=sys.stderr, flush=True)
"""
    with child(code, stdin=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        process.stderr.close()
        process.stdin.close()
        assert (process.wait(timeout=60), process.stdout.read()) == (141, "")
    assert not list(tmp_path.iterdir())  # no report of a bug


def test_another_broken_pipe_is_reported(tmp_path):
    code = """
def command(arguments):
    read, write = os.pipe()
    os.close(read)
    os.write(write, b'x')
"""
    with child(code, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "BrokenPipeError" in err
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", [Refused, Missing, GateFailed])
def test_a_refusal_has_a_cause_and_a_remedy_also_after_pickling(kind):
    with pytest.raises(TypeError, match="remedy"):
        kind("--size 7: too small")
    read = pickle.loads(pickle.dumps(kind("--size 7: too small", "Try --size 64.")))
    assert (type(read), read.cause, read.remedy) == (kind, "--size 7: too small", "Try --size 64.")
    assert str(read) == "--size 7: too small\nTry --size 64."


def test_a_name_too_long_for_a_file_ends_in_two_lines(tmp_path, capsys):
    assert run_command(lambda _: (tmp_path / ("x" * 300)).read_bytes(), []) == 2
    cause, remedy = capsys.readouterr().err.splitlines()
    assert "no file or folder has so long a name" in cause and remedy == "Choose a shorter name."


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("engine.labels.class_tables", 2, "a part of the library, not a command"),
        ("engine.loop", 2, "a part of the library, not a command"),
        ("no_such", 1, "No module named"),
    ],
)
def test_a_module_without_a_command_says_so(module, code, said):
    ended = subprocess.run([sys.executable, "-m", f"datasetdm_fast.{module}"], capture_output=True, text=True)
    assert ended.returncode == code and said in ended.stderr


@pytest.mark.parametrize("module", ["datasetdm_fast.convert", "datasetdm_fast"])
def test_a_python_without_the_libraries_is_named_with_the_remedy(module):
    line = [sys.executable, "-S", "-m", module, "convert"]  # -S: no folder of installed packages
    ended = subprocess.run(line, capture_output=True, text=True, cwd=Path(datasetdm_fast.__file__).parent.parent)
    cause, remedy = ended.stderr.splitlines()
    assert ended.returncode == 3 and cause.startswith(f"{sys.executable}: the libraries")
    assert "source .venv/bin/activate" in remedy


def test_help_is_given_without_docstrings():
    line = [sys.executable, "-OO", "-m", "datasetdm_fast.merge", "--help"]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.startswith("usage: python -m datasetdm_fast.merge ")


def test_a_current_folder_that_is_gone_ends_in_two_lines(tmp_path, capsys, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_command(lambda _: len(os.getcwd()), []) == 3
    assert capsys.readouterr().err.splitlines()[0] == "the current folder is no longer there"


def test_a_file_that_is_gone_is_named_where_the_current_folder_is_there(tmp_path, capsys, monkeypatch):
    assert run_command(lambda _: len((tmp_path / "gone.txt").read_bytes()), []) == 3
    assert capsys.readouterr().err.splitlines()[0] == f"{tmp_path}/gone.txt: No such file or directory"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_command(lambda _: len(Path("file.txt").read_bytes()), []) == 3
    assert capsys.readouterr().err.splitlines()[0] == "the current folder is no longer there"


def test_a_machine_without_a_temporary_folder_is_named(capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/none"])
    assert run_command(lambda _: len(tempfile.mkdtemp()), []) == 3
    assert capsys.readouterr().err.splitlines()[0] == "No usable temporary directory found in ['/none']"


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), BlockingIOError(errno.EAGAIN, "fork")])
def test_a_limit_of_threads_or_processes_is_no_bug(capsys, error):
    assert run_command(Mock(side_effect=error), []) == 3
    assert capsys.readouterr().err.startswith("this machine or container starts no more threads or processes\n")


FIRST = """import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(7)
sys.meta_path.insert(0, Finder())
from datasetdm_fast import cli
sys.exit(cli.main())"""


@pytest.mark.parametrize("line", ["verify", "serve --port 0", "generate --gpus 1", "train --data demo:8 --out decoder"])
def test_every_command_says_how_threads_wait_before_torch_is_imported(tmp_path, line):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", FIRST, *line.split(), "--quiet"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (7, "PASSIVE\n"), ended.stderr


def test_letters_that_a_locale_lacks_are_refused_with_the_way_to_have_them():
    with pytest.raises(Refused, match="or letters that the locale lacks") as stop:
        output.check_output("--out", "l\udcc3\udcb6we", "folder")
    assert stop.value.remedy == "Choose another name, or set PYTHONUTF8=1."


def test_a_sample_that_would_be_made_again_is_only_told(capsys):
    settings = RunConfig(dry_run=True, json=True)
    assert output.remake_sample(settings, "run", "00000003", None) == 0
    told = capsys.readouterr()
    assert '"id": "00000003"' in told.out and '"written": []' in told.out
