"""Low-rank adapters fused into a model as it is loaded (Hu et al. 2021, eq. 3): W + scale * alpha / rank * B A."""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from datasetdm_fast.engine.backbones.adapter_files import find_adapter
from datasetdm_fast.engine.backbones.fitting import first_line, quiet_libraries
from datasetdm_fast.engine.loading.model import Model, digest
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents, tensors

TEXT_ENCODERS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}  # of kohya
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
ROWS = re.compile(r"(lora_B|[._]up)(\.default)?\.weight$")  # of a tensor with the rows of a layer, before it is renamed
NOTES = "lora_adapter_metadata"  # under which diffusers writes how a file's adapters are scaled
FORM = "Give an adapter of this model's family in .safetensors, as kohya's scripts or diffusers save them."


def fuse_adapters(model: Model, adapters: Sequence[str]) -> Model:
    """The model with every adapter FILE[:SCALE] fused into copies of its networks, and their digests."""
    if adapters and model.backbone.name_adapter is None:
        raise Refused(
            f"--lora {adapters[0]}: the layers of adapters are not known for {model.backbone.title} yet",
            "Fuse it with diffusers' load_lora_weights and fuse_lora, and name the folder that save_pretrained writes.",
        )
    for text in adapters:
        model = _with_one(model, text)
    return model


def _with_one(model: Model, text: str) -> Model:
    path, scale = find_adapter(text)
    tensors.check_safetensors(path)
    notes = _notes(path, model.networks)
    changed: dict[str, nn.Module] = {}
    state = _named_as_layers(load_file(path), model, path)
    for (network, layer), parts in sorted(_adapters(state, model, path).items()):
        if network not in changed:
            changed[network] = copy.deepcopy(model.networks[network].module)
        noted = _noted_scale(notes, network, layer, parts)
        _fuse(_layer(changed[network], layer, path), parts, scale * noted, f"--lora {path}: {layer}")
    name, count = f"lora {path.name}", 1
    while name in model.digests:  # diffusers calls all adapters alike
        name, count = f"lora {path.name} {count + 1}", count + 1
    fused_digests = {name: f"{digest([path])} x {scale:g}"}
    plain = model.with_modules(**{name: module.eval().requires_grad_(False) for name, module in changed.items()})
    return replace(plain, digests={**model.digests, **fused_digests})


def _named_as_layers(state: dict[str, Tensor], model: Model, path: Path) -> dict[str, Tensor]:
    """The tensors under the names of the model's layers, refused where a part of one has none."""
    assert model.backbone.name_adapter is not None
    if any("dora_scale" in key for key in state):
        raise Refused(f"--lora {path}: it is a DoRA, which scales the columns of weights, too", FORM)
    try:
        with quiet_libraries():
            named = model.backbone.name_adapter(state, model.configs)
    except Exception as error:  # of names and shapes that diffusers does not know
        raise Refused(
            f"--lora {path}: its names are not those of an adapter of {model.backbone.title} ({first_line(error)})",
            FORM,
        ) from error
    rows, named_rows = (
        sum(value.shape[0] for key, value in each.items() if ROWS.search(key) and value.ndim) for each in (state, named)
    )
    if rows != named_rows:
        raise Refused(f"--lora {path}: {rows - named_rows} of its {rows} rows are of layers that the model lacks", FORM)
    return named


def _ending(key: str) -> tuple[str, str]:
    """How the name of an adapter's tensor ends, and which of its tensors it is; empty where it is none."""
    return next(((ending, kind) for ending, kind in ENDINGS.items() if key.endswith(ending)), ("", ""))


def _adapters(state: dict[str, Tensor], model: Model, path: Path) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Network and layer -> the tensors of its adapter."""
    starts = {f"{part}.": part for part in model.networks} | {"lora_unet_": model.backbone.denoiser}
    starts |= {start: part for start, part in TEXT_ENCODERS.items() if part in model.networks}
    layers: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        ending, kind = _ending(key)
        start = next((name for name in starts if key.startswith(name)), "")
        if not ending or not start:
            raise Refused(f"--lora {path}: {documents.quote(key)} is not a tensor of a low-rank adapter", FORM)
        layer = key[len(start) : len(key) - len(ending)].replace(".processor.", ".")
        layers[starts[start], layer][kind] = value
    if not layers:
        raise Refused(f"--lora {path}: it holds no tensor", FORM)
    return layers


def _notes(path: Path, networks: Iterable[str]) -> dict[str, Any]:
    """What diffusers noted about the adapters of a file: settings such as `unet.lora_alpha`, checked; often none."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(NOTES, "{}")
    notes = documents.parse_json(text, f"--lora {path}: its {NOTES}")
    forms = {"lora_alpha": float, "alpha_pattern": {}, "use_rslora": bool}
    try:
        documents.check_form(notes, {})
        for network in networks:
            present = {name: form for name, form in forms.items() if notes.get(f"{network}.{name}") is not None}
            documents.check_form(notes, {f"{network}.{name}": form for name, form in present.items()})
            pattern = notes.get(f"{network}.alpha_pattern") or {}
            documents.check_form(pattern, dict.fromkeys(pattern, float), f"{network}.alpha_pattern")
            if others := [name for name in pattern if not re.fullmatch(r"\^?[\w.]+", name)]:
                raise ValueError(f"{network}.alpha_pattern has {documents.quote(others[0])}, expected names of layers")
    except ValueError as error:
        raise Refused(f"--lora {path}: its {NOTES} are inconsistent ({error})", FORM) from error
    return notes


def _noted_scale(notes: dict[str, Any], network: str, layer: str, parts: dict[str, Tensor]) -> float:
    """The noted alpha / rank of a layer's adapter; 1 where nothing is noted, or its alpha is a tensor of the file."""
    alpha = notes.get(f"{network}.lora_alpha")
    if alpha is None or "alpha" in parts or "down" not in parts:
        return 1.0
    pattern = notes.get(f"{network}.alpha_pattern") or {}  # of layers whose names end so, or with ^ are so
    names = (f".{layer}", f".^{layer}")
    alpha = next((value for end, value in pattern.items() if any(name.endswith(f".{end}") for name in names)), alpha)
    rank = max(parts["down"].shape[0], 1)
    return alpha / (math.sqrt(rank) if notes.get(f"{network}.use_rslora") else rank)


def _layer(module: nn.Module, name: str, path: Path) -> nn.Module:
    """The layer that a name of the file means: its dots may be written as underscores."""
    plain = _plain(name)
    for place, layer in module.named_modules():
        if _plain(place) == plain and isinstance(layer, (nn.Linear, nn.Conv2d)):
            return layer
    raise Refused(f"--lora {path}: the model has no layer {documents.quote(name)}", FORM)


def _plain(name: str) -> str:
    plain = re.sub(r"^text_model_|_0$", "", re.sub(r"\bto_out\.0\b", "to_out", name).replace(".", "_"))
    return re.sub(r"(?<=self_attn_)to_(\w+)$", r"\1_proj", plain)  # as diffusers calls those of CLIP, too


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
