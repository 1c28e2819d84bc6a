"""Models in one .safetensors or .ckpt file, in the layout of latent diffusion's own code."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from datasetdm_fast.engine.backbones import ANOTHER, DAMAGED, Backbone, every_backbone, list_supported, pipeline_of
from datasetdm_fast.engine.backbones.fitting import (
    ADAPTER,
    check_readable,
    check_size,
    first_line,
    quiet_libraries,
    read_config,
)
from datasetdm_fast.engine.backbones.sd import DOWN_BLOCKS, SD, SD_SCHEDULER, UP_BLOCKS, check_network
from datasetdm_fast.engine.loading import folder as folders
from datasetdm_fast.engine.loading.model import UNKNOWN_LICENCE, Model, Network, check_model, digest
from datasetdm_fast.engine.loading.presets import build_module
from datasetdm_fast.engine.loading.tokenizer import tokenizer_beside
from datasetdm_fast.engine.models.layers import Uninitialised
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents, pickles, tensors

LORA_MARKS = ("lora_", ".lora.", "hada_", "lokr_")  # in the names of tensors that only change another model


def load_file(path: Path, *, size: int = 0, allow_download: bool = False, ema: bool = False) -> Model:
    """The model in one file of the original latent-diffusion layout; `ema` takes the averaged weights of its U-Net.

    Such a file holds no vocabulary: it is read from a `tokenizer` folder beside the file, or from the local hub cache.
    """
    state, notes = _read_single_file(path)
    backbone, narrow = family_of(state), next((key for key, value in state.items() if value.dtype.itemsize < 2), "")
    if narrow and (backbone or any(key.endswith(folders.SCALES) for key in state)):
        raise Refused(f"model: {path} holds weights of 8 bits, the first is {narrow}", "Take a file in 16 or 32 bits.")
    if backbone:
        return load_parts(path, state, notes, backbone, size=size, allow_download=allow_download)
    configured = _prediction_beside(path)
    _check_layout(state, path)
    unet_config, vae_config = _unet_config(state, path), _vae_config(state, path)
    text_config, is_second = _text_config(state, path)
    tokenizer = tokenizer_beside(path, is_second, allow_download)
    with quiet_libraries():  # advice about a flag that is none of ours
        converted = single_file_utils.convert_ldm_unet_checkpoint(
            with_averaged(state, path) if ema else state, unet_config, extract_ema=False
        )
    unet = fill_module(UNet2DConditionModel(**unet_config), converted, f"{path}: unet")
    convert = single_file_utils.convert_ldm_vae_checkpoint
    vae = fill_module(AutoencoderKL(**vae_config), convert(state, vae_config), f"{path}: vae")
    text_encoder = CLIPTextModel(text_config)
    if is_second:
        converted = single_file_utils.convert_open_clip_checkpoint(text_encoder, state)
    else:
        converted = single_file_utils.convert_ldm_clip_checkpoint(state)
    converted = {key.removeprefix("text_model."): value for key, value in converted.items()}
    known = {key: value for key, value in converted.items() if key in text_encoder.state_dict()}
    text_encoder = fill_module(text_encoder, known, f"{path}: text_encoder")
    inferred = NOTED.get(notes.get("modelspec.prediction_type", ""))
    inferred = inferred or ("epsilon" if not is_second or predicts_noise(unet) else "v_prediction")
    scheduler = SD_SCHEDULER | {"prediction_type": configured or inferred}
    if is_second and scheduler["prediction_type"] == "v_prediction":
        unet.register_to_config(sample_size=96)
    defaults = SD.defaults({"unet": unet.config})
    licence = notes.get("modelspec.license", UNKNOWN_LICENCE)
    digests = {"file": digest([path])}
    if configured not in ("", inferred):
        digests["prediction"] = configured
    origin, proof = (str(path), str(path.resolve())), (digests, licence)
    modules = {"text_encoder": text_encoder, "unet": unet, "vae": vae}
    networks = {part: Network.of(module) for part, module in modules.items()}
    tokenizers = {"tokenizer": tokenizer}
    return check_model(Model(*origin, SD, tokenizers, networks, scheduler, defaults, size or defaults.size, *proof))


LORA = "a LoRA, which only changes another model"
NOTED = {"epsilon": "epsilon", "v": "v_prediction"}  # a file's own note -> a scheduler's word for it
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction"}  # the same of a configuration of the original code
EMA = "model_ema."  # before the names of averaged weights, which have no dots
UNET, VAE, CLIP, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)


def _read_single_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a single-file checkpoint and its notes, such as its licence; a pickle has none, and is converted
    by another process first.
    """
    if path.suffix == ".safetensors":
        check_readable(path)
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    if path.suffix != ".ckpt":
        raise Refused(f"model: {path} is a {path.suffix or 'suffixless'} file; {list_supported()}", ANOTHER)
    check_readable(path)
    return safetensors.torch.load_file(pickles.safe_copy(path)), {}


def _prediction_beside(path: Path) -> str:
    """What the UNet predicts by the configuration of the original code that lies beside the file under its name, as web
    UIs read it; empty where it has none.
    """
    settings = path.with_suffix(".yaml")
    setting = documents.read_yaml(settings) if settings.is_file() else None
    for key in ("model", "params", "parameterization"):
        setting = setting.get(key) if isinstance(setting, dict) else None
    if setting is None:
        return ""
    if not isinstance(setting, str) or setting not in PREDICTION_TYPES:
        raise Refused(
            f"model: {settings}: parameterization is {documents.quote(setting)}, "
            f"expected {' or '.join(PREDICTION_TYPES)}",
            "Correct it, or take the file away if it is not of this model.",
        )
    return PREDICTION_TYPES[setting]


def with_averaged(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors with the exponential moving average of each U-Net weight in its place; refused where one has none."""
    names = {key: EMA + "".join(key.split(".")[1:]) for key in state if key.startswith(UNET)}
    if absent := [key for key, name in names.items() if name not in state]:
        has_any = any(key.startswith(EMA) for key in state)
        raise Refused(
            f"--ema: {path} has {f'no average of {len(absent)} weights, the first is {absent[0]}' if has_any else 'no'}"
            f"{'' if has_any else ' averaged weights'}",
            "Drop --ema, or take the file that holds them (often called full-ema).",
        )
    return {**state, **{key: state[name] for key, name in names.items()}}


def _check_layout(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuses a file that is no checkpoint of SD 1.x or 2.x in the original layout, and names what it is."""
    signs = {
        LORA: LORA_MARKS,
        "a ControlNet": ("control_model.", "controlnet_"),
        "a model of another family": ("conditioner.embedders.", "joint_blocks.", "double_blocks."),
    }
    for kind, marks in signs.items():
        if any(mark in key for key in state for mark in marks):
            raise Refused(f"model: {path} holds {kind}; {list_supported()}", ADAPTER if kind == LORA else ANOTHER)
    for part, prefixes in (("unet", (UNET,)), ("vae", (VAE,)), ("text_encoder", (CLIP, OPEN_CLIP))):
        if not any(key.startswith(prefixes) for key in state):
            evidence = f"its first tensor is {next(iter(state))}" if state else "it holds no tensor at all"
            raise Refused(
                f"model: {path} has no {part} ({evidence}), and a single file must hold unet, vae and text encoder in "
                f"the original layout; {list_supported()}",
                ANOTHER,
            )


def _shape(state: Mapping[str, Tensor], key: str, path: Path, axes: tuple[int, ...] = (4,)) -> torch.Size:
    """The shape of a tensor that every checkpoint has, of as many axes as it has there."""
    if key not in state:
        raise Refused(f"model: {path} lacks the tensor {key}, which every checkpoint of {SD.title} has", DAMAGED)
    shape = state[key].shape
    if len(shape) not in axes:
        expected = " or ".join(map(str, axes))
        raise Refused(f"model: {path}: the tensor {key} has {len(shape)} axes, expected {expected}", DAMAGED)
    return shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers occur at the group of `pattern` among the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _unet_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    blocks = _count(state, rf"{re.escape(UNET)}input_blocks\.(\d+)\.")
    layers = blocks // 4 - 1
    widths = [
        _shape(state, f"{UNET}input_blocks.{depth * (layers + 1) + 1}.0.out_layers.3.weight", path)[0]
        for depth in range(4)
    ]
    is_linear = len(_shape(state, f"{UNET}input_blocks.1.1.proj_in.weight", path, (2, 4))) == 2
    config = {
        "sample_size": 64,
        "in_channels": _shape(state, f"{UNET}input_blocks.0.0.weight", path)[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": list(DOWN_BLOCKS),
        "up_block_types": list(UP_BLOCKS),
        "cross_attention_dim": _shape(
            state, f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", path, (2,)
        )[1],
        # Head counts leave no trace in the shapes: SD 1.x has 8 everywhere, SD 2.x heads of 64 channels.
        "attention_head_dim": [width // 64 for width in widths] if is_linear else 8,
        "use_linear_projection": is_linear,
    }
    check_network("unet", config, path)
    return config


def _vae_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    count = _count(state, rf"{re.escape(VAE)}encoder\.down\.(\d+)\.")
    config = {
        "block_out_channels": tuple(
            _shape(state, f"{VAE}encoder.down.{level}.block.0.conv1.weight", path)[0] for level in range(count)
        ),
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "layers_per_block": _count(state, rf"{re.escape(VAE)}encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": _shape(state, f"{VAE}post_quant_conv.weight", path)[0],
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }
    check_network("vae", config, path)
    return config


def _text_config(state: Mapping[str, Tensor], path: Path) -> tuple[CLIPTextConfig, bool]:
    """The text encoder's config, read off the shapes, and whether it is SD 2.x's, which stops before the last layer."""
    is_second = any(key.startswith(OPEN_CLIP) for key in state)
    if is_second:
        prefix, blocks = OPEN_CLIP, r"transformer\.resblocks\.(\d+)\."
        names: list[str] = ["token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"]
    else:
        prefix, blocks = CLIP, r"encoder\.layers\.(\d+)\."
        prefix += "text_model." if any(key.startswith(f"{CLIP}text_model.") for key in state) else ""
        names = [f"embeddings.{kind}_embedding.weight" for kind in ("token", "position")]
        names += ["encoder.layers.0.mlp.fc1.weight"]
    (vocabulary, width), (length, _), (inner, _) = (_shape(state, prefix + name, path, (2,)) for name in names)
    count = _count(state, re.escape(prefix) + blocks)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=count - 1 if is_second else count,
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=length,
        hidden_act="gelu" if is_second else "quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0 if is_second else 1,
    )
    return config, is_second


def fill_module(module: nn.Module, state: Mapping[str, Tensor], name: str) -> nn.Module:
    """The module with converted weights, refused where a tensor is missing, unknown or of another shape."""
    tensors.check_fit(module.state_dict(), state, f"model: {name}", SD.title, DAMAGED)
    module.load_state_dict(dict(state))
    return module


@torch.inference_mode()
def predicts_noise(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet predicts noise rather than velocity: it then returns nearly its input at the last timestep."""
    unet.eval()
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    output = unet(noise, 999, torch.zeros(1, 77, unet.config.cross_attention_dim)).sample
    return float(torch.corrcoef(torch.stack([noise.flatten(), output.flatten()]))[0, 1]) > 0.5


State = dict[str, Tensor]


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
    place, states = path.parent, _parts_of(state, backbone)
    clips = [part for part in backbone.of_kind("tokenizer") if part in backbone.file_tokenizers]
    full_size = json.loads(json.dumps(backbone.full_size))  # lists as a folder's files have them
    if backbone.denoiser in full_size:
        full_size[backbone.denoiser] |= backbone.file_config(_strip_prefix(states[backbone.denoiser], backbone))
    usual = {part: config for part, config in full_size.items() if part in (*states, folders.SCHEDULER)}
    config_file = place / backbone.denoiser / "config.json"
    form = read_config(config_file) if config_file.is_file() else {}
    switches = {key: value for key, value in usual.get(backbone.denoiser, {}).items() if type(value) is bool}
    configured = _prediction_beside(path) if backbone.flow is None else ""
    if any(form.get(key, value) != value for key, value in switches.items()):
        usual.pop(folders.SCHEDULER)  # models that read their guidance have one of their own
    elif backbone.flow is None:
        schedule = usual[folders.SCHEDULER]
        schedule |= _noted_schedule(path, state, notes)
        if configured == schedule["prediction_type"] or (place / folders.SCHEDULER).is_dir():
            configured = ""  # it changes nothing
        schedule |= {"prediction_type": configured} if configured else {}
    absent = [
        f"{part}/config.json" if part in states else part
        for part, record in backbone.parts.items()
        if not (place / part).is_dir()
        and part not in (*usual, *clips)
        and not (record.is_optional and part.replace("tokenizer", "text_encoder") not in states)
    ]
    if absent:
        raise Refused(
            f"model: {path} holds the {' and '.join(states)} of {backbone.title}, and needs also {', '.join(absent)}",
            "Put these of the same model, as diffusers has them, beside the file.",
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
            {"file": digest([path])} | ({"prediction": configured} if configured else {}),
            notes.get("modelspec.license", UNKNOWN_LICENCE),
        ),
    )


def _noted_schedule(path: Path, state: State, notes: Mapping[str, str]) -> dict[str, Any]:
    """What a U-Net predicts, where its file tells it by a note or a tensor without a use."""
    if edm := next((key for key in state if key.startswith("edm_")), ""):
        raise Refused(f"model: {path} holds {edm}, and models of that noise (EDM) are not sampled here", ANOTHER)
    marked = {"rescale_betas_zero_snr": True} if "ztsnr" in state else {}
    noted = NOTED.get(notes.get("modelspec.prediction_type", ""), "v_prediction" if "v_pred" in state else "")
    return marked | ({"prediction_type": noted} if noted else {})


def _parts_of(state: State, backbone: Backbone) -> dict[str, State]:
    """The tensors of each part that a file holds; what begins as no part does is the denoiser's, if that has none."""
    states: dict[str, State] = {}
    for part, start in backbone.file_parts.items():
        if begun := {key: value for key, value in state.items() if key.startswith(start)}:
            states[part] = begun
    others = {key for part in states.values() for key in part}
    bare = {key: value for key, value in state.items() if key not in others}
    return {backbone.denoiser: bare} | states


def _strip_prefix(state: State, backbone: Backbone) -> State:
    """The denoiser's tensors under names that begin alike in every file."""
    start = backbone.file_parts[backbone.denoiser]
    return {key.removeprefix(start): value for key, value in state.items()}


def _fill(part: str, config: Mapping[str, Any], state: State, backbone: Backbone, path: Path) -> nn.Module:
    """The module of a part with the tensors of the file, refused where these do not fit its config."""
    record = backbone.parts[part]
    try:
        with torch.device("meta"):
            module = build_module(record, config)
        with quiet_libraries():
            if record.kind == "text_encoder":
                converted = _text_tensors(module, state, backbone.file_parts[part])
            else:
                convert = SINGLE_FILE_LOADABLE_CLASSES[type(module).__name__]["checkpoint_mapping_fn"]
                is_transformer = part == backbone.denoiser and backbone.flow is not None
                # That of U-Nets and autoencoders looks for how names begin, others trip over it.
                state = _strip_prefix(state, backbone) if is_transformer else dict(state)
                converted = convert(checkpoint=state, config=module.config)
    except Exception as error:  # of settings, names and shapes that diffusers does not know
        raise Refused(
            f"model: {path}: its {part} is not laid out as that of {backbone.title} ({first_line(error)})",
            folders.MATCHING,
        ) from error
    has_config = (path.parent / part / "config.json").is_file()
    tensors.check_fit(
        module.state_dict(),
        converted,
        f"model: {path}: {part}",
        f"the config of {backbone.title}",
        folders.MATCHING
        if has_config
        else f"Put the config.json of the same model's {part} into a folder {part} beside the file.",
    )
    with Uninitialised():
        module = build_module(record, config)
    module.load_state_dict(converted)
    return module


def _text_tensors(module: Any, state: State, start: str) -> State:
    """The tensors of a text encoder under the names of transformers; others, such as positions, are left out."""
    named = {key.removeprefix(start): value for key, value in state.items()}
    if "token_embedding.weight" in named:
        named |= single_file_utils.convert_open_clip_checkpoint(module, state, prefix=start)
    known = module.state_dict()
    bare = {key.removeprefix("text_model."): value for key, value in named.items()}
    result = {key: bare.get(key.removeprefix("text_model."), named.get(key)) for key in known}
    if "shared.weight" in result:  # of T5, which has one table
        result["encoder.embed_tokens.weight"] = result["shared.weight"]
    return {key: value for key, value in result.items() if value is not None}
