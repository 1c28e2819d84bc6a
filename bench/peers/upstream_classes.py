"""DatasetDM's own classes, from the checkout that DATASETDM_UPSTREAM names: its UNet, attention store, sampling loop
and decoders.

They are made for 512 x 512 pixels and for the last call of PNDM. What they import and never compute with is replaced by
nothing.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import PNDMScheduler
from torch import Tensor, nn

from bench.peers.samples import samples_of
from bench.peers.upstream import arithmetic, own_decoders
from bench.setting import Setting
from datasetdm_fast.data import Capture, Request, Sample, Text
from datasetdm_fast.engine.decoders.config import SD1_LEVELS
from datasetdm_fast.errors import Missing
from datasetdm_fast.stages import LEVELS

SIDE = 512  # pixels, fixed in upstream's loop
GROUPS = 32  # of every norm, fixed in the UNet it vendors
UNUSED = ("cv2", "IPython", "IPython.display", "tqdm.notebook", "black", "mmcv", "mmcv.cnn", "mmcv.runner")
UNUSED += ("torchvision", "torchvision.transforms", "detectron2", "detectron2.layers", "detectron2.config")
UNUSED += ("fvcore", "fvcore.nn", "fvcore.nn.weight_init")
# As bare folders: their __init__ imports more than is needed.
PACKAGES = ("model", "model.segment", "model.diffusers", "model.diffusers.models")
# What upstream's UNet takes of a model's configuration.
SIZES = ("sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels")
SIZES += ("layers_per_block", "cross_attention_dim", "attention_head_dim", "norm_num_groups")
DECODERS = {
    "segmentation": ("model.segment.transformer_decoder", "seg_decorder"),
    "depth": ("model.depth_module", "Depthmodule"),
    "heatmap": ("model.pose_module_heat", "PoseModule_HeatMap"),
}


class Nothing:
    """Stands for what is imported and never computed with."""

    def __init__(self, *_: object, **__: object):
        pass

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()

    def __call__(self, *_: object, **__: object) -> Nothing:
        return Nothing()


def normal_init(module: nn.Module, mean: float = 0.0, std: float = 1.0, bias: float = 0.0) -> None:
    nn.init.normal_(module.weight, mean, std)


def stand_in(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    known = {"normal_init": normal_init, "tqdm": lambda values: values}
    module.__getattr__ = lambda attribute: known.get(attribute) or Nothing()
    return module


@contextlib.contextmanager
def checkout(root: Path) -> Iterator[None]:
    """Within the block upstream's modules can be imported; afterwards `sys.modules` is as it was."""
    before = dict(sys.modules)
    for name in UNUSED:
        sys.modules[name] = stand_in(name)
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(Path(root, *name.split(".")))]
        package.__version__ = "0.3.0"  # of the diffusers it vendors
        sys.modules[name] = package
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("model", "ptp_utils", *(unused.split(".")[0] for unused in UNUSED)):
                del sys.modules[name]
        sys.modules.update(before)


def classes_of(path: Path, names: Sequence[str]) -> SimpleNamespace:
    """The classes and constants `names` of a script, without running the rest of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def is_wanted(node: ast.stmt) -> bool:
        if isinstance(node, ast.Assign):
            return any(isinstance(target, ast.Name) and target.id in names for target in node.targets)
        return getattr(node, "name", "") in names

    found = {"abc": importlib.import_module("abc"), "__name__": path.stem}
    exec(compile(ast.Module([node for node in tree.body if is_wanted(node)], []), str(path), "exec"), found)
    return SimpleNamespace(**{name: found[name] for name in names})


class UpstreamClasses:
    dtype, batch, rounds_text = "fp32", 1, False

    def __init__(self, setting: Setting, root: Path):
        self.setting, self.recipe, self.device = setting, setting.recipe, setting.device
        model = setting.model
        wanted = ("LOW_RESOURCE", "AttentionControl", "AttentionStore")
        self.store = classes_of(root / "train.py", wanted).AttentionStore()
        self.store.activate = False
        with checkout(root):
            self.ptp = importlib.import_module("ptp_utils")
            self.module = importlib.import_module("model.unet")
            self.decoders = real_decoders(setting) if model.levels == SD1_LEVELS else own_decoders(setting)
        self.unet = self.module.UNet2D(**{name: model.modules["unet"].config[name] for name in SIZES})
        self.unet.load_state_dict(model.modules["unet"].state_dict())
        self.unet.eval().to(self.device)
        self.ptp.register_attention_control(self.unet, self.store)
        self.scheduler = PNDMScheduler.from_config(dict(model.scheduler))
        self._first = [(buffer, buffer.clone()) for decoder in self.decoders.values() for buffer in decoder.buffers()]
        self._clear()

    def _clear(self) -> None:
        self.module.clear_feature_dic()
        self.store.reset()

    def encode_text(self, prompts: Sequence[str]) -> Text:
        return self.setting.reference.encode_text(prompts)  # transformers' own module, as upstream uses it

    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        moment = torch.tensor(timestep, device=self.device)
        with arithmetic(False):
            return self.unet(torch.cat([latents, latents]), moment, encoder_hidden_states=text.context)["sample"]

    def denoise_and_capture(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        self._clear()
        self.store.activate = True
        noise = self.denoise(latents, timestep, text)
        self.store.activate = False
        return noise, self.capture()

    def capture(self) -> Capture:
        """What the call left in upstream's dictionaries."""
        features, average = self.module.get_feature_dic(), self.store.get_average_attention()
        maps = []
        for level in self.setting.model.levels:
            places = ("mid",) if level.name == "low" else ("up", "down")
            layers = [layer for place in places for layer in average[f"{place}_cross"]]
            maps.append(tuple(layer[None] for layer in layers if layer.shape[1] == level.side**2))
        return Capture(tuple(tuple(features[name]) for name in LEVELS), tuple(maps))

    def _run(self, request: Request) -> np.ndarray:
        self._clear()
        model, generator = self.setting.model, torch.Generator("cpu").manual_seed(request.seed)
        parts = (
            self.unet,
            model.modules["vae"],
            model.tokenizers["tokenizer"],
            model.modules["text_encoder"],
            self.scheduler,
        )
        options = {"num_inference_steps": self.recipe.facts["steps"], "guidance_scale": self.recipe.guidance}
        with arithmetic(False):
            return self.ptp.text2image(
                *parts, [request.prompt], self.store, generator=generator, Train=False, **options
            )[0]

    def make(self, requests: Sequence[Request]) -> list[Sample]:
        for buffer, first in self._first:
            buffer.copy_(first)
        (request,) = requests
        image = self._run(request)
        with arithmetic(False):
            answers = {task: self._answer(decoder, request) for task, decoder in self.decoders.items()}
        on_host = {task: {name: value.cpu() for name, value in answer.items()} for task, answer in answers.items()}
        decoders, tokenizer = self.setting.reference.decoders, self.setting.model.tokenizer
        return samples_of(requests, image, on_host, decoders, self.recipe, tokenizer)

    def _answer(self, decoder: nn.Module, request: Request) -> dict[str, Tensor]:
        if self.setting.model.levels != SD1_LEVELS:
            return decoder(self.capture())
        features = {name: list(tensors) for name, tensors in self.module.get_feature_dic().items()}
        return named(decoder(features, self.store, [request.prompt], None))


def named(answer: Any) -> dict[str, Tensor]:
    """The answer of an upstream decoder under our names: segmentation names its own, depth [B, 1, H, W] and heatmaps do
    not.
    """
    if isinstance(answer, dict):
        return {name: answer[name] for name in ("pred_logits", "pred_masks")}
    (value,) = answer if isinstance(answer, (list, tuple)) else (answer,)
    return {"depth" if value.shape[1] == 1 else "heatmaps": value}


class Settings(dict):
    __getattr__ = dict.__getitem__


def real_decoders(setting: Setting) -> dict[str, nn.Module]:
    """Upstream's decoder classes with the weights of the setting's; parameters that are never read keep their initial
    values.
    """
    made = {}
    for task, ours in setting.trained.items():
        module, name = DECODERS[ours.config.kind]
        build = getattr(importlib.import_module(module), name)
        if ours.config.kind == "segmentation":
            theirs = build(num_classes=len(ours.config.classes), num_queries=ours.config.queries)
        elif ours.config.kind == "depth":
            theirs = build(max_depth=ours.config.max_depth)
        else:
            theirs = build(Settings(MODEL=Settings(HEAD_INPUT=1024), DATASETS=Settings(IMAGE_SIZE=[SIDE, SIDE])))
        theirs.load_state_dict(theirs.state_dict() | ours.state_dict())
        made[task] = theirs.to(setting.device)
    return made


def build(setting: Setting, batch: int) -> UpstreamClasses:
    root, recipe, who = os.environ.get("DATASETDM_UPSTREAM"), setting.recipe, "DatasetDM's own classes"
    if not root:
        raise Missing(f"{who}: DATASETDM_UPSTREAM is not set", "set it to a checkout of showlab/DatasetDM")
    is_last = recipe.schedule.timesteps[recipe.captured[-1]] in (0, 1)
    if recipe.size != SIDE or not is_last or setting.model.modules["unet"].config.norm_num_groups != GROUPS:
        limits = f"{SIDE} pixels, the last call and norms of {GROUPS} groups"
        raise Missing(f"{who}: they are made for {limits}", "measure random-sd14")
    if importlib.util.find_spec("einops") is None and setting.model.levels == SD1_LEVELS:
        raise Missing(f"{who}: einops is not installed, its decoders compute with it", "pip install einops")
    return UpstreamClasses(setting, Path(root))
