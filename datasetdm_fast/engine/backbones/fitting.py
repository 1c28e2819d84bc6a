"""Whether the files of a model are whole, within bounds, of a kind that is supported and all of one model."""

import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from datasetdm_fast.engine.backbones import ANOTHER, DAMAGED, LoadedModel, Read
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import FACTOR
from datasetdm_fast.untrusted import documents, tensors

TOGETHER = "Take every part from the same model."


def check_settings(configs: Read, source: str, part: str, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses a part by the first of its settings whose value is none of those supported, the first of which is what a
    missing one means.
    """
    for name, (usual, *others) in supported.items():
        value = configs[part].get(name, usual)
        if type(value) is bool and type(usual) is not bool or value not in (usual, *others):
            raise Refused(
                f"model: {source}: the {part}'s {name} is {documents.quote(value)} where {usual!r} is expected, so it "
                "is a model of another kind",
                ANOTHER,
            )


def check_autoencoder(vae: Mapping[str, Any], source: Path | str) -> None:
    """Refuses an autoencoder whose latents are not scaled by numbers, or have cells of another size."""
    numbers = {"scaling_factor": (vae.get("scaling_factor", 1.0), 0.0, " above 0")}
    numbers["shift_factor"] = vae.get("shift_factor") or 0.0, -math.inf, ""
    for name, (value, least, bound) in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least < value < math.inf:
            raise Refused(
                f"model: {source}: the vae's {name} is {documents.quote(value)}, expected a number{bound}", DAMAGED
            )
    if (pixels := 2 ** (len(vae.get("dim_mult") or vae["block_out_channels"]) - 1)) != FACTOR:
        raise Refused(
            f"model: {source}: a latent cell of the vae is {pixels} x {pixels} pixels, expected {FACTOR} x {FACTOR}",
            ANOTHER,
        )


def check_channels(source: str, read: Any, vae: Mapping[str, Any], cells: int = 1) -> None:
    """Refuses an autoencoder of another form, and a denoiser that reads other latents than it gives, as those that edit
    images do; `cells` of them are one token where it reads them packed.
    """
    check_autoencoder(vae, source)
    supplied = cells * vae.get("latent_channels", vae.get("z_dim"))
    if read != supplied:
        raise Refused(
            f"model: {source}: the denoiser reads {documents.quote(read)} channels where the latents of the vae have "
            f"{documents.quote(supplied)}, so it is a model of another kind, such as one that edits images",
            ANOTHER,
        )


def check_fit(model: LoadedModel) -> None:
    """Refuses parts that are not of one model: a text of another width than the denoiser reads, a tokenizer with more
    entries than its encoder knows, and what the family itself checks.
    """
    widths = model.backbone.text_widths(model.configs)
    for what, (read, supplied) in widths.items():
        if read != supplied:
            raise Refused(
                f"model: {model.name}: the denoiser reads {what} of width {read}, the encoders give {supplied}, so "
                "they belong to different models",
                TOGETHER,
            )
    for part in model.backbone.of_kind("text_encoder") if widths else ():
        if part not in model.configs:
            continue
        config: Any = model.configs[part]
        tokenizer = model.loaded_tokenizers[part.replace("text_encoder", "tokenizer")]
        known: int = getattr(config, "text_config", config).vocab_size
        if len(tokenizer) > known:
            raise Refused(
                f"model: {model.name}: the tokenizer of the {part} has {len(tokenizer)} entries, it knows {known}",
                TOGETHER,
            )
    model.backbone.check_fit(model)


ADAPTER = "Name its base model with --model, and the LoRA with --lora."
SCHEDULE = "Correct the model's scheduler_config.json, or get that file again."
DYNAMIC_SHIFTS = "base_shift max_shift base_image_seq_len max_image_seq_len".split()  # of flows
SHIFTS = ["shift", "flow_shift", "shift_terminal", *DYNAMIC_SHIFTS]
LARGEST_VOCABULARY = 64 * 2**20  # bytes of a tokenizer's files; CLIP's have 3 MB
# of a config: any number, layers, entries of a list, steps
LARGEST_NUMBER, MOST_LAYERS, MOST_ENTRIES, MOST_TIMESTEPS = 2**20, 128, 128, 100_000
DISTANCE, BUCKETS = "relative_attention_max_distance", "relative_attention_num_buckets"  # of T5
LEAST = {  # of a config
    **dict.fromkeys("num_layers num_hidden_layers layers_per_block norm_num_groups n_layers".split(), 1),
    **dict.fromkeys("pos_embed_max_size axes_lens axes_dims axes_dims_rope".split(), 1),
    **dict.fromkeys("num_attention_heads num_key_value_heads num_heads attention_head_dim".split(), 1),
    **dict.fromkeys("layer_norm_eps layer_norm_epsilon rms_norm_eps".split(), 0),
    "transformer_layers_per_block": 0,
    BUCKETS: 4,
}
read_config = partial(documents.read_object, most=LARGEST_VOCABULARY)  # of a model or tokenizer, by its path
# What is read of a tokenizer's config; other settings may name code that a library would fetch and run.
TOKENIZER_SETTINGS = set(
    "bos_token eos_token pad_token unk_token model_max_length added_tokens_decoder add_prefix_space do_lower_case "
    "errors clean_up_tokenization_spaces tokenizer_class additional_special_tokens extra_ids chat_template".split()
)


def check_size(size: int, multiple: int, most: int = 0) -> None:
    if size <= 0 or size % multiple:
        raise Refused(
            f"size: {size} is not a positive multiple of {multiple}, which the levels of the model need",
            f"Try --size {max(round(size / multiple), 1) * multiple}; 0 takes what the model was made for.",
        )
    if most and size > most:
        raise Refused(
            f"size: the model has positions for images of at most {most} pixels a side, {size} were to be drawn",
            f"Use --size {most - most % multiple} or less.",
        )


def check_bounds(config: Mapping[str, Any], source: Path) -> None:
    """Refuse numbers no model of this kind has: modules are built by them before any weight is looked at."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_bounds(value, source)
            continue
        least = config.get(BUCKETS, 32) // 4 + 1 if key == DISTANCE else LEAST.get(key, -math.inf)
        is_list = isinstance(value, (list, tuple))
        values = value if is_list else [value]
        if any(isinstance(number, (int, float)) and number < least for number in values):
            raise Refused(
                f"model: {source}: the setting {documents.quote(key)} is {documents.quote(value)}, expected {least} or "
                "more",
                DAMAGED,
            )
        most = MOST_LAYERS if "layers" in key else LARGEST_NUMBER
        is_nested = is_list and any(isinstance(inner, (list, dict)) for inner in values)
        is_large = any(isinstance(number, (int, float)) and not abs(number) <= most for number in values)
        if is_nested or is_large or is_list and len(values) > MOST_ENTRIES:
            raise Refused(
                f"model: {source}: the setting {documents.quote(key)} is {documents.quote(value)}, expected "
                f"numbers of at most {most}{', and no lists of them' * is_nested}",
                ANOTHER if is_nested else DAMAGED,
            )


def _check_forms(
    config: Mapping[str, Any], source: Path | str, forms: Mapping[str, Any], nullable: Collection[str]
) -> None:
    """Refuses a scheduler with a setting of another form, or with null where that says nothing."""
    present = [name for name in forms if name in config and not (config[name] is None and name in nullable)]
    try:
        documents.check_form(config, {name: forms[name] for name in present})
    except ValueError as error:
        raise Refused(f"model: {source}: the scheduler's {error}", SCHEDULE) from error


def check_scheduler(config: Mapping[str, Any], source: Path | str, *, is_flow: bool = False) -> None:
    if is_flow:
        ignored = [] if config.get("use_dynamic_shifting") else DYNAMIC_SHIFTS
        of_flow = {"_class_name": str, "num_train_timesteps": int, **dict.fromkeys(SHIFTS, float)}
        _check_forms(config, source, of_flow, ["shift_terminal", *ignored])
        count, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
        if not (0 < count <= MOST_TIMESTEPS and shift > 0 and 0 <= (config.get("shift_terminal") or 0) < 1):
            raise Refused(
                f"model: {source}: the scheduler's steps, shift or shift_terminal are out of range, expected 1 to "
                f"{MOST_TIMESTEPS} steps, a shift above 0 and an end below 1",
                SCHEDULE,
            )
        return
    forms = {
        "_class_name": str,
        "num_train_timesteps": int,
        "steps_offset": int,
        "beta_start": float,
        "beta_end": float,
        "set_alpha_to_one": bool,
        "trained_betas": [float],
    }
    ignored = ["beta_start", "beta_end"] if config.get("trained_betas") else []
    _check_forms(config, source, forms, ["trained_betas", "set_alpha_to_one", *ignored])
    count = config.get("num_train_timesteps", 1000)
    betas = config.get("trained_betas")
    if betas is None:
        betas = [config.get("beta_start", 0.0001), config.get("beta_end", 0.02)]
    is_range = 0 < count <= MOST_TIMESTEPS and 0 <= config.get("steps_offset", 0) < count
    if not is_range or not 0 < len(betas) <= MOST_TIMESTEPS or not all(0 < beta < 1 for beta in betas):
        raise Refused(
            f"model: {source}: the scheduler's steps, steps_offset or betas are out of range, expected 1 to "
            f"{MOST_TIMESTEPS} steps, an offset below that and betas between 0 and 1",
            SCHEDULE,
        )
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise Refused(
            f"model: {source}: the scheduler {config.get('_class_name', '')} has no beta_schedule, so the model is "
            "of another kind",
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
    """The first line of a library's error, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return documents.one_line((text or type(error).__name__).splitlines()[0])


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings and progress bars of diffusers and transformers within the block; what matters is checked here."""
    from transformers.utils import logging

    # What was not imported yet prints nothing. An import that is repeated after an interrupt leaves it no attribute.
    of_diffusers = sys.modules.get("diffusers.utils.logging")
    both = (logging, *([of_diffusers] if of_diffusers else []))
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
