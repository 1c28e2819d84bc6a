"""Dataset Diffusion's own gen_data.py beside `generate --parity dataset-diffusion`: the same model and prompts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skips import long_test

from datasetdm_fast import generate
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loading.saving import save_model
from datasetdm_fast.runs.run_folder.reader import open_run

ENTRIES = [
    ("a man with a dog; person dog", "person dog"),
    ("a room with a television; tv monitor potted plant person", "tv monitor potted plant person"),
    ("a cat on a chair; cat chair", "cat chair"),
]
SIDES = (8, 4)  # cells of self- and cross-attention of the demo model, whose latents have 16 a side
STEPS, PIXELS = 5, 128
THRESHOLDS, NEAR = (0.5, 0.6), 1e-3  # the usual ones; rounding may move a value over a threshold or another class's
# What its code needs to run here: NLTK's tokenizer, of which lists of words need no more than a split, and networks
# in fp32, as parity is with an fp32 run of its algorithm. Fewer steps than its 100 take less time. Its pixels before
# JPEG and the values that its masks come from are kept beside its output, as pixels0.npy, values0.npy and so on.
START = f"""
import itertools, runpy, sys, types
import numpy, torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image
out = sys.argv[1]
set_timesteps = PNDMScheduler.set_timesteps
PNDMScheduler.set_timesteps = lambda scheduler, steps, device=None: set_timesteps(scheduler, {STEPS}, device)
for name in ("nltk", "nltk.tokenize"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["nltk.tokenize"].word_tokenize = str.split
load = StableDiffusionPipeline.from_pretrained.__func__
def in_fp32(kind, path, **named):
    return load(kind, path, **{{**named, "torch_dtype": torch.float32}})
StableDiffusionPipeline.from_pretrained = classmethod(in_fp32)
interpolate, fromarray = torch.nn.functional.interpolate, Image.fromarray
values, pixels = itertools.count(), itertools.count()
def values_kept(given, *size, **named):
    found = interpolate(given, *size, **named)
    if named.get("mode") == "bicubic" and found.shape[-1] == {PIXELS}:
        numpy.save(f"{{out}}/values{{next(values)}}.npy", found[0])
    return found
def pixels_kept(given, *rest):
    if given.ndim == 3:
        numpy.save(f"{{out}}/pixels{{next(pixels)}}.npy", given)
    return fromarray(given, *rest)
torch.nn.functional.interpolate, Image.fromarray = values_kept, pixels_kept
sys.path.insert(0, sys.argv[2])
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@long_test
@pytest.mark.parametrize("batch", [1, 2])
def test_its_own_script_writes_the_same(batch, tmp_path):
    """Its negative prompt has 209 tokens in the demo's tokenizer, so that it is cut within a word."""
    checkout = os.environ.get("DATASET_DIFFUSION_UPSTREAM")
    if not checkout:
        pytest.skip("DATASET_DIFFUSION_UPSTREAM does not name a checkout of VinAIResearch/Dataset-Diffusion")
    keys, theirs, ours = ("filename", "caption", "class_prompt"), tmp_path / "theirs", tmp_path / "ours"
    (tmp_path / "list.json").write_text(
        json.dumps([dict(zip(keys, (f"n{k}.jpg", *each))) for k, each in enumerate(ENTRIES)])
    )
    model = save_model(load_model("demo"), tmp_path / "model")
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text, "class_prompt": words}) for text, words in ENTRIES)
    )
    line = f"--json-path {tmp_path}/list.json --sd-path {model} --self-res {SIDES[0]} --cross-res {SIDES[1]}"
    script = [str(tmp_path), checkout, f"{checkout}/gen_data.py", "--work-dir", str(theirs)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", START, *script, *line.split(), "--batch-size", str(batch)]
    subprocess.run(command, check=True, env=os.environ | hidden)
    line = (
        f"--prompts {tmp_path}/list.jsonl --model {model} --self-cells {SIDES[0]} --cross-cells {SIDES[1]} --number 3"
    )
    line += f" --labeller attention --parity dataset-diffusion --classes voc --palette voc --seed 1111 --out {ours}"
    line += f" --batch-size {batch} --steps {STEPS} --engine torch --dtype fp32 --device cpu --quiet"
    assert generate.main(line.split()) == 0
    with open_run(ours) as found:
        images = [sample.image for sample in found]
    for k, image in enumerate(images):
        far = np.abs(image.astype(int) - np.load(tmp_path / f"pixels{k}.npy"))
        assert far.max() <= 1 and far.mean() < 0.01
        a, b = (Image.open(path) for path in (ours / f"attention/{k:08}.png", theirs / f"mask/n{k}.png"))
        assert a.mode == b.mode and a.getpalette()[:63] == b.getpalette()[:63]
        values = np.sort(np.load(tmp_path / f"values{k}.npy"), axis=0)
        is_near = np.abs(values[-1][..., None] - THRESHOLDS).min(-1) < NEAR
        is_near |= values[-1] - values[-2] < NEAR
        differs = np.asarray(a) != np.asarray(b)
        print(f"batch {batch}, image {k}: {far.mean():.4f} mean, {far.max()} most; {differs.sum()} pixels of the mask")
        assert not (differs & ~is_near).any() and is_near.mean() < 0.3
