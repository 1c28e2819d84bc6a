"""Every stage of a model and its decoders as ONNX graphs, beside a manifest that says what they are."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import nn

from datasetdm_fast import __version__, kernels, stages
from datasetdm_fast.data import ProjectedCapture, Text
from datasetdm_fast.disk import storage
from datasetdm_fast.engine import backbones, models
from datasetdm_fast.engine import decoders as decoder_package
from datasetdm_fast.engine.backbones import ANOTHER
from datasetdm_fast.engine.decoders.trunk import Decoder, SpectralConv2d, with_ops
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.models.capture import CaptureHook, ProjectingReader, Projection, RawReader, append_rows
from datasetdm_fast.engine.models.mmdit import MMDiT
from datasetdm_fast.engine.models.unet import TextTable, TimeTable, UNet
from datasetdm_fast.engine.models.vae import ImageDecoder, ImageEncoder, has_usual_form
from datasetdm_fast.errors import Missing, Refused, check_choice
from datasetdm_fast.export.manifest import (
    NAME,
    PRECISIONS,
    FileInfo,
    Manifest,
    StageFile,
    TensorInfo,
    check_replaceable,
)
from datasetdm_fast.export.onnx.capture import AveragingHook, ExportHook, ProjectingHook, RawHook, raw_outputs
from datasetdm_fast.export.onnx.graph import BATCH, OPSETS, WORDS, DataFile, Extent, Graph, Value, digest, trace_module
from datasetdm_fast.export.onnx.operations import ONNX_RUNTIME, PORTABLE, exportable
from datasetdm_fast.export.onnx.operators import OPERATORS
from datasetdm_fast.export.onnx.stage_names import OTHERS, RAW, TEXT, averaged_sides, label_of, select_stages
from datasetdm_fast.export.staging import fill_alone, stage_files
from datasetdm_fast.plugins import load_place
from datasetdm_fast.stages import LEVELS, Tensors

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPERATIONS = {"any": PORTABLE, "onnxruntime": ONNX_RUNTIME}


def export(model: Model, decoders: Mapping[str, Decoder], out: Path | str, **options: Any) -> Manifest:
    """The manifest of folder `out`, which then holds every stage, or those of `only`; equal input, equal bytes.

    The options are those of `StageExport`. A folder that holds this very export already is left as it is; of several
    processes that export into it at once one does the work.
    """
    with model.built_for_now():
        return StageExport(model, decoders, **options).write_into(Path(out))


def export_cached(model: Model, decoders: Mapping[str, Decoder], **options: Any) -> tuple[Path, Manifest]:
    """The folder of the cache that holds an export, and its manifest; the folder is named by all that decides its
    files.
    """
    with model.built_for_now():
        exported = StageExport(model, decoders, **options)
        folder = storage.cache_folder() / "onnx" / hashlib.sha256(repr(exported.request).encode()).hexdigest()[:32]
        return folder, exported.write_into(folder)


@dataclass(frozen=True)
class ExportRequest:
    """What decides the files of an export."""

    names: tuple[str, ...]
    precision: str
    runtime: str
    source: str
    size: int


def usual_rows(model: Model) -> int:
    """Rows of text for each image of a call, at the model's own guidance."""
    return 2 if model.has_negative(model.scale or model.defaults.guidance) else 1


def graphed_parts(model: Model) -> tuple[str, ...]:
    """The stages of text encoders and autoencoder that are graphs; what is missing PyTorch runs."""
    if not model.backbone.network_plan:
        return OTHERS
    return tuple(name for name in OTHERS if name not in TEXT) if has_usual_form(model.configs.get("vae")) else ()


def _check(model: Model, decoders: Mapping[str, Decoder], precision: str, runtime: str) -> None:
    if not model.backbone.served_by("export"):
        raise Refused(f"export: {model.backbone.title} has no network that is written as graphs", ANOTHER)
    check_choice("precision", precision, PRECISIONS)
    check_choice("runtime", runtime, OPERATIONS)
    if precision == "fp16" and precision not in model.backbone.halves:
        remedy = "Use bf16 or fp32." if runtime == "any" else "Use fp32."  # ONNX Runtime has no convolutions in bf16
        raise Refused(f"precision: activations of {model.backbone.title} leave fp16's range", remedy)
    for task, decoder in decoders.items():
        if any(isinstance(module, SpectralConv2d) for module in decoder.modules()):
            raise Refused(
                f"{task} decoder: its spectral norms change with every image, which a graph cannot express",
                "Load it without strict=True.",
            )


def source_digest(model: Model, decoders: Mapping[str, Decoder], rows: int = 0) -> str:
    """SHA-256 of all that decides the graphs: parameters, configurations and this package's own code."""
    backbone = model.backbone
    joint = [backbone.denoiser, *(["vae"] if graphed_parts(model) else [])]
    parts = {name: model.networks[name] for name in sorted(joint if backbone.network_plan else model.networks)}
    configs = {
        name: part.config.to_dict() if hasattr(part.config, "to_dict") else part.config for name, part in parts.items()
    }
    # What begins with an underscore says where and how a part was read, not what it computes.
    configs = {
        name: {key: value for key, value in config.items() if not key.startswith("_")}
        for name, config in configs.items()
    }
    total = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    total.update(f"{rows or usual_rows(model)} rows, {model.levels}".encode())
    for task, decoder in decoders.items():  # their order decides that of the channels
        total.update(f"{task} {decoder.config.to_json()}".encode())
    total.update(digest((name, part.read().state_dict()) for name, part in parts.items()).encode())
    total.update(digest((task, decoder.state_dict()) for task, decoder in decoders.items()).encode())
    total.update(exporter().encode())
    return total.hexdigest()


def exporter_files() -> list[Path]:
    """The code that decides what the graphs compute; of the kernels, those the graphs take over."""
    taken = "ada_norm attention_shares attention_sums depth_head geglu image_norm joint_qkv upsample_concat".split()
    modules = [Path(str(module.__file__)) for module in (*map(kernels.OPS.get, taken), stages)]
    packages = backbones, models, decoder_package
    folders = [Path(__file__).parents[1], *(Path(package.__path__[0]) for package in packages)]
    return [*(path for folder in folders for path in sorted(folder.rglob("*.py"))), *modules]


@cache
def exporter() -> str:
    """Version of this package, with a digest of the code that decides what the graphs compute."""
    total = hashlib.sha256()
    for path in exporter_files():
        total.update(path.read_bytes())
    return f"{__version__}+{total.hexdigest()[:12]}"


class StageExport:
    """One export: modules and data files are made once and shared by the stages that read them.

    UNet and autoencoder are stored in `precision`; text encoder, timesteps, level sums and decoders are fp32 in each.
    `raw_capture` adds the stage that hands out all features and maps, `averages` the one that averages the attention of
    these two sides. For the `runtime` onnxruntime attention is that library's own operator. Calls have `rows` of text
    for each image, by default those of the model's own guidance. `on_stage` is called with the name of each stage
    before it is written.
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
        rows: int = 0,
        on_stage: Callable[[str], None] = lambda stage: None,
    ):
        _check(model, decoders, precision, runtime)
        self.is_joint, self.rows = bool(model.backbone.network_plan), rows or usual_rows(model)
        names = select_stages(decoders, raw_capture, averages, only, graphed_parts(model))
        self.request = ExportRequest(names, precision, runtime, source_digest(model, decoders, rows), model.size)
        self.model, self.decoders, self.on_stage = model, decoders, on_stage
        self.dtype, self.ops = TYPES[precision], OPERATIONS[runtime]
        is_wide = self.dtype == torch.float16 and model.latents.leaves_fp16
        self.image_dtype = torch.float32 if is_wide else self.dtype
        channels, side, _ = model.latent_shape()
        self.sizes: dict[str, int | Extent] = {
            "B": BATCH,
            "2B": BATCH * self.rows,
            "K": WORDS,
            "C": channels,
            "h": side,
            "w": side,
            "H": model.size,
            "W": model.size,
        }
        self.sizes |= {"T": model.levels[0].tokens, "D": model.text_width}

    @cached_property
    def _reference(self) -> Any:
        return load_place(self.model.backbone.reference)(self.model)

    @cached_property
    def projection(self) -> Projection:
        return Projection(self.model.levels, self.decoders)

    def write_into(self, out: Path) -> Manifest:
        """The manifest of the folder, which is left as it is where it holds this very export already."""
        with fill_alone(out):
            try:
                manifest = Manifest.read(out)
                if self.request == ExportRequest(
                    tuple(manifest.stages), manifest.precision, manifest.runtime, manifest.source, manifest.size
                ):
                    manifest.check_files(out)
                    return manifest
                earlier = (*manifest.files, *(f"{Path(stage.file).stem}.plan" for stage in manifest.stages.values()))
            except (Refused, Missing):
                check_replaceable(out)
                earlier = ()
            with stage_files(out, NAME, earlier) as folder:
                return self.write(folder)

    def write(self, folder: Path) -> Manifest:
        """The manifest, once every file is in the folder."""
        groups: dict[str, list[str]] = {}  # by the data file that stages share: all of the UNet's have one
        for name in self.request.names:
            groups.setdefault(self.model.backbone.denoiser if name.startswith("denoise") else name, []).append(name)
        by_name: dict[str, StageFile] = {}
        for group, members in groups.items():
            data = DataFile(f"{group}.data")
            parts = self._parts(group)
            for name in members:
                self.on_stage(name)
                by_name[name] = self._write_stage(folder, name, data, parts)
            if data.size:
                with (folder / data.name).open("wb") as file:
                    file.writelines(data.chunks())
        for stage in by_name.values():
            onnx.checker.check_model(str(folder / stage.file))
        paths = sorted(folder.iterdir())
        files = {path.name: FileInfo(storage.sha256_of(path), path.stat().st_size) for path in paths}
        manifest = self._manifest({name: by_name[name] for name in self.request.names}, files)
        (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _manifest(self, by_name: Mapping[str, StageFile], files: Mapping[str, FileInfo]) -> Manifest:
        channels = {
            task: {level: (part.start, part.stop) for level, part in zip(LEVELS, parts) if part.stop > part.start}
            for task, parts in self.projection.tasks.items()
        }
        return Manifest(
            stages=by_name,
            files=files,
            precision=self.request.precision,
            runtime=self.request.runtime,
            opset=OPSETS[self.dtype],
            size=self.model.size,
            source=self.request.source,
            model={"name": self.model.name, **self.model.digests},
            tasks={task: decoder.config.kind for task, decoder in self.decoders.items()},
            channels=channels,
            exporter=exporter(),
        )

    def _parts(self, group: str) -> dict[str, nn.Module]:
        """The modules a group of stages is traced from, by the prefix of their weights' names."""
        networks, backbone = self.model.networks, self.model.backbone
        if group == backbone.denoiser and self.is_joint:
            source = networks[group].read()
            plan = load_place(backbone.network_plan)(source.config, source.state_dict())
            network = MMDiT(source.config, plan, self.ops)
            append_rows(network, self.projection)
            return {"network": network, "projection": self.projection}
        if group == backbone.denoiser:
            unet = networks[group].read()
            tables = {"times": TimeTable(unet, self.model.size), "texts": TextTable(unet)}
            return tables | {"unet": exportable(UNet(unet, self.ops)), "projection": self.projection}
        if group == "encode_text":
            sources = {name: networks[name].read() for name in backbone.of_kind("text_encoder")}
            assert backbone.text_network
            return {"text_encoder": load_place(backbone.text_network)(sources, self.ops)}
        if group == "decode_image":
            space = None if self.is_joint else self.model.latents
            decoder = ImageDecoder(networks["vae"].read(), self.ops, space)
            return {"image_decoder": exportable(decoder)}
        if group == "encode_image":
            return {"image_encoder": ImageEncoder(networks["vae"].read(), self.ops)}
        return {"decoder": with_ops(self.decoders[label_of(group)], self.ops)}

    def _write_stage(self, folder: Path, name: str, data: DataFile, parts: Mapping[str, nn.Module]) -> StageFile:
        graph = Graph(name, data, OPERATORS, OPSETS[self.dtype])
        modules = {prefix: trace_module(module, graph, prefix) for prefix, module in parts.items()}
        table = self._table(name, modules)
        inputs = {
            key: graph.input(key, self._shape(name, key, axes), getattr(torch, dtype))
            for key, (axes, dtype) in table.inputs.items()
        }
        outputs = self._outputs(name, modules, inputs)
        expected = {key: axes for key, axes in table.outputs.items() if key in outputs or not key.startswith("sums_")}
        assert set(outputs) == set(expected), f"{name} gives {sorted(outputs)}, its table {sorted(expected)}"
        for key in expected:
            graph.output(key, outputs[key])
        facts = {"stage": name, "source": self.request.source, "precision": self.request.precision}
        proto = graph.model({f"datasetdm_fast.{key}": value for key, value in facts.items()})
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString(deterministic=True))
        has_data = any(constant.external_data for constant in proto.graph.initializer)
        infos = _describe(table.inputs, graph.inputs), _describe(expected, graph.outputs)
        return StageFile(f"{name}.onnx", data.name if has_data else "", *infos)

    def _table(self, name: str, modules: Mapping[str, nn.Module]) -> Tensors:
        if name.startswith("denoise"):
            sides = averaged_sides(name)
            usual = stages.average(*sides) if sides else stages.STAGES.get(name)
            table = stages.keep(self.model.levels) if usual is None else usual
            read = modules["network"].conditioning.reads if self.is_joint else modules["times"].reads
            self.sizes["P"] = read.get("pooled", 0)
            names = [*read, *(["mask"] if self.model.backbone.pads_text else [])]
            return stages.of_rows(self.rows, table, names)
        if name == "encode_text" and len(modules["text_encoder"].tokenizers) > 1:
            return stages.PAIRED_TEXT
        if name in stages.STAGES:
            return stages.STAGES[name]
        decoder = self.decoders[label_of(name)]
        config = decoder.config
        return stages.annotate(config.kind, list(decoder.projections()), bool(config.word_heads))

    def _shape(self, name: str, key: str, axes: stages.Shape) -> list[int | Extent]:
        sizes: dict[str, int | Extent] = dict(self.sizes)
        if key.startswith("sums_"):
            level = LEVELS.index(key.removeprefix("sums_"))
            part = self.projection.tasks[label_of(name)][level]
            side = self.model.levels[level].side
            sizes |= {"F": part.stop - part.start, "h": side, "w": side}
        return [sizes[axis] if isinstance(axis, str) else axis for axis in axes]

    def _outputs(self, name: str, modules: Mapping[str, nn.Module], inputs: Mapping[str, Value]) -> dict[str, Value]:
        if name.startswith("denoise"):
            return (self._joint_outputs if self.is_joint else self._unet_outputs)(name, modules, **inputs)
        if name == "encode_text":
            text = modules["text_encoder"].of_tokens(*inputs.values())
            outputs = {"context": text.context}
            if text.pooled is not None:
                outputs["pooled"] = text.pooled
            return outputs
        if name == "decode_image":
            latents: Any = inputs["latents"]
            numbers = self._reference.unscale(latents) if self.is_joint else latents
            pixels = modules["image_decoder"](numbers.to(self.image_dtype)).float()
            image = ((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).floor().to(torch.uint8)
            return {"image": image, "is_finite": pixels.isfinite().flatten(1).all(1)}
        if name == "encode_image":
            pixels = inputs["image"].float().permute(0, 3, 1, 2) / 127.5 - 1
            return {"moments": modules["image_encoder"](pixels.to(self.image_dtype)).float()}
        return self._decoder_outputs(modules["decoder"], inputs)

    def _unet_outputs(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        latents: Value,
        timestep: Value,
        context: Value,
        class_context: Value | None = None,
        pooled: Value | None = None,
        guidance: Value | None = None,
    ) -> dict[str, Value]:
        hook: CaptureHook
        if name == RAW:
            hook = RawHook(self.model.levels, self.ops, self.rows)
        elif class_context is not None:
            keys = (key for key, _ in modules["texts"](class_context.to(self.dtype)))
            layers = modules["unet"].text_layers
            sides, keys_of = averaged_sides(name), dict(zip(layers, keys))
            hook = AveragingHook(self.model.levels, sides, keys_of, self.ops, self.rows)
        elif name == "denoise":
            hook = CaptureHook(self.ops)
        else:
            hook = ProjectingHook(self.projection, self.ops, self.rows)
        biases = modules["times"](timestep, pooled, guidance).to(self.dtype)
        texts = modules["texts"](context.to(self.dtype))
        noise = modules["unet"](latents.to(self.dtype), biases, texts, hook).float()
        return {"noise": noise, **(hook.outputs() if isinstance(hook, ExportHook) else {})}

    def _joint_outputs(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        latents: Value,
        timestep: Value,
        context: Value,
        pooled: Value | None = None,
        mask: Value | None = None,
        guidance: Value | None = None,
    ) -> dict[str, Value]:
        network, levels = modules["network"], self.model.levels
        seen = cast(int, BATCH), levels[0].side ** 2
        reader: Any = None
        if name == RAW:
            reader = RawReader(levels, *seen)
        elif name != "denoise":
            reader = ProjectingReader(self.projection, *seen, self.ops)
        text: Any = Text(context.to(self.dtype), pooled, mask, cast(Any, guidance))
        noise = network(latents.to(self.dtype), timestep, text, reader).float()
        if reader is None:
            return {"noise": noise}
        clean = self._reference.cells(latents - timestep / 1000 * noise[-latents.shape[0] :])
        if name == RAW:
            return {"noise": noise, **raw_outputs(reader.capture(clean))}
        sums = reader.level_sums(clean).items()
        return {"noise": noise, **{f"sums_{LEVELS[level]}": total.float() for level, total in sums}}

    def _decoder_outputs(self, decoder: nn.Module, inputs: Mapping[str, Value]) -> dict[str, Value]:
        graph = next(iter(inputs.values())).graph
        empty = ((level.name, (BATCH, 0, level.side, level.side)) for level in self.model.levels)
        unread = {f"sums_{name}": Value(graph, "", shape, torch.float32) for name, shape in empty}
        sums = {**unread, **inputs}
        return decoder(ProjectedCapture(tuple(sums[f"sums_{name}"] for name in LEVELS), {}), inputs.get("text"))


def _describe(table: Mapping[str, tuple[stages.Shape, str]], values: Sequence[Value]) -> tuple[TensorInfo, ...]:
    rows = []
    for (name, (axes, dtype)), value in zip(table.items(), values, strict=True):
        shape = tuple(str(size) if isinstance(size, Extent) else size for size in value.shape)
        fixed = ((axis, size) for axis, size in zip(axes, shape) if isinstance(axis, int) or isinstance(size, str))
        is_as_listed = len(axes) == len(shape) and getattr(torch, dtype) == value.dtype
        is_as_listed &= all(axis == size for axis, size in fixed)
        assert is_as_listed, f"{name} is {shape} {value.dtype}, its table says {axes} {dtype}"
        rows.append(TensorInfo(name, axes, shape, dtype))
    return tuple(rows)
