"""DatasetDM's command lines on our engine: its prompts, seeds, names and files, a killed line, and what is refused.

The checkout is one of ours in DatasetDM's form: its lists hold other texts than DatasetDM's.
"""

import hashlib
import importlib.util
import io
import json
import os
import random
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import upstream_rules
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage
from test_decoders import seeded_state
from test_schemas import check_run

from datasetdm_fast import audit
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.compat.showlab import __main__ as command
from datasetdm_fast.compat.showlab import (
    files,
    generating,
    generator,
    prompts,
)
from datasetdm_fast.compat.showlab.generator import GENERATORS, Order
from datasetdm_fast.data import Request
from datasetdm_fast.engine.decoders import upstream as checkpoints
from datasetdm_fast.engine.decoders.checkpoint import build_decoder
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.engine.labels.class_tables import builtin_table
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.prompts import make_plan
from datasetdm_fast.errors import Refused
from datasetdm_fast.kernels.upsample_concat import resize
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.ledger import DONE, QUARANTINED, Ledger, Row
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.training.settings import TrainConfig

MASKS = {"width": 16, "layers": 2, "feed_forward": 24, "mask_dim": 12, "queries": 20}
SMALL = {"segmentation": MASKS, "open-vocabulary": MASKS, "depth": {"width": 16, "depth_width": 8}}
# Of the external contours that OpenCV 5.0 finds in the masks below, in its order.
OPENCV = "36ce7192f287123c0565543fdfb00f3d"
PROMPTS = "dataset/Prompts_From_GPT"
VOC = """
def sub_processor(pid, opt):
    prompt_for_bicycle = ["a bicycle at a wall", "two bicycles"]
    prompt_for_person = ["a {} waits", "a {} reads"]
    prompt_for_diningtable = ["a table"]
    one = ["small", ""]
    map_dict = {%s}
    for idx in classes:
        prompts_list = ["one {} {}"]
        names = ["woman", "man"]
        if random.random() > 0.3:
            prompts = [choice(sub_classes_list)]
        else:
            prompts = ["picture of {}".format(class_target)]
"""
COCO = """
def sub_processor(pid, opt):
    prompts_list = ["a {} stands", "a {} runs"]
    names = ["woman", "man"]
    prompts = [choice(sub_classes_list)]
    prompts = ["picture of {}".format(class_target)]
"""
SENTENCE = """
def sub_processor(pid, opt):
    body = ["", "as a whole"]
    names = ["woman", "man"]
    prompts_list = ["a {} walks, {}"]
    prompts = ["all of {}".format(choice(sub_classes_list))]
    prompts = ["a scan"]
"""


def digest_of_contours(find) -> str:
    """Of what `find` says of 400 random masks: sparse ones, full ones and smooth ones, of one pixel and more."""
    whole, numbers = hashlib.md5(), np.random.default_rng(5)
    for k in range(400):
        height, width = numbers.integers(1, 48, 2)
        values = numbers.random((height, width))
        for _ in range(k % 4):
            padded = np.pad(values, 1, mode="edge")
            values = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
        mask = values > np.quantile(values, numbers.random())
        for one in find(mask):
            whole.update(f"{one.reshape(-1).tolist()}\n".encode())
        whole.update(b"\n")
    return whole.hexdigest()


def external_contours(mask):
    """Those of the parts that lie in no hole, of the one that begins lowest first."""
    outside = ndimage.label(np.pad(~mask, 1, constant_values=True))[0] == 1
    (parts, _), around = ndimage.label(mask, np.ones((3, 3))), ndimage.binary_dilation(outside)[1:-1, 1:-1]
    return [files.outer_border(parts == k) for k in sorted({*parts[mask & around].tolist()}, reverse=True)]


def test_contours_are_those_of_opencv():
    assert digest_of_contours(external_contours) == OPENCV
    if importlib.util.find_spec("cv2"):
        import cv2

        def found(mask):
            return cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]

        assert digest_of_contours(found) == OPENCV


# ---- prompts and seeds

CLASSES = builtin_table("voc").names[1:]
OWN_LISTS = {"bicycle", "person", "diningtable"}


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.fixture(scope="module")
def root(tmp_path_factory, model):
    """A checkout in DatasetDM's form, with weights for the demo model."""
    folder = tmp_path_factory.mktemp("checkout")
    lists = ", ".join(f'"{name}": one' for name in CLASSES if name not in OWN_LISTS)
    scripts = {"Semantic_VOC_AnyClass": VOC % lists, "Instance_COCO_AnyClass": COCO}
    scripts |= dict.fromkeys(
        (
            "Semantic_CityScapes_AnyClass",
            "Semantic_Medical_CT",
            "Semantic_DeepFashion",
            "Pose_COCO_HeatMap",
            "Pose_COCO",
        ),
        SENTENCE,
    )
    for name, text in scripts.items():
        write(folder / f"tools/parallel_generate_{name}.py", text)
    for kind in ("NYU", "KITTI", "coco_pose", "deepfashion_mm"):
        write(folder / PROMPTS / kind / "general.txt", "a red ball\n\na blue cube \na green star\n")
    for name in builtin_table("cityscapes").names:
        write(folder / PROMPTS / f"cityscapes/{name}.txt", f"a {name} at night\n")
    write(folder / PROMPTS / "cityscapes/general.txt", "a town\n")
    write(folder / PROMPTS / "voc2012/bird.txt", "a bird on a branch\r\na bird\n")
    write(folder / PROMPTS / "coco/dog.txt", "a dog on a lawn\n")
    write(folder / PROMPTS / "coco/general.txt", "")
    write(folder / "config/NYU.yaml", "Depth_Decorder:\n  max_depth: 10\n  task: depth\n")
    write(folder / "config/VOC.yaml", "SEG_Decorder:\n  num_classes: 2\n  num_queries: 20\n")
    width = model.text_width
    for kind, (network, settings) in checkpoints.KINDS.items():
        sizes = {**SMALL.get(network, {"width": 16}), **settings, "levels": model.levels}
        config = upstream(network, **sizes | ({"text_width": width} if "queries" in sizes else {}))
        shapes = {name: value.shape for name, value in build_decoder(config).state_dict().items()}
        shapes |= {name: torch.Size(shape) for name, shape in checkpoints.unused_shapes(config).items()}
        prefix = "module." if kind == "coco" else ""
        state = {f"{prefix}{name}": value for name, value in seeded_state(shapes, 4).items()}
        torch.save(state, folder / f"{kind}.pth")
    return folder


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, model, tmp_path_factory):
    """The demo model of all tests, and weights without the process that reads a pickle."""
    folder = tmp_path_factory.mktemp("weights")

    def converted(path: Path) -> Path:
        save_file(torch.load(path, weights_only=True), folder / f"{path.stem}.safetensors")
        return folder / f"{path.stem}.safetensors"

    monkeypatch.setattr("datasetdm_fast.engine.loading.load_model", lambda name, **_: model)
    monkeypatch.setattr("datasetdm_fast.untrusted.pickles.safe_copy", converted)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(prog, script, given):
    return command.read_line(prog, script.name, script.description, script.flags, given)


def ordered(root: Path, script: str, *arguments: str) -> generator.Order:
    generator = GENERATORS[f"parallel_generate_{script}"]
    flags = ["--root", str(root), "--model", "demo", *arguments]
    return generator.order(read(command.PROG, generator, flags))


def test_prompts_stay_whole_for_the_tokenizer_to_cut(root, model):
    source = ordered(root, "Semantic_VOC_AnyClass", "--n_each_class", "1", "--thread_num", "1").source
    given = source.lines[0]._replace(text="zigzagging " * 40 + "end")
    plan = make_plan(replace(source, lines=(given,)), model.tokenizer, number=1, seed=0, batch_size=1)
    assert plan.request(0).prompt == given.text


def test_every_process_draws_the_same_prompts_and_has_seeds_of_its_own(root):
    found = ordered(root, "Semantic_VOC_AnyClass", "--n_each_class", "7", "--thread_num", "3").items
    assert len(found) == 3 * 20 * 2  # what is left of 7 by 3 is dropped
    python, expected = random.Random(42), []
    for k, name in enumerate(CLASSES):
        lines = {
            "bicycle": ["a bicycle at a wall", "two bicycles"],
            "person": ["a woman waits", "a woman reads", "a man waits", "a man reads"],
            "diningtable": ["a table"],
        }.get(name, [f"one small {name}", f"one  {name}"])
        lines = lines + (["a bird on a branch", "a bird"] if name == "bird" else [])
        for n in range(2):
            prompt = python.choice(lines) if python.random() > 0.3 else f"picture of {name}"
            expected.append((f"{name}_{200000 + 2 * k + n}", prompt))
    for process in range(3):
        own = found[40 * process : 40 * (process + 1)]
        assert [item.prompt for item in own] == [prompt for _, prompt in expected]
        assert [item.seed - 4 * process for item in own] == [int(stem.split("_")[1]) for stem, _ in expected]
    assert found[0].stem == "aeroplane_200000" and len({item.stem for item in found}) == len(found)


@pytest.mark.parametrize(
    "script, flags, first, count",
    [
        ("Instance_COCO_AnyClass", ("--n_each_class", "1"), {"picture of person", "a woman stands", "a man runs"}, 80),
        ("Semantic_CityScapes_AnyClass", ("--n_each_class", "1"), {"all of a road at night", "all of a town"}, 19),
        ("Semantic_Medical_CT", ("--n_each_class", "1"), {"a scan"}, 19),
        (
            "Semantic_DeepFashion",
            ("--n_each_class", "3", "--prompt_root", f"{PROMPTS}/deepfashion_mm"),
            {"all of ", "all of a red ball", "all of a blue cube ", "all of a green star"},
            3,
        ),
        ("Depth_KITTI", ("--n_each_class", "2", "--prompt_root", f"{PROMPTS}/KITTI"), {"", "a red ball"}, 2),
        (
            "Pose_COCO",
            ("--number_data", "4"),
            {f"a {who} walks, {end}" for who in ("man", "woman") for end in ("",)},
            4,
        ),
    ],
)
def test_prompts_of_the_other_generators(root, script, flags, first, count):
    found = ordered(root, script, *flags, "--thread_num", "1")
    assert len(found.items) == count and [item.seed for item in found.items] == list(range(200000, 200000 + count))
    lines = {item.prompt for item in found.items}
    assert first & lines or "walks" in next(iter(lines)) or "ball" in str(lines) or "cube" in str(lines)
    if script == "Instance_COCO_AnyClass":
        assert found.items[64].stem == "computer mouse_200064"
        assert found.items[43].prompt == "picture of knife"  # it has no line, so nothing is drawn for it
        assert found.prompts[64].classes == ("mouse",)
    assert found.config.guidance == 5.0 and ordered(root, "Semantic_VOC_AnyClass").config.guidance == 7.0


# ---- files


def answer(raw, kind="coco", side=64, **changes):
    network, settings = checkpoints.KINDS[kind]
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    return files.DecodedImage(pixels, raw, upstream(network, **settings), **changes)


def decoded(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)))


def test_files_follow_upstreams_rules():
    numbers = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=numbers)  # noqa: E731
    raw = {"pred_logits": 3 * draw(12, 20), "pred_masks": 4 * draw(12, 4, 4)}
    masks = resize(raw["pred_masks"][None], 64)
    mapped = decoded(files.write_class_map(answer(raw, "cityscapes")))
    assert (mapped == upstream_rules.labels(raw["pred_logits"][None], masks, 5000 * (64 / 512) ** 2)[0].numpy()).all()
    assert len(np.unique(mapped)) > 2
    raw = {"pred_logits": draw(20, 3), "pred_masks": 4 * draw(20, 4, 4)}
    expected = upstream_rules.mask(raw["pred_logits"][None], resize(raw["pred_masks"][None], 64), 7)[0].numpy()
    found = decoded(files.write_class_mask(answer(raw, "voc", class_id=7)))
    assert (found == expected).all() and found.max() == 7
    maps = draw(17, 8, 8)
    points, is_written = upstream_rules.keypoints(maps[None], 64)
    line = files.write_heatmap_joints(answer({"heatmaps": maps}, "pose")).decode()
    assert np.allclose([float(x) for x in line.split(",")], points[0][is_written[0]].flatten())
    assert files.write_heatmap_joints(answer({"heatmaps": -torch.ones(17, 8, 8)}, "pose")) == b"\n"
    metres = 12 * torch.rand(1, 64, 64, generator=numbers)
    coarse = decoded(files.write_depth(answer({"depth": metres}, "nyu")))
    assert (coarse == upstream_rules.depth_bytes(metres[0].numpy(), 10)).all() and coarse.max() == 255


def test_a_class_of_little_evidence_is_left_out_unless_it_is_the_first():
    """Of 64 x 64 pixels 78 are enough; the first and the third class have 64 each."""
    masks, logits = torch.full((3, 64, 64), -9.0), torch.full((3, 20), -9.0)
    masks[0, :8, :8], masks[1, :, 32:], masks[2, 40:48, :8] = 9, 9, 9
    logits[range(3), range(3)] = 9
    mapped = decoded(files.write_class_map(answer({"pred_logits": logits, "pred_masks": masks}, "cityscapes")))
    assert (mapped[:8, :8] == 0).all() and (mapped[:, 32:] == 1).all() and 2 not in mapped


def test_evidence_counts_where_it_is_more_than_half():
    """Of 64 x 64 pixels with evidence 0.4 or 0.6, of which 78 in all are enough."""
    masks, logits = torch.full((2, 64, 64), -9.0), torch.full((2, 20), -9.0)
    logits[range(2), range(2)] = 9
    for evidence, number in ((0.4, 0), (0.6, 1)):
        masks[1] = np.log(evidence / (1 - evidence))
        raw = {"pred_logits": logits, "pred_masks": masks}
        assert (decoded(files.write_class_map(answer(raw, "cityscapes"))) == number).all()


def test_prompts_of_poses_are_every_end_with_every_noun_in_every_sentence():
    lists = {
        "body": ["in a hat", "in a coat"],
        "names": ["man", "girl"],
        "prompts_list": ["a {} {}", "photo of a {} {}"],
    }
    drawn = []
    dice = types.SimpleNamespace(choice=lambda lines: drawn.extend(lines) or lines[0])
    prompts.pose(types.SimpleNamespace(strings=lists.get), "")(dice)
    hats = ["a man in a hat", "photo of a man in a hat", "a girl in a hat", "photo of a girl in a hat"]
    assert drawn == [*hats, *(line.replace("hat", "coat") for line in hats)]


def test_files_of_an_image_are_named_after_it_and_its_class_is_numbered_from_one_on():
    seen = []
    plain = GENERATORS["parallel_generate_Semantic_VOC_AnyClass"]
    script = replace(plain, write=lambda output: seen.append(output.class_id) or b"mask")
    items = [prompts.Item(seed, "a", name) for seed, name in ((5, "aeroplane"), (6, "tvmonitor"), (7, ""))]
    order, raw = Order(script, None, "voc", items, plain.class_names()), {"open-vocabulary": None}
    made = [order.files(index, np.zeros((8, 8, 3), np.uint8), raw, raw) for index in range(3)]
    assert seen == [1, 20, 0] and made[0]["Mask/aeroplane_5.png"] == b"mask"
    assert [list(files_) for files_ in made] == [order.names(index) for index in range(3)]


def test_an_image_is_made_again_where_any_of_its_files_is_missing(tmp_path):
    names = [("Image/0.jpg", "Mask/0.png"), ("Image/1.jpg", "Mask/1.png"), ("Image/2.jpg", "Mask/2.png"), ()]
    order = types.SimpleNamespace(run_folder=tmp_path / "run", out=tmp_path, names=names.__getitem__)
    assert generating.missing_files(order) == []
    for name in ("Image/0.jpg", "Mask/0.png", "Image/1.jpg", "Mask/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "run" / LEDGER).parent.mkdir(parents=True)
    with Ledger(tmp_path / "run" / LEDGER) as ledger:
        ledger.commit([Row(Request(k, "a", k), {}, status=QUARANTINED if k == 3 else DONE) for k in (2, 0, 1, 3)])
    assert generating.missing_files(order) == [1, 2]


def test_a_mask_holds_what_is_above_zero_and_is_scored_by_that_alone():
    masks, logits = torch.full((1, 8, 8), -9.0), torch.tensor([[20.0, 0.0]])
    masks[0, :, :4], masks[0, :, 4:6] = 0, np.log(3)  # evidence of a half, and of three quarters
    found, classes, scores = files.candidates(answer({"pred_logits": logits, "pred_masks": masks}, side=8), 3)
    assert found.tolist() == [[[False] * 4 + [True] * 2 + [False] * 2] * 8] and classes == [0]
    assert scores.tolist() == pytest.approx([0.75])


def test_an_instance_is_written_from_a_score_of_two_fifths_on(monkeypatch):
    masks = np.zeros((3, 8, 8), bool)
    masks[0, 2, 2], masks[1, 3, 3], masks[2, 4, 4] = True, True, True
    monkeypatch.setattr(files, "candidates", lambda *_: (masks, [5, 6, 7], torch.tensor([0.4, 0.399, 0.5])))
    lines = files.write_contours(None).decode().splitlines()
    assert lines == ["2,2,5,0.4", "4,4,7,0.5"]  # as numpy writes fp32


def test_contour_lines():
    """The larger part of each instance, its class and score; of two equal boxes the lower one."""
    masks = torch.full((3, 64, 64), -9.0)
    masks[0, 10:20, 5:30], masks[0, 40:50, 5:30], masks[1, 3, 7] = 9, 9, 9
    raw = {"pred_logits": torch.full((3, 81), -20.0), "pred_masks": masks}
    raw["pred_logits"][0, 4], raw["pred_logits"][1, 0], raw["pred_logits"][2, 2] = 1.0, 2.0, 3.0
    lines = files.write_contours(answer(raw)).decode().splitlines()
    # sorted, as PyTorch's topk promises no order
    assert sorted(line.rpartition(",")[0] for line in lines) == ["5,40,5,49,29,49,29,40,4", "7,3,0"]
    assert all(0.4 <= float(line.rpartition(",")[2]) <= 1 for line in lines)
    assert files.write_contours(answer({**raw, "pred_logits": torch.zeros(3, 81)})) == b""


def test_a_line_of_pixels_has_the_area_of_its_pixels():
    mask = np.zeros((64, 64), bool)
    mask[50, 5:14], mask[10:12, 5:7] = True, True  # nine pixels, and four
    assert files.largest_contour(mask).tolist() == [[5, 50], [13, 50]]


def test_a_joint_is_written_from_the_third_pixel_of_a_side_on():
    """As upstream has it, a quarter of a pixel towards the higher neighbour."""
    for column, expected in ((1, "\n"), (2, "2.25,4.0,1.0\n"), (6, "6.25,4.0,1.0\n"), (7, "\n")):
        maps = torch.zeros(1, 8, 9)
        maps[0, 4, column], maps[0, 4, column + 1] = 1, 0.5
        turned = f"4.0,{expected.partition(',')[0]},1.0\n" if expected.strip() else "\n"
        for shown, told in ((maps[..., :8], expected), (maps[..., :8].transpose(1, 2), turned)):
            answered = answer({"heatmaps": shown.contiguous()}, "pose", side=8)
            assert files.write_heatmap_joints(answered) == told.encode()
    flat = torch.full((1, 8, 8), -1.0)
    flat[0, 4, 3] = 0
    assert files.joints(answer({"heatmaps": flat}, "pose", side=8))[0].tolist() == [[0, 0]]  # as upstream, of no height


# ---- runs

SHORT = ("--model", "demo", "--steps", "2", "--engine", "fast", "--quiet")
NYU = ("parallel_generate_Depth_NYU", "--grounding_ckpt", "nyu.pth", "--prompt_root", f"{PROMPTS}/NYU")


@pytest.fixture
def run(root, capsys):
    def run(*arguments, code=0):
        assert command.main([*map(str, arguments), "--root", str(root), *SHORT]) == code
        return capsys.readouterr()

    return run


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of an output but those of its run folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and generator.RUN not in path.parts
    }


def test_a_line_resumes_to_the_same_bytes_and_leaves_a_run_folder(run, root, tmp_path, capsys, monkeypatch):
    line = (*NYU, "--number_data", "4", "--thread_num", "2", "--batch_size", "2", "--config", "config/NYU.yaml")
    run(*line, "--outdir", tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    stems = ("200000", "200001", "200004", "200005")
    assert sorted(whole) == sorted(f"{part}" for s in stems for part in (f"Image/{s}.jpg", f"Annotation/{s}.png"))
    assert decoded(whole["Annotation/200000.png"]).shape == (128, 128)
    picture = Image.open(tmp_path / "whole/Image/200000.jpg")
    assert picture.layer[0][1:3] == (2, 2) and picture.layer[1][1:3] == (1, 1)  # colours at half the resolution
    stored = open_run(tmp_path / "whole/.run")
    assert stored[2].seed == 200004 and stored[2].prompt == stored[0].prompt
    expected = upstream_rules.depth_bytes(stored[0].depth.metres, 10)
    assert np.abs(decoded(whole["Annotation/200000.png"]).astype(int) - expected).max() <= 1  # millimetres there
    assert audit.main([str(tmp_path / "whole/.run"), "--quiet"]) == 0
    check_run(tmp_path / "whole/.run")

    run(*line, "--outdir", tmp_path / "parts", "--limit", "2")
    (tmp_path / "parts/Image/200000.jpg").unlink()
    (tmp_path / "parts/Image/.200004.jpg.7.part").write_bytes(b"half")  # of a killed command
    run(*line, "--batch_size", "3", "--outdir", tmp_path / "parts")
    assert tree(tmp_path / "parts") == whole
    before = os.stat(tmp_path / "parts/Image/200000.jpg").st_mtime_ns
    assert json.loads(run(*line, "--outdir", tmp_path / "parts", "--json").out)["made"] == 0
    assert os.stat(tmp_path / "parts/Image/200000.jpg").st_mtime_ns == before
    (tmp_path / "parts/Annotation/200005.png").unlink()
    capsys.readouterr()
    run(*line, "--outdir", tmp_path / "parts")
    assert tree(tmp_path / "parts") == whole

    sizes = []
    denoise = FastEngine.denoise_and_capture
    monkeypatch.setattr(
        FastEngine, "denoise_and_capture", lambda self, x, *given: sizes.append(len(x)) or denoise(self, x, *given)
    )
    run(*line, "--batch_size", "3", "--outdir", tmp_path / "other")
    assert sizes == [1] * 4 and tree(tmp_path / "other") == whole

    for other in (("--thread_num", "1"), ("--seed", "7"), ("--profile", "0.14.0")):
        assert "holds a run with other" in run(*line, *other, "--outdir", tmp_path / "parts", code=2).err
    assert tree(tmp_path / "parts") == whole


@pytest.mark.parametrize(
    "script, kind, suffix, folder",
    [
        ("Semantic_VOC_AnyClass", "voc", "png", "Mask"),
        ("Instance_COCO_AnyClass", "coco", "txt", "Mask"),
        ("Pose_COCO", "pose-simcc", "png", "Annotation"),
    ],
)
def test_the_other_labels(run, tmp_path, script, kind, suffix, folder):
    count = "number_data" if "Pose" in script else "n_each_class"
    line = (f"parallel_generate_{script}", "--grounding_ckpt", f"{kind}.pth", f"--{count}", "1", "--thread_num", "1")
    run(*line, "--limit", "1", "--batch_size", "1", "--outdir", tmp_path / "out")
    stem = {"voc": "aeroplane_200000", "coco": "person_200000"}.get(kind, "200000")
    assert set(tree(tmp_path / "out")) == {f"Image/{stem}.jpg", f"{folder}/{stem}.{suffix}"}


# ---- what is refused


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (("parallel_generate_Depth_NYY",), 2, "did you mean parallel_generate_Depth_NYU?"),
        (("train",), 2, "unknown script 'train'"),
        ((*NYU, "--numbr_data", "3"), 2, "did you mean --number_data?"),
        ((*NYU, "--n_each_class", "3"), 2, "unknown flag --n_each_class"),
        ((*NYU, "--thread_num", "0"), 2, "--thread_num 0: expected a number of 1 or more"),
        ((*NYU, "--thread_num", "21"), 2, "--thread_num 21: --number_data 20 gives too few images"),
        ((*NYU, "--thread_num", "1", "--number_data", "2", "--grounding_ckpt", "pose.pth"), 2, "do not fit this depth"),
        (
            (*NYU, "--thread_num", "1", "--grounding_ckpt", "none.pth"),
            3,
            "--grounding_ckpt: {root}/none.pth is not there",
        ),
        (
            (*NYU, "--thread_num", "1", "--grounding_ckpt", "config"),
            2,
            "config: a folder, expected a checkpoint FILE.pth",
        ),
        ((*NYU, "--thread_num", "1", "--config", "config/VOC/none.yaml"), 3, "config/VOC/none.yaml is not there"),
        ((*NYU, "--thread_num", "1", "--prompt_root", "none"), 3, "none/general.txt is not there"),
        ((*NYU, "--thread_num", "1", "--model", "none"), 3, "none is not there"),
        ((*NYU, "--thread_num", "1", "--config", "tag.yaml"), 2, "tags are not read"),
        (
            ("parallel_generate_Semantic_CityScapes_AnyClass", "--prompt_root", f"{PROMPTS}/NYU"),
            2,
            f"{PROMPTS}/NYU: it has no road.txt",
        ),
        (
            ("parallel_generate_Semantic_VOC_AnyClass", "--root", "{empty}"),
            3,
            "tools/parallel_generate_Semantic_VOC_AnyClass.py is not there",
        ),
        (
            (
                "parallel_generate_Semantic_VOC_AnyClass",
                "--grounding_ckpt",
                "cityscapes.pth",
                "--config",
                "config/VOC.yaml",
            ),
            2,
            "tensors do not fit this open-vocabulary decoder",
        ),
    ],
)
def test_what_is_refused(root, tmp_path, capsys, arguments, code, said):
    write(root / "tag.yaml", "a: !!python/object/apply:os.system [ls]\n")
    (tmp_path / "empty").mkdir()
    given = [word.format(empty=tmp_path / "empty") for word in arguments]
    rest = [] if len(given) == 1 else ["--outdir", str(tmp_path / "out"), "--quiet"]
    rest += [] if "--root" in given or not rest else ["--root", str(root)]
    rest += ["--model", "demo"] if rest and "--model" not in given else []
    assert command.main([*given, *rest]) == code
    told = capsys.readouterr().err
    assert said.format(root=root) in told and len(told.splitlines()) <= 3, told
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_each_image_and_writes_none(run, tmp_path):
    line = (*NYU, "--number_data", "4", "--thread_num", "2", "--dry_run", "--outdir", tmp_path / "out")
    rows = [row for row in run(*line).out.splitlines() if "  seed " in row]
    assert [row.split("  ")[0] for row in rows] == ["200000", "200001", "200004", "200005"]
    assert rows[2].startswith("200004  seed 200004  'a ") and not (tmp_path / "out").exists()


def test_the_same_checkpoint_in_another_place_is_accepted(run, root, tmp_path):
    line = (*NYU, "--number_data", "2", "--thread_num", "1", "--outdir", tmp_path / "out")
    run(*line, "--limit", "1")
    state = torch.load(root / "nyu.pth", weights_only=True)
    torch.save(state, tmp_path / "moved.pth")
    run(*line, "--grounding_ckpt", tmp_path / "moved.pth")
    assert json.loads(run(*line, "--json").out)["made"] == 0
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "other.pth")
    assert "other settings (decoder: " in run(*line, "--grounding_ckpt", tmp_path / "other.pth", code=2).err


def test_refusals_name_the_flags_of_the_line(run, tmp_path):
    line = (*NYU, "--number_data", "1", "--thread_num", "1", "--outdir", tmp_path / "out")
    run(*line)
    said = run(*line, "--seed", "7", code=2).err
    assert "Choose another --outdir, or give the flags" in said
    (tmp_path / "file").touch()
    said = run(*line, "--outdir", tmp_path / "file", code=2).err
    assert said.startswith(f"--outdir {tmp_path / 'file'}: there is a file of that name")


def test_flags_without_effect_are_named(root, model):
    given = ("--prompt", "a cat", "--config", "x.yaml", "--prompt_root", "x")
    line = read("", GENERATORS["parallel_generate_Semantic_Medical_CT"], given)
    told = "ignored   --config, --prompt: without effect in DatasetDM, too"
    assert list(generating.rows_of_ignored(line)) == [told]


def test_a_line_that_resumes_keeps_the_size_of_batches(root):
    """As images are made one by one, no size changes a byte."""
    flags = ("Depth_NYU", "--number_data", "2", "--thread_num", "1", "--prompt_root", f"{PROMPTS}/NYU")
    order = ordered(root, *flags, "--batch_size", "3", "--guidance", "2.5")
    assert generating.spec_of(order, None).identity["batch_size"] == 3 and order.config.guidance == 2.5
    assert generating.spec_of(order, {"config": {"batch_size": 5}}).identity["batch_size"] == 5
    assert ordered(root, *flags).config.guidance == 5.0


def test_the_table_counts_processes_and_what_they_leave_over(root):
    engine = types.SimpleNamespace(name="fast", model=types.SimpleNamespace(name="demo"))
    job = types.SimpleNamespace(engine=engine, plan=types.SimpleNamespace(batch_size=4))
    flags = ("Depth_NYU", "--number_data", "7", "--thread_num", "3", "--prompt_root", f"{PROMPTS}/NYU")
    plain = "\n".join(generating.rows(ordered(root, *flags), job))
    assert "6 images, seeds 200000 to 200009: those of --thread_num 3 processes" in plain
    assert "--number_data 7: 1 left over by 3 processes" in plain and "guidance 5;" in plain


def test_an_output_that_holds_something_else_is_refused(run, tmp_path):
    write(tmp_path / "out/Image/200000.jpg", "mine")
    told = run(*NYU, "--number_data", "1", "--thread_num", "1", "--outdir", tmp_path / "out", code=2).err
    assert "holds files of another run" in told and (tmp_path / "out/Image/200000.jpg").read_text() == "mine"


def test_the_lines_of_train_on_the_page_of_datasetdm_are_lines_of_train():
    page = (Path(__file__).parent.parent / "docs/from-datasetdm.md").read_text()
    lines = [row.split("|") for row in page.splitlines() if row.startswith("| `train_")]
    shared = page.partition("python -m datasetdm_fast.train ")[2].partition("\npython -m")[0]
    shared = shared.replace("\\\n", " ").split()
    assert len(lines) == 11
    for _, script, line, _ in lines:
        words = line.strip(" `").split()
        parse([*words, *shared[shared.index("--preset") :]], TrainConfig)[0].check()
        assert words[0] == "--data" and script.strip(" `").startswith("train_")


@pytest.mark.parametrize("line", [[], ["-h"], ["--help"]])
def test_all_scripts_are_listed_with_what_they_make(capsys, line):
    assert command.main(line) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {command.PROG} SCRIPT")
    assert all(name in told and script.description in told for name, script in GENERATORS.items())


def test_the_help_of_a_script_tells_what_stands_where_a_flag_is_not_given(capsys):
    assert command.main([NYU[0], "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for line in (
        "--seed WHOLE seed for drawing the prompts (default: 42)",
        "--number_data WHOLE images in all (default: 20)",
        "--guidance NUMBER guidance scale, 0 = that of the script (default: 0.0)",
        "its configuration, which names the data set --grounding_ckpt",
    ):
        assert line in told, line


def test_a_word_that_is_no_flag_is_refused():
    with pytest.raises(Refused, match="unexpected argument 'seven', every setting is a flag"):
        read(command.PROG, GENERATORS[NYU[0]], ["seven"])
    with pytest.raises(Refused, match="unknown flag --seven"):
        read(command.PROG, GENERATORS[NYU[0]], ["--seven"])


@pytest.mark.parametrize(
    ("text", "ask", "said"),
    [
        ("def f(:", lambda script: script.strings("names"), r"not readable as Python \(SyntaxError\)"),
        ("a = '\0'", lambda script: script.strings("names"), "not readable as Python"),
        (VOC % "", lambda script: script.strings("ends"), "assigns no list of texts to ends"),
        (VOC % '"a": [1]', lambda script: script.lists("map_dict"), "map_dict"),
        (VOC % "", lambda script: script.lists("names"), "names"),
        ("def sub_processor(pid, opt):\n    pass", lambda script: script.template(), "no prompt from a text alone"),
        (
            'def sub_processor(pid, opt):\n    prompts = ["{} and {}".format(name)]',
            lambda script: script.template("name"),
            "builds no prompt from name",
        ),
    ],
)
def test_a_script_of_another_form_is_refused(tmp_path, text, ask, said):
    write(path := tmp_path / "script.py", text)
    with pytest.raises(Refused, match=said) as refusal:
        ask(prompts.PromptTexts(path, tmp_path))
    assert refusal.value.cause.startswith(f"{path}: ") and refusal.value.remedy == prompts.GET_AGAIN


def test_files_of_prompts_and_settings_of_another_form_are_refused(tmp_path):
    (tmp_path / "general.txt").write_bytes(b"a ball\na \xff cube\n")
    with pytest.raises(Refused, match="general.txt line 2: not valid UTF-8"):
        prompts.read_prompt_lines(tmp_path / "general.txt")
    write(tmp_path / "own.yaml", "- 3\n")
    with pytest.raises(Refused, match="own.yaml: holds a list, expected sections of settings"):
        prompts.read_settings(tmp_path / "own.yaml")
    texts = prompts.PromptTexts(tmp_path / "none.py", tmp_path)
    with pytest.raises(Refused, match=f"--prompt_root {tmp_path}: ") as refusal:
        texts.file("../general", must_exist=True)
    assert refusal.value.remedy == "Give the class another name."
    with pytest.raises(Refused, match="the prompt files contain no line"):
        prompts.sample_line([], "{}")


def test_a_trainers_script_is_refused_with_its_page(capsys):
    assert command.main(["train_depth_NYU"]) == 2
    assert "docs/from-datasetdm.md has the line of `train`" in capsys.readouterr().err


# ---- DatasetDM's own scripts


class Stand(types.ModuleType):
    """Stands for a module that DatasetDM's scripts import and whose answers are given here."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


STOOD_FOR = ("IPython", "pytorch_lightning", "torchvision", "diffusers", "transformers", "detectron2", "mmcv", "model")
STOOD_FOR += ("dataset", "seq_aligner", "train", "scipy", "matplotlib", "skimage", "albumentations")


def picture_of(seed: int) -> np.ndarray:
    """A smooth picture of 512 pixels a side."""
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((512, 512)))


def raw_of(task: str, seed: int) -> dict[str, torch.Tensor]:
    """What a decoder of upstream's sizes might answer for an image."""
    numbers = torch.Generator().manual_seed(seed)
    classes, queries = {"voc": (3, 20), "coco": (81, 100), "cityscapes": (20, 100), "deepfashion": (25, 100)}.get(
        task, (0, 0)
    )
    if classes:
        coarse = torch.randn(1, queries, 12, 12, generator=numbers)
        masks = 9 * torch.nn.functional.interpolate(coarse, size=(160, 160), mode="bicubic")
        return {"pred_logits": 5 * torch.randn(1, queries, classes, generator=numbers), "pred_masks": masks}
    if task == "pose":
        return {"heatmaps": torch.randn(1, 17, 64, 64, generator=numbers) + 0.1}
    return {"depth": torch.rand(1, 1, 512, 512, generator=numbers) * (10 if task == "nyu" else 80)}


@contextmanager
def upstreams_script(checkout: Path, name: str, kind: str, monkeypatch):
    """A script of a checkout, imported with stands for the libraries and networks that it would use."""
    before = dict(sys.modules)

    class Finder:
        @staticmethod
        def find_spec(full, path=None, target=None):
            if full.partition(".")[0] in STOOD_FOR:
                return importlib.util.spec_from_loader(full, Finder(), is_package=True)
            return None

        def create_module(self, spec):
            return Stand(spec.name)

        def exec_module(self, module):
            pass

    for each in [one for one in sys.modules if one.partition(".")[0] in (*STOOD_FOR, "tools", "ptp_utils")]:
        del sys.modules[each]
    monkeypatch.setattr(sys, "path", [str(checkout), *sys.path])
    sys.meta_path.insert(0, Finder)
    try:
        import ptp_utils

        script = importlib.import_module(f"tools.{name}")
        now = {"seed": 0}
        prompts = []

        def text2image(*arguments, generator, **options):
            now["seed"] = generator.initial_seed()
            prompts.append((now["seed"], arguments[5][0], options["guidance_scale"]))
            return picture_of(now["seed"])[None], None

        encoder = mock.MagicMock(return_value=[torch.zeros(1, 77, 8)])
        encoder.to.return_value = encoder
        encoder.from_pretrained.return_value = encoder

        class Network:
            def __call__(self, *_):
                raw = raw_of(kind, now["seed"])
                return raw if "pred_logits" in raw else next(iter(raw.values()))

            def __getattr__(self, _):
                return lambda *arguments, **options: self

        for each in ("seg_decorder", "seg_decorder_open_word", "Depthmodule", "PoseModule_HeatMap"):
            monkeypatch.setattr(script, each, lambda *_, **__: Network(), raising=False)
        monkeypatch.setattr(script, "retry_if_cuda_oom", lambda function: function, raising=False)
        monkeypatch.setattr(script, "CLIPTextModel", encoder)
        monkeypatch.setattr(script, "random", random, raising=False)  # one of them has it from `dataset`
        monkeypatch.setattr(script, "seed_everything", random.seed)
        monkeypatch.setattr(script, "softmax", lambda x, axis: np.exp(x) / np.exp(x).sum(axis), raising=False)
        monkeypatch.setattr(ptp_utils, "text2image", text2image)
        monkeypatch.setattr(ptp_utils, "register_attention_control", lambda *_: None)
        monkeypatch.setattr(torch, "load", lambda *_, **__: {})
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        yield script, prompts
    finally:
        sys.meta_path.remove(Finder)
        for each in set(sys.modules) - set(before):
            del sys.modules[each]
        sys.modules.update(before)


@pytest.mark.parametrize(
    "script, kind, config, prompts, count, processes",
    [
        ("Semantic_VOC_AnyClass", "voc", "VOC/VOC_Sematic_Seg_5Images", "voc2012", 5, 2),
        ("Semantic_CityScapes_AnyClass", "cityscapes", "", "cityscapes", 1, 1),
        ("Semantic_Medical_CT", "cityscapes", "", "cityscapes", 1, 1),
        ("Semantic_DeepFashion", "deepfashion", "deepfashion/Deepfashion_Semantic_Seg_5mages", "deepfashion_mm", 5, 2),
        ("Instance_COCO_AnyClass", "coco", "coco/COCO_Instance_Seg_10Images", "coco", 1, 1),
        ("Depth_NYU", "nyu", "NYU/NYU_Depth", "NYU", 5, 2),
        ("Depth_KITTI", "kitti", "KITTI/KITTI_Depth_50images", "KITTI", 4, 2),
        ("Pose_COCO_HeatMap", "pose", "coco_pose/coco_pose", "coco_pose", 5, 2),
    ],
)
def test_upstreams_own_scripts_write_the_same(script, kind, config, prompts, count, processes, tmp_path, monkeypatch):
    """Its code as it stands, process by process, given pictures and answers of decoders, against ours."""
    checkout = os.environ.get("DATASETDM_UPSTREAM")
    if not checkout or not importlib.util.find_spec("cv2"):
        pytest.skip("DATASETDM_UPSTREAM does not name a checkout of showlab/DatasetDM, or OpenCV is not installed")
    name, root = f"parallel_generate_{script}", Path(checkout)
    generator = GENERATORS[name]
    folder = root / PROMPTS / prompts
    flags = ["--root", checkout, "--model", "demo", "--thread_num", str(processes), f"--{generator.count}", str(count)]
    settings = str(root / f"config/{config}.yaml") if config else ""
    flags += ["--prompt_root", str(folder), "--config", settings]
    line = read("", generator, flags)
    ours = generator.order(line)
    ignored = {"config": settings, "n_samples": 1, "fixed_code": False, "H": 512, "W": 512}  # by our lines
    options = types.SimpleNamespace(**ignored | line.values)
    options.outdir, options.grounding_ckpt = str(tmp_path / "theirs"), "none"
    with upstreams_script(root, name, kind, monkeypatch) as (module, drawn):
        if ours.classes:  # the first few: the instances of an image of 512 pixels take seconds
            module.classes = dict(list(module.classes.items())[:6])
        for process in range(processes):
            module.sub_processor(process, options)
    few = set(module.classes.values()) if ours.classes else {""}
    wanted = [(index, item) for index, item in enumerate(ours.items) if item.name in few]
    assert [(item.seed, item.prompt, ours.config.guidance) for _, item in wanted] == drawn
    decoder = {generator.task: answer({}, kind).config}
    made = {}
    for index, item in wanted:
        raw = {generator.task: {key: value[0] for key, value in raw_of(kind, item.seed).items()}}
        made |= ours.files(index, picture_of(item.seed), raw, decoder)
    theirs = tree(tmp_path / "theirs")
    assert made.keys() == theirs.keys()
    for path, content in made.items():
        if path.endswith(".png"):
            assert Image.open(io.BytesIO(theirs[path])).mode == "L"
            assert (decoded(content) == decoded(theirs[path])).all(), path
        else:
            assert content == theirs[path], path


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Depth_Decorder:\n  max_depth: 80\n", "kitti"),
        ("Depth_Decorder:\n  max_depth: 10\n", "nyu"),
        ("Depth_Decorder:\n  task: depth\n", "nyu"),
        ("Depth_Decorder: 80\n", "nyu"),
        ("Depth_Decorder:\n  max_depth:\n", "nyu"),
        ("SEG_Decorder:\n  max_depth: 80\n", "nyu"),
        ("Depth_Decorder:\n  max_depth: 20\n", None),
        ("Depth_Decorder:\n  max_depth: 0\n", None),
        ("Depth_Decorder:\n  max_depth: far\n", None),
    ],
)
def test_the_range_of_a_config_chooses_the_checkpoint(tmp_path, text, kind):
    write(tmp_path / "own.yaml", text)
    line = type("Line", (dict,), {"path": lambda self, name: tmp_path / self[name]})(config="own.yaml")
    script = next(each for each in GENERATORS.values() if each.kinds == ("nyu", "kitti"))
    if kind:
        assert script._kind(line) == kind
        assert script._kind(type(line)(config=None)) == "nyu"
    else:
        with pytest.raises(Refused, match="expected 10 or 80"):
            script._kind(line)
