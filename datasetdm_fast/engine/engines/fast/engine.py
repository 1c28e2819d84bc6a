"""What the fast engine of a CPU and that of a GPU have in common: networks, texts, timesteps and captures."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.config import CACHED
from datasetdm_fast.data import AnyCapture, AttentionSums, Capture, ProjectedCapture, Text
from datasetdm_fast.engine.backbones.latent_space import sample_posterior, scale
from datasetdm_fast.engine.decoders.trunk import Decoder, with_ops
from datasetdm_fast.engine.engines import Engine, check_task
from datasetdm_fast.engine.engines.device import engine_call, resolve_device, slow_in_fp16
from datasetdm_fast.engine.loading.model import Model, WeightSource
from datasetdm_fast.engine.models.capture import (
    AttentionSlot,
    CaptureHook,
    KeptFeature,
    ProjectedSums,
    Projection,
    RawCapture,
    SummedAttention,
)
from datasetdm_fast.engine.models.packed import largest_distance, place_module, weights_of
from datasetdm_fast.engine.models.unet import TextTable, TimeTable
from datasetdm_fast.engine.models.vae import ImageEncoder
from datasetdm_fast.errors import Refused, check_choice
from datasetdm_fast.kernels import plain
from datasetdm_fast.kernels.choice import operations
from datasetdm_fast.kernels.transfer import to_device
from datasetdm_fast.plugins import load_place

KINDS = {  # of device -> its engine
    "cpu": "datasetdm_fast.engine.engines.fast.on_cpu:CpuEngine",
    "cuda": "datasetdm_fast.engine.engines.fast.on_gpu:GpuEngine",
}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHUNK_PIXELS = {  # of the images per call of the autoencoder; its full-size activations dwarf the UNet's
    "cpu": 256 * 256,
    "cuda": 8 * 512 * 512,
}
NETWORKS = ("times", "texts", "unet", "projection")  # of every call
LAZY_NETWORKS = ("text_encoder", "image_decoder", "image_encoder")  # read when they are first called
CACHED_TIMESTEPS = 2048  # whose biases are cached
WIDEST_SLICE = 8  # images per core of a CPU: more would leave its caches

Inputs = tuple[Tensor, ...]
Step = Callable[..., tuple[Tensor, ...]]  # one call of the UNet: noise [R, C, h, w], and what it captures


def resolve_precision(name: str, device: torch.device) -> str:
    """The precision of the UNet and the autoencoder: as requested, or fp32 on a CPU and fp16 on a GPU."""
    if name == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    check_choice("dtype", name, ("auto", *DTYPES))
    if name == "fp16" and device.type == "cpu":
        raise slow_in_fp16("dtype")
    if name == "tf32" and device.type == "cpu":
        raise Refused("dtype: a CPU has no TF32", "Use --dtype bf16 or --dtype fp32.")
    return name


class FastEngine(Engine):
    """See engine.Engine; an instance is the CpuEngine or the GpuEngine of its device. The weights of `model` are read
    when they are first needed and left as they are; where no module holds them, they are not held twice.

    Text encoder, timestep table and level sums are stored in fp32 in every precision: they cost little, and labels hang
    on them. The UNet and the autoencoder are stored as `dtype`, but in fp32 an autoencoder that leaves the range of
    fp16, and a small UNet on a CPU, where its products alone are in bf16; on a GPU the decoders are stored as fp16
    where `dtype` is narrow. Norms and softmax add up in fp32 inside their operations. On a GPU fp32 is exact; in any
    other precision convolutions of fp32 round their factors to TF32.
    """

    name, speeds = "fast", (CACHED,)
    _seen: tuple[int, ...] | None = None  # versions of the weights that were read, as a plan needs none
    # What is made of the weights when they are read, see `_refresh`.
    times: nn.Module
    texts: nn.Module
    unet: nn.Module
    projection: nn.Module
    label_dtype: torch.dtype
    _stored_decoders: Mapping[str, nn.Module]
    _compiled: Step | None
    _rows: dict[float, Tensor]
    _text: tuple[Tensor, int, int] | None = None
    _keys_values: list[Inputs]  # of every slice of the batch, of the text of the previous call
    # class prompts, cells, keys [B, heads, T, d] of every cross-attention with so many, by layer
    _class_keys: tuple[Tensor, int, dict[AttentionSlot, Tensor]] | None
    largest_stacked = math.inf  # weights of all decoders' first layers; more are stacked for each captured call

    def __new__(
        cls, model: Model, decoders: Mapping[str, Decoder] | None = None, *, device: str = "auto", **choices: Any
    ) -> FastEngine:
        kind = load_place(KINDS[resolve_device(device).type]) if cls is FastEngine else cls
        return object.__new__(kind)

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        ops: SimpleNamespace | None = None,
        compile: bool = False,
    ):
        self.model, self.device = model, resolve_device(device)
        self.precision = resolve_precision(dtype, self.device)
        self.dtype = DTYPES[self.precision]
        is_wide = model.latents.leaves_fp16 and self.dtype == torch.float16
        self.image_dtype = torch.float32 if is_wide else self.dtype  # of the autoencoder
        self._has_usual_ops = ops is None  # others are called one by one
        self.is_compiled = compile
        # Settings that had to be changed, for the rows of the samples made since.
        self.adjustments: dict[str, int] = {}
        # A compiler fuses the plain forms itself.
        self.ops = ops or (plain if compile else self._operations(self.dtype))
        self.unet_dtype, self.kinds = self._forms()
        decoder_ops = self._operations(torch.float32)
        self.decoders = {
            task: with_ops(decoder, decoder_ops).to(self.device) for task, decoder in (decoders or {}).items()
        }
        # Listed once, as finding them takes longer than to ask each.
        weights = (weight for decoder in self.decoders.values() for weight in decoder.parameters())
        self._decoder_weights = [weight for weight in weights if not weight.is_inference()]

    @functools.cached_property
    def text_encoder(self) -> nn.Module:
        return self._load_lazily("text_encoder")

    @functools.cached_property
    def image_decoder(self) -> nn.Module:
        return self._load_lazily("image_decoder")

    @functools.cached_property
    def image_encoder(self) -> nn.Module:
        return self._load_lazily("image_encoder")

    def _operations(self, dtype: torch.dtype) -> SimpleNamespace:
        return operations(self.device, dtype)

    def _forms(self) -> tuple[torch.dtype, tuple[type[nn.Module], type[nn.Module]]]:
        """What the UNet stores between its products, and the classes of the UNet and the image decoder."""
        raise NotImplementedError

    def _sources(self, *names: str) -> dict[str, WeightSource]:
        """The weights of these networks of the model, by default of all."""
        raise NotImplementedError

    def _ready(self) -> None:
        """Brings networks and decoders into the forms that are called: `_stored_decoders` in `label_dtype`, too."""
        raise NotImplementedError

    def _unload_except(self, *needed: str) -> None:
        """Unloads large networks that are not needed now, where memory is short; here all networks stay loaded."""

    def _parts(self, step: Step, slices: Callable[[int], list[Inputs]], batch: int) -> list[tuple[Tensor, ...]]:
        """The outputs of `step` for the slices of a batch; `slices(size)` are its inputs for `size` images each."""
        raise NotImplementedError

    def _images(self, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Images of latents on the device, and whether each is finite, part by part."""
        raise NotImplementedError

    def _run_decoder(self, task: str, capture: AnyCapture, text: Tensor | None) -> dict[str, Tensor]:
        """A decoder's raw outputs."""
        raise NotImplementedError

    def _read_weights(self, versions: tuple[int, ...]) -> None:
        sources = self._sources("unet")
        for name in NETWORKS:
            setattr(self, name, self._build_network(name, sources))
        del sources
        for name in (*LAZY_NETWORKS, "_wide_image_decoder"):
            self.__dict__.pop(name, None)
        self._seen = versions
        self._ready()
        self._compiled = torch.compile(self._plain, dynamic=False) if self.is_compiled else None
        self._rows, self._text, self._keys_values, self._class_keys = {}, None, [], None

    def _build_network(self, name: str, sources: Mapping[str, WeightSource]) -> nn.Module:
        """One of the networks, from the weights of the model."""
        match name:
            case "times":
                module, dtype = TimeTable(sources["unet"], self.model.size), torch.float32
            case "texts":
                module, dtype = TextTable(sources["unet"]), self.unet_dtype
            case "unet":
                module, dtype = self.kinds[0](sources["unet"], self.ops), self.unet_dtype
            case "projection":
                module = Projection(self.model.levels, self.decoders, largest_held=self.largest_stacked)
                dtype = self.unet_dtype
            case "text_encoder":
                assert self.model.backbone.text_network
                module, dtype = load_place(self.model.backbone.text_network)(sources, self.ops), torch.float32
            case "image_decoder":
                module, dtype = self.kinds[1](sources["vae"], self.ops, self.model.latents), self.image_dtype
            case _:
                module, dtype = ImageEncoder(sources["vae"], self.ops), self.image_dtype
        return place_module(module, self.device, dtype)

    def _load_lazily(self, name: str) -> nn.Module:
        """One of LAZY_NETWORKS."""
        self._refresh()
        sources = self.model.backbone.of_kind("text_encoder") if name == "text_encoder" else ("vae",)
        return self._build_network(name, self._sources(*sources))

    def weight_distance(self) -> float:
        """How far a weight lies from that of the model, as a share of the largest number in its tensor."""
        if self._seen is None:
            self._refresh()
        farthest, sources = 0.0, self._sources()
        encoder = ("image_encoder",) if "image_encoder" in self.__dict__ else ()  # few need it
        for name in (*NETWORKS, "text_encoder", "image_decoder", *encoder):
            held, truth = weights_of(getattr(self, name)), weights_of(self._build_network(name, sources))
            farthest = max(farthest, largest_distance(held, truth))
        for task, decoder in self._stored_decoders.items() if self.label_dtype == torch.float32 else ():
            farthest = max(farthest, largest_distance(weights_of(decoder), self.decoders[task].state_dict()))
        return farthest

    def _refresh(self, context: Tensor | None = None) -> None:
        """Reads weights that were changed; for a call with the text of the previous one they are taken as they are."""
        if context is not None and self._is_cached(context):
            return
        # Counters that advance when a weight is changed in place.
        decoders = sum(parameter._version for parameter in self._decoder_weights)
        versions = *(network.changes for network in self.model.networks.values()), decoders
        if versions != self._seen:
            try:
                with torch.inference_mode(False):
                    self._read_weights(versions)
            except BaseException:  # such as an interrupt: what was read is not ready
                self._seen = None
                raise

    def prepare(self, batch: int) -> None:
        self._refresh()

    @engine_call
    def encode_text(self, prompts: Sequence[str]) -> Text:
        self._refresh()
        self._unload_except("text_encoder")
        return self.text_encoder(self.model, prompts)

    @engine_call
    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        self._refresh(text.context)
        return self._call(self._compiled or self._plain, latents, timestep, text)[0]

    @engine_call
    def denoise_and_capture(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, AnyCapture]:
        """The noise and what the decoders make of the activations; without decoders the activations themselves."""
        if not self.decoders:
            return self.denoise_and_capture_raw(latents, timestep, text)
        noise, *sums = self._call(self._capture_projected, latents, timestep, text)
        return noise, ProjectedCapture(tuple(sums), self.projection.tasks)

    @engine_call
    def denoise_and_capture_raw(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        """The noise and every captured feature and map as the reference engine gives them."""
        self._refresh()
        hook = RawCapture(self.model.levels, self.ops, len(text) // len(latents))
        noise = self._run(hook, *self._inputs(latents, timestep, text))
        return noise, hook.result()

    @engine_call
    def denoise_and_keep(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Tensor]:
        """The noise of a U-Net, and the deep feature that later calls may start from, [B, R / B * C, h, w]."""
        noise, deep = self._call(self._keep_deep, latents, timestep, text)
        return noise, deep

    @engine_call
    def denoise_from(self, deep: Tensor, latents: Tensor, timestep: float, text: Text) -> Tensor:
        """The noise where the deep feature is that of an earlier call."""
        return self._call(self._start_deep, latents, timestep, text, (deep,))[0]

    @engine_call
    def denoise_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        self._refresh(text.context)
        context, cells = class_text.context, sums.tokens.shape[1]
        if self._class_keys is None or self._class_keys[0] is not context or self._class_keys[1] != cells:
            tables = zip(self.unet.text_layers, self.texts(context.to(self.device, self.unet_dtype)))
            keys = {slot: keys for slot, (keys, _) in tables if self.model.levels[slot.level].side ** 2 == cells}
            self._class_keys = (context, cells, keys)
        others = (sums.cells, sums.tokens, *self._class_keys[2].values())
        noise, cells, tokens = self._call(self._capture_average, latents, timestep, text, others)
        return noise, AttentionSums(cells, tokens)

    def _call(
        self, step: Step, latents: Tensor, timestep: float, text: Text, others: Inputs = ()
    ) -> tuple[Tensor, ...]:
        """The noise [R, C, h, w], and whatever [B, ...] `step` returns besides, from the UNet's inputs: latents, the
        timestep's biases, `others` with a row for every image, and the keys and values of every text layer.
        """
        self._refresh(text.context)
        biases, images = self._biases(timestep, text), len(latents)
        latents = channels_last(latents.to(self.device), self.unet_dtype)

        def slices(size: int) -> list[Inputs]:
            context, starts = text.context, range(0, images, size)
            if self._text is None or not self._is_cached(context) or self._text[2] != size:
                tables = self._encode_keys_values(context.to(self.device), images)
                self._keys_values = [
                    tuple(_select_rows(table, 1, images, start, size) for table in tables) for start in starts
                ]
                self._text = None if context.is_inference() else (context, context._version, size)
            parts = zip(*(value.split(size) for value in (latents, *others)))
            rows = (biases if biases.ndim == 1 else _select_rows(biases, 0, images, start, size) for start in starts)
            return [(part, row, *more, *table) for (part, *more), row, table in zip(parts, rows, self._keys_values)]

        self._unload_except()
        noise, *captured = zip(*self._parts(step, slices, images))
        halves = zip(*(part.chunk(len(text) // images) for part in noise))
        return torch.cat([part for half in halves for part in half]), *(torch.cat(value) for value in captured)

    def _inputs(self, latents: Tensor, timestep: float, text: Text) -> Inputs:
        """What the U-Net reads of a call that is not sliced."""
        keys_values = self._encode_keys_values(text.context.to(self.device), len(latents))
        return channels_last(latents.to(self.device), self.unet_dtype), self._biases(timestep, text), *keys_values

    def _biases(self, timestep: float, text: Text) -> Tensor:
        """What the timestep adds in every resnet, to all rows or with a pooled text to each its own."""
        timestep = float(timestep)
        if text.pooled is None and timestep in self._rows:
            return self._rows[timestep]
        time = torch.full((), timestep, device=self.device)
        if text.pooled is not None:
            return self.times(time, text.pooled.to(self.device), text.guidance).to(self.unet_dtype)
        if len(self._rows) >= CACHED_TIMESTEPS:
            self._rows.clear()
        row = self._rows[timestep] = self.times(time).to(self.unet_dtype)
        return row

    def _is_cached(self, context: Tensor) -> bool:
        """Whether it is the text of the previous call, unchanged; inference tensors count no changes."""
        known = None if context.is_inference() else self._text
        return known is not None and known[0] is context and known[1] == context._version

    def _encode_keys_values(self, context: Tensor, images: int) -> tuple[Tensor, ...]:
        """Keys and values of every layer, for the rows of text of so many images."""
        return self.texts(context.to(self.unet_dtype))

    def _run(self, hook: CaptureHook, latents: Tensor, row: Tensor, *keys_values: Tensor) -> Tensor:
        return self.unet(latents, row, keys_values, hook).float().contiguous()

    def _plain(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self._run(CaptureHook(self.ops), *inputs),)

    def _keep_deep(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        hook = KeptFeature(self.unet.deep, self.ops)
        noise = self._run(hook, *inputs)
        assert hook.value is not None
        return noise, torch.cat(hook.value.chunk(len(noise) // len(inputs[0])), 1)

    def _start_deep(self, latents: Tensor, row: Tensor, deep: Tensor, *keys_values: Tensor) -> tuple[Tensor, ...]:
        rows = torch.cat(deep.chunk(keys_values[0].shape[1] // len(latents), 1))
        rows = rows.contiguous(memory_format=torch.channels_last)
        noise = self.unet.forward_from(latents, row, keys_values, rows, CaptureHook(self.ops))
        return (noise.float().contiguous(),)

    def _capture_projected(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        hook = ProjectedSums(self.projection, inputs[0], self.ops)
        return self._run(hook, *inputs), *hook.result()

    def _capture_average(
        self, latents: Tensor, row: Tensor, cells: Tensor, tokens: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        assert self._class_keys
        slots = list(self._class_keys[2])
        keys, keys_values = others[: len(slots)], others[len(slots) :]
        sums = AttentionSums(cells, tokens)
        sides = [self.model.levels[slot.level].side for slot in self.unet.text_layers]
        hook = SummedAttention(sides, sums, dict(zip(slots, keys)), self.ops)
        noise = self._run(hook, latents, row, *keys_values)
        return noise, hook.cells, hook.tokens

    @engine_call
    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        self._refresh()
        return tuple(torch.cat(part) for part in zip(*self._images(latents.to(self.device))))

    def _decode_part(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        images, is_finite = self._pixels(channels_last(latents, self.image_dtype))
        # Some autoencoders leave the range of fp16.
        if self.image_dtype != torch.float16 or bool(is_finite.all()):
            return images, is_finite
        return as_images(self._wide_image_decoder(channels_last(latents, torch.float32)))

    def _pixels(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return as_images(self.image_decoder(latents))

    @functools.cached_property
    def _wide_image_decoder(self) -> nn.Module:
        source = self.model.networks["vae"].read()
        return place_module(self.kinds[1](source, self.ops, self.model.latents), self.device, torch.float32)

    @engine_call
    def encode_image(
        self, images: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:  # [B, C, h, w]
        self._refresh()
        self._unload_except("image_encoder")
        raw = encode_in_chunks(self._encode_part, to_device(images, self.device), generators)
        return scale(self.model.latents, raw)

    def _encode_part(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        return sample_moments(moments_of(self.image_encoder, images, self.image_dtype), generators)

    @engine_call
    def annotate(self, task: str, capture: AnyCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        check_task(task, self.decoders)
        self._refresh()
        return self._run_decoder(task, capture.of(task), text)


def chunk_of(side: int, device: torch.device) -> int:
    """Images with so many pixels a side that one call of the autoencoder takes."""
    return max(CHUNK_PIXELS[device.type] // side**2, 1)


def encode_in_chunks(
    encode: Callable[[Tensor, Sequence[torch.Generator] | None], Tensor],
    images: Tensor,  # [B, H, W, 3] on the device
    generators: Sequence[torch.Generator] | None,
) -> Tensor:
    """encode(images, generators) of as many images at once as one call of the autoencoder takes."""
    size = chunk_of(images.shape[2], images.device)
    parts = enumerate(images.split(size))
    return torch.cat(
        [encode(part, generators and generators[place * size : (place + 1) * size]) for place, part in parts]
    )


def moments_of(encoder: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """The autoencoder's moments [B, 2 C, h, w] of images [B, H, W, 3] uint8."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    moments: Tensor = encoder(channels_last(pixels, dtype))
    return moments.float().contiguous()


def sample_moments(moments: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Latents of the autoencoder's moments [B, 2 C, h, w]: their mean, or with generators a sample."""
    latents, log_variance = moments.chunk(2, 1)
    return sample_posterior(latents, (0.5 * log_variance.clamp(-30, 20)).exp(), generators)


def slice_of(batch: int) -> int:
    """Images of a batch that a CPU works on at once, by the batch alone, so that threads change no rounding."""
    return min(-(-batch // 2), WIDEST_SLICE)


def _select_rows(table: Tensor, axis: int, batch: int, start: int, count: int) -> Tensor:
    """The rows along `axis` of a table of all rows of text that belong to images start .. start + count."""
    if batch <= count:
        return table
    images = table.unflatten(axis, (-1, batch))
    return images.narrow(axis + 1, start, min(count, batch - start)).flatten(axis, axis + 1)


def as_images(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, H, W, 3] uint8, rounded down, of pixels [B, 3, H, W] about -1 .. 1, and whether each was finite."""
    pixels = pixels.float()
    images = ((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).to(torch.uint8)
    return images, pixels.isfinite().flatten(1).all(1)


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
