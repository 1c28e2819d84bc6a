"""Plans on the disk: only what its manifest describes is used, and one build serves every process that waits."""

import dataclasses
import multiprocessing
import os
import time

import numpy as np
import pytest

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.tensorrt import flavours, plans

pytestmark = pytest.mark.core

ORDER = plans.PlanOrder(
    stage="denoise",
    batch=1,
    source="e" * 64,
    graph="a" * 64,
    shapes={"latents": (1, 4, 16, 16)},
    precision="fp16",
    flavour="tensorrt-rtx",
    version="1.7.1.116",
    cuda="13",
    capabilities=("sm89",),
)
CONTENT = bytes(range(256)) * 3
NOTES = {"layers": 7, "fused_attentions": 0, "seconds": 0.1}
GOLDEN = {"in.latents": np.ones((1, 4), np.float32), "out.noise": np.zeros((2, 4), np.float32)}


class Builder:
    """Writes `content` and counts how often it was asked."""

    def __init__(self, content: bytes = CONTENT):
        self.content, self.built = content, 0

    def __call__(self, part):
        self.built += 1
        part.write_bytes(self.content)
        return NOTES, GOLDEN


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(flavours, "find_flavour", lambda *_: flavours.Flavour("tensorrt-rtx", ORDER.version, "13"))
    told: list[str] = []
    opened = plans.PlanFolder(tmp_path / "engines", told.append)
    opened.told = told
    return opened


def test_a_plan_is_built_once_and_read_back_as_it_was(folder):
    builder = Builder()
    first, second = folder.open_or_build(ORDER, builder), folder.open_or_build(ORDER, builder)
    assert builder.built == 1 and first.content == second.content == CONTENT
    assert second.notes["layers"] == 7
    np.testing.assert_array_equal(second.golden["in.latents"], GOLDEN["in.latents"])
    assert not folder.told and not list(folder.folder.glob("*.part"))


def test_every_field_of_an_order_has_a_plan_of_its_own():
    changed = {
        "stage": "decode_image",
        "source": "f" * 64,
        "graph": "b" * 64,
        "batch": 2,
        "shapes": {"latents": (2, 4, 16, 16)},
        "precision": "fp32",
        "flavour": "tensorrt",
        "version": "1.7.2",
        "cuda": "12",
        "capabilities": ("sm120",),
        "gpu": "NVIDIA H200",
        "format": 3,
    }
    assert set(changed) == {field.name for field in dataclasses.fields(plans.PlanOrder)}
    keys = {dataclasses.replace(ORDER, **{name: value}).name for name, value in changed.items()}
    assert len(keys) == len(changed) and ORDER.name not in keys


def test_a_flipped_byte_anywhere_is_refused_and_the_plan_built_again(folder):
    builder = Builder()
    path = folder.open_or_build(ORDER, builder).path
    for place in (path, path.with_name(f"{path.name}.json"), plans.sibling(path, plans.GOLDEN)):
        whole = place.read_bytes()
        for at in range(0, len(whole), 7):
            place.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            try:
                assert folder.read(ORDER).content == CONTENT and place.suffix == ".json"  # a note, such as the seconds
            except (Missing, Refused):
                pass
        place.write_bytes(whole)
    path.write_bytes(b"x" + CONTENT[1:])
    assert folder.open_or_build(ORDER, builder).content == CONTENT and builder.built == 2
    assert folder.told == [
        f"{path}: it is truncated or modified, as its digest is not that of its manifest; it is rebuilt"
    ]


@pytest.mark.parametrize("length", [0, 13, len(CONTENT) - 1])
def test_a_truncated_plan_is_refused(folder, length):
    path = folder.open_or_build(ORDER, Builder()).path
    path.write_bytes(CONTENT[:length])
    with pytest.raises(Refused, match="truncated"):
        folder.read(ORDER)
    path.write_bytes(CONTENT + b"\0")
    with pytest.raises(Refused, match="truncated or modified"):
        folder.read(ORDER)


def rename_plan(folder, old, new):
    for suffix in plans.SUFFIXES:
        plans.sibling(folder.path(old), suffix).rename(plans.sibling(folder.path(new), suffix))


def test_the_plan_of_another_model_under_the_same_name_is_refused(folder):
    other = dataclasses.replace(ORDER, graph="b" * 64)
    builder = Builder()
    folder.open_or_build(other, Builder(b"other"))
    rename_plan(folder, other, ORDER)
    assert folder.open_or_build(ORDER, builder).content == CONTENT and builder.built == 1
    (message,) = folder.told
    assert f"its manifest is that of another plan, {other.name}" in message


def test_a_manifest_that_was_changed_to_fit_the_order_alone_is_refused(folder):
    stale = dataclasses.replace(ORDER, version="1.6.0")
    path = folder.open_or_build(stale, Builder(b"stale")).path
    place = path.with_name(f"{path.name}.json")
    place.write_text(place.read_text().replace("1.6.0", "1.7.1.116"))
    with pytest.raises(Refused, match="its manifest is that of another plan"):
        folder.read(stale)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"facts": {}, "notes": {}, "sha256": {}}', "[" * 10_000, "\0"])
def test_a_manifest_of_another_program_is_refused(folder, text):
    path = folder.open_or_build(ORDER, Builder()).path
    path.with_name(f"{path.name}.json").write_text(text)
    with pytest.raises(Refused):
        folder.read(ORDER)


def test_a_modified_or_missing_golden_output_makes_the_plan_unusable(folder):
    path = plans.sibling(folder.open_or_build(ORDER, Builder()).path, plans.GOLDEN)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Refused, match="golden.safetensors: it is truncated or modified"):
        folder.read(ORDER)
    path.unlink()
    with pytest.raises(Refused, match="there is no such file"):
        folder.read(ORDER)


def test_the_content_handed_out_is_the_one_that_was_checked(folder):
    path = folder.open_or_build(ORDER, Builder()).path
    plan = folder.read(ORDER)
    path.write_bytes(b"something else")
    assert plan.content == CONTENT


def test_a_failed_build_leaves_nothing(folder):
    def fails(part):
        part.write_bytes(b"half")
        raise Refused("denoise: no", "Try another precision.")

    with pytest.raises(Refused):
        folder.open_or_build(ORDER, fails)
    assert [path.name for path in folder.folder.iterdir()] == [".lock"]


# Several processes ----------------------------------------------------------------------------------------------------


def _ask(folder, log, start):
    def build(part):
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return Builder()(part)

    start.wait()
    told: list[str] = []
    plan = plans.PlanFolder(folder, told.append).open_or_build(ORDER, build)
    with open(log, "a") as file:
        file.write(f"{len(plan.content)} {len(told)}\n")


def test_eight_processes_make_one_build(tmp_path):
    context = multiprocessing.get_context("fork")
    start, log = context.Event(), tmp_path / "log"
    processes = [context.Process(target=_ask, args=(tmp_path / "engines", log, start)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = log.read_text().split("\n")
    assert lines.count("built") == 1
    assert sum(line.startswith(f"{len(CONTENT)} ") for line in lines) == 8


def test_a_builder_that_was_killed_does_not_block_the_next(folder):
    context = multiprocessing.get_context("fork")

    def dies():
        folder.open_or_build(ORDER, lambda part: os._exit(9))

    process = context.Process(target=dies)
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert folder.open_or_build(ORDER, Builder()).content == CONTENT


# What lies in a folder ------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_plan_is_told(folder):
    broken = folder.open_or_build(dataclasses.replace(ORDER, stage="encode_text"), Builder()).path
    broken.write_bytes(broken.read_bytes()[:-1])
    moved = dataclasses.replace(ORDER, graph="c" * 64)
    folder.open_or_build(moved, Builder())
    wrong = dataclasses.replace(ORDER, graph="d" * 64)
    rename_plan(folder, moved, wrong)
    for path, told in ((broken, "truncated"), (folder.path(wrong), "its manifest is that of another plan")):
        with pytest.raises(Refused, match=told):
            plans.read_plan(path)


def test_links_and_pipes_in_the_place_of_plans_are_neither_waited_for_nor_used(folder):
    path = folder.open_or_build(ORDER, Builder()).path
    beside = path.with_name("encode_text-0123456789abcdef.plan")
    beside.symlink_to("nowhere")
    with pytest.raises(Missing, match="its manifest is missing"):
        plans.read_plan(beside)
    path.unlink()
    os.mkfifo(path)
    builder = Builder()
    assert folder.open_or_build(ORDER, builder).content == CONTENT and builder.built == 1
    assert folder.told == [f"{path}: there is no such file; it is rebuilt"]
    real = path.rename(folder.folder / "elsewhere")
    path.symlink_to(real)
    assert folder.open_or_build(ORDER, builder).content == CONTENT and builder.built == 1  # where it lies is all one
