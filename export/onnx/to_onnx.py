"""Every stage of a model and its decoders as ONNX graphs, beside a manifest that says what they are."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from datasetdm_fast import __version__, stages
from datasetdm_fast.data import ProjectedCapture
from datasetdm_fast.disk.locks import cache_folder
from datasetdm_fast.engine.decoders.layers import SpectralConv2d
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.labels.names import LabelName
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.models.capture import NoCapture, Projection, RawCapture, Slot
from datasetdm_fast.engine.models.text_encoder import TextEncoder
from datasetdm_fast.engine.models.unet import TextTable, TimeTable, UNet
from datasetdm_fast.engine.models.vae import ImageDecoder, ImageEncoder
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.manifest import (
    NAME,
    PRECISIONS,
    FileInfo,
    Manifest,
    StageFile,
    TensorInfo,
    check_replaceable,
)
from datasetdm_fast.export.onnx.graph import OPSETS, Extent, Graph, Value, traced
from datasetdm_fast.export.onnx.operations import ONNX_RUNTIME, PORTABLE, exportable, probabilities
from datasetdm_fast.export.onnx.operators import OPERATORS
from datasetdm_fast.export.onnx.weights import DataFile, deferred, digest
from datasetdm_fast.export.staging import alone, staged
from datasetdm_fast.kernels import bilinear, depth_head, image_norm, upsample_concat
from datasetdm_fast.stages import FACTOR, LEVELS, Tensors

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BATCH = Extent(1, ("B",))
WORDS = Extent(1, ("K",))
RAW = "denoise_and_keep"
AVERAGE = "denoise_and_average"  # followed by the sides whose self-attention and cross-attention it averages
OPERATIONS = {"any": PORTABLE, "onnxruntime": ONNX_RUNTIME}


def export(model: Model, decoders: Mapping[str, Decoder], out: Path | str, **options: Any) -> Manifest:
    """The manifest of folder `out`, which then holds every stage, or those of `only`; equal input, equal bytes.

    The options are those of `StageExport`. A folder that holds this very export already is left as it is; of several
    processes that export into it at once one does the work.
    """
    with model.built_for_now():
        return StageExport(model, decoders, **options).into(Path(out))


def cached(model: Model, decoders: Mapping[str, Decoder], **options: Any) -> tuple[Path, Manifest]:
    """The same in a folder of the cache, named by all that decides its files."""
    with model.built_for_now():
        made = StageExport(model, decoders, **options)
        folder = cache_folder() / "onnx" / hashlib.sha256(repr(made.wish).encode()).hexdigest()[:32]
        return folder, made.into(folder)


@dataclass(frozen=True)
class ExportWish:
    """What decides the files of an export."""

    names: tuple[str, ...]
    precision: str
    runtime: str
    source: str
    size: int


def chosen_stages(
    decoders: Mapping[str, Decoder], raw_capture: bool, averages: tuple[int, int] | None, only: Sequence[str] | None
) -> tuple[str, ...]:
    """Without decoders there is nothing to capture but the features and maps themselves."""
    captures = [*(["denoise_and_capture"] if decoders else []), *([RAW] if raw_capture else [])]
    captures += [average_name(*averages)] if averages else []
    names = ["encode_text", "denoise", *captures, "decode_image", "encode_image", *map(annotate_name, decoders)]
    for name in only or ():
        if name not in names:
            raise Refused(f"stage: {name!r} is none of {', '.join(names)}", "Choose from these.")
    return tuple(name for name in names if only is None or name in only)


def average_name(self_side: int, cross_side: int) -> str:
    """The stage that averages the attention of these sides."""
    return f"{AVERAGE}_{self_side}_{cross_side}"


def averaged_sides(stage: str) -> tuple[int, ...]:
    """The sides whose attention a stage averages; none of any other stage."""
    return tuple(map(int, stage.removeprefix(AVERAGE).split("_")[1:])) if stage.startswith(AVERAGE) else ()


def exported_apart(stage: str) -> dict[str, Any]:
    """The options that export a stage few runs need, alone; none for the others."""
    if stage == RAW:
        return {"raw_capture": True, "only": [RAW]}
    return {"averages": averaged_sides(stage), "only": [stage]} if averaged_sides(stage) else {}


def annotate_name(label: str) -> str:
    """The stage of the decoder of a label."""
    return f"annotate_{LabelName.parse(label).stem}"


def label_of(stage: str) -> str:
    """The label whose decoder a stage is."""
    return str(LabelName.of_stem(stage.removeprefix("annotate_")))


def _check(decoders: Mapping[str, Decoder], precision: str, runtime: str) -> None:
    if precision not in PRECISIONS:
        raise Refused(f"precision: {precision!r} is none of {', '.join(PRECISIONS)}", "Choose one of these.")
    if runtime not in OPERATIONS:
        raise Refused(f"runtime: {runtime!r} is none of {', '.join(OPERATIONS)}", "Choose one of these.")
    for task, decoder in decoders.items():
        if any(isinstance(module, SpectralConv2d) for module in decoder.modules()):
            raise Refused(
                f"{task} decoder: its spectral norms change with every image, which a graph cannot express",
                "Load it without strict=True.",
            )


def source_digest(model: Model, decoders: Mapping[str, Decoder]) -> str:
    """SHA-256 of all that decides the graphs: parameters, configurations and this package's own code."""
    parts = {"text_encoder": model.text_encoder, "unet": model.unet, "vae": model.vae}
    configs = {"text_encoder": model.text_encoder.config.to_dict(), "unet": model.unet.config, "vae": model.vae.config}
    # What begins with an underscore says where and how a part was read, not what it computes.
    configs = {
        name: {key: value for key, value in config.items() if not key.startswith("_")}
        for name, config in configs.items()
    }
    total = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    for task, decoder in decoders.items():  # their order decides that of the channels
        total.update(f"{task} {decoder.config.to_json()}".encode())
    total.update(digest({**parts, **{f"decoder {task}": decoder for task, decoder in decoders.items()}}).encode())
    total.update(exporter().encode())
    return total.hexdigest()


@cache
def exporter() -> str:
    """Version of this package, with a digest of the code that decides what the graphs say."""
    root = Path(stages.__file__).parent
    # Of the kernels, those the graphs take over.
    forms = [Path(module.__file__) for module in (bilinear, depth_head, image_norm, upsample_concat)]
    rooms = (Path(__file__).parents[1], root / "models", root / "decoders")
    files = [*(path for room in rooms for path in sorted(room.rglob("*.py"))), *forms, Path(stages.__file__)]
    total = hashlib.sha256()
    for path in files:
        total.update(path.read_bytes())
    return f"{__version__}+{total.hexdigest()[:12]}"


# What the stages compute ----------------------------------------------------------------------------------------------
class Adding(NoCapture):
    """Adds up what the decoders' first layers make of features and maps: level sums [B, F, h, w] fp32."""

    def __init__(self, projection: Projection, ops: SimpleNamespace):
        super().__init__(ops)
        self.projection = projection
        self.sums: dict[int, Value] = {}

    def feature(self, slot: Slot | None, x: Value) -> None:
        if slot is None or not self.projection.widths[slot[0]]:
            return
        level, place = slot
        for half, weight in zip(x.chunk(2), self.projection.features[level][place]):
            self._add(level, nn.functional.conv2d(half, weight.transpose(0, 1).unsqueeze(2).unsqueeze(3)))

    def attend(self, slot: Slot, q: Value, k: Value, v: Value) -> Value:
        level, place = slot
        if not self.projection.widths[level]:
            return self.ops.attention(q, k, v)
        output, maps = self.ops.attention_maps(q, k, v)
        maps = maps.chunk(2)[1]
        weight = self.projection.maps[level][place].flatten(0, 1).transpose(0, 1)
        planes = weight @ maps.transpose(2, 3).flatten(1, 2)  # [B, F, S]
        side = int(planes.shape[2] ** 0.5)
        self._add(level, planes.unflatten(2, (side, side)))
        return output

    def _add(self, level: int, planes: Value) -> None:
        planes = planes.float()
        self.sums[level] = self.sums[level] + planes if level in self.sums else planes


class Averaging(NoCapture):
    """Adds up the attention probabilities of the conditional half, the means of the layers and heads of one side: those
    of self-attention, and those of the queries of cross-attention over a class prompt.
    """

    def __init__(self, model: Model, sides: tuple[int, int], class_keys: Mapping[Slot, Value], ops: SimpleNamespace):
        super().__init__(ops)
        self.counts = [side**2 for side in sides]
        self.class_keys = class_keys
        self.shares = [1 / len(level.heads) for level in model.levels]  # of a layer in the mean of its level
        self.sums: dict[str, Value] = {}

    def attend_self(self, slot: Slot, q: Value, k: Value, v: Value) -> Value:
        if q.shape[2] == self.counts[0]:
            self._add("cells", slot, _conditional(q), _conditional(k))
        return self.ops.attention(q, k, v)

    def attend(self, slot: Slot, q: Value, k: Value, v: Value) -> Value:
        if q.shape[2] == self.counts[1]:
            self._add("tokens", slot, _conditional(q), self.class_keys[slot])
        return self.ops.attention(q, k, v)

    def _add(self, name: str, slot: Slot, q: Value, k: Value) -> None:
        found = probabilities(q, k, q.shape[-1] ** -0.5).float().mean(1) * self.shares[slot[0]]
        self.sums[name] = self.sums[name] + found if name in self.sums else found


def _conditional(x: Value) -> Value:
    """The conditional half, which before the halves differ is all there is."""
    return x if x.shape[0] == BATCH else x.chunk(2)[1]


class KeepingOnce(RawCapture):
    """Keeps the maps that the attention itself uses."""

    def attend(self, slot: Slot, q: Value, k: Value, v: Value) -> Value:
        output, maps = self.ops.attention_maps(q, k, v)
        self.maps[slot] = maps.chunk(2)[1]
        return output


class StageExport:
    """One export: modules and data files are made once and shared by the stages that read them.

    UNet and autoencoder are stored in `precision`; text encoder, timesteps, level sums and decoders are fp32 in each.
    `raw_capture` adds the stage that hands out all features and maps, `averages` the one that averages the attention of
    these two sides. For the `runtime` onnxruntime attention is that
    library's own operator. `told` hears the name of each stage before it is written.
    """

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder],
        *,
        precision: str = "fp32",
        raw_capture: bool = False,
        averages: tuple[int, int] | None = None,
        only: Sequence[str] | None = None,
        runtime: str = "any",
        told: Callable[[str], None] = lambda stage: None,
    ):
        _check(decoders, precision, runtime)
        names = chosen_stages(decoders, raw_capture, averages, only)
        self.wish = ExportWish(names, precision, runtime, source_digest(model, decoders), model.size)
        self.model, self.decoders, self.told = model, decoders, told
        self.dtype, self.ops = TYPES[precision], OPERATIONS[runtime]
        side = model.size // FACTOR
        self.sizes = {"B": BATCH, "2B": BATCH * 2, "K": WORDS, "h": side, "w": side, "H": model.size, "W": model.size}
        self.sizes |= {"T": model.levels[0].tokens, "D": model.unet.config.cross_attention_dim}

    @cached_property
    def projection(self) -> Projection:
        return Projection(self.model.levels, self.decoders)

    def into(self, out: Path) -> Manifest:
        with alone(out):
            try:
                there = Manifest.read(out)
                found = ExportWish(tuple(there.stages), there.precision, there.runtime, there.source, there.size)
                if found == self.wish:
                    there.check_files(out)
                    return there
                earlier = tuple(there.files)
            except (Refused, Missing):
                check_replaceable(out)
                earlier = ()
            with staged(out, NAME, earlier) as folder:
                return self.write(folder)

    def write(self, folder: Path) -> Manifest:
        """The manifest, once every file is in the folder."""
        groups: dict[str, list[str]] = {}  # by the data file that stages share: all of the UNet's have one
        for name in self.wish.names:
            groups.setdefault("unet" if name.startswith("denoise") else name, []).append(name)
        found: dict[str, StageFile] = {}
        for group, members in groups.items():
            data = DataFile(f"{group}.data")
            parts = self._parts(group)
            for name in members:
                self.told(name)
                found[name] = self._stage(folder, name, data, parts)
            if data.size:
                with (folder / data.name).open("wb") as file:
                    file.writelines(data.chunks())
        for stage in found.values():
            onnx.checker.check_model(str(folder / stage.file))
        files = {}
        for path in sorted(folder.iterdir()):
            with path.open("rb") as file:
                files[path.name] = FileInfo(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
        manifest = self._manifest({name: found[name] for name in self.wish.names}, files)
        (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _manifest(self, found: Mapping[str, StageFile], files: Mapping[str, FileInfo]) -> Manifest:
        channels = {
            task: {level: (part.start, part.stop) for level, part in zip(LEVELS, parts) if part.stop > part.start}
            for task, parts in self.projection.tasks.items()
        }
        return Manifest(
            stages=found,
            files=files,
            precision=self.wish.precision,
            runtime=self.wish.runtime,
            opset=OPSETS[self.dtype],
            size=self.model.size,
            source=self.wish.source,
            model={"name": self.model.name, **self.model.digests},
            tasks={task: decoder.config.kind for task, decoder in self.decoders.items()},
            channels=channels,
            exporter=exporter(),
        )

    # Modules

    def _parts(self, group: str) -> dict[str, nn.Module]:
        """The modules a group of stages is traced from, by the prefix of their weights' names."""
        model = self.model
        if group == "unet":
            unet = deferred(model.unet)
            tables = {"times": TimeTable(unet), "texts": TextTable(unet)}
            return tables | {"unet": exportable(UNet(unet, self.ops)), "projection": self.projection}
        if group == "encode_text":
            return {"text_encoder": TextEncoder(deferred(model.text_encoder), self.ops)}
        if group == "decode_image":
            return {"image_decoder": exportable(ImageDecoder(deferred(model.vae), self.ops))}
        if group == "encode_image":
            return {"image_encoder": ImageEncoder(deferred(model.vae), self.ops)}
        return {"decoder": _shared_copy(self.decoders[label_of(group)], self.ops)}

    # Graphs

    def _stage(self, folder: Path, name: str, data: DataFile, parts: Mapping[str, nn.Module]) -> StageFile:
        graph, table = Graph(name, data, OPERATORS, OPSETS[self.dtype]), self._table(name)
        modules = {prefix: traced(module, graph, prefix) for prefix, module in parts.items()}
        inputs = {
            key: graph.input(key, self._shape(name, key, axes), getattr(torch, dtype))
            for key, (axes, dtype) in table.inputs.items()
        }
        outputs = self._outputs(name, modules, inputs)
        given = {key: axes for key, axes in table.outputs.items() if key in outputs or not key.startswith("sums_")}
        assert set(outputs) == set(given), f"{name} gives {sorted(outputs)}, its table {sorted(given)}"
        for key in given:
            graph.output(key, outputs[key])
        facts = {"stage": name, "source": self.wish.source, "precision": self.wish.precision}
        proto = graph.model({f"datasetdm_fast.{key}": value for key, value in facts.items()})
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString(deterministic=True))
        has_data = any(constant.external_data for constant in proto.graph.initializer)
        described = _told(table.inputs, graph.inputs), _told(given, graph.outputs)
        return StageFile(f"{name}.onnx", data.name if has_data else "", *described)

    def _table(self, name: str) -> Tensors:
        if name == RAW:
            return stages.keep(self.model.levels)
        if sides := averaged_sides(name):
            return stages.average(*sides)
        if name in stages.STAGES:
            return stages.STAGES[name]
        decoder = self.decoders[label_of(name)]
        config = decoder.config
        return stages.annotate(config.kind, list(decoder.projections()), bool(config.word_heads))

    def _shape(self, name: str, key: str, axes: stages.Shape) -> list[int | Extent]:
        sizes = dict(self.sizes)
        if key.startswith("sums_"):
            level = LEVELS.index(key.removeprefix("sums_"))
            part = self.projection.tasks[label_of(name)][level]
            side = self.model.levels[level].side
            sizes |= {"F": part.stop - part.start, "h": side, "w": side}
        return [sizes[axis] if isinstance(axis, str) else axis for axis in axes]

    def _outputs(self, name: str, modules: Mapping[str, nn.Module], inputs: Mapping[str, Value]) -> dict[str, Value]:
        if name.startswith("denoise"):
            return self._unet_outputs(name, modules, **inputs)
        if name == "encode_text":
            return {"context": modules["text_encoder"](inputs["tokens"])}
        if name == "decode_image":
            pixels = modules["image_decoder"](inputs["latents"].to(self.dtype)).float()
            image = ((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).floor().to(torch.uint8)
            return {"image": image, "is_finite": pixels.isfinite().flatten(1).all(1)}
        if name == "encode_image":
            pixels = inputs["image"].float().permute(0, 3, 1, 2) / 127.5 - 1
            return {"moments": modules["image_encoder"](pixels.to(self.dtype)).float()}
        return self._answers(modules["decoder"], inputs)

    def _unet_outputs(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        latents: Value,
        timestep: Value,
        context: Value,
        class_context: Value | None = None,
    ) -> dict[str, Value]:
        sides = averaged_sides(name)
        if name == RAW:
            hook = KeepingOnce(self.model.levels, self.ops)
        elif sides:
            keys = (key for key, _ in modules["texts"](class_context.to(self.dtype)))
            hook = Averaging(self.model, sides, dict(zip(modules["unet"].text_layers, keys)), self.ops)
        else:
            hook = NoCapture(self.ops) if name == "denoise" else Adding(self.projection, self.ops)
        biases, texts = modules["times"](timestep).to(self.dtype), modules["texts"](context.to(self.dtype))
        noise = modules["unet"](latents.to(self.dtype), biases, texts, hook).float()
        if name == RAW:
            capture = hook.result()
            raw = {
                f"{kind}_{level}_{place}": value
                for kind in ("features", "maps")
                for level, row in zip(LEVELS, getattr(capture, kind))
                for place, value in enumerate(row)
            }
            return {"noise": noise, **raw}
        if sides:
            return {"noise": noise, **hook.sums}
        sums = sorted(hook.sums.items()) if name != "denoise" else ()
        return {"noise": noise, **{f"sums_{LEVELS[level]}": total for level, total in sums}}

    def _answers(self, decoder: nn.Module, inputs: Mapping[str, Value]) -> dict[str, Value]:
        graph = next(iter(inputs.values())).graph
        empty = ((level.name, (BATCH, 0, level.side, level.side)) for level in self.model.levels)
        sums = {f"sums_{name}": Value(graph, "", shape, torch.float32) for name, shape in empty} | inputs
        return decoder(ProjectedCapture(tuple(sums[f"sums_{name}"] for name in LEVELS), {}), inputs.get("text"))


def _told(table: Mapping[str, tuple[stages.Shape, str]], values: Sequence[Value]) -> tuple[TensorInfo, ...]:
    rows = []
    for (name, (axes, dtype)), value in zip(table.items(), values, strict=True):
        shape = tuple(str(size) if isinstance(size, Extent) else size for size in value.shape)
        fixed = ((axis, size) for axis, size in zip(axes, shape) if isinstance(axis, int) or isinstance(size, str))
        is_as_told = len(axes) == len(shape) and getattr(torch, dtype) == value.dtype
        is_as_told &= all(axis == size for axis, size in fixed)
        assert is_as_told, f"{name} is {shape} {value.dtype}, its table says {axes} {dtype}"
        rows.append(TensorInfo(name, axes, shape, dtype))
    return tuple(rows)


def _shared_copy(decoder: Decoder, ops: SimpleNamespace) -> Decoder:
    """A copy whose structure may be changed, over the same weights."""
    tensors: Iterator[Tensor] = (tensor for kind in (decoder.parameters(), decoder.buffers()) for tensor in kind)
    copied = copy.deepcopy(decoder, {id(tensor): tensor for tensor in tensors})
    for module in copied.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    return copied
