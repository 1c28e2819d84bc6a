"""Models: the demo, seeded random presets, diffusers folders and single files of Stable Diffusion 1.x and 2.x, checked before use."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import safetensors
import safetensors.torch
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from datasetdm_fast.config import DEMO_DEFAULTS, SD_DEFAULTS, Defaults
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.foreign import documents, pickles, tensors
from datasetdm_fast.stages import FACTOR, Level, levels

DEMO = Path(__file__).parent / "demo" / "model"
PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
SUPPORTED = "supported are Stable Diffusion 1.x and 2.x text-to-image models, as a diffusers folder or one .safetensors or .ckpt file"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
DOWN_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP_BLOCKS = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
BYTES = 256  # entries every byte-level vocabulary starts with
LARGEST_VOCABULARY = 64 * 2**20  # bytes of a tokenizer's files; CLIP's have 3 MB
LARGEST_NUMBER, MOST_LAYERS, LARGEST_SIDE, MOST_TIMESTEPS = 2**20, 64, 512, 100_000  # of a config: any number, layers, latent cells of a side, steps
# What is read of a config. Other settings change no network of this kind, and some name code that a library would fetch and run.
ARCHITECTURE = {
    "unet": {*inspect.signature(UNet2DConditionModel.__init__).parameters} - {"self"} | {"_class_name", "_diffusers_version"},
    "vae": {*inspect.signature(AutoencoderKL.__init__).parameters} - {"self"} | {"_class_name", "_diffusers_version"},
    "text_encoder": {
        *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        *("hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id"),
        *("architectures", "model_type"),
    },
    "tokenizer": {
        *("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length", "added_tokens_decoder", "add_prefix_space", "do_lower_case"),
        *("errors", "clean_up_tokenization_spaces", "tokenizer_class"),
    },
}
VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARY = "openai/clip-vit-large-patch14"  # the tokenizer of every SD 1.x and 2.x model
SD_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}
SEEDED_LICENCE = "none: seeded random weights, nothing was trained"
UNKNOWN_LICENCE = "unknown: ask the model's owner"


@dataclass(frozen=True, eq=False)
class Model:
    """A text-to-image model in fp32, in eval mode, without gradients, with what is to be written down about it."""

    name: str
    source: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: dict
    defaults: Defaults
    size: int  # pixels of a side
    digests: dict[str, str]  # part -> SHA-256 of its files, or the recipe of seeded weights
    licence: str
    levels: tuple[Level, ...]

    def token_ids(self, prompts: Sequence[str]) -> Tensor:  # [B, T] int64
        """The padded tokens of each prompt, cut off where the text encoder's positions end."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        return self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def load_model(name: str, *, size: int = 0, allow_download: bool = False) -> Model:
    """The model `name`: demo, tiny, random-sd14, a diffusers folder, a single file, or a hub repository where downloads are allowed."""
    try:
        return _load(name, size, allow_download)
    except Refused as stop:
        if stop.remedy:
            raise
        raise Refused(stop.cause, "Choose another --model, or get its files again and compare their checksums.") from stop


def _load(name: str, size: int, allow_download: bool) -> Model:
    if size:
        _check_size(size)  # before seconds go into reading weights
    path = Path(name)
    if name in PRESETS:
        return PRESETS[name](size)
    if path.is_dir():
        return load_folder(path, size=size)
    if path.is_file():
        return load_file(path, size=size, allow_download=allow_download)
    if not HUB_NAME.fullmatch(name):
        raise Refused(f"model: {name!r} is neither one of {', '.join(PRESETS)} nor an existing folder or file", SUPPORTED)
    if not allow_download:
        raise Refused(
            f"model: {name!r} is no folder here, and as a name on the model hub it would have to be downloaded", "add --allow-download, or give a local folder"
        )
    return load_folder(_downloaded(name), size=size, name=name)


def load_folder(folder: Path, *, size: int = 0, name: str = "", defaults: Defaults | None = None) -> Model:
    """The model in a diffusers folder; every part, its form and each of its tensors is checked."""
    with _making_sense(folder):
        configs = _folder_configs(folder)
        for part in ("unet", "vae", "text_encoder"):
            configs[part] = {key: value for key, value in configs[part].items() if key in ARCHITECTURE[part]}
            _check_bounds(configs[part], folder / part)
        _check_scheduler(configs["scheduler"], folder)
        _check_unet(configs["unet"], folder)
        _check_vae(configs["vae"], folder)
    weights = {part: _weight_files(folder / part) for part in ("text_encoder", "unet", "vae")}
    tokenizer = _tokenizer(folder / "tokenizer")
    text_encoder = _from_folder(CLIPTextModel, folder / "text_encoder", weights["text_encoder"], configs["text_encoder"])
    unet = _from_folder(UNet2DConditionModel, folder / "unet", weights["unet"], configs["unet"])
    vae = _from_folder(AutoencoderKL, folder / "vae", weights["vae"], configs["vae"])
    files = {**{part: found.files for part, found in weights.items()}, "tokenizer": _files(folder / "tokenizer"), "scheduler": _files(folder / "scheduler")}
    side = unet.config.sample_size
    if not isinstance(side, int) or not 0 < side <= LARGEST_SIDE:
        raise Refused(f"model: {folder}: the UNet's sample_size is {documents.shown(side)}, expected a number up to {LARGEST_SIDE}, {SUPPORTED}")
    defaults = defaults or Defaults(side * FACTOR, SD_DEFAULTS.steps, SD_DEFAULTS.guidance)
    digests, licence = {part: digest(files[part]) for part in PARTS}, folder_licence(folder)
    return _model(name or str(folder), str(folder.resolve()), tokenizer, text_encoder, unet, vae, configs["scheduler"], defaults, size, digests, licence)


def load_file(path: Path, *, size: int = 0, allow_download: bool = False) -> Model:
    """The model in one file of the original latent-diffusion layout.

    Such a file holds no vocabulary: it is read from a `tokenizer` folder beside the file, or from the local hub cache.
    """
    state, licence = _read_single_file(path)
    _check_layout(state, path)
    unet_config, vae_config, text_config, is_second = _unet_config(state, path), _vae_config(state, path), *_text_config(state, path)
    tokenizer = _tokenizer_beside(path, is_second, allow_download)
    unet = _filled(lambda: UNet2DConditionModel(**unet_config), single_file_utils.convert_ldm_unet_checkpoint(state, unet_config), f"{path}: unet")
    vae = _filled(lambda: AutoencoderKL(**vae_config), single_file_utils.convert_ldm_vae_checkpoint(state, vae_config), f"{path}: vae")
    text_encoder = CLIPTextModel(text_config)
    convert = single_file_utils.convert_open_clip_checkpoint if is_second else lambda _, state: single_file_utils.convert_ldm_clip_checkpoint(state)
    converted = {key.removeprefix("text_model."): value for key, value in convert(text_encoder, state).items()}
    known = text_encoder.state_dict()
    text_encoder = _filled(lambda: text_encoder, {key: value for key, value in converted.items() if key in known}, f"{path}: text_encoder")
    scheduler = dict(SD_SCHEDULER)
    if is_second and not predicts_noise(unet):
        scheduler["prediction_type"] = "v_prediction"
        unet.register_to_config(sample_size=96)
    defaults = Defaults(unet.config.sample_size * FACTOR, SD_DEFAULTS.steps, SD_DEFAULTS.guidance)
    return _model(str(path), str(path.resolve()), tokenizer, text_encoder, unet, vae, scheduler, defaults, size, {"file": digest([path])}, licence)


def _model(name, source, tokenizer, text_encoder, unet, vae, scheduler, defaults, size, digests, licence) -> Model:
    """The last checks common to every source: the parts fit each other, their numbers are finite, the size is possible."""
    size = size or defaults.size
    _check_size(size)
    width, hidden = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if width != hidden:
        raise Refused(f"model: {name}: the UNet reads text of width {width}, the text encoder gives {hidden}, so they belong to different models")
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise Refused(f"model: {name}: the tokenizer has {len(tokenizer)} entries, the text encoder knows {text_encoder.config.vocab_size}")
    for part, module in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        module.eval().requires_grad_(False)
        _check_finite(f"{name}: {part}", module.state_dict())
    scheduler = {key: value for key, value in scheduler.items() if key != "_diffusers_version"}
    tokens = text_encoder.config.max_position_embeddings
    return Model(name, source, tokenizer, text_encoder, unet, vae, scheduler, defaults, size, digests, licence, levels(unet.config, tokens, size))


def _check_size(size: int) -> None:
    if size <= 0 or size % 64:
        raise Refused(f"size: {size} is not a positive multiple of 64, which the four levels of the model need")


def _check_finite(name: str, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise Refused(f"model: {name}.{key} holds NaN or infinite values, so the weights are damaged", "get the file again and compare its checksum")


# Seeded presets ---------------------------------------------------------------------------------------------------------------------


def _fill(module: nn.Module, seed: int) -> nn.Module:
    """`module` with seeded weights: matrices of unit gain, norms near one, other vectors near zero, so activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    state = module.state_dict()
    with torch.no_grad():
        for key in sorted(state):
            value = state[key]
            value.normal_(generator=generator)
            if value.dim() >= 2:
                value.div_(math.sqrt(value[0].numel()))
            else:
                value.mul_(0.02).add_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
    return module


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module built without its own initialisation, which would cost seconds at full size and draw from the global generator."""
    with torch.device("meta"):
        module = build()
    assert not list(module.buffers()), "to_empty would lose what a buffer holds"
    return _fill(module.to_empty(device="cpu"), seed)


def _seeded_text_encoder(config: CLIPTextConfig, seed: int) -> CLIPTextModel:
    with torch.random.fork_rng(devices=[]):
        return _fill(CLIPTextModel(config), seed)


def _small_tokenizer() -> CLIPTokenizer:
    """The demo world's byte-pair tokenizer: any text works, words it does not know become pieces of bytes."""
    from datasetdm_fast.scenes.tokenizer import build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder))


def _load_demo(size: int) -> Model:
    if not DEMO.is_dir():
        raise Missing(
            f"model: the demo model is not there, {DEMO} does not exist",
            f"train it: python -m datasetdm_fast.demo.train --out {DEMO}; or name another with --model",
        )
    return load_folder(DEMO, size=size, name="demo", defaults=DEMO_DEFAULTS)


def _load_tiny(size: int) -> Model:
    """SD 1.x in form, small enough for tests: 28 features and 16 maps, 128 x 128 pixels, seeded random weights."""
    tokenizer = _small_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = {
        "sample_size": 16,
        "block_out_channels": (32, 32, 64, 64),
        "attention_head_dim": 2,  # diffusers' name for the number of heads
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 16, 16, 16),
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 128,
    }
    return _preset("tiny", tokenizer, text, unet, vae, Defaults(128, 4, SD_DEFAULTS.guidance), size, seed=1)


def _load_random_sd14(size: int) -> Model:
    """Stable Diffusion 1.4 at full size with seeded random weights: about 4.3 GB in fp32.

    CLIP's vocabulary is not shipped with this package, so the tokenizer is the demo world's; its ids lie within CLIP's 49408.
    """
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    unet = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768}
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    }
    return _preset("random-sd14", _small_tokenizer(), text, unet, vae, SD_DEFAULTS, size, seed=14)


def _preset(name: str, tokenizer, text: CLIPTextConfig, unet: dict, vae: dict, defaults: Defaults, size: int, seed: int) -> Model:
    text_encoder = _seeded_text_encoder(text, seed)
    unet_module = _seeded(lambda: UNet2DConditionModel(down_block_types=DOWN_BLOCKS, up_block_types=UP_BLOCKS, layers_per_block=2, **unet), seed + 1)
    vae_module = _seeded(lambda: AutoencoderKL(**vae), seed + 2)
    digests = {part: f"seeded: {name}, seed {seed + k}" for k, part in enumerate(("text_encoder", "unet", "vae"))}
    return _model(name, f"preset {name}", tokenizer, text_encoder, unet_module, vae_module, SD_SCHEDULER, defaults, size, digests, SEEDED_LICENCE)


PRESETS: dict[str, Callable[[int], Model]] = {"demo": _load_demo, "tiny": _load_tiny, "random-sd14": _load_random_sd14}


# Diffusers folders ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    files: list[Path]
    variant: str | None
    is_safe: bool
    index: Path  # which tensor lies in which file, where there are several


def _folder_configs(folder: Path) -> dict[str, dict]:
    """The configs of the parts of a folder that looks like a supported pipeline."""
    if not any(folder.iterdir()):
        raise Refused(f"model: {folder} is an empty folder, {SUPPORTED}")
    index = _json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    pipeline = index.get("_class_name", "StableDiffusionPipeline")
    if (folder / "text_encoder_2").exists() or "text_encoder_2" in index or "XL" in pipeline:
        raise Refused(f"model: {folder} holds an SDXL pipeline ({pipeline}, two text encoders), {SUPPORTED}")
    if list(folder.glob("*lora*.safetensors")) and not (folder / "unet").exists():
        raise Refused(
            f"model: {folder} holds a LoRA, which only changes another model, {SUPPORTED}", "merge it into its base model and save that as a diffusers folder"
        )
    if not any((folder / part).exists() for part in PARTS):
        raise Refused(f"model: {folder} has none of the parts {', '.join(PARTS)}, {SUPPORTED}")
    if not pipeline.startswith("StableDiffusion") or pipeline.startswith("StableDiffusion3"):
        raise Refused(f"model: {folder} holds a {pipeline}, {SUPPORTED}")
    names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    for part in PARTS:
        if not (folder / part / names.get(part, "config.json")).is_file():
            raise Refused(f"model: {folder} has no {part} ({part}/{names.get(part, 'config.json')} is missing), and every part is needed: {', '.join(PARTS)}")
    return {part: _json(folder / part / names.get(part, "config.json")) for part in PARTS}


def _json(path: Path) -> dict:
    return documents.read_object(path, most=LARGEST_VOCABULARY)


def _check_bounds(config: Mapping, source: Path, deep: int = 0) -> None:
    """Refuse numbers no model of this kind has: modules are built by them before any weight is looked at."""
    for key, value in config.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        most = MOST_LAYERS if "layers" in key else LARGEST_NUMBER
        is_list = isinstance(value, (list, tuple)) and len(values) <= 16 and not any(isinstance(inner, (list, dict)) for inner in values)
        is_possible = all(not isinstance(number, (int, float)) or abs(number) <= most for number in values)
        if not is_possible or isinstance(value, (list, tuple)) and not is_list:
            raise Refused(f"model: {source}: the setting {documents.shown(key)} is {documents.shown(value)}, expected numbers of at most {most}")


@contextmanager
def _making_sense(source: Path) -> Iterator[None]:
    """Refuses, within the block, configs whose values have other types than a reader can expect."""
    try:
        yield
    except Refused:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise Refused(f"model: {source}: its configs make no sense ({type(error).__name__}: {_first_line(error)})") from error


def _check_unet(config: Mapping, source: Path) -> None:
    """Refuse every UNet whose pyramid is not that of SD 1.x and 2.x, by the first setting that differs."""
    channels = config.get("in_channels", 4)
    if channels != 4:
        kind = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth-to-image model"}.get(channels, "another kind of model")
        raise Refused(f"model: {source}: the UNet reads {channels} channels, so it is {kind}, {SUPPORTED}")
    wanted = {
        "_class_name": "UNet2DConditionModel",
        "out_channels": 4,
        "down_block_types": list(DOWN_BLOCKS),
        "up_block_types": list(UP_BLOCKS),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "addition_embed_type": None,
        "class_embed_type": None,
        "encoder_hid_dim": None,
        "num_class_embeds": None,
        "dual_cross_attention": False,
        "only_cross_attention": False,
        "attention_type": "default",
        "cross_attention_norm": None,
        "resnet_time_scale_shift": "default",
    }
    for key, value in wanted.items():
        found = config.get(key, value)
        if found != value:
            raise Refused(f"model: {source}: the UNet's {key} is {found!r} where {value!r} is expected, {SUPPORTED}")
    depth, layers = config.get("transformer_layers_per_block", 1), config.get("layers_per_block", 2)
    if depth not in (1, [1] * 4):
        raise Refused(f"model: {source}: the UNet's transformer_layers_per_block is {depth!r} where 1 is expected, {SUPPORTED}")
    if not isinstance(layers, int):
        raise Refused(f"model: {source}: the UNet's layers_per_block is {layers!r} where one number is expected, {SUPPORTED}")


def _check_vae(config: Mapping, source: Path) -> None:
    kind, channels = config.get("_class_name", "AutoencoderKL"), config.get("latent_channels", 4)
    if kind != "AutoencoderKL" or channels != 4:
        raise Refused(f"model: {source}: the vae is a {kind} with {channels} latent channels where AutoencoderKL with 4 is expected, {SUPPORTED}")
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if factor != FACTOR:
        raise Refused(f"model: {source}: the vae makes one latent cell of {factor} x {factor} pixels where {FACTOR} x {FACTOR} is expected, {SUPPORTED}")


def _check_scheduler(config: Mapping, source: Path) -> None:
    forms = {"num_train_timesteps": int, "steps_offset": int, "beta_start": float, "beta_end": float, "set_alpha_to_one": bool, "trained_betas": [float]}
    documents.check_form(config, {name: form for name, form in forms.items() if config.get(name) is not None})
    count = config.get("num_train_timesteps", 1000)
    betas = config.get("trained_betas") or [config.get("beta_start", 0.0001), config.get("beta_end", 0.02)]
    if not 0 < count <= MOST_TIMESTEPS or len(betas) > MOST_TIMESTEPS or not all(0 < beta < 1 for beta in betas):
        raise Refused(f"model: {source}: the scheduler's steps or betas are out of range, expected 1 to {MOST_TIMESTEPS} steps and betas between 0 and 1")
    if not 0 <= config.get("steps_offset", 0) < count:
        raise Refused(f"model: {source}: the scheduler's steps_offset is {config['steps_offset']}, expected 0 to {count - 1}")
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise Refused(f"model: {source}: the scheduler {config.get('_class_name', '')} has no beta_schedule, so the model is of another kind, {SUPPORTED}")


def _weight_files(part: Path) -> _Weights:
    """The weight files of one part, checked to be readable; safetensors before pickles, full precision before fp16."""
    for stem in ("diffusion_pytorch_model", "pytorch_model", "model"):
        for extension in ("safetensors", "bin"):
            for variant in (None, "fp16"):
                tag = f".{variant}" if variant else ""
                single, index = part / f"{stem}{tag}.{extension}", part / f"{stem}.{extension}.index{tag}.json"
                files = [single] if single.is_file() else []
                if not files and index.is_file():
                    files = _shards(index)
                if files:
                    for file in files:
                        _check_readable(file)
                    return _Weights(files, variant, extension == "safetensors", index)
    raise Refused(f"model: {part.parent} has no weights of its {part.name}: {part} holds neither .safetensors nor .bin files")


def _shards(index: Path) -> list[Path]:
    """The files an index of split weights names, each beside it."""
    try:
        names = sorted(set(_json(index)["weight_map"].values()))
        return [index.parent / documents.check_inside(name) for name in names]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Refused(f"model: {index} is no index of weight files ({_first_line(error)})") from error


def _check_readable(file: Path) -> None:
    """Refuse a file that is missing, a pointer left by git-lfs, or cut off."""
    if not file.is_file():
        raise Refused(f"model: {file} is listed in its index but missing")
    try:
        with file.open("rb") as opened:
            beginning = opened.read(40)
    except OSError as error:
        raise Refused(f"model: {file} cannot be read ({error.strerror})") from error
    if beginning.startswith(b"version https://git-lfs"):
        raise Refused(f"model: {file} is a git-lfs pointer, not the weights", "run git lfs pull in that folder")
    if file.suffix == ".safetensors":
        tensors.check_safetensors(file)


def _from_folder(kind: type, folder: Path, weights: _Weights, config: Mapping) -> nn.Module:
    """A diffusers or transformers module in fp32 from its folder, refused where weights and config do not fit."""
    try:
        with _quiet(), _only_weights(folder, weights, config) as safe:
            module, info = kind.from_pretrained(
                safe, torch_dtype=torch.float32, variant=weights.variant, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (Refused, Missing):
        raise
    except Exception as error:  # a config that makes no sense lets the libraries raise nearly anything
        raise Refused(f"model: {folder} cannot be loaded, its weights do not fit its config.json ({_first_line(error)})") from error
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise Refused(f"model: {folder} lacks {len(lacking)} tensors its config.json asks for, the first is {lacking[0]}")
    return module


@contextmanager
def _only_weights(folder: Path, weights: _Weights, config: Mapping) -> Iterator[Path]:
    """A folder with the numbers of the architecture and links to safetensors files, so that nothing else of `folder` reaches a library."""
    with tempfile.TemporaryDirectory() as made:
        safe = Path(made)
        safe.joinpath("config.json").write_text(json.dumps(config), encoding="utf-8")
        for file in weights.files:
            safe.joinpath(_safe_name(file.name)).symlink_to((file if weights.is_safe else pickles.safe_copy(file)).resolve())
        if len(weights.files) > 1:
            table = {name: _safe_name(file) for name, file in _json(weights.index)["weight_map"].items()}
            safe.joinpath(_safe_name(weights.index.name)).write_text(json.dumps({"metadata": {}, "weight_map": table}), encoding="utf-8")
        yield safe


def _safe_name(name: str) -> str:
    return re.sub(r"^pytorch_model", "model", name).replace(".bin", ".safetensors")


def _first_line(error: Exception) -> str:
    return documents.plain((str(error).strip() or type(error).__name__).splitlines()[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither library's warnings nor progress bars within the block; what matters is checked and said in our own words."""
    before = [(module, module.get_verbosity()) for module in (diffusers.utils.logging, transformers.utils.logging)]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for module, _ in before:
        module.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for module, level in before:
            module.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if not (folder / "tokenizer.json").is_file() and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise Refused(f"model: {folder} holds no vocabulary, expected are vocab.json and merges.txt, or tokenizer.json")
    try:
        with _quiet(), _only_vocabulary(folder) as safe:
            tokenizer = CLIPTokenizer.from_pretrained(safe, local_files_only=True)
    except (Refused, Missing, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library panics with an error that is no Exception
        raise Refused(f"model: {folder} cannot be read as a CLIP tokenizer ({_first_line(error)})") from error
    if len(tokenizer) < BYTES:
        raise Refused(f"model: {folder} gives a tokenizer of {len(tokenizer)} entries, fewer than the {BYTES} bytes every CLIP vocabulary starts with")
    return tokenizer


@contextmanager
def _only_vocabulary(folder: Path) -> Iterator[Path]:
    """A folder with the words and marks of a tokenizer, and nothing else of `folder`."""
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    with tempfile.TemporaryDirectory() as made:
        safe = Path(made)
        kept = {key: value for key, value in settings.items() if key in ARCHITECTURE["tokenizer"]}
        safe.joinpath("tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
        for name in VOCABULARY_FILES:
            if (folder / name).is_file():
                safe.joinpath(name).write_bytes(storage.read(folder / name, LARGEST_VOCABULARY))
        yield safe


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def digest(files: list[Path]) -> str:
    """SHA-256 over the contents of `files` in order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return f"sha256:{total.hexdigest()}"


def folder_licence(folder: Path) -> str:
    """Licence text of a model folder, else the licence its card names, else a line saying that it is unknown."""
    texts = sorted(path for path in folder.iterdir() if path.is_file() and path.stem.upper() in ("LICENSE", "LICENCE", "COPYING"))
    if texts:
        return texts[0].read_text(encoding="utf-8", errors="replace").strip()
    card = folder / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL) if card.is_file() else None
    named = re.search(r"^licen[sc]e:\s*(\S.*)$", front[1], re.MULTILINE) if front else None
    return named[1].strip().strip("\"'") if named else UNKNOWN_LICENCE


def _downloaded(name: str) -> Path:
    """Local snapshot of a hub repository's pipeline files."""
    import huggingface_hub

    patterns = ["model_index.json", "README.md", "LICENSE*", *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt", "safetensors"))]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        cause, remedy = (
            f"model: {name} could not be downloaded ({_first_line(error)})",
            "check the name, the connection and your access, or give a local folder",
        )
        raise Missing(cause, remedy) from error


# Single files -----------------------------------------------------------------------------------------------------------------------

UNET, VAE, CLIP, OPEN_CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "cond_stage_model.model."


def _read_single_file(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a single-file checkpoint and its licence; of a pickle, those of the safetensors copy another process made."""
    if path.suffix == ".safetensors":
        _check_readable(path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata.get("modelspec.license", UNKNOWN_LICENCE)
    if path.suffix != ".ckpt":
        raise Refused(f"model: {path} is a {path.suffix or 'suffixless'} file, {SUPPORTED}")
    _check_readable(path)
    return safetensors.torch.load_file(pickles.safe_copy(path)), UNKNOWN_LICENCE


def _check_layout(state: Mapping[str, Tensor], path: Path) -> None:
    """Say what a file is that is not an SD 1.x or 2.x checkpoint in the original layout."""
    signs = {
        "a LoRA, which only changes another model": ("lora_", ".lora.", "hada_", "lokr_"),
        "an SDXL model (two text encoders)": ("conditioner.embedders.",),
        "a ControlNet": ("control_model.", "controlnet_"),
        "an SD 3 model": ("joint_blocks.",),
        "a Flux model": ("double_blocks.",),
    }
    for kind, marks in signs.items():
        if any(mark in key for key in state for mark in marks):
            raise Refused(f"model: {path} holds {kind}, {SUPPORTED}")
    for part, prefixes in (("unet", (UNET,)), ("vae", (VAE,)), ("text_encoder", (CLIP, OPEN_CLIP))):
        if not any(key.startswith(prefixes) for key in state):
            found = f"its first tensor is {next(iter(state))}" if state else "it holds no tensor at all"
            raise Refused(f"model: {path} has no {part} ({found}), and a single file must hold unet, vae and text encoder in the original layout; {SUPPORTED}")


def _shape(state: Mapping[str, Tensor], key: str, path: Path) -> torch.Size:
    if key not in state:
        raise Refused(f"model: {path} lacks the tensor {key}, which every Stable Diffusion 1.x and 2.x checkpoint has")
    return state[key].shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers occur at the group of `pattern` among the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _unet_config(state: Mapping[str, Tensor], path: Path) -> dict:
    """The UNet's diffusers config, read off the shapes."""
    blocks = _count(state, rf"{re.escape(UNET)}input_blocks\.(\d+)\.")
    layers = blocks // 4 - 1
    widths = [_shape(state, f"{UNET}input_blocks.{depth * (layers + 1) + 1}.0.out_layers.3.weight", path)[0] for depth in range(4)]
    is_linear = len(_shape(state, f"{UNET}input_blocks.1.1.proj_in.weight", path)) == 2
    config = {
        "sample_size": 64,
        "in_channels": _shape(state, f"{UNET}input_blocks.0.0.weight", path)[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": list(DOWN_BLOCKS),
        "up_block_types": list(UP_BLOCKS),
        "cross_attention_dim": _shape(state, f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", path)[1],
        # Head counts leave no trace in the shapes: SD 1.x has 8 everywhere, SD 2.x heads of 64 channels.
        "attention_head_dim": [width // 64 for width in widths] if is_linear else 8,
        "use_linear_projection": is_linear,
    }
    _check_unet(config, path)
    return config


def _vae_config(state: Mapping[str, Tensor], path: Path) -> dict:
    """The autoencoder's diffusers config, read off the shapes."""
    count = _count(state, rf"{re.escape(VAE)}encoder\.down\.(\d+)\.")
    config = {
        "block_out_channels": tuple(_shape(state, f"{VAE}encoder.down.{level}.block.0.conv1.weight", path)[0] for level in range(count)),
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "layers_per_block": _count(state, rf"{re.escape(VAE)}encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": _shape(state, f"{VAE}post_quant_conv.weight", path)[0],
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }
    _check_vae(config, path)
    return config


def _text_config(state: Mapping[str, Tensor], path: Path) -> tuple[CLIPTextConfig, bool]:
    """The text encoder's config, read off the shapes, and whether it is SD 2.x's, which stops before the last layer."""
    is_second = any(key.startswith(OPEN_CLIP) for key in state)
    prefix = OPEN_CLIP if is_second else CLIP + ("text_model." if any(key.startswith(CLIP + "text_model.") for key in state) else "")
    names = (
        ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight", r"transformer\.resblocks\.(\d+)\.")
        if is_second
        else ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight", r"encoder\.layers\.(\d+)\.")
    )
    vocabulary, width = _shape(state, prefix + names[0], path)
    count = _count(state, re.escape(prefix) + names[3])
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_shape(state, prefix + names[2], path)[0],
        num_hidden_layers=count - 1 if is_second else count,
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=_shape(state, prefix + names[1], path)[0],
        hidden_act="gelu" if is_second else "quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0 if is_second else 1,
    )
    return config, is_second


def _filled(build: Callable[[], nn.Module], state: Mapping[str, Tensor], name: str) -> nn.Module:
    """The built module with converted weights, refused where a tensor is missing, unknown or of another shape."""
    module = build()
    wanted = module.state_dict()
    for key, value in wanted.items():
        if key not in state:
            raise Refused(f"model: {name} lacks the tensor {key}")
        if state[key].shape != value.shape:
            raise Refused(f"model: {name}.{key} has the shape {tuple(state[key].shape)} where {tuple(value.shape)} is expected")
    extra = sorted(set(state) - set(wanted))
    if extra:
        raise Refused(f"model: {name} has {len(extra)} tensors that Stable Diffusion 1.x and 2.x do not have, the first is {extra[0]}")
    module.load_state_dict(dict(state))
    return module


@torch.inference_mode()
def predicts_noise(unet: UNet2DConditionModel) -> bool:
    """Whether a trained UNet predicts noise rather than velocity, which no file of SD 2.x says.

    At the last timestep a sample is nearly pure noise, so a noise predictor returns nearly its input and a velocity predictor does not.
    """
    unet.eval()
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    output = unet(noise, 999, torch.zeros(1, 77, unet.config.cross_attention_dim)).sample
    return float(torch.corrcoef(torch.stack([noise.flatten(), output.flatten()]))[0, 1]) > 0.5


def _tokenizer_beside(path: Path, is_second: bool, allow_download: bool) -> CLIPTokenizer:
    beside = path.parent / "tokenizer"
    if beside.is_dir():
        return _tokenizer(beside)
    try:
        with _quiet():
            tokenizer = CLIPTokenizer.from_pretrained(VOCABULARY, local_files_only=not allow_download)
    except (OSError, ValueError):
        tokenizer = ()
    if len(tokenizer) < BYTES:  # without files transformers hands back a tokenizer of two entries
        raise Missing(
            f"model: {path} holds no vocabulary, and neither {beside} nor the local hub cache has one",
            f"put vocab.json and merges.txt of {VOCABULARY} into {beside}, or add --allow-download",
        )
    if is_second:
        tokenizer.pad_token = "!"  # SD 2.x pads with id 0
    return tokenizer
