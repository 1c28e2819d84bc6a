"""Models in the diffusers folder layout."""

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasetdm_fast.config import SD_DEFAULTS, Defaults
from datasetdm_fast.engine.loading.checks import (
    ADAPTER,
    ANOTHER,
    DAMAGED,
    LARGEST_SIDE,
    PARTS,
    SUPPORTED,
    check_bounds,
    check_network,
    check_readable,
    check_scheduler,
    first_line,
    known_settings,
    quiet_libraries,
    read_config,
)
from datasetdm_fast.engine.loading.model import NETWORKS, SD_SCHEDULER, Model, check_model
from datasetdm_fast.engine.loading.network import ConfigFile, Network, tensors_of
from datasetdm_fast.engine.loading.provenance import digest, files_of, folder_licence
from datasetdm_fast.engine.loading.tokenizer import OwnTokenizer, load_tokenizer
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.stages import FACTOR
from datasetdm_fast.untrusted import documents, pickles

# diffusers' pipeline of Stable Diffusion puts these right in the scheduler of old folders: the offset is 1, and samples
# are not clipped.
CORRECTED = {"steps_offset": 1}
UNREAD = ("_diffusers_version", "clip_sample")
# So it does with a sample_size that such versions wrote too small.
OLD, LEAST_SIDE = re.compile(r"0\.[0-8]\b"), 64
MATCHING = "Take config.json and weights from the same model."
USUAL = "the schedule of Stable Diffusion 1.x"  # in place of a digest where a folder holds none


def load_folder(
    folder: Path, *, size: int = 0, name: str = "", defaults: Defaults | None = None, is_own: bool = False
) -> Model:
    """The model in a diffusers folder; every part, its form and each of its tensors is checked.

    A folder of this package (`is_own`) was written by today's diffusers: its parts are read without that library.
    """
    with _making_sense(folder):
        configs = _folder_configs(folder)
        for part in NETWORKS:
            if not is_own:
                configs[part] = {key: value for key, value in configs[part].items() if key in known_settings(part)}
            check_bounds(configs[part], folder / part)
        check_scheduler(configs["scheduler"], folder)
        for part in ("unet", "vae"):
            check_network(part, configs[part], folder)
    weights = _all_weights(folder)
    tokenizer = (OwnTokenizer if is_own else load_tokenizer)(folder / "tokenizer")
    networks = {part: _network(folder / part, weights[part], configs[part], is_own) for part in NETWORKS}
    side = networks["unet"].config.sample_size
    if not isinstance(side, int) or not 0 < side <= LARGEST_SIDE:
        raise Refused(
            f"model: {folder}: the UNet's sample_size is {documents.quote(side)}, expected a number up to "
            f"{LARGEST_SIDE}; {SUPPORTED}",
            ANOTHER,
        )
    if OLD.match(str(configs["unet"].get("_diffusers_version"))):
        side = max(side, LEAST_SIDE)
    defaults = defaults or Defaults(side * FACTOR, SD_DEFAULTS.steps, SD_DEFAULTS.guidance)
    scheduler = {key: value for key, value in configs["scheduler"].items() if key not in UNREAD} | CORRECTED
    origin = name or str(folder), str(folder.resolve())
    proof = folder_digests(folder, weights), folder_licence(folder)
    return check_model(Model(*origin, tokenizer, networks, scheduler, defaults, size or defaults.size, *proof))


@dataclass(frozen=True)
class _Weights:
    file: Path
    variant: str | None


def _folder_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configs of the parts of a folder that looks like a supported pipeline."""
    index = read_config(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    pipeline = index.get("_class_name", "StableDiffusionPipeline")
    if (folder / "text_encoder_2").exists() or "text_encoder_2" in index or "XL" in pipeline:
        raise Refused(f"model: {folder} holds an SDXL pipeline ({pipeline}, two text encoders); {SUPPORTED}", ANOTHER)
    if list(folder.glob("*lora*.safetensors")) and not (folder / "unet").exists():
        raise Refused(f"model: {folder} holds a LoRA, which only changes another model; {SUPPORTED}", ADAPTER)
    if not any((folder / part).exists() for part in PARTS):
        raise Refused(
            f"model: {folder} has none of the parts {', '.join(PARTS)}; {SUPPORTED}",
            "Name the folder that holds them with --model.",
        )
    if not pipeline.startswith("StableDiffusion") or pipeline.startswith("StableDiffusion3"):
        raise Refused(f"model: {folder} holds a {pipeline}; {SUPPORTED}", ANOTHER)
    names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    places = {part: folder / part / names.get(part, "config.json") for part in PARTS}
    has_schedule = (folder / "scheduler").exists()
    for part, place in places.items():
        if not place.is_file() and (part != "scheduler" or has_schedule):
            raise Refused(
                f"model: {folder} has no {part} ({part}/{place.name} is missing), and these parts are needed: "
                f"tokenizer, {', '.join(NETWORKS)}",
                f"Add the folder {part} of the same model.",
            )
    read = {part: read_config(place) for part, place in places.items() if part != "scheduler" or has_schedule}
    return read if has_schedule else read | {"scheduler": _usual_schedule(folder, read["unet"])}


def _usual_schedule(folder: Path, unet: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule of Stable Diffusion 1.x, for a folder that holds networks alone; those of 2.x have several."""
    if unet.get("use_linear_projection"):
        raise Refused(
            f"model: {folder} has no scheduler, and models like Stable Diffusion 2.x were trained with several",
            "Add the folder scheduler of the same model.",
        )
    print(f"model: {folder} has no scheduler, so the schedule of Stable Diffusion 1.x is taken", file=sys.stderr)
    return dict(SD_SCHEDULER)


@contextmanager
def _making_sense(source: Path) -> Iterator[None]:
    """Refuses, within the block, configs whose values have other types than a reader can expect."""
    try:
        yield
    except Refused:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise Refused(
            f"model: {source}: its configs are inconsistent ({type(error).__name__}: {first_line(error)})", DAMAGED
        ) from error


def folder_digests(folder: Path, weights: Mapping[str, _Weights] | None = None) -> dict[str, str]:
    """Digest of the files of each part, whose weights are looked for where they are not given."""
    files = {
        **{part: [weight.file] for part, weight in (weights or _all_weights(folder)).items()},
        "tokenizer": files_of(folder / "tokenizer"),
        "scheduler": files_of(folder / "scheduler") if (folder / "scheduler").exists() else [],
    }
    return {part: digest(files[part]) if files[part] else USUAL for part in PARTS}


def _all_weights(folder: Path) -> dict[str, _Weights]:
    return {part: _weight_files(folder / part) for part in NETWORKS}


def _weight_files(part: Path) -> _Weights:
    """The weight file of one part, checked to be readable; safetensors before pickles, full precision before fp16."""
    stems = ("diffusion_pytorch_model", "pytorch_model", "model")
    for extension, stem, variant in product(("safetensors", "bin"), stems, (None, "fp16")):
        file = part / f"{stem}{f'.{variant}' if variant else ''}.{extension}"
        if file.is_file():
            check_readable(file)
            return _Weights(file, variant)
    raise Refused(
        f"model: {part.parent} has no weights of its {part.name}: {part} holds no .safetensors or .bin file of weights",
        "Add the weight file of the same model; one that is split into several has to be joined.",
    )


def _network(folder: Path, weights: _Weights, config: Mapping[str, Any], is_own: bool) -> Network:
    if not is_own:
        return Network.of(_from_folder(folder, weights, config))
    return Network(
        ConfigFile(config),
        lambda: _from_folder(folder, weights, config),
        lambda stored: tensors_of(weights.file, stored),
    )


def class_of(part: str) -> Any:
    """The class of diffusers or transformers that is a network of this name."""
    import diffusers
    import transformers

    return {
        "text_encoder": transformers.CLIPTextModel,
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
    }[part]


def _from_folder(folder: Path, weights: _Weights, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers or transformers module in fp32 from its folder, refused where weights and config do not fit."""
    kind = class_of(folder.name)
    try:
        with quiet_libraries(), _only_weights(folder, weights, config) as safe:
            module, info = kind.from_pretrained(
                safe,
                torch_dtype=torch.float32,
                variant=weights.variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (Refused, Missing):
        raise
    except Exception as error:  # a config that makes no sense lets the libraries raise nearly anything
        raise Refused(
            f"model: {folder} cannot be loaded, its weights do not fit its config.json ({first_line(error)})", MATCHING
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise Refused(
            f"model: {folder} lacks {len(missing)} tensors its config.json asks for, the first is {missing[0]}",
            MATCHING,
        )
    return module


@contextmanager
def _only_weights(folder: Path, weights: _Weights, config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with the architecture's numbers and a link to safetensors, so that libraries see nothing else."""
    with tempfile.TemporaryDirectory() as made:
        safe, file = Path(made), weights.file
        safe.joinpath("config.json").write_text(json.dumps(config), encoding="utf-8")
        name = re.sub(r"^pytorch_model", "model", file.name).replace(".bin", ".safetensors")
        target = file if file.suffix == ".safetensors" else pickles.safe_copy(file)
        safe.joinpath(name).symlink_to(target.resolve())
        yield safe


def download_model(name: str) -> Path:
    """Local snapshot of a hub repository's pipeline files."""
    import huggingface_hub

    patterns = [
        "model_index.json",
        "README.md",
        "LICENSE*",
        *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt", "safetensors")),
    ]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise Missing(
            f"model: {name} could not be downloaded ({first_line(error)})",
            "Check the name, the connection and your access, or give a local folder.",
        ) from error
