"""What a model's configuration and weights must satisfy before anything is built from them."""

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

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


def check_finite(name: str, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise Refused(
                f"model: {name}.{key} holds NaN or infinite values, so the weights are damaged",
                "Get the file again and compare its checksum.",
            )


def read_config(path: Path) -> dict:
    return documents.read_object(path, most=LARGEST_VOCABULARY)


def check_bounds(config: Mapping, source: Path) -> None:
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


def check_unet(config: Mapping, source: Path) -> None:
    """Refuse every UNet whose pyramid is not that of SD 1.x and 2.x, by the first setting that differs."""
    channels = config.get("in_channels", 4)
    if channels != 4:
        kind = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth-to-image model"}.get(
            channels, "another kind of model"
        )
        raise Refused(f"model: {source}: the UNet reads {channels} channels, so it is {kind}; {SUPPORTED}", ANOTHER)
    expected = {
        "_class_name": "UNet2DConditionModel",
        "out_channels": 4,
        "down_block_types": list(DOWN_BLOCKS),
        "up_block_types": list(UP_BLOCKS),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "addition_embed_type": None,
        "class_embed_type": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_class_embeds": None,
        "dual_cross_attention": False,
        "only_cross_attention": False,
        "attention_type": "default",
        "cross_attention_norm": None,
        "resnet_time_scale_shift": "default",
        # Weights of these shapes fit also where a setting below is another one, and the images would be wrong.
        "center_input_sample": False,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
    }
    for key, value in expected.items():
        actual = config.get(key, value)
        if actual != value:
            raise Refused(
                f"model: {source}: the UNet's {key} is {actual!r} where {value!r} is expected; {SUPPORTED}", ANOTHER
            )
    _check_activation(config, source, "UNet")
    depth, layers = config.get("transformer_layers_per_block", 1), config.get("layers_per_block", 2)
    if depth not in (1, [1] * 4):
        raise Refused(
            f"model: {source}: the UNet's transformer_layers_per_block is {depth!r} where 1 is expected; {SUPPORTED}",
            ANOTHER,
        )
    if not isinstance(layers, int):
        raise Refused(
            f"model: {source}: the UNet's layers_per_block is {layers!r} where one number is expected; {SUPPORTED}",
            ANOTHER,
        )


def check_vae(config: Mapping, source: Path) -> None:
    kind, channels = config.get("_class_name", "AutoencoderKL"), config.get("latent_channels", 4)
    if kind != "AutoencoderKL" or channels != 4:
        raise Refused(
            f"model: {source}: the vae is a {kind} with {channels} latent channels where AutoencoderKL with 4 is "
            f"expected; {SUPPORTED}",
            ANOTHER,
        )
    _check_activation(config, source, "vae")
    scale = config.get("scaling_factor", 0.18215)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise Refused(
            f"model: {source}: the vae's scaling_factor is {documents.quote(scale)}, expected a number above 0",
            DAMAGED,
        )
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if factor != FACTOR:
        raise Refused(
            f"model: {source}: the vae makes one latent cell of {factor} x {factor} pixels where {FACTOR} x {FACTOR} "
            f"is expected; {SUPPORTED}",
            ANOTHER,
        )


def _check_activation(config: Mapping, source: Path, part: str) -> None:
    activation = config.get("act_fn", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise Refused(
            f"model: {source}: the {part}'s act_fn is {activation!r} where 'silu' is expected; {SUPPORTED}", ANOTHER
        )


def check_scheduler(config: Mapping, source: Path) -> None:
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
    if not 0 < count <= MOST_TIMESTEPS or len(betas) > MOST_TIMESTEPS or not all(0 < beta < 1 for beta in betas):
        raise Refused(
            f"model: {source}: the scheduler's steps or betas are out of range, expected 1 to {MOST_TIMESTEPS} steps "
            "and betas between 0 and 1",
            SCHEDULE,
        )
    if not 0 <= config.get("steps_offset", 0) < count:
        raise Refused(
            f"model: {source}: the scheduler's steps_offset is {config['steps_offset']}, expected 0 to {count - 1}",
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


def first_line(error: Exception) -> str:
    return documents.one_line((str(error).strip() or type(error).__name__).splitlines()[0])


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings and progress bars of diffusers and transformers within the block; what matters is checked here."""
    from transformers.utils import logging

    diffusers = sys.modules.get("diffusers")  # what is not there yet says nothing
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
