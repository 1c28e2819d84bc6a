"""Low-rank adapters fused into a model as it is loaded (Hu et al. 2021, eq. 3): W + scale * alpha / rank * B A."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.foreign import documents, tensors
from datasetdm_fast.loading.model import Model
from datasetdm_fast.loading.provenance import digest

# how files begin the names of a network's layers -> the network
NETWORKS = {"lora_unet_": "unet", "lora_te_": "text_encoder", "unet.": "unet", "text_encoder.": "text_encoder"}
ENDINGS = {  # of the names of one adapter's tensors -> which of them it is
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}
FORM = "Give an adapter of Stable Diffusion 1.x or 2.x in .safetensors, as kohya's scripts or diffusers save them."
LARGEST_SCALE = 100.0


def fused(model: Model, given: Sequence[str]) -> Model:
    """The model with every adapter FILE[:SCALE] fused into copies of its networks, and their digests."""
    for text in given:
        model = _with_one(model, text)
    return model


def parse(text: str) -> tuple[Path, float]:
    """File and scale of FILE[:SCALE]."""
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        scale = float(number)
    except ValueError:
        return Path(text), 1.0
    if not abs(scale) <= LARGEST_SCALE:
        raise Refused(
            f"--lora {text}: the scale is {number}, expected a number up to {LARGEST_SCALE:g}",
            "Write FILE:0.8 for a scale of 0.8.",
        )
    return Path(name), scale


def _with_one(model: Model, text: str) -> Model:
    path, scale = parse(text)
    if not path.is_file():
        raise Missing(
            f"--lora {path}: no such file{storage.named_alike(path)}",
            "Check the path; a scale follows the file: FILE:0.8",
        )
    tensors.check_safetensors(path)
    changed: dict[str, nn.Module] = {}
    for (network, layer), parts in sorted(_adapters(load_file(path), path).items()):
        if network not in changed:
            changed[network] = copy.deepcopy(getattr(model, network))
        _fuse(_layer(changed[network], layer, path), parts, scale, f"--lora {path}: {layer}")
    name, count = f"lora {path.name}", 1
    while name in model.digests:  # diffusers calls all adapters alike
        name, count = f"lora {path.name} {count + 1}", count + 1
    told = {name: f"{digest([path])} x {scale:g}"}
    plain = model.with_modules(**{name: module.eval().requires_grad_(False) for name, module in changed.items()})
    return replace(plain, digests={**model.digests, **told})


def _adapters(state: dict[str, Tensor], path: Path) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Network and layer -> the tensors of its adapter."""
    found: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        ending = next((one for one in ENDINGS if key.endswith(one)), None)
        start = next((one for one in NETWORKS if key.startswith(one)), None)
        if ending is None or start is None:
            raise Refused(f"--lora {path}: {documents.quoted(key)} is not a tensor of a low-rank adapter", FORM)
        layer = key[len(start) : len(key) - len(ending)].replace(".processor.", ".")
        found[NETWORKS[start], layer][ENDINGS[ending]] = value
    if not found:
        raise Refused(f"--lora {path}: it holds no tensor", FORM)
    return found


def _layer(module: nn.Module, name: str, path: Path) -> nn.Module:
    """The layer that a name of the file means: its dots may be written as underscores."""
    wanted = _plain(name)
    for place, layer in module.named_modules():
        if _plain(place) == wanted and isinstance(layer, (nn.Linear, nn.Conv2d)):
            return layer
    raise Refused(f"--lora {path}: the model has no layer {documents.quoted(name)}", FORM)


def _plain(name: str) -> str:
    return re.sub(r"^text_model_|_0$", "", re.sub(r"\bto_out\.0\b", "to_out", name).replace(".", "_"))


@torch.no_grad()
def _fuse(layer: nn.Module, parts: dict[str, Tensor], scale: float, where: str) -> None:
    if not {"down", "up"} <= set(parts):
        raise Refused(f"{where}: only {' and '.join(parts)} of its adapter is there", FORM)
    down, up = parts["down"].float(), parts["up"].float()
    rank = len(down) if down.ndim > 1 else 0
    alpha = parts.get("alpha", torch.tensor(float(rank)))
    is_whole = rank and up.ndim == down.ndim and up.shape[1] == rank and alpha.numel() == 1
    if not is_whole or (up.shape[0], down.shape[1]) != tuple(layer.weight.shape[:2]):
        raise Refused(
            f"{where}: an adapter of {list(down.shape)} and {list(up.shape)} for a weight of "
            f"{list(layer.weight.shape)}",
            FORM,
        )
    change = (up.flatten(1) @ down.flatten(1)) * (scale * float(alpha) / rank)
    if change.numel() != layer.weight.numel() or not change.isfinite().all():
        raise Refused(
            f"{where}: its product does not fit a weight of {list(layer.weight.shape)}, or is not finite", FORM
        )
    layer.weight += change.view_as(layer.weight)
