"""Models in the diffusers folder layout, those that are shipped among them."""

import inspect
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasetdm_fast.config import DEMO_DEFAULTS, Defaults
from datasetdm_fast.engine.backbones import (
    ANOTHER,
    DAMAGED,
    Backbone,
    Part,
    Read,
    every_backbone,
    list_supported,
    open_backbone,
)
from datasetdm_fast.engine.backbones.fitting import (
    ADAPTER,
    BUCKETS,
    DISTANCE,
    check_bounds,
    check_readable,
    check_scheduler,
    check_size,
    first_line,
    quiet_libraries,
    read_config,
)
from datasetdm_fast.engine.backbones.sd import USUAL_SCHEDULE
from datasetdm_fast.engine.loading.model import (
    UNKNOWN_LICENCE,
    ConfigFile,
    Model,
    Network,
    check_model,
    digest,
    files_of,
    folder_licence,
    tensors_of,
)
from datasetdm_fast.engine.loading.tokenizer import OwnTokenizer, load_tokenizer
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.plugins import load_place
from datasetdm_fast.untrusted import documents, pickles
from datasetdm_fast.untrusted.tensors import check_safetensors

DEMO = Path(__file__).parents[2] / "demo" / "model"
DEMO_DIT = DEMO.with_name("model-dit")
INDEX = "model_index.json"  # is written last: a folder that has one is whole
SCHEDULER = "scheduler"
MATCHING = "Take config.json and weights from the same model."
STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")  # of weight files: diffusers', and two of transformers
# numbers of text encoders that null would leave out, and what they usually are
TEXT_NUMBERS = {
    **dict.fromkeys(("layer_norm_epsilon", "rms_norm_eps"), 1e-6),
    **{DISTANCE: 128, BUCKETS: 32},
    **dict.fromkeys(("text_config", "vision_config"), {}),  # in whose place null builds a model of full size
    "rope_parameters": {},
}
CLIP_NUMBERS = {"layer_norm_eps": 1e-5, "eos_token_id": 49407}
HEAD = "attention_head_dim"  # the sum of axes_dims_rope
OF_BLOCKS = (HEAD, "transformer_layers_per_block", "layers_per_block", "cross_attention_dim")  # maybe one for each
# settings by which a library would fetch code, or import another library and run that
RUNS_CODE = ("auto_map", "custom_pipelines", "quantization_config")
SCALES = (".scale_weight", ".weight_scale")  # of weights of 8 bits, by which they would be multiplied


def load_demo(size: int) -> Model:
    return load_folder(check_shipped(DEMO), size=size, name="demo", defaults=DEMO_DEFAULTS, is_own=True)


def load_demo_dit(size: int) -> Model:
    """A small MM-DiT with two CLIP text encoders."""
    from datasetdm_fast.engine.backbones.flow_models import DEMO_DIT_DEFAULTS

    return load_folder(check_shipped(DEMO_DIT), size=size, name="demo-dit", defaults=DEMO_DIT_DEFAULTS, is_own=True)


def check_shipped(folder: Path) -> Path:
    """The folder of a demo model, which must be there."""
    if not folder.is_dir():
        raise Missing(
            f"model: the demo model is not there, {folder} does not exist",
            "Install the package again, or name another model with --model.",
        )
    return folder


@dataclass(frozen=True)
class FileParts:
    """What a file beside a folder holds of a model, or what is known of it without one."""

    backbone: Backbone
    index: dict[str, Any]
    configs: Read  # of parts that the folder may lack
    fill: Mapping[str, Callable[[str, Mapping[str, Any]], nn.Module]]  # part -> its module from name and config
    tokenizers: Mapping[str, Any]
    digests: dict[str, str]
    licence: str  # empty: as that of the folder


def load_folder(
    folder: Path,
    *,
    size: int = 0,
    name: str = "",
    defaults: Defaults | None = None,
    is_own: bool = False,
    parts: FileParts | None = None,
) -> Model:
    """The model in a diffusers folder; every part, its form and each of its tensors is checked.

    A folder of this package (`is_own`) was written by today's diffusers: its parts are read without that library.
    Parts that are among `parts` come from a file.
    """
    with _making_sense(folder):
        if parts is None:
            index = read_config(folder / INDEX) if (folder / INDEX).exists() else {}
            parts = FileParts(_backbone_of(folder, index), index, {}, {}, {}, {}, "")
        backbone, index = parts.backbone, parts.index
        if size:
            check_size(size, backbone.multiple)  # before seconds go into reading weights
        configs = _folder_configs(folder, backbone, index, parts.configs)
        for part in backbone.networks:
            if part in configs:
                if not is_own:
                    configs[part] = _readable_settings(backbone.parts[part], configs[part], folder / part)
                check_bounds(configs[part], folder / part)
        if SCHEDULER in configs:
            check_scheduler(configs[SCHEDULER], folder, is_flow=backbone.flow is not None)
        configs = backbone.check(configs, str(folder))
        if SCHEDULER not in configs:
            raise Refused(f"model: {folder} has no scheduler", "Add the folder scheduler of the same model.")
        read = {part: ConfigFile(config) for part, config in configs.items()}
        defaults, usual_licence = defaults or backbone.defaults(read), backbone.licence(read)
        check_size(size or defaults.size, backbone.multiple, backbone.most_pixels(read))
    present = [part for part in backbone.parts if part in configs]
    networks_present = [part for part in backbone.networks if part in configs]
    weights = {part: _weight_files(folder / part) for part in networks_present if part not in parts.fill}
    tokenizers = dict(parts.tokenizers) | {
        part: OwnTokenizer(folder / part) if is_own else load_tokenizer(folder / part, backbone.parts[part].classes)
        for part in present
        if part not in (*networks_present, *parts.tokenizers)
    }
    networks = {
        part: Network.of(parts.fill[part](part, configs[part]))
        if part in parts.fill
        else _network(folder / part, backbone.parts[part], weights[part], configs[part], is_own)
        for part in networks_present
    }
    licence = parts.licence or folder_licence(folder)
    return check_model(
        Model(
            name or str(folder),
            str(folder.resolve()),
            backbone,
            tokenizers,
            networks,
            configs[SCHEDULER],
            defaults,
            size or defaults.size,
            folder_digests(folder, backbone, weights) | parts.digests,
            usual_licence or licence if licence == UNKNOWN_LICENCE else licence,
            {key: value for key, value in index.items() if key not in backbone.parts and not key.startswith("_")},
        )
    )


@dataclass(frozen=True)
class _Weights:
    """The weight files of one part."""

    files: tuple[Path, ...]
    variant: str | None
    index: Path | None = None  # where they are several: which holds which tensor


def _backbone_of(folder: Path, index: Mapping[str, Any]) -> Backbone:
    """The family of a folder, by its model_index.json, or by the classes of its networks where it has none."""
    if "_class_name" in index:
        return open_backbone(index["_class_name"], folder)
    families = every_backbone()
    if list(folder.glob("*lora*.safetensors")) and not any((folder / each.denoiser).exists() for each in families):
        raise Refused(f"model: {folder} holds a LoRA, which only changes another model; {list_supported()}", ADAPTER)
    if not any((folder / part).exists() for each in families for part in each.parts):
        known = dict.fromkeys(part for each in families for part in each.parts)
        raise Refused(
            f"model: {folder} has none of the parts {', '.join(known)}; {list_supported()}",
            "Name the folder that holds them with --model.",
        )
    fitting = [each for each in families if _could_be(folder, each)]
    return max(fitting or families, key=lambda each: sum((folder / part).exists() for part in each.parts))


def family_of(folder: Path) -> Backbone:
    """The record of the family of a model's folder."""
    return _backbone_of(folder, read_config(folder / INDEX) if (folder / INDEX).exists() else {})


def _could_be(folder: Path, backbone: Backbone) -> bool:
    """Whether the denoiser of a folder says that it is of the family's class, or says nothing."""
    place = folder / backbone.denoiser / "config.json"
    if not place.is_file():
        return False
    named = read_config(place).get("_class_name")
    classes = backbone.parts[backbone.denoiser].classes
    return named is None or any(named == each.partition(":")[2] for each in classes)


def _folder_configs(folder: Path, backbone: Backbone, index: Mapping[str, Any], usual: Read) -> Read:
    """The configs of the parts of a folder of this family, or usual ones in their place, and of its schedule, whose
    absence the family judges.
    """
    configs: Read = {"model_index": dict(index)}
    required = [name for name, part in backbone.parts.items() if not part.is_optional]
    for name, part in backbone.parts.items():
        entry = index.get(name) or [None, None]
        if not isinstance(entry, list) or len(entry) != 2:
            raise Refused(
                f"model: {folder}: {INDEX} says {documents.quote(entry)} of its {name}, expected a library and a class",
                DAMAGED,
            )
        library, class_name = entry
        place = folder / name / ("tokenizer_config.json" if part.kind == "tokenizer" else "config.json")
        if not place.is_file() and name in usual:
            configs[name] = dict(usual[name])
            continue
        if part.is_optional and class_name is None and (name in index or not place.is_file()):
            continue
        if not place.is_file():
            raise Refused(
                f"model: {folder} has no {name} ({name}/{place.name} is missing), and these parts of "
                f"{backbone.title} are needed: {', '.join(required)}",
                f"Add the folder {name} of the same model.",
            )
        if class_name is not None and f"{library}:{class_name}" not in part.classes:
            raise Refused(
                f"model: {folder}: its {name} is a {documents.quote(class_name)} of {documents.quote(library)}, "
                f"expected {' or '.join(each.partition(':')[2] for each in part.classes)} for {backbone.title}",
                ANOTHER,
            )
        configs[name] = read_config(place)
    if (place := folder / SCHEDULER / "scheduler_config.json").is_file():
        configs[SCHEDULER] = read_config(place)
    elif SCHEDULER in usual:
        configs[SCHEDULER] = dict(usual[SCHEDULER])
    elif (folder / SCHEDULER).exists():
        raise Refused(
            f"model: {folder} has no scheduler (scheduler/{place.name} is missing)",
            "Add the folder scheduler of the same model.",
        )
    return configs


def _readable_settings(part: Part, config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """What is read of a config: of diffusers' classes what they take, of others all but what runs code."""
    if named := [key for key in RUNS_CODE if config.get(key)]:
        raise Refused(
            f"model: {source}: its config has {named[0]}, which runs code of its own or of another library; neither "
            "is done here",
            "Take the model as its authors publish it for diffusers, in full precision.",
        )
    library, _, name = part.classes[0].partition(":")
    is_clip = library == "transformers" and name.startswith("CLIP")
    usual: Mapping[str, Any] = CLIP_NUMBERS if is_clip else TEXT_NUMBERS
    if library == "diffusers":
        usual = {key: known.default for key, known in inspect.signature(class_of(part).__init__).parameters.items()}
    for key, value in {**config, **(config.get("text_config") or {})}.items():
        expected = usual.get(key)
        is_short = is_unfit = False
        if key.startswith("axes_") and isinstance(expected, (list, tuple)):
            is_short = not isinstance(value, (list, tuple)) or len(value) != len(expected)
            is_unfit = key == "axes_dims_rope" and not is_short and sum(value) != config.get(HEAD, usual[HEAD])
        if is_short or is_unfit or not _could_replace(value, expected, takes_lists=key in OF_BLOCKS):
            raise Refused(
                f"model: {source.parent}: the {source.name}'s {key} is {documents.quote(value)}, expected a value such "
                f"as {expected!r}",
                DAMAGED,
            )
    if library != "diffusers":
        return dict(config)
    known = {*usual} - {"self"} | {"_class_name", "_diffusers_version"}
    return {key: value for key, value in config.items() if key in known}


def _could_replace(value: Any, expected: Any, *, takes_lists: bool) -> bool:
    """Whether a setting's value has a form of its usual one, of whole numbers maybe one for each block."""
    if not isinstance(expected, (int, float, tuple, dict)):
        return True
    if value is None:
        return isinstance(expected, bool)  # of a switch it means no
    if isinstance(value, list):
        return expected == () or value != [] and (takes_lists or isinstance(expected, tuple))
    if isinstance(value, (str, dict)):
        return type(value) is type(expected)
    is_whole = not isinstance(value, float) or value.is_integer()
    return not (isinstance(value, bool) or isinstance(expected, int) and not is_whole) or isinstance(expected, bool)


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


def folder_digests(
    folder: Path, backbone: Backbone | None = None, weights: Mapping[str, _Weights] | None = None
) -> dict[str, str]:
    """Digest of the files of each part, which are looked for where they are not given."""
    backbone = backbone or family_of(folder)
    if weights is None:
        weights = {part: _weight_files(folder / part) for part in backbone.networks if (folder / part).exists()}
    files = {
        part: [*weights[part].files] if part in weights else files_of(folder / part)
        for part in (*backbone.parts, SCHEDULER)
        if (folder / part).exists()
    }
    return {part: digest(files[part]) if part in files else USUAL_SCHEDULE for part in (*files, SCHEDULER)}


def _weight_files(part: Path) -> _Weights:
    """The weight files of one part, checked to be readable; safetensors before pickles, full precision before half."""
    for extension, stem, variant in product(("safetensors", "bin"), STEMS, (None, "fp16", "bf16")):
        file = part / f"{stem}{f'.{variant}' if variant else ''}.{extension}"
        if file.is_file() or file.is_symlink():  # of a snapshot, whose blob may be gone
            check_readable(file)
            return _Weights((file,), variant)
        index = part / f"{stem}.{extension}.index{f'.{variant}' if variant else ''}.json"
        if index.is_file():
            return _Weights(_files_of_index(index, f".{extension}"), variant, index)
    lack, remedy = "holds no .safetensors or .bin file of weights", "Add the weight file of the same model."
    if others := sorted(path.name for path in part.iterdir() if path.suffix in (".safetensors", ".bin")):
        lack = f"holds {', '.join(others)}, none of which has the name of a whole weight file without an index"
        remedy = f"Add {STEMS[0]}.safetensors of the same model, or rename one that holds all of its weights to that."
    raise Refused(f"model: {part.parent} has no weights of its {part.name}: {part} {lack}", remedy)


def _files_of_index(index: Path, extension: str) -> tuple[Path, ...]:
    """The weight files that an index names, all in its own folder."""
    named = read_config(index).get("weight_map")
    names = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(extension) for name in names):
        raise Refused(f"model: {index}: it names no {extension} files of its folder", DAMAGED)
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise Refused(
            f"model: {index.parent} lacks {len(absent)} of its {len(names)} weight files, the first is {absent[0]}",
            DAMAGED,
        )
    for name in names:
        check_readable(index.parent / name)
    return tuple(index.parent / name for name in names)


def _network(folder: Path, part: Part, weights: _Weights, config: Mapping[str, Any], is_own: bool) -> Network:
    def load() -> nn.Module:
        return _from_folder(folder, part, weights, config)

    if not is_own:
        return Network.of(load(), load)
    return Network(
        ConfigFile(config),
        load,
        lambda stored: tensors_of(weights.files[0], stored),
        lambda: sum(math.prod(shape) for _, shape in check_safetensors(weights.files[0]).values()),
    )


def class_of(part: Part) -> Any:
    """The class of diffusers or transformers that a part is loaded as."""
    return load_place(part.classes[0])


def _from_folder(folder: Path, part: Part, weights: _Weights, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers or transformers module in fp32 from its folder, refused where weights and config do not fit."""
    kind = class_of(part)
    try:
        with quiet_libraries(), _only_weights(weights, part.kind, config) as safe:
            module, info = kind.from_pretrained(
                safe,
                dtype=torch.float32,
                variant=weights.variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (Refused, Missing):
        raise
    except Exception as error:  # a config that makes no sense lets the libraries raise nearly anything
        reason = first_line(error)
        if "above report" in reason:  # transformers', which is not shown
            reason = "tensors of other shapes"
        raise Refused(
            f"model: {folder} cannot be loaded, its weights do not fit its config.json ({reason})", MATCHING
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise Refused(
            f"model: {folder} lacks {count_noun(len(missing), 'tensor')} its config.json asks for, the first is "
            f"{missing[0]}",
            MATCHING,
        )
    if scales := sorted(name for name in info["unexpected_keys"] if name.endswith(SCALES)):
        raise Refused(
            f"model: {folder} holds weights of 8 bits and their scales, the first is {scales[0]}",
            "Take a folder with weights in 16 or 32 bits.",
        )
    known = {without_numbers(name) for name in module.state_dict()}
    if more := sorted(name for name in info["unexpected_keys"] if without_numbers(name) in known):
        raise Refused(
            f"model: {folder} has {count_noun(len(more), 'tensor')} of layers that its config.json omits, the first "
            f"is {more[0]}",
            MATCHING,
        )
    return module


def without_numbers(name: str) -> str:
    return re.sub(r"\d+", "", name)


@contextmanager
def _only_weights(weights: _Weights, kind: str, config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with the architecture's numbers and a link to safetensors, so that libraries see nothing else."""
    stem = STEMS[-1] if kind == "text_encoder" else STEMS[0]
    with tempfile.TemporaryDirectory() as made:
        safe = Path(made)
        safe.joinpath("config.json").write_text(json.dumps(config), encoding="utf-8")
        for file in weights.files:
            target = file if file.suffix == ".safetensors" else pickles.safe_copy(file)
            safe.joinpath(_safe_name(file.name, stem)).symlink_to(target.resolve())
        if weights.index:
            places = {key: _safe_name(name, stem) for key, name in read_config(weights.index)["weight_map"].items()}
            text = json.dumps({"metadata": {}, "weight_map": places})
            safe.joinpath(_safe_name(weights.index.name, stem)).write_text(text, encoding="utf-8")
        yield safe


def _safe_name(name: str, stem: str) -> str:
    """The name of a file's copy in safetensors, or of the index of such files, as a library looks for it."""
    return re.sub(rf"^({'|'.join(STEMS)})", stem, name).replace(".bin", ".safetensors")


def download_model(name: str, allow_download: bool) -> Path:
    """Local snapshot of a hub repository's pipeline files; without a download, the one that is in the local cache."""
    import huggingface_hub

    parts = {part for backbone in every_backbone() for part in backbone.parts} | {SCHEDULER}
    patterns = [
        INDEX,
        "README.md",
        "LICENSE*",
        *(f"{part}/*.{kind}" for part in parts for kind in ("json", "txt", "safetensors", "jinja")),
    ]
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=not allow_download)
        )
    except Exception as error:
        raise Missing(
            f"model: {name} could not be downloaded ({first_line(error)})",
            "Check the name, the connection and your access, or give a local folder.",
        ) from error
