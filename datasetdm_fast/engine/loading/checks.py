"""What a model's configuration and weights must satisfy before anything is built from them."""

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import FACTOR
from datasetdm_fast.untrusted import documents, tensors

PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
SUPPORTED = (
    "supported are Stable Diffusion 1.x and 2.x text-to-image models, as a diffusers folder or one .safetensors or "
    ".ckpt file"
)
ANOTHER = "Name such a model with --model."
ADAPTER = "Name its base model with --model, and the LoRA with --lora."
DAMAGED = "Get the model's files again and compare their checksums, or name another with --model."
SCHEDULE = "Correct the model's scheduler_config.json, or get that file again."
DOWN_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP_BLOCKS = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
LARGEST_VOCABULARY = 64 * 2**20  # bytes of a tokenizer's files; CLIP's have 3 MB
# of a config: any number, layers, latent cells of a side, steps
LARGEST_NUMBER, MOST_LAYERS, LARGEST_SIDE, MOST_TIMESTEPS = 2**20, 64, 512, 100_000
# What is read of a config. Other settings change no network of this kind, and some name code that a library would fetch
# and run. Of a UNet and an autoencoder it is what their classes take.
SETTINGS = {
    "text_encoder": set(
        "vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads hidden_act "
        "max_position_embeddings layer_norm_eps attention_dropout initializer_range initializer_factor pad_token_id "
        "bos_token_id eos_token_id architectures model_type".split()
    ),
    "tokenizer": set(
        "bos_token eos_token pad_token unk_token model_max_length added_tokens_decoder add_prefix_space do_lower_case "
        "errors clean_up_tokenization_spaces tokenizer_class".split()
    ),
}

NAMES = {"unet": "UNet", "vae": "vae"}
OTHER_KINDS = {9: ", so it is an inpainting model", 8: ", so it is an image-editing model"}  # by channels of a UNet
ACTIVATION = ("silu", "swish")  # two names of one function
# Settings by which a network is another one although its weights may have the same shapes -> the values that are
# supported, first the default.
FORMS: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "in_channels": (4,),
        "_class_name": ("UNet2DConditionModel",),
        "out_channels": (4,),
        "down_block_types": (list(DOWN_BLOCKS),),
        "up_block_types": (list(UP_BLOCKS),),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "transformer_layers_per_block": (1, [1] * 4),
        "act_fn": ACTIVATION,
        "dual_cross_attention": (False,),
        "only_cross_attention": (False,),
        "attention_type": ("default",),
        "resnet_time_scale_shift": ("default",),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        **dict.fromkeys(
            "addition_embed_type class_embed_type encoder_hid_dim encoder_hid_dim_type num_class_embeds "
            "cross_attention_norm time_embedding_act_fn timestep_post_act time_cond_proj_dim".split(),
            (None,),
        ),
    },
    "vae": {"_class_name": ("AutoencoderKL",), "latent_channels": (4,), "act_fn": ACTIVATION},
}


def known_settings(part: str) -> set[str]:
    """The names in a part's config that are read."""
    if part in SETTINGS:
        return SETTINGS[part]
    import diffusers

    kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    return {*inspect.signature(kind.__init__).parameters} - {"self"} | {"_class_name", "_diffusers_version"}


def check_size(size: int) -> None:
    if size <= 0 or size % 64:
        raise Refused(
            f"size: {size} is not a positive multiple of 64, which the four levels of the model need",
            f"Try --size {max(round(size / 64), 1) * 64}; 0 takes what the model was made for.",
        )


def read_config(path: Path) -> dict[str, Any]:
    return documents.read_object(path, most=LARGEST_VOCABULARY)


def check_bounds(config: Mapping[str, Any], source: Path) -> None:
    """Refuse numbers no model of this kind has: modules are built by them before any weight is looked at."""
    for key, value in config.items():
        is_list = isinstance(value, (list, tuple))
        values = value if is_list else [value]
        most = MOST_LAYERS if "layers" in key else LARGEST_NUMBER
        is_nested = is_list and (len(values) > 16 or any(isinstance(inner, (list, dict)) for inner in values))
        if is_nested or any(isinstance(number, (int, float)) and not abs(number) <= most for number in values):
            raise Refused(
                f"model: {source}: the setting {documents.quote(key)} is {documents.quote(value)}, expected "
                f"numbers of at most {most}",
                DAMAGED,
            )


def check_network(part: str, config: Mapping[str, Any], source: Path | str) -> None:
    """Refuse a UNet or autoencoder of another form than that of SD 1.x and 2.x, by the first setting that differs."""
    for key, (usual, *others) in FORMS[part].items():
        actual = config.get(key, usual)
        if type(actual) is bool and type(usual) is not bool or actual not in (usual, *others):
            kind = OTHER_KINDS.get(actual, "") if key == "in_channels" and isinstance(actual, int) else ""
            raise Refused(
                f"model: {source}: the {NAMES[part]}'s {key} is {documents.quote(actual)} where {usual!r} is "
                f"expected{kind}; {SUPPORTED}",
                ANOTHER,
            )
    if not isinstance(config.get("layers_per_block", 2), int):
        raise Refused(f"model: {source}: the {NAMES[part]}'s layers_per_block is no number; {SUPPORTED}", ANOTHER)
    if part == "vae":
        scale, factor = config.get("scaling_factor", 0.18215), 2 ** (len(config["block_out_channels"]) - 1)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise Refused(
                f"model: {source}: the vae's scaling_factor is {documents.quote(scale)}, expected a number above 0",
                DAMAGED,
            )
        if factor != FACTOR:
            raise Refused(
                f"model: {source}: a latent cell of the vae is {factor} x {factor} pixels, expected {FACTOR} x "
                f"{FACTOR}; {SUPPORTED}",
                ANOTHER,
            )


def check_scheduler(config: Mapping[str, Any], source: Path | str) -> None:
    forms = {
        "num_train_timesteps": int,
        "steps_offset": int,
        "beta_start": float,
        "beta_end": float,
        "set_alpha_to_one": bool,
        "trained_betas": [float],
    }
    documents.check_form(config, {name: form for name, form in forms.items() if config.get(name) is not None})
    count = config.get("num_train_timesteps", 1000)
    betas = config.get("trained_betas") or [config.get("beta_start", 0.0001), config.get("beta_end", 0.02)]
    is_range = 0 < count <= MOST_TIMESTEPS and 0 <= config.get("steps_offset", 0) < count
    if not is_range or len(betas) > MOST_TIMESTEPS or not all(0 < beta < 1 for beta in betas):
        raise Refused(
            f"model: {source}: the scheduler's steps, steps_offset or betas are out of range, expected 1 to "
            f"{MOST_TIMESTEPS} steps, an offset below that and betas between 0 and 1",
            SCHEDULE,
        )
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise Refused(
            f"model: {source}: the scheduler {config.get('_class_name', '')} has no beta_schedule, so the model is "
            f"of another kind; {SUPPORTED}",
            ANOTHER,
        )


def check_readable(file: Path) -> None:
    """Refuse a file that cannot be read, is a pointer left by git-lfs, or is cut off."""
    try:
        with file.open("rb") as opened:
            beginning = opened.read(40)
    except OSError as error:
        raise Refused(
            f"model: {file} cannot be read ({error.strerror})", "Check that the file is there and that you may read it."
        ) from error
    if beginning.startswith(b"version https://git-lfs"):
        raise Refused(f"model: {file} is a git-lfs pointer, not the weights", "Run git lfs pull in that folder.")
    if file.suffix == ".safetensors":
        tensors.check_safetensors(file)


def first_line(error: BaseException) -> str:
    return documents.one_line((str(error).strip() or type(error).__name__).splitlines()[0])


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings and progress bars of diffusers and transformers within the block; what matters is checked here."""
    from transformers.utils import logging

    diffusers = sys.modules.get("diffusers")  # what was not imported yet prints nothing
    both = (logging, *([diffusers.utils.logging] if diffusers else []))
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in both]
    for library in both:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, has_bars in before:
            library.set_verbosity(level)
            if has_bars:
                library.enable_progress_bar()
