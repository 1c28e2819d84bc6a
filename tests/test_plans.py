"""Plans on the disk: nothing but what was sealed with this user's key is ever handed out, and one build serves every
process that waits.
"""

import dataclasses
import multiprocessing
import os
import struct
import time

import numpy as np
import pytest

from datasetdm_fast.errors import Refused
from datasetdm_fast.export.tensorrt import plans, sealed

ORDER = plans.PlanOrder(
    stage="denoise",
    source="e" * 64,
    graph="a" * 64,
    profiles=({"latents": ((1, 4, 16, 16), (1, 4, 16, 16), (1, 4, 16, 16))},),
    precision="fp16",
    flavour="tensorrt-rtx",
    version="1.7.1.116",
    cuda="13",
    capabilities=("sm89",),
)
CONTENT = bytes(range(256)) * 3
GOLDEN = {"in.latents": np.ones((1, 4), np.float32), "out.noise": np.zeros((2, 4), np.float32)}


@pytest.fixture(autouse=True)
def key_file(tmp_path, monkeypatch):
    monkeypatch.setenv(sealed.KEY_VARIABLE, str(tmp_path / "private" / "plan.key"))
    return tmp_path / "private" / "plan.key"


class Builder:
    """Writes `content` and counts how often it was asked."""

    def __init__(self, content: bytes = CONTENT):
        self.content, self.built = content, 0

    def __call__(self, part):
        self.built += 1
        part.write_bytes(self.content)
        return {"layers": 7, "seconds": 0.1}, GOLDEN


@pytest.fixture
def folder(tmp_path):
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
        "profiles": ({"latents": ((1, 4, 16, 16), (2, 4, 16, 16), (2, 4, 16, 16))},),
        "precision": "fp32",
        "flavour": "tensorrt",
        "version": "1.7.2",
        "cuda": "12",
        "capabilities": ("sm120",),
        "flags": ("refit",),
        "gpu": "NVIDIA H200",
        "format": 2,
    }
    assert set(changed) == {field.name for field in dataclasses.fields(plans.PlanOrder)}
    keys = {dataclasses.replace(ORDER, **{name: value}).key for name, value in changed.items()}
    assert len(keys) == len(changed) and ORDER.key not in keys


def test_a_flipped_byte_anywhere_is_refused_and_the_plan_built_anew(folder):
    builder = Builder()
    path = folder.open_or_build(ORDER, builder).path
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(plans.Unusable):
            folder.read(ORDER)
    assert folder.open_or_build(ORDER, builder).content == CONTENT and builder.built == 2
    assert len(folder.told) == 1 and "edited" in folder.told[0] and folder.told[0].endswith("rebuilt")


def test_a_plan_cut_anywhere_is_refused(folder):
    path = folder.open_or_build(ORDER, Builder()).path
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(plans.Unusable, match="truncated|foreign"):
            folder.read(ORDER)
    path.write_bytes(whole + b"\0")
    with pytest.raises(plans.Unusable, match="too long"):
        folder.read(ORDER)


def test_the_plan_of_another_model_under_the_same_name_is_refused_with_what_differs(folder):
    other = dataclasses.replace(ORDER, graph="b" * 64)
    builder = Builder()
    there = folder.open_or_build(other, Builder(b"other")).path
    there.rename(folder.path(ORDER))
    plans.golden_path(there).rename(plans.golden_path(folder.path(ORDER)))
    assert folder.open_or_build(ORDER, builder).content == CONTENT and builder.built == 1
    (said,) = folder.told
    assert "was made for something else (graph bbbbbbb" in said and "expected aaaaaaa" in said


def test_a_stale_plan_names_the_version_it_was_built_with(folder):
    stale = folder.open_or_build(dataclasses.replace(ORDER, version="1.6.0"), Builder(b"stale")).path
    os.replace(stale, folder.path(ORDER))
    with pytest.raises(plans.Unusable, match="version 1.6.0, expected 1.7.1.116"):
        folder.read(ORDER)


def test_a_foreign_file_and_a_claim_of_a_huge_header_are_refused(folder):
    folder.folder.mkdir()
    path = folder.path(ORDER)
    path.write_bytes(b"vtrt" + bytes(4096))
    with pytest.raises(plans.Unusable, match="foreign"):
        folder.read(ORDER)
    path.write_bytes(sealed.MAGIC + struct.pack("<I", 1 << 31) + bytes(64))
    with pytest.raises(plans.Unusable, match="claims 2147483648 bytes"):
        folder.read(ORDER)


def test_a_plan_sealed_with_another_key_is_refused(folder, key_file):
    folder.open_or_build(ORDER, Builder())
    key_file.unlink()
    with pytest.raises(plans.Unusable, match="sealed with a key that is not"):
        plans.PlanFolder(folder.folder).read(ORDER)


def test_an_edited_or_missing_golden_output_makes_the_plan_unusable(folder):
    path = plans.golden_path(folder.open_or_build(ORDER, Builder()).path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(plans.Unusable, match="golden.safetensors was edited"):
        folder.read(ORDER)
    path.unlink()
    with pytest.raises(plans.Unusable, match="lacks its golden output"):
        folder.read(ORDER)


def test_the_payload_handed_out_is_the_one_that_was_checked(folder, monkeypatch):
    path = folder.open_or_build(ORDER, Builder()).path
    plan = folder.read(ORDER)
    path.write_bytes(b"something else")
    assert plan.content == CONTENT


def test_a_payload_beyond_the_cap_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "LARGEST_PAYLOAD", 10)
    with pytest.raises(Refused, match="11 bytes are more than"):
        sealed.write(tmp_path / "x.plan", {}, bytes(11), b"k" * 32)
    assert not (tmp_path / "x.plan").exists()


def test_a_failed_build_leaves_nothing(folder):
    def fails(part):
        part.write_bytes(b"half")
        raise Refused("denoise: no", "Try another precision.")

    with pytest.raises(Refused):
        folder.open_or_build(ORDER, fails)
    assert [path.suffix for path in folder.folder.iterdir()] == [".lock"]


# The key --------------------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_is_the_users_own(key_file):
    first = sealed.load_key()
    assert sealed.load_key() == first and len(first) == 32
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in key_file.parent.iterdir()] == ["plan.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_key_that_others_can_reach_is_refused(key_file, mode):
    sealed.load_key()
    key_file.chmod(mode)
    with pytest.raises(Refused, match=f"permissions {mode:04o}, expected 0600"):
        sealed.load_key()


def test_a_key_behind_a_link_or_of_another_length_is_refused(key_file, tmp_path):
    key = sealed.load_key()
    key_file.rename(tmp_path / "elsewhere")
    key_file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="cannot be read"):
        sealed.load_key()
    key_file.unlink()
    key_file.write_bytes(key[:16])
    key_file.chmod(0o600)
    with pytest.raises(Refused, match="has 16 bytes, expected 32"):
        sealed.load_key()


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


def test_eight_processes_make_one_key_and_one_build(tmp_path):
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


def test_entries_say_what_each_plan_is_and_what_is_wrong_with_it(folder):
    good = folder.open_or_build(ORDER, Builder()).path
    broken = folder.open_or_build(dataclasses.replace(ORDER, stage="encode_text"), Builder()).path
    broken.write_bytes(broken.read_bytes()[:-1])
    moved = folder.open_or_build(dataclasses.replace(ORDER, graph="c" * 64), Builder()).path
    wrong = folder.path(dataclasses.replace(ORDER, graph="d" * 64))
    moved.rename(wrong)
    plans.golden_path(moved).rename(plans.golden_path(wrong))
    found = {entry.path: entry for entry in folder.entries()}
    assert not found[good].fault and found[good].facts["capabilities"] == ["sm89"] and found[good].notes["layers"] == 7
    assert "truncated" in found[broken].fault
    assert "carries another plan's name" in found[wrong].fault


def test_links_and_pipes_in_the_place_of_plans_are_neither_waited_for_nor_used(folder):
    path = folder.open_or_build(ORDER, Builder()).path
    beside = path.with_name("encode_text-0123456789abcdef.plan")
    beside.symlink_to("nowhere")
    assert [entry.fault for entry in folder.entries() if entry.path == beside] == [f"{beside} is a link to nothing"]
    path.unlink()
    os.mkfifo(path)
    builder = Builder()
    assert folder.open_or_build(ORDER, builder).content == CONTENT and builder.built == 1
    assert folder.told == [f"{path} is not a regular file; it is not loaded but rebuilt"]
    real = path.rename(folder.folder / "elsewhere")
    path.symlink_to(real)
    assert (
        folder.open_or_build(ORDER, builder).content == CONTENT and builder.built == 1
    )  # where a sealed file lies does not matter
    removed = plans.prune([(folder, lambda facts: "")], 1 << 30)
    assert [path for path, _ in removed] == [beside] and not beside.is_symlink()


def test_prune_removes_what_cannot_be_used_and_the_least_recently_used_beyond_the_cap(folder):
    made = [folder.open_or_build(dataclasses.replace(ORDER, graph=letter * 64), Builder()).path for letter in "abcd"]
    for age, path in enumerate(made):
        os.utime(path, (1000 - age, 1000 - age))
    made[0].write_bytes(b"")
    orphan = folder.folder / "denoise-0123456789abcdef.golden.safetensors"
    left = folder.folder / "denoise-0123456789abcdef.compiled"
    for path in (orphan, left, *map(plans.compiled_path, made[1:3])):
        path.write_bytes(b"")
    size = made[1].stat().st_size
    removed = dict(plans.prune([(folder, lambda facts: "stale" if facts["graph"][0] == "b" else "")], size))
    assert (
        "foreign" in removed[made[0]]
        and removed[made[1]] == "stale"
        and f"beyond the {size} bytes" in removed[made[3]]
        and {orphan, left} <= set(removed)
    )
    assert [path.name for path in sorted(folder.folder.iterdir())] == sorted(
        [made[2].name, *(f(made[2]).name for f in (plans.golden_path, plans.compiled_path)), made[2].stem + ".lock"]
    )


def test_the_cap_holds_for_all_folders_together(folder, tmp_path):
    """Every model has a folder of its own in the cache, so a cap for each would limit nothing."""
    other = plans.PlanFolder(tmp_path / "other", folder.told.append)
    old, new = (one.open_or_build(ORDER, Builder()).path for one in (folder, other))
    os.utime(old, (1000, 1000))
    size = new.stat().st_size
    removed = plans.prune([(one, lambda facts: "") for one in (folder, other)], size, is_dry=True)
    assert removed == [(old, f"beyond the {size} bytes that are kept")] and old.exists()
    plans.prune([(one, lambda facts: "") for one in (folder, other)], size)
    assert not old.exists() and new.exists()


def test_files_of_other_programs_are_neither_shown_nor_deleted(folder):
    """`terraform plan -out x.plan` writes such files, too."""
    mine = folder.open_or_build(ORDER, Builder()).path
    copy = mine.with_name("mine.plan")
    copy.write_bytes(mine.read_bytes())
    theirs = [folder.folder / name for name in ("x.plan", "denoise-1.plan", "y.compiled", "z.golden.safetensors")]
    for path in theirs:
        path.write_bytes(b"of another program")
    (folder.folder / "folder.plan").mkdir()
    assert [entry.path for entry in folder.entries()] == [mine, copy]
    assert [path for path, _ in plans.prune([(folder, lambda facts: "")], 1 << 30)] == [copy]
    assert all(path.exists() for path in theirs)
