"""A diffusers pipeline that is in memory as a model, adapters that were fused into it included."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.engine.backbones import list_supported, open_backbone
from datasetdm_fast.engine.backbones.fitting import check_scheduler
from datasetdm_fast.engine.loading.folder import SCHEDULER
from datasetdm_fast.engine.loading.model import UNKNOWN_LICENCE, ConfigFile, Model, Network, check_model
from datasetdm_fast.engine.models.layers import Uninitialised
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun

NOTES = ("_diffusers_version", "_use_default_values", "_name_or_path")  # of a config, that are no settings
WRAPPED = ".base_layer."  # where an adapter library keeps a layer that it has wrapped
ADAPTERS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")


def model_of(pipe: Any, size: int = 0) -> Model:
    """The model of a pipeline of diffusers, in fp32 and of its own memory: the pipeline may change afterwards."""
    backbone, origin = open_backbone(type(pipe).__name__, "from_diffusers"), f"a {type(pipe).__name__} in memory"
    names = (*backbone.parts, SCHEDULER)
    parts: dict[str, Any] = {name: getattr(pipe, name, None) for name in names}
    parts = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}  # what torch.compile has wrapped
    optional = [name for name, part in backbone.parts.items() if part.is_optional]
    if absent := [name for name, part in parts.items() if part is None and name not in optional]:
        raise Refused(
            f"from_diffusers: {type(pipe).__name__} has no {', '.join(absent)}; {list_supported()}",
            "Give a pipeline that holds all of its parts.",
        )
    present = {name: part for name, part in parts.items() if part is not None}
    _check_freeu(present[backbone.denoiser])
    tokenizers = {name: present[name] for name in backbone.of_kind("tokenizer") if name in present}
    for tokenizer in tokenizers.values():
        _check_vectors(tokenizer)
    read = {name: _config_of(part) for name, part in present.items()}
    # The config of a scheduler that was built in code does not name its class.
    read[SCHEDULER]["_class_name"] = type(present[SCHEDULER]).__name__
    configs = backbone.check(read | _index_of(pipe), origin) | {SCHEDULER: read[SCHEDULER]}
    check_scheduler(configs[SCHEDULER], origin, is_flow=backbone.flow is not None)
    copies = {name: _copy_network(present[name], name) for name in backbone.networks if name in present}
    networks = {name: network for name, (network, _) in copies.items()}
    digests = {name: digest for name, (_, digest) in copies.items()}
    serialised = json.dumps(configs[SCHEDULER], sort_keys=True, default=str).encode()
    digests |= {name: _words(tokenizer) for name, tokenizer in tokenizers.items()}
    digests |= {SCHEDULER: f"sha256:{hashlib.sha256(serialised).hexdigest()}"}
    parts = {name: ConfigFile(config) for name, config in configs.items()}
    defaults = backbone.defaults(parts)
    model = Model(
        str(getattr(pipe, "name_or_path", "") or origin),
        origin,
        backbone,
        tokenizers,
        networks,
        configs[SCHEDULER],
        defaults,
        size or defaults.size,
        digests,
        backbone.licence(parts) or UNKNOWN_LICENCE,
        configs["model_index"],
    )
    return check_model(model)


def _copy_network(part: nn.Module, name: str) -> tuple[Network, str]:
    """A network of a pipeline in memory of its own, and the digest of its weights, whose tensors are then freed."""
    state = state_of(part, name)
    kind = type(part)
    with torch.random.fork_rng(devices=[]), Uninitialised():
        copy = getattr(kind, "from_config", kind)(part.config)
    copy.load_state_dict(dict(state))
    return Network.of(copy.float().eval().requires_grad_(False)), digest_of(state)


def _config_of(part: Any) -> dict[str, Any]:
    """The settings of a part of a pipeline, as a folder's files have them; a tokenizer has none."""
    config = getattr(part, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if key not in NOTES
    }


def _index_of(pipe: Any) -> dict[str, dict[str, Any]]:
    """The settings of the pipeline itself."""
    settings = {key: value for key, value in pipe.config.items() if not key.startswith("_")}
    return {"model_index": {key: value for key, value in settings.items() if isinstance(value, (bool, int, float))}}


def _check_freeu(unet: nn.Module) -> None:
    """Refuses a UNet that scales its features as it runs, which no weight shows."""
    scales = ("s1", "s2", "b1", "b2")
    if any(all(getattr(block, name, None) for name in scales) for block in getattr(unet, "up_blocks", ())):
        raise Refused(
            "from_diffusers: FreeU is enabled in the unet, which the engines here do not follow, so images would "
            "differ",
            "Call pipe.disable_freeu() first.",
        )


def _check_vectors(tokenizer: Any) -> None:
    """Refuses a word of several vectors: diffusers' pipeline writes them all in place of it, a tokenizer does not."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    if several := sorted(token for token in added if f"{token}_1" in added):
        raise Refused(
            f"from_diffusers: textual inversion gave {several[0]!r} several vectors, which diffusers writes in place "
            "of that one word; they are not read here",
            "Load each vector under a token of its own, token=['<a>', '<b>'], and name them all in the prompts.",
        )


def state_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of a network under their plain names; refused where an adapter is not fused into them."""
    waiting = [
        place
        for place, layer in module.named_modules()
        if getattr(layer, "lora_A", None) and not getattr(layer, "merged", False)
    ]
    if waiting:
        raise Refused(
            f"from_diffusers: {count_noun(len(waiting), 'layer')} of the {name} with an adapter that is not fused, the "
            f"first is {waiting[0]}",
            "Call pipe.fuse_lora() first, or pipe.unload_lora_weights() to go without.",
        )
    if any(value.is_meta for value in module.state_dict().values()):
        raise Refused(
            f"from_diffusers: the weights of the {name} are offloaded, so they are not in memory",
            "Load the pipeline without enable_sequential_cpu_offload().",
        )
    return {
        key.replace(WRAPPED, "."): value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
        for key, value in module.state_dict().items()
        if not any(mark in key for mark in ADAPTERS)
    }


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256:{total.hexdigest()}"


def _words(tokenizer: Any) -> str:
    words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return f"sha256:{hashlib.sha256(words).hexdigest()}"
