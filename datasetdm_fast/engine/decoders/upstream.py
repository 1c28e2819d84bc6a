"""DatasetDM's own checkpoints: which decoder one is of, and the decoder folder it becomes and comes back from."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.checkpoint import UNUSED, build_decoder, check_fit
from datasetdm_fast.engine.decoders.config import SD1_LEVELS, DecoderConfig, parts_of, read_config, upstream
from datasetdm_fast.engine.decoders.trunk import Decoder, wide_mixes
from datasetdm_fast.engine.labels import BACKGROUND
from datasetdm_fast.engine.labels.class_tables import builtin_table
from datasetdm_fast.engine.models.layers import Uninitialised
from datasetdm_fast.errors import Missing, Refused, check_choice, quote
from datasetdm_fast.kernels import reference
from datasetdm_fast.stages import LEVELS, Level
from datasetdm_fast.untrusted import documents, pickles, tensors

SUFFIXES = (".pth", ".pt")
SIDE_FILE = "unused.safetensors"  # beside model.safetensors: what upstream saves and never reads
PREFIX = "module."  # that data parallelism puts before every name
LVIS_LOGITS = 80  # classes of the settings that upstream trains LVIS with
ALONE = "A decoder's checkpoint is the state dict alone: save that, or name another file."


def _things(name: str) -> tuple[str, ...]:
    return tuple(word for word in builtin_table(name).names if word != BACKGROUND)


def number_classes(count: int) -> tuple[str, ...]:
    return tuple(f"thing {k + 1}" for k in range(count))


_ANY_THING = {"task": "instance", "min_area": 0, "instance_class_from": "prompt"}  # taught one class for all things
# What a checkpoint is called -> kind of decoder and the settings that its weights do not show.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "voc": ("open-vocabulary", {"classes": _things("voc"), "score_threshold": 0.0}),
    "cityscapes": ("segmentation", {"classes": builtin_table("cityscapes").names}),
    "deepfashion": ("segmentation", {"classes": builtin_table("deepfashion").names}),
    "coco": ("segmentation", {"classes": _things("coco"), **_ANY_THING}),
    "lvis": ("segmentation", {"classes": number_classes(LVIS_LOGITS), **_ANY_THING}),
    "nyu": ("depth", {"max_depth": 10.0}),
    "kitti": ("depth", {"max_depth": 80.0}),
    "vkitti2": ("depth", {"max_depth": 80.0}),
    "pose": ("heatmap", {}),
    "pose-simcc": ("simcc", {}),
}
ANY_COUNT = ("coco", "lvis")  # all things are taught as one class, so that any number of them is read alike
LOGITS = {3: ("voc",), 20: ("cityscapes",), 25: ("deepfashion",), LVIS_LOGITS + 1: ANY_COUNT}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of upstream whose names and shapes fit a decoder; its numbers are not read yet."""

    path: Path
    copy: Path  # a safetensors file of the same tensors
    kind: str  # one of KINDS
    is_guessed: bool
    config: DecoderConfig
    prefix: str  # of every name

    @property
    def description(self) -> str:
        """What the checkpoint was taken for, in a sentence."""
        config, how = self.config, "its tensors are those of" if self.is_guessed else "read as"
        numbers = f", {config.queries} queries, {config.logits} class logits" if config.has_queries else ""
        numbers += "" if not numbers or config.logits in LOGITS else " of classes without names"
        alike = [kind for kind in _alike(_shapes(self.copy)[1]) if kind != self.kind] if self.is_guessed else []
        others = f"; a checkpoint of {' or '.join(alike)} looks the same" if alike else ""
        others += f", say so with --kind {alike[0]} or --decoder {quote(f'{alike[0]}:{self.path}')}" if alike else ""
        source = "; the class of an instance is what its prompt names" if config.instance_class_from == "prompt" else ""
        return f"{self.path}: {how} a {self.kind} decoder ({config.kind}{numbers}){source}{others}"

    def files(self) -> dict[str, bytes]:
        """The files of the decoder folder, the configuration last: every tensor with its own bytes."""
        state = {name.removeprefix(self.prefix): value for name, value in load_file(self.copy).items()}
        unused = UNUSED.get(self.config.kind, ())
        left = {name: value for name, value in state.items() if name.startswith(unused)}
        read = {name: value for name, value in state.items() if name not in left}
        if strange := [name for name, value in read.items() if value.dim() and not value.is_floating_point()]:
            kinds = ", ".join(f"{name} {str(read[name].dtype).removeprefix('torch.')}" for name in strange)
            raise Refused(f"{self.path}: weights are floating-point numbers, found {kinds}", ALONE)
        tensors.check_finite(read, f"{self.path}: ")
        files = {"model.safetensors": save(read)}
        # Even an empty one shows that the tensors' own precision is that of the checkpoint.
        if left or self.prefix or any(value.dtype != torch.float32 for value in read.values()):
            files[SIDE_FILE] = save(left, {"prefix": self.prefix})
        return files | {"config.json": self.config.to_json().encode()}


def open_checkpoint(path: Path, kind: str = "", levels: tuple[Level, ...] = SD1_LEVELS) -> Checkpoint:
    """The checkpoint in a file, of a `kind` or what its tensors tell, of a decoder on the U-Net of `levels`."""
    if kind:
        check_choice("--kind", kind, KINDS)
    if path.is_dir():
        raise Refused(f"{path}: a folder, expected a checkpoint FILE.pth of DatasetDM", "Name the file.")
    if not path.is_file():
        raise Missing(f"decoder weights {path}: no such file{storage.named_alike(path)}", "Check the path.")
    copy = path if path.suffix == ".safetensors" else pickles.safe_copy(path)
    if others := json.loads(_read_note(copy, pickles.OTHERS) or "[]"):  # what it held beside its tensors
        raise Refused(f"{path}: it holds {', '.join(others)}, which are not tensors of a decoder", ALONE)
    prefix, shapes = _shapes(copy)
    if not shapes:
        raise Refused(f"{path}: it holds no tensor at all", ALONE)
    chosen = kind or guess_kind(shapes, path)
    config = config_of(chosen, shapes, levels)
    _check(config, shapes, path, chosen)
    return Checkpoint(path, copy, chosen, not kind, config, prefix)


def _read_note(path: Path, name: str) -> str:
    """A note in a safetensors file, empty where it has none of this name."""
    tensors.check_safetensors(path)
    with safe_open(path, "pt") as opened:
        return (opened.metadata() or {}).get(name, "")


def _shapes(copy: Path) -> tuple[str, Shapes]:
    """The prefix of most names, and shapes by name without it; a name that lacks it is one that no decoder has."""
    shapes = {name: shape for name, (_, shape) in tensors.check_safetensors(copy).items()}
    if sum(name.startswith(PREFIX) for name in shapes) * 2 <= len(shapes):
        return "", shapes
    return PREFIX, {
        name.removeprefix(PREFIX) if name.startswith(PREFIX) else f"{name} (without {PREFIX})": shape
        for name, shape in shapes.items()
    }


def _alike(shapes: Shapes) -> tuple[str, ...]:
    """The kinds whose checkpoints have these names and last layers."""
    if "class_embed.weight" in shapes:
        logits = _size(shapes, "class_embed.weight", 0)
        return LOGITS.get(logits, ANY_COUNT if logits > 1 else ())
    if "last_layer_depth.0.weight" in shapes:
        return ("nyu", "kitti", "vkitti2")
    if "final_layer.weight" in shapes:
        return ("pose",)
    return ("pose-simcc",) if "mlp_head_x.weight" in shapes else ()


def guess_kind(shapes: Shapes, path: Path) -> str:
    """The kind inferred from names and shapes."""
    alike = _alike(shapes)
    if alike and KINDS[alike[0]][0] != "depth":
        return alike[0]
    if alike:
        raise Refused(
            f"{path}: its tensors are those of a depth decoder, and {', '.join(alike)} have the same",
            "Name one: --kind nyu reads metres up to 10, --kind kitti and --kind vkitti2 up to 80 "
            f"(or --decoder {quote(f'nyu:{path}')}).",
        )
    legacy = "to_k.weight" in shapes and "to_q.weight" in shapes
    what = "the decoder of DatasetDM's train.py, which no generator reads" if legacy else "no decoder of DatasetDM"
    names = sorted(shapes)
    raise Refused(
        f"{path}: it holds {what}: {len(names)} tensors, {', '.join(documents.one_line(name) for name in names[:4])}"
        f"{' ...' if len(names) > 4 else ''}",
        "Name a checkpoint of DatasetDM's other trainers.",
    )


def _size(shapes: Shapes, name: str, axis: int, otherwise: int = 0) -> int:
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) > axis else otherwise


def config_of(name: str, shapes: Shapes, levels: tuple[Level, ...]) -> DecoderConfig:
    """The configuration of a checkpoint: the settings of its kind, and the widths that its tensors have."""
    kind, settings = KINDS[name]
    logits = _size(shapes, "class_embed.weight", 0)
    is_of_others = logits in LOGITS and (name, logits) != ("lvis", 3)  # which our trainer gives it for two categories
    if name in ANY_COUNT and logits > 1 and not is_of_others:
        settings = settings | {"classes": number_classes(logits - 1)}
    usual = upstream(kind, levels=levels, **settings)
    width = _size(shapes, "low_feature_conv.0.weight", 0, usual.width)
    sizes: dict[str, Any] = {"width": width}
    if usual.has_queries:
        layers = {key.split(".")[1] for key in shapes if key.startswith("transformer_ffn_layers.")}
        mixed = _size(shapes, "query_feat_mlp.weight", 1, usual.width + usual.text_width)
        sizes |= {
            "queries": _size(shapes, "query_feat.weight", 0, usual.queries),
            "layers": len(layers) or usual.layers,
            "feed_forward": _size(shapes, "transformer_ffn_layers.0.linear1.weight", 0, usual.feed_forward),
            "mask_dim": _size(shapes, "mask_embed.layers.2.weight", 0, usual.mask_dim),
            "text_width": max(mixed - width, 1),
        }
    if usual.kind == "depth":
        sizes["depth_width"] = _size(shapes, "last_layer_depth.0.weight", 0, usual.depth_width)
    return DecoderConfig.from_json(replace(usual, **sizes).to_json())


def _check(config: DecoderConfig, shapes: Shapes, path: Path, kind: str) -> None:
    """Refuses shapes that are not exactly those of the decoder, by every one that differs."""
    with torch.device("meta"), Uninitialised():
        decoder = build_decoder(config)
        unused = UNUSED.get(config.kind, ())
        read = {name: torch.empty(shape) for name, shape in shapes.items() if not name.startswith(unused)}
    wide = [level.channels for level in config.levels]
    widths = [_size(shapes, f"{name}_feature_conv.0.weight", 1) for name in LEVELS]
    if all(widths) and widths != wide and sorted(read) == sorted(decoder.state_dict()):
        raise Refused(
            f"{path}: it was trained on a U-Net whose levels have {', '.join(map(str, widths))} channels, expected "
            f"{', '.join(map(str, wide))}",
            "Name its model with --model, or the model that its run used.",
        )
    try:
        check_fit(decoder, read, f"{path} as {kind}")
    except Refused as stop:
        alike = [name for name in _alike(shapes) if name != kind]
        raise Refused(stop.cause, f"Its last layer is that of {' or '.join(alike)}." if alike else ALONE) from stop


def unused_shapes(config: DecoderConfig) -> Shapes:
    """Shapes of what upstream's class has and never reads."""
    if config.kind == "segmentation":
        widths = config.width, config.width + config.text_width
        return {f"query_{name}_mlp.weight": widths for name in ("feat", "embed")}
    if config.kind == "simcc":
        mixes = {name: sides for name, sides in wide_mixes(config.width).items() if name != "mid"}
        with torch.device("meta"), Uninitialised():
            trunk = Decoder(config, reference, mixes).state_dict()
        return {name: tuple(value.shape) for name, value in trunk.items() if name.startswith(UNUSED["simcc"])}
    return {}


def as_checkpoint(folder: Path) -> bytes:
    """A decoder folder as upstream saves its decoders: the file that it came from, tensor by tensor."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise Missing(f"decoder {folder}: {name} is not there", "Name a decoder's own folder.")
    config = read_config(folder)
    if config.upscale or config.text_centre or config.normalisation != "image":
        raise Refused(
            f"decoder {folder}: its architecture is not DatasetDM's, so no checkpoint of DatasetDM can hold it",
            "Train with --preset upstream for one that can.",
        )
    tensors.check_safetensors(folder / "model.safetensors")
    state, side = load_file(folder / "model.safetensors"), folder / SIDE_FILE
    with torch.device("meta"), Uninitialised():
        check_fit(build_decoder(config), state, str(folder))
    prefix = ""
    if side.is_file():
        prefix, left = _read_note(side, "prefix"), load_file(side)
        if prefix not in ("", PREFIX) or not all(name.startswith(UNUSED.get(config.kind, ())) for name in left):
            raise Refused(f"{side}: it holds other tensors than the unused ones", "Convert the checkpoint again.")
    else:
        left = {name: torch.zeros(shape) for name, shape in unused_shapes(config).items()}
        state = {name: value.float() for name, value in state.items()}  # upstream has fp32 only
    whole = {f"{prefix}{name}": value for name, value in sorted({**state, **left}.items())}
    buffer = BytesIO()
    torch.save(whole, buffer)
    return buffer.getvalue()


def unpack_decoders(source: str | Path, levels: tuple[Level, ...] = SD1_LEVELS) -> list[Path]:
    """The folders that --decoder names; of a checkpoint FILE.pth or KIND:FILE.pth, one in the cache."""
    return [unpack_decoder(part, levels) for part in parts_of(source)]


def unpack_decoder(part: Path, levels: tuple[Level, ...]) -> Path:
    kind, colon, named = str(part).partition(":")
    if not colon or kind not in KINDS:
        kind, named = "", str(part)
    path = Path(named)
    if part.is_dir() or not kind and (path.suffix not in SUFFIXES or path.is_dir()):
        return part
    checkpoint = open_checkpoint(path, kind, levels)
    key = json.dumps([storage.sha256_of(path), checkpoint.config.values])
    holder = storage.cache_folder() / "decoders" / hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = holder / checkpoint.kind
    try:
        tensors.check_safetensors(folder / "model.safetensors")
        read_config(folder)
    except (Refused, Missing):  # not there yet, or damaged
        print(checkpoint.description, file=sys.stderr)
        storage.publish({folder / name: content for name, content in checkpoint.files().items()})
    return holder
