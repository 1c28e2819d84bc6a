"""Dataset Diffusion's command lines: files, parts of a list, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from datasetdm_fast.compat import vinai, vinai_lists
from datasetdm_fast.engine.loop.class_prompts import class_columns
from datasetdm_fast.runs.run_folder.audit import audit

ENTRIES = [
    ("a man with a dog; person dog", "person dog"),
    ("a room with a television; tv monitor potted plant person", "tv monitor potted plant person"),
    ("two people on a sofa; person person sofa", "person person sofa"),
    ("clouds", ""),
    ("a cat; cat", "cat"),
]
FEW = "--sd-path demo --steps 2 --batch-size 2 --quiet".split()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("list") / "voc_prompts.json"
    keys = ("filename", "caption", "class_prompt")
    path.write_text(json.dumps([dict(zip(keys, (f"n{k}.jpg", *entry))) for k, entry in enumerate(ENTRIES)]))
    return path


def run(prompts, out, *more) -> int:
    return vinai.main(["gen_data.py", *FEW, "--json-path", str(prompts), "--work-dir", str(out), *more])


def files(out) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("[im]*/*"))}


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory):
    """The corrected run of the whole list, made in two steps."""
    out = tmp_path_factory.mktemp("vinai") / "OUT"
    assert run(prompts, out, "--corrected", "--limit", "2") == 0
    assert len(files(out)) == 4 and run(prompts, out, "--corrected") == 0
    return out


def test_images_and_masks_have_names_form_and_palette(whole):
    found = files(whole)
    assert list(found) == [f"{kind}/n{k}.{end}" for kind, end in (("image", "jpg"), ("mask", "png")) for k in range(5)]
    mask = Image.open(whole / "mask/n1.png")
    assert mask.mode == "P" and bytes(mask.getpalette()[:63]) == vinai.palette("voc")
    assert set(np.unique(mask)) <= {0, 15, 16, 20, 255} and not np.asarray(Image.open(whole / "mask/n3.png")).any()
    assert Image.open(whole / "image/n1.jpg").size == (128, 128)
    assert not audit(whole / ".run").findings


def test_parts_of_a_list_add_up(prompts, whole, tmp_path, monkeypatch):
    for part in (("--start", "3"), ("--end", "3")):
        assert run(prompts, tmp_path / "parts", "--corrected", *part) == 0
    assert files(tmp_path / "parts") == files(whole)
    (whole / "image/n0.jpg").unlink()
    monkeypatch.setattr(vinai, "prepare_job", None)  # a finished run loads no network
    assert run(prompts, whole, "--corrected") == 0 and files(tmp_path / "parts") == files(whole)


@pytest.mark.parametrize(
    "part, said", [((), "entries 3 to 4"), (("--start", "4"), "entry 4"), (("--start", "2", "--end", "4"), "entry 3")]
)
def test_images_of_one_part_are_not_replaced_by_those_of_another(prompts, tmp_path, capsys, part, said):
    """They have other noise: their run folders would name images that are not there."""
    assert run(prompts, tmp_path, "--start", "3") == 0
    before = files(tmp_path)
    assert run(prompts, tmp_path, *part) == 2 and files(tmp_path) == before
    assert f".run-3-5 has images of the {said} already" in capsys.readouterr().err
    assert run(prompts, tmp_path, "--end", "3") == 0 and len(files(tmp_path)) == 10
    assert run(prompts, tmp_path, "--start", "3") == 0


def test_what_a_killed_command_had_half_written_is_gone_once_it_is_run_again(prompts, whole):
    """What another part in this folder is writing stays."""
    left = [whole / "image/.n0.jpg.7.part", whole / "mask/.n4.png.123000000045.part", whole / "image/.n7.jpg.7.part"]
    for part in left:
        part.write_bytes(b"half")
    assert run(prompts, whole, "--corrected") == 0 and [part.exists() for part in left] == [False, False, True]
    left[-1].unlink()


def test_every_listed_word_has_its_own_place(prompts):
    found = vinai_lists.read_list(prompts, "", -1, -1)
    assert found.kind == "voc" and found.prompts[1].classes == ("tvmonitor", "pottedplant", "person")
    named = class_columns(found.prompts[2].class_prompt, ("person", "sofa"), None, by_words=True)
    assert named == [("person", (1,)), ("person", (2,)), ("sofa", (3,))]
    entry = {"filename": "a.jpg", "caption": "x", "class_prompt": "hot dog fire hydrant dog"}
    prompts.with_name("coco.json").write_text(json.dumps([entry]))
    (other,) = (coco := vinai_lists.read_list(prompts.with_name("coco.json"), "", -1, -1)).prompts
    assert coco.kind == "coco" and len(vinai.palette("coco")) == 81 * 3
    assert [places for _, places in class_columns(other.class_prompt, other.classes, None, by_words=True)] == [
        (1,),
        (3, 4),
        (5,),
    ]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["gen_dat"], 2, "did you mean gen_data?"),
        (["gen_data", "--work-dir", "OUT"], 2, "--sd-path is missing"),
        (["gen_data", *FEW, "--work-dir", "OUT", "--json-path", "none.json"], 3, "--json-path: none.json is not there"),
        (["gen_data", *FEW, "--work-dir", "OUT", "--json-path", "LIST", "--self-res", "64"], 2, "--self-res 64: this"),
        (["gen_data", "--sd-path", "SD", "--work-dir", "OUT", "--json-path", "LIST"], 3, "--sd-path: SD is not there"),
        (["gen_data", *FEW, "--work-dir", "OUT", "--treshold", "1"], 2, "did you mean --threshold?"),
        (["gen_data", *FEW, "--work-dir", "OUT", "--threshold", "0.4"], 2, "--uncertainty-threshold 0.5"),
        (["gen_data", *FEW, "--work-dir", "OUT", "--json-path", "LIST", "--start", "5"], 2, "it has 5"),
        (["gen_data", *FEW, "--work-dir", "OUT", "--json-path", "LIST", "--data-type", "coco"], 2, "a class of coco"),
        (["gen_data_voc", "--sd-path", "demo"], 3, "data/prompts/voc_prompts.json"),
    ],
)
def test_bad_lines_write_nothing(prompts, line, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vinai.main([str(prompts) if word == "LIST" else word for word in line]) == code
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_list_written_by_hand_is_refused_with_an_example(tmp_path, capsys):
    path = tmp_path / "mine.json"
    for text in ('[{"filename": "0.jpg", "caption": "a dog", "class_prompt": "dog"},]', "", "{}"):
        path.write_text(text)
        assert run(path, tmp_path / "OUT") == 2
        told = capsys.readouterr().err
        assert str(path) in told and 'Write a JSON list of entries such as {"filename": "0.jpg"' in told


def test_a_file_is_no_folder_to_write_into(prompts, tmp_path, capsys):
    (tmp_path / "OUT").touch()
    assert run(prompts, tmp_path / "OUT") == 2
    assert f"--work-dir {tmp_path / 'OUT'}: there is a file of that name" in capsys.readouterr().err


def test_another_run_is_refused_by_the_names_of_its_flags(prompts, whole, capsys):
    assert run(prompts, whole, "--corrected", "--seed", "5") == 2
    assert "Choose another --work-dir, or give the flags" in capsys.readouterr().err


def test_what_does_not_fit_is_cut_by_the_tokenizer(tmp_path, capsys):
    """With --corrected a class prompt must fit."""
    path = tmp_path / "long.json"
    for words, more, code in ((76, (), 0), (77, (), 2), (76, ("--corrected",), 2)):
        entry = {"filename": "a.jpg", "caption": "zigzag " * 40, "class_prompt": "cat " * words}
        path.write_text(json.dumps([entry]))
        assert run(path, tmp_path / "OUT", "--dry-run", *more) == code
    said = capsys.readouterr().err.splitlines()
    assert (
        "its class prompt has a class at word 77, at most 76 words are read" in said[0] and "at most 77 fit" in said[2]
    )
