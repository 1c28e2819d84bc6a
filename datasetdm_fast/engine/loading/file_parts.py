"""Models whose denoiser, and what else it holds, lie in one file in the layout of the original code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from datasetdm_fast.engine.backbones import every_backbone, pipeline_of
from datasetdm_fast.engine.backbones.record import Backbone
from datasetdm_fast.engine.loading import folder as folders
from datasetdm_fast.engine.loading.checks import check_size, first_line, quiet_libraries, read_config
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.loading.presets import build_empty, build_module
from datasetdm_fast.engine.loading.provenance import UNKNOWN_LICENCE, digest
from datasetdm_fast.engine.loading.tokenizer import tokenizer_beside
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import tensors

State = dict[str, Tensor]
LORA_MARKS = ("lora_", ".lora.", "hada_", "lokr_")  # in the names of tensors that only change another model


def family_of(state: Mapping[str, Any]) -> Backbone | None:
    """The family that a file is of by the names of its tensors; None where no record knows them."""
    if any(mark in key for key in state for mark in LORA_MARKS):
        return None
    families = (each for each in every_backbone() if each.file_signs)
    return next((each for each in families if all(any(sign in key for key in state) for sign in each.file_signs)), None)


def load_parts(
    path: Path, state: State, notes: Mapping[str, str], backbone: Backbone, *, size: int, allow_download: bool
) -> Model:
    """The model of a file; parts that it does not hold are read from their folders beside it, where a `config.json`
    also tells the form of one it holds, if it is not that of the family's usual model.
    """
    if size:
        check_size(size, backbone.multiple)
    if narrow := next((key for key, value in state.items() if value.dtype.itemsize < 2), ""):
        raise Refused(f"model: {path} holds weights of 8 bits, the first is {narrow}", "Take a file in 16 or 32 bits.")
    place, states = path.parent, _parts_of(state, backbone)
    clips = [part for part in backbone.of_kind("tokenizer") if part in backbone.file_tokenizers]
    full_size = json.loads(json.dumps(backbone.full_size))  # lists as a folder's files have them
    if backbone.denoiser in full_size:
        full_size[backbone.denoiser] |= backbone.file_config(_bare(states[backbone.denoiser], backbone))
    usual = {part: config for part, config in full_size.items() if part in (*states, folders.SCHEDULER)}
    absent = [
        part
        for part, record in backbone.parts.items()
        if not (place / part).is_dir()
        and part not in (*usual, *clips)
        and not (record.is_optional and part.replace("tokenizer", "text_encoder") not in states)
    ]
    if absent:
        raise Refused(
            f"model: {path} holds the {' and '.join(states)} of {backbone.title}, and needs also {', '.join(absent)}",
            "Put these folders of the same model, as diffusers has them, beside the file.",
        )
    index = read_config(place / folders.INDEX) if (place / folders.INDEX).is_file() else {}
    if index.get("_class_name") != pipeline_of(backbone):
        index = {}
    fetched = {
        part: tokenizer_beside(path, backbone.file_tokenizers[part], allow_download, part)
        for part in clips
        if not (place / part).is_dir()
    }

    def fill(part: str, config: Mapping[str, Any]) -> nn.Module:
        return _fill(part, config, states[part], backbone, path)

    return folders.load_folder(
        place,
        size=size,
        name=str(path),
        parts=folders.FileParts(
            backbone,
            index,
            {**usual, **dict.fromkeys(fetched, {})},
            dict.fromkeys(states, fill),
            fetched,
            {"file": digest([path])},
            notes.get("modelspec.license", UNKNOWN_LICENCE),
        ),
    )


def _parts_of(state: State, backbone: Backbone) -> dict[str, State]:
    """The tensors of each part that a file holds; what begins as no part does is the denoiser's, if that has none."""
    states: dict[str, State] = {}
    for part, start in backbone.file_parts.items():
        if begun := {key: value for key, value in state.items() if key.startswith(start)}:
            states[part] = begun
    others = {key for part in states.values() for key in part}
    bare = {key: value for key, value in state.items() if key not in others}
    return {backbone.denoiser: bare} | states


def _bare(state: State, backbone: Backbone) -> State:
    """The denoiser's tensors under names that begin alike in every file."""
    start = backbone.file_parts[backbone.denoiser]
    return {key.removeprefix(start): value for key, value in state.items()}


def _fill(part: str, config: Mapping[str, Any], state: State, backbone: Backbone, path: Path) -> nn.Module:
    """The module of a part with the tensors of the file, refused where these do not fit its config."""
    record = backbone.parts[part]
    with torch.device("meta"):
        module = build_module(record, config)
    try:
        with quiet_libraries():
            if record.kind == "text_encoder":
                converted = _text_tensors(module, state, backbone.file_parts[part])
            else:
                convert = SINGLE_FILE_LOADABLE_CLASSES[type(module).__name__]["checkpoint_mapping_fn"]
                is_transformer = part == backbone.denoiser and backbone.flow is not None
                # That of U-Nets and autoencoders looks for how names begin, others trip over it.
                state = _bare(state, backbone) if is_transformer else dict(state)
                converted = convert(checkpoint=state, config=module.config)
    except Exception as error:  # of names and shapes that diffusers does not know
        raise Refused(
            f"model: {path}: its {part} is not laid out as that of {backbone.title} ({first_line(error)})",
            folders.MATCHING,
        ) from error
    tensors.check_fit(
        module.state_dict(),
        converted,
        f"model: {path}: {part}",
        f"the config of {backbone.title}",
        f"Put the config.json of the same model's {part} into a folder {part} beside the file.",
    )
    module = build_empty(lambda: build_module(record, config))
    module.load_state_dict(converted)
    return module


def _text_tensors(module: Any, state: State, start: str) -> State:
    """The tensors of a text encoder under the names of transformers; others, such as positions, are left out."""
    named = {key.removeprefix(start): value for key, value in state.items()}
    if "token_embedding.weight" in named:
        named = single_file_utils.convert_open_clip_checkpoint(module, state, prefix=start)
    known = module.state_dict()
    bare = {key.removeprefix("text_model."): value for key, value in named.items()}
    result = {key: bare.get(key.removeprefix("text_model."), named.get(key)) for key in known}
    if "shared.weight" in result:  # of T5, which has one table
        result["encoder.embed_tokens.weight"] = result["shared.weight"]
    return {key: value for key, value in result.items() if value is not None}
