"""Scripts of DatasetDM run as they are: what they import from us, batches, refusals, and what its own scripts write."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skips import long_test
from test_decoders import seeded_state

from datasetdm_fast.compat.showlab import __main__ as command
from datasetdm_fast.compat.showlab import splicing
from datasetdm_fast.engine.decoders import upstream as checkpoints
from datasetdm_fast.engine.decoders.checkpoint import build_decoder
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.loading import load_model

WEIGHTS = "./dataset/ckpts/imagenet"
SCRIPT = f"""
import argparse
import multiprocessing as mp
import os

import cv2
import numpy as np
import seq_aligner
import torch
import torch.nn.functional as F
import yaml
from IPython.display import Image, display
from pytorch_lightning import seed_everything
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPFeatureExtractor, CLIPTextModel, CLIPTokenizer
from detectron2.utils.memory import retry_if_cuda_oom

import ptp_utils
from dataset import *
from model.segment.transformer_decoder import seg_decorder
from model.unet import UNet2D, clear_feature_dic, get_feature_dic
from tools.train_instance_coco import dict2obj, instance_inference
from tools.utils import get_findContours
from train import AttentionStore

def work(number, given):
    torch.cuda.set_device(number)
    seed_everything(given.seed)
    print("drawn", random.random())
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    tokenizer = CLIPTokenizer.from_pretrained("{WEIGHTS}/", subfolder="tokenizer")
    vae = AutoencoderKL.from_pretrained("{WEIGHTS}/", subfolder="vae").to(device)
    unet = UNet2D.from_pretrained("{WEIGHTS}/", subfolder="unet").to(device)
    text_encoder = CLIPTextModel.from_pretrained("{WEIGHTS}/text_encoder").to(device)
    scheduler = StableDiffusionPipeline.from_pretrained("some/model", use_auth_token="").to(device).scheduler
    decoder = seg_decorder(num_classes=80, num_queries=20).to(device)
    decoder.load_state_dict(torch.load(given.weights, map_location="cpu"), strict=True)
    controller = AttentionStore()
    ptp_utils.register_attention_control(unet, controller)
    parts = unet, vae, tokenizer, text_encoder, scheduler
    found = {{}}
    texts = ["a red ball", "a blue star on grass"]
    for name, chosen in (("both", (0, 1)), ("first", (0,)), ("second", (1,))):
        prompts, numbers = [texts[k] for k in chosen], [torch.Generator().manual_seed(k) for k in chosen]
        clear_feature_dic()
        controller.reset()
        images, _ = ptp_utils.text2image(*parts, prompts, controller, guidance_scale=5, generator=numbers, Train=False)
        ptp_utils.save_images(images, out_put=os.path.join(given.outdir, name + ".jpg"))
        with torch.no_grad():
            answer = decoder(get_feature_dic(), controller, prompts, tokenizer)
        average = controller.get_average_attention()
        found[name + " low"] = torch.cat(get_feature_dic()["low"], 1).numpy()
        found[name + " up"] = average["up_cross"][-1].numpy()
        found[name + " masks"] = answer["pred_masks"].numpy()
        found[name + " layers"] = [len(average[place + "_cross"]) for place in ("down", "mid", "up")]
    masks = F.interpolate(answer["pred_masks"], size=(64, 64), mode="bilinear", align_corners=False)[0]
    one = retry_if_cuda_oom(instance_inference)(answer["pred_logits"][0], masks, 80, 6).to(torch.device("cpu"))
    found["scores"] = one.scores.numpy()
    found["contour"] = get_findContours(one.pred_masks.numpy()[0])
    cv2.imwrite(os.path.join(given.outdir, "mask.png"), np.full((4, 4), 2.5, np.float32))
    np.savez(os.path.join(given.outdir, "found.npz"), **found)
    assert dict2obj({{"a": {{"b": 1}}}}).a.b == 1 and controller.num_att_layers == 20

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--outdir", "--weights"):
        parser.add_argument(name)
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()
    shared = mp.Manager().dict()
    process = mp.get_context("spawn").Process(target=work, args=(0, given))
    process.start()
    process.join()
"""


TRAINER = f"""
import numpy as np
import torch
from pytorch_lightning import seed_everything
from dataset import *
from diffusers import AutoencoderKL, DDPMScheduler
from model.diffusers.models.unet_2d_condition import UNet2DConditionModel
from model.loss import distance
from model.segment.transformer_decoder import seg_decorder
from model.unet import UNet2D, clear_feature_dic, get_feature_dic
from transformers import CLIPTextModel, CLIPTokenizer
import ptp_utils

class Store:
    activate = True

    def reset(self):
        self.cur_step, self.attention_store = 0, {{}}

    def step_callback(self, latents):
        return latents

    def get_average_attention(self):
        return {{key: [one / self.cur_step for one in maps] for key, maps in self.attention_store.items()}}

seed_everything(1)
tokenizer = CLIPTokenizer.from_pretrained("{WEIGHTS}/", subfolder="tokenizer")
vae = AutoencoderKL.from_pretrained("{WEIGHTS}/", subfolder="vae")
unet = UNet2D.from_pretrained("{WEIGHTS}/", subfolder="unet")
text_encoder = CLIPTextModel.from_pretrained("{WEIGHTS}/text_encoder")
decoder = seg_decorder(num_classes=80, num_queries=4).to("cpu")
optimiser = torch.optim.Adam(decoder.parameters(), 1e-4)
scheduler, store = DDPMScheduler.from_config("some/model", subfolder="scheduler"), Store()
ptp_utils.register_attention_control(unet, store)
losses = []
for image, mask in Pictures():
    clear_feature_dic()
    store.reset()
    scheduler.set_timesteps(50)
    with torch.no_grad():
        latents = 0.18215 * vae.encode(image[None]).latent_dist.sample()
    noisy = scheduler.add_noise(latents, torch.randn(latents.shape), scheduler.timesteps[-1:])
    parts = unet, vae, tokenizer, text_encoder, scheduler
    ptp_utils.text2image(*parts, ["a ball"], store, latent=noisy, guidance_scale=5, Train=True)
    loss = distance(decoder(get_feature_dic(), store, ["a ball"], tokenizer)["pred_masks"][:, 0], mask)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(float(loss.detach()))
assert int(scheduler.timesteps[-1]) == 0 and UNet2DConditionModel is None
assert losses[1] < losses[0], losses
torch.save(decoder.state_dict(), "latest_checkpoint.pth")
"""
CHECKOUT = {  # what a trainer reads of its checkout
    "dataset/__init__.py": "from .pictures import *\nfrom .rooms import *",
    "dataset/rooms.py": "import albumentations as A\nfrom skimage.util import random_noise\nclass Rooms: pass",
    "dataset/pictures.py": """
import cv2
import torch
import numpy as np
from detectron2.structures import BitMasks
from detectron2.data import transforms as T

class Pictures:
    def __getitem__(self, k):
        if k == 2:
            raise IndexError
        image = cv2.resize(cv2.cvtColor(cv2.imread("picture.png"), cv2.COLOR_BGR2RGB), dsize=None, fx=2, fy=2)
        mask = np.zeros(image.shape[:2], np.uint8)
        cv2.fillPoly(mask, [np.array([[8, 8], [8, 99], [99, 99], [99, 8]])], 1)
        changed, changes = T.apply_transform_gens([T.RandomCrop("absolute", (128, 128))], T.AugInput(image))
        assert changed.image.shape == (128, 128, 3) and (changed.image[..., 0] > changed.image[..., 2]).all()
        pixels = torch.from_numpy(changed.image / np.float32(127.5) - np.float32(1)).permute(2, 0, 1)
        return pixels, BitMasks(torch.from_numpy(changes.image(mask))[None]).tensor.float()
""",
    "model/segment/places.py": "import torch.nn.functional as F",
    "model/loss.py": """
from .segment.places import F
from detectron2.projects.point_rend.point_features import point_sample, get_uncertain_point_coords_with_randomness

def distance(logits, mask):
    points = get_uncertain_point_coords_with_randomness(logits[None], lambda found: -found.abs(), 99, 3, 0.75)
    assert points.shape == (1, 99, 2) and 0 <= points.min() and points.max() <= 1
    at = [point_sample(each[None], points, align_corners=False) for each in (logits, mask)]
    return F.binary_cross_entropy_with_logits(*at)
""",
}


def weights_of(kind: str, path: Path) -> Path:
    """A checkpoint with seeded weights for the demo model."""
    network, settings = checkpoints.KINDS[kind]
    model = load_model("demo")
    sizes = {"width": 16, "levels": model.levels, **settings}
    if network in ("segmentation", "open-vocabulary"):
        width = model.text_width
        sizes |= {"layers": 2, "feed_forward": 24, "mask_dim": 12, "queries": 20, "text_width": width}
    config = upstream(network, **sizes | ({"depth_width": 8} if network == "depth" else {}))
    shapes = {name: value.shape for name, value in build_decoder(config).state_dict().items()}
    shapes |= {name: torch.Size(shape) for name, shape in checkpoints.unused_shapes(config).items()}
    torch.save(seeded_state(shapes, 4), path)
    return path


def run(*arguments) -> int:
    return command.main(["run", *map(str, arguments)])


def test_a_script_finds_datasetdms_names_and_batches_are_right(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, before, line = tmp_path / "script.py", set(sys.modules), list(sys.argv)
    script.write_text(SCRIPT)
    weights = weights_of("coco", tmp_path / "coco.pth")
    flags = ("--model", "demo", "--engine", "torch", "--device", "cpu", "--steps", 2)
    assert run(*flags, script, "--outdir", tmp_path, "--weights", weights) == 0
    told = capfd.readouterr()
    assert "drawn 0.6394" in told.out and "script.py: 4 images" in told.err
    found = np.load(tmp_path / "found.npz")
    for name, at_most in (("low", 1e-3), ("up", 1e-5)):
        apart = np.concatenate([found[f"{each} {name}"] for each in ("first", "second")])
        assert np.abs(found[f"both {name}"] - apart).max() < at_most
    assert np.abs(found["first low"] - found["second low"]).max() > 0.01
    assert found["both masks"].shape[0] == 2 and found["scores"].shape == (6,)
    assert found["both layers"].tolist() == [3, 1, 6] == found["first layers"].tolist()
    assert np.array(Image.open(tmp_path / "mask.png")).tolist() == [[2] * 4] * 4
    assert not {"model", "ptp_utils", "train", "dataset"} & (set(sys.modules) - before) and sys.argv == line


def test_a_trainer_takes_its_data_and_losses_from_its_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {**CHECKOUT, "tools/train_mine.py": TRAINER}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    Image.new("RGB", (70, 66), (200, 90, 20)).save(tmp_path / "picture.png")
    before = set(sys.modules)
    assert run("--model", "demo", "--engine", "torch", "--device", "cpu", "tools/train_mine.py") == 0
    found = checkpoints.open_checkpoint(tmp_path / "latest_checkpoint.pth", "", load_model("demo").levels)
    assert found.kind == "coco" and found.config.queries == 4 and checkpoints.SIDE_FILE in found.files()
    assert not {"dataset", "model", "cv2", "detectron2"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    "text, code, told",
    [
        (None, 2, "no such script"),
        ("import (", 2, "not a Python script"),
        ("x = 1\nfrom model.unet import Nothing", 2, "line 2: ImportError"),
        ("import torch\ntorch.load('none.pth')", 3, "line 2: none.pth is not there"),
        ("import model.loss", 2, "model.loss is none of the modules"),
        ("import albumentations\nalbumentations.Compose([])", 3, "the script needs albumentations, which is not"),
        ("from tools.utils import nothing", 2, "cannot import name 'nothing' from 'tools.utils'"),
        (
            "from model.segment.transformer_decoder import seg_decorder\nimport torch\n"
            "try:\n    seg_decorder().load_state_dict({'a': torch.zeros(1)})\nexcept:\n    nowhere.load()",
            2,
            "tensors do not fit this segmentation decoder",
        ),
    ],
)
def test_what_a_script_cannot_find_is_said_in_a_sentence(text, code, told, tmp_path, capfd):
    script = tmp_path / "script.py"
    if text is not None:
        script.write_text(text)
    assert run("--model", "demo", script) == code
    said = capfd.readouterr().err.strip()
    assert told in said and len(said.splitlines()) <= 2


def test_what_cannot_run_is_refused_before_its_first_line(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--engin", "torch", "mine.py") == 2 and "(did you mean --engine?)" in capfd.readouterr().err
    for name, rest, code, told in (
        ("mine.py", "", 3, WEIGHTS),
        ("train.py", "", 2, "no generator of DatasetDM reads"),
        ("train_depth_NYU.py", "x.cuda()", 2, "line 2: it calls .cuda(), and --device is cpu"),
    ):
        (tmp_path / name).write_text(f"print('it ran')\n{rest}")
        assert run("--device", "cpu", name) == code
        said = capfd.readouterr()
        assert told in said.err and "it ran" not in said.out


@pytest.mark.parametrize(
    "script, kind, config, count",
    [
        ("Semantic_VOC_AnyClass", "voc", "VOC/VOC_Sematic_Seg_5Images", "n_each_class"),
        ("Depth_NYU", "nyu", "NYU/NYU_Depth", "number_data"),
    ],
)
def test_upstreams_scripts_write_what_our_commands_write(script, kind, config, count, tmp_path, monkeypatch):
    """Unmodified, on the demo model. 3 steps, as of 2 two calls are at the last timestep: PNDM repeats its second."""
    root, name = upstream_checkout(), f"parallel_generate_{script}"
    weights = weights_of(kind, tmp_path / f"{kind}.pth")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    flags = ["--model", "demo", "--steps", "3", "--limit", "2", "--device", "cpu"]
    own = ["--config", root / f"config/{config}.yaml", "--grounding_ckpt", weights, f"--{count}", 2, "--thread_num", 1]
    own = list(map(str, own))
    monkeypatch.chdir(root)  # --prompt_root is a switch of its scripts: prompts are found from the checkout on
    assert run(*flags, "--engine", "torch", root / f"tools/{name}.py", *own, "--outdir", theirs) == 0
    rest = ["--root", str(root), "--strict", "--quiet", "--outdir", str(ours)]
    assert command.main([name, *flags, *own, *rest]) == 0
    pictures = sorted(path.relative_to(theirs) for path in theirs.rglob("*.*"))
    assert len(pictures) == 4 and all((ours / path).is_file() for path in pictures)
    for path in pictures:
        a, b = (Image.open(out / path) for out in (ours, theirs))
        if path.suffix == ".jpg":
            assert (ours / path).read_bytes() == (theirs / path).read_bytes()
        else:  # DatasetDM's scripts write masks of 512 pixels, whatever the size of the image
            assert (np.array(a.resize(b.size, Image.Resampling.NEAREST)) == np.array(b)).mean() > (
                0.97 if kind == "voc" else 0.9999
            )


def upstream_checkout() -> Path:
    checkout = os.environ.get("DATASETDM_UPSTREAM")
    if not checkout:
        pytest.skip("DATASETDM_UPSTREAM does not name a checkout of showlab/DatasetDM")
    return Path(checkout).resolve()


def labelled_output(folder: Path) -> Path:
    """An output of two images with masks, depth and contours."""
    for name in ("Image", "Mask", "Annotation"):
        (folder / name).mkdir(parents=True)
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((512, 512)).save(folder / f"Image/dog_{k}.jpg")
        plane = np.full((512, 512), 30 * k, np.uint8)
        plane[99:300, 99:200] = 12
        for name in ("Mask", "Annotation"):
            Image.fromarray(plane).save(folder / f"{name}/dog_{k}.png")
        (folder / f"Mask/dog_{k}.txt").write_text(f"{k},1,{k},5,9,5,1,0.5\n")
    return folder


@pytest.mark.parametrize("name", splicing.SPLICERS)
def test_upstreams_splicers_write_what_our_commands_write(name, tmp_path, monkeypatch):
    """Given the same draws: its own have no seed."""
    root, source = upstream_checkout(), labelled_output(tmp_path / "DataDiffusion/in")
    monkeypatch.chdir(tmp_path)
    random.seed(3)
    line = ["--input_root", "in", "--out_root", "theirs", "--thread_num", 1]
    assert run("--limit", 3, root / f"tools/{name}.py", *line) == 0
    drawn, listed, splicer = random.Random(3), os.listdir(source / "Image"), splicing.SPLICERS[name]
    out = tmp_path / "DataDiffusion/theirs"
    assert len(list(out.rglob("*.*"))) == 6
    for id in range(3):
        pair = tuple(Path(drawn.choice(listed)).stem for _ in range(2))
        rows = (pair,) if drawn.random() > 0.5 else tuple((one,) for one in pair)
        image, label = splicing.spliced(splicer, source, splicing.Tiles(id, rows), is_single=False)
        assert (out / f"Image/splicing_{id}.jpg").read_bytes() == image
        assert (out / f"{splicer.folder}/splicing_{id}{splicer.suffix}").read_bytes() == label


def test_upstreams_vis_script_draws_what_our_command_draws(tmp_path, monkeypatch):
    root = upstream_checkout()
    labelled_output(tmp_path / "DataDiffusion/NYU_Train_250_images_t1")
    monkeypatch.chdir(tmp_path)
    assert run(root / "DataDiffusion/vis_NYU.py") == 0
    assert command.main(["vis_NYU", "--root", str(tmp_path), "--out_root", "ours", "--quiet"]) == 0
    ours, theirs = (sorted((tmp_path / "DataDiffusion" / name).iterdir()) for name in ("ours", "Vis"))
    assert [path.name for path in ours] == [path.name for path in theirs] and len(ours) == 4
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


def picture(path: Path, pixels: np.ndarray | None = None) -> None:
    """A file of these pixels, else a photo of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((520, 600, 3), (90, 120, 30), np.uint8) if pixels is None else pixels).save(path)


def voc_data(root: Path) -> None:
    picture(root / "PascalVOC12/JPEGImages/a.jpg")
    picture(root / "PascalVOC12/SegmentationClassAug/a.png", np.pad(np.full((300, 380), 3, np.uint8), 110))
    (root / "PascalVOC12/splits").mkdir()
    (root / "PascalVOC12/splits/train_aug.txt").write_text("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n")


def cityscapes_data(root: Path) -> None:
    picture(root / "cityscapes/leftImg8bit/train/aachen/a_leftImg8bit.png", np.full((700, 1400, 3), 90, np.uint8))
    picture(root / "cityscapes/gtFine/train/aachen/a_gtFine_labelTrainIds.png", np.full((700, 1400), 10, np.uint8))


def instances(categories: int) -> str:
    """One image with two things, in COCO's form with what LVIS adds."""
    image = {"id": 1, "file_name": "a.jpg", "height": 520, "width": 600, "coco_url": "http://x/train2017/a.jpg"}
    names = [{"id": k, "name": f"c{k}", "synonyms": [f"c{k}"], "frequency": "f"} for k in range(1, categories + 1)]
    place = {"image_id": 1, "bbox": [100, 100, 200, 300], "area": 60000, "iscrowd": 0}
    outline = [[100, 100, 300, 100, 300, 400, 100, 400]]
    things = [{**place, "id": k, "category_id": k, "segmentation": outline} for k in (1, 2)]
    lacking = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return json.dumps({"images": [image | lacking], "annotations": things, "categories": names})


def coco_data(root: Path) -> None:
    picture(root / "COCO2017/train2017/a.jpg")
    (root / "COCO2017/annotations").mkdir()
    (root / "COCO2017/annotations/instances_train2017.json").write_text(instances(80))


def lvis_data(root: Path) -> None:
    picture(root / "lvis/train2017/a.jpg")
    (root / "lvis/lvis_v1_train.json").write_text(instances(1203))
    (root.parent / "dataset/Selected_File/LVIS").mkdir(parents=True)  # where its script writes a list


@long_test
@pytest.mark.parametrize(
    ("script", "config", "kind", "write", "queries"),
    [
        ("train_semantic_voc", "VOC/VOC_Sematic_Seg_5Images", "voc", voc_data, 20),
        (
            "train_semantic_cityscapes",
            "cityscapes/Cityscapes_Semantic_Seg_50images",
            "cityscapes",
            cityscapes_data,
            100,
        ),
        ("train_instance_coco", "coco/COCO_Instance_Seg_10Images", "coco", coco_data, 100),
        ("train_instance_LVIS", "LVIS/LVIS_Instance_Seg_10Images", "lvis", lvis_data, 100),
    ],
)
def test_upstreams_trainers_leave_a_checkpoint(script, config, kind, write, queries, tmp_path, monkeypatch):
    root = upstream_checkout()
    write(tmp_path / "data")
    text = (root / f"config/{config}.yaml").read_text()
    (tmp_path / "short.yaml").write_text(text.replace("total_epoch: 5000", "total_epoch: 1"))
    monkeypatch.chdir(tmp_path)
    flags = ("--model", "demo", "--engine", "torch", "--device", "cpu")
    assert run(*flags, root / f"tools/{script}.py", "--config", "short.yaml", "--save_name", "one") == 0
    path = tmp_path / "checkpoint/one/latest_checkpoint.pth"
    assert checkpoints.open_checkpoint(path, kind, load_model("demo").levels).config.queries == queries
    assert len(list((tmp_path / "checkpoint/one/training").iterdir())) >= 3
