"""The fast engine: our own networks without repeated work, in half precision with CUDA graphs on a GPU, in fp32 or bf16
on a CPU.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.data import AttentionSums, Capture, ProjectedCapture
from datasetdm_fast.decoders.trunk import Decoder, is_folded, narrowed, with_ops
from datasetdm_fast.decoders.trunk import packed as packed_decoder
from datasetdm_fast.engines.cuda_graph import GraphPool, StepGraph
from datasetdm_fast.engines.device import allow_tf32, choose_by_shape, resolve_device, slow_in_fp16
from datasetdm_fast.engines.lanes import Lanes
from datasetdm_fast.engines.memory import halving, suggested, trim
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.kernels import plain, winograd
from datasetdm_fast.kernels.choice import gave_way, operations
from datasetdm_fast.kernels.launch import triton
from datasetdm_fast.kernels.to_device import to_device
from datasetdm_fast.loading.model import Model
from datasetdm_fast.loading.network import Weighted, as_widest
from datasetdm_fast.models import fused
from datasetdm_fast.models.capture import (
    CaptureHook,
    NoCapture,
    ProjectedSums,
    Projection,
    RawCapture,
    Slot,
    SummedAttention,
)
from datasetdm_fast.models.packed import packed, spending, weight_as, weights_of
from datasetdm_fast.models.text_encoder import TextEncoder
from datasetdm_fast.models.unet import TextTable, TimeTable, UNet
from datasetdm_fast.models.unet_block import is_narrow, with_blocks
from datasetdm_fast.models.vae import ImageDecoder, ImageEncoder

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHUNK_PIXELS = {
    "cpu": 256 * 256,
    "cuda": 8 * 512 * 512,
}  # images the autoencoder takes at once; its full-size activations dwarf the UNet's
TIMES = 2048  # timesteps whose biases are kept
# weights that are computed with before they are stored, or stay in fp32: of timesteps, and of doubled cells
COMPUTED = ("time_emb", "upsamplers")
LARGEST_IDLE = 2**27  # bytes; on a CPU larger networks of AT_NEED are let go while others work, and read again
LARGEST_STACKED = 2**23  # weights of all decoders' first layers; on a CPU more are stacked anew for a captured call
WIDEST_SLICE = 8  # images a core of a CPU takes at once: more would leave its caches


def resolve_precision(name: str, device: torch.device) -> str:
    """The precision of the UNet and the autoencoder: as asked, or fp32 on a CPU and fp16 on a GPU."""
    if name == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if name not in DTYPES:
        raise Refused(f"dtype: {name!r} is none of auto, {', '.join(DTYPES)}", "Choose one of these with --dtype.")
    if name == "fp16" and device.type == "cpu":
        raise slow_in_fp16("dtype")
    if name == "tf32" and device.type == "cpu":
        raise Refused("dtype: a CPU has no TF32", "Use --dtype bf16 or --dtype fp32.")
    return name


def computed(method: Callable) -> Callable:
    """A call of the engine: without gradients, and with TF32 only where its precision is another than fp32."""

    @functools.wraps(method)
    def call(engine: FastEngine, *arguments, **named):
        allow_tf32(engine.device, engine.precision != "fp32")
        choose_by_shape(engine.device)
        with torch.inference_mode():
            return method(engine, *arguments, **named)

    return call


def is_large(module: nn.Module) -> bool:
    """Whether it is too large to be held while others work."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters()) > LARGEST_IDLE


def make_room() -> None:
    """Gives back what calls left behind on a CPU."""
    winograd.let_go()
    trim()


def placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`module` on the device, its convolutions channels-last."""
    return module.eval().to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


class FastEngine:
    """See engines.Engine; the weights of `model` are read at construction and left as they are; where no module holds
    them, they are not held twice.

    Text encoder, timestep table and level sums are stored in fp32 in every precision: they cost little, and labels hang
    on them. The UNet and the autoencoder are stored as `dtype`, but a small UNet on a CPU as fp32, where its products
    alone are in bf16; on a GPU the decoders are stored as fp16 where `dtype` is narrow. Norms and softmax add up in
    fp32 inside their operations. On a GPU fp32 is exact; in any other precision convolutions of fp32 round their
    factors to TF32.
    """

    name = "fast"

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
        self.lanes, self._calls = Lanes(), Lanes()  # of the slices of a batch, and of calls about one image
        self.precision = resolve_precision(dtype, self.device)
        self.dtype = DTYPES[self.precision]
        self._has_usual_ops = ops is None  # others are called one by one
        # Images that the UNet and the autoencoder of a GPU take at once, 0 = as many as they are given.
        self.is_compiled, self.widest, self.widest_chunk = compile, 0, 0
        self.adjustments: dict[
            str, int
        ] = {}  # what had to be done differently from what was asked, for the rows of the samples made since
        self.ops = ops or (
            plain if compile else operations(self.device, self.dtype)
        )  # a compiler fuses the plain forms itself
        config = model.networks["unet"].config
        is_block = self.device.type == "cpu" and self._has_usual_ops and not compile
        # What a small UNet on a CPU stores between its products, which alone are in bf16 then.
        self.unet_dtype = torch.float32 if is_block and is_narrow(config.block_out_channels) else self.dtype
        is_fused = self.device.type == "cuda" and not compile
        self.kinds = (fused.FusedUNet, fused.FusedImageDecoder) if is_fused else (UNet, ImageDecoder)
        decoder_ops = operations(self.device, torch.float32)
        self.decoders = {
            task: with_ops(decoder, decoder_ops).to(self.device) for task, decoder in (decoders or {}).items()
        }
        self._read_weights()

    def _read_weights(self) -> None:
        self._seen = self._weight_versions()
        sources = self._sources("unet")
        for name in NETWORKS:
            setattr(self, name, self._network(name, sources))
        self._has_large_unet = is_large(self.unet)  # asked here, as packed weights are no parameters
        for name in (*AT_NEED, "_wide_image_decoder"):
            self.__dict__.pop(name, None)
        is_wide = self.device.type == "cpu" or self.is_compiled or self.dtype == torch.float32
        # In bf16, too: labels need its three further bits, and what leaves its range is made again in fp32.
        self.label_dtype = torch.float32 if is_wide else torch.float16
        self._stored_decoders = self.decoders
        if not is_wide:
            ops = operations(self.device, self.label_dtype)
            self._stored_decoders = {
                task: narrowed(one, self.label_dtype, ops) if is_folded(one) else one
                for task, one in self.decoders.items()
            }
        if self.device.type == "cpu" and not self.is_compiled:
            in_pairs = self.dtype == torch.bfloat16
            self.unet = packed(with_blocks(self.unet, in_pairs) if self._has_usual_ops else self.unet)
            if self._has_usual_ops:
                self._stored_decoders = {task: packed_decoder(one) for task, one in self.decoders.items()}
        del sources
        if self.device.type == "cpu":
            trim()
        else:  # built before a run begins, as copies to a GPU make the host wait
            self.text_encoder, self.image_decoder  # noqa: B018
        self._compiled = torch.compile(self._plain, dynamic=False) if self.is_compiled else None
        self._rows: dict[float, Tensor] = {}
        self._text: tuple[Tensor, int, int] | None = None
        self._empty: tuple[Tensor, tuple[Tensor, ...]] | None = (
            None  # the text of the unconditional rows, its keys and values
        )
        self._keys_values: list[tuple[Tensor, ...]] = []  # of every slice of the batch
        self._classes: tuple[Tensor, int, dict[Slot, Tensor]] | None = None  # class prompts, cells, their keys by layer
        self._graphs: dict[tuple, StepGraph] = {}  # by the step and the shapes of its inputs
        # Of the autoencoder and the decoders, whose stream runs beside the UNet's: with memory of their own.
        self._label_graphs: dict[tuple, StepGraph] = {}
        self._pool: GraphPool | None = None
        self._label_pool: GraphPool | None = None
        self._answers: dict[str, list[str]] = {}  # names of what a recorded decoder says

    @property
    def _step(self) -> Callable[..., tuple[Tensor, ...]]:
        """A plain call; not kept, as an engine that refers to itself would not be let go at once."""
        return self._compiled or self._plain

    def _sources(self, *names: str) -> dict[str, Weighted]:
        """The weights of these networks of the model, or of all; what no module holds is stored as it is multiplied
        with.
        """

        networks = {name: self.model.networks[name] for name in names or self.model.networks}
        if self.device.type != "cpu":  # whose forms of a layer may read a weight twice
            found = {name: network.read() for name, network in networks.items()}
            # Wherever the reference engine has put the modules: what is computed from weights would round otherwise.
            return {
                name: Weighted(one.config, {part: value.cpu() for part, value in one.state.items()})
                for name, one in found.items()
            }

        def stored(dtype: torch.dtype, name: str, value: Tensor) -> torch.dtype:
            is_half = value.dim() > 1 and not any(part in name for part in COMPUTED)
            return dtype if is_half else as_widest(name, value)

        dtypes = {name: self.unet_dtype if name == "unet" else self.dtype for name in networks}
        return {
            name: network.read()
            if name == "text_encoder"
            else network.read(functools.partial(stored, dtypes[name]), dtypes[name])
            for name, network in networks.items()
        }

    def _network(self, name: str, sources: Mapping[str, Weighted]) -> nn.Module:
        """One of NETWORKS or the image encoder, from the weights of the model."""
        module, is_wide = {**NETWORKS, **AT_NEED}[name](self, sources), name in ("text_encoder", "times")
        dtype = self.unet_dtype if name in NETWORKS else self.dtype
        return placed(module, self.device, torch.float32 if is_wide else dtype)

    @functools.cached_property
    def text_encoder(self) -> nn.Module:
        return self._read_at_need("text_encoder", "text_encoder")

    @functools.cached_property
    def image_decoder(self) -> nn.Module:
        return self._read_at_need("image_decoder", "vae")

    @functools.cached_property
    def image_encoder(self) -> nn.Module:
        return self._read_at_need("image_encoder", "vae")

    def _read_at_need(self, name: str, source: str) -> nn.Module:
        is_packed = self.device.type == "cpu" and name != "text_encoder" and not self.is_compiled
        if self.device.type == "cpu":  # what calls left behind makes room for it
            make_room()
        module = self._network(name, self._sources(source))
        module = packed(module) if is_packed else module
        if self.device.type == "cpu":  # what reading left behind
            trim()
        return spending(module) if is_packed and name == "image_decoder" and self._has_usual_ops else module

    def _keep_alone(self, *wanted: str) -> None:
        """On a CPU lets the large networks go that are not wanted now."""
        for name in AT_NEED if self.device.type == "cpu" else ():
            if name not in wanted and (module := self.__dict__.get(name)) is not None and is_large(module):
                self.__dict__.pop(name, None)

    def weight_distance(self) -> float:
        """How far, in the largest weight of its tensor, a weight of the engine lies from what its model gives: 0, or
        something changed it.
        """
        farthest, sources = 0.0, self._sources()
        encoder = ("image_encoder",) if "image_encoder" in self.__dict__ else ()  # few need it
        for name in (*NETWORKS, "text_encoder", "image_decoder", *encoder):
            held, truth = weights_of(getattr(self, name)), weights_of(self._network(name, sources))
            farthest = max(farthest, _distance(held, truth))
        for task, decoder in self._stored_decoders.items() if self.label_dtype == torch.float32 else ():
            farthest = max(farthest, _distance(weights_of(decoder), self.decoders[task].state_dict()))
        return farthest

    def _weight_versions(self) -> tuple[int, ...]:
        """Counters that advance when a weight is changed in place."""
        decoders = (
            sum(parameter._version for parameter in decoder.parameters() if not parameter.is_inference())
            for decoder in self.decoders.values()
        )
        return *(network.changes for network in self.model.networks.values()), *decoders

    def _refresh(self) -> None:
        if self._weight_versions() != self._seen:
            self._read_weights()

    @computed
    def encode_text(self, prompts: Sequence[str]) -> Tensor:  # [B, T, D]
        self._refresh()
        self._keep_alone("text_encoder")
        return self.text_encoder(to_device(self.model.token_ids(prompts), self.device))

    @computed
    def encode_classes(self, words: Sequence[str]) -> Tensor:  # [K, D]
        return self.encode_text(words).mean(1)

    @computed
    def denoise(self, latents: Tensor, timestep: float, context: Tensor) -> Tensor:  # [2B, 4, h, w]
        return self._call(self._step, latents, timestep, context)[0]

    @computed
    def denoise_and_capture(
        self, latents: Tensor, timestep: float, context: Tensor
    ) -> tuple[Tensor, ProjectedCapture | Capture]:
        """The noise and what the loaded decoders make of the activations; without decoders the activations
        themselves.
        """
        if not self.decoders:
            return self.denoise_and_capture_raw(latents, timestep, context)
        noise, *sums = self._call(self._captured, latents, timestep, context)
        return noise, ProjectedCapture(tuple(sums), self.projection.tasks)

    @computed
    def denoise_and_capture_raw(self, latents: Tensor, timestep: float, context: Tensor) -> tuple[Tensor, Capture]:
        """The noise and every captured feature and map as the reference engine gives them."""
        self._refresh()
        hook = RawCapture(self.model.levels, self.ops)
        noise = self._run(hook, self._latents(latents), self._row(timestep), *self._tabled(context.to(self.device)))
        return noise, hook.result()

    @computed
    def denoise_and_average(
        self, latents: Tensor, timestep: float, context: Tensor, class_context: Tensor, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        self._refresh_for(context)
        own = (sums.cells, sums.tokens, *self._class_keys(class_context, sums.tokens.shape[1]))
        noise, cells, tokens = self._call(self._summed, latents, timestep, context, own)
        return noise, AttentionSums(cells, tokens)

    def _class_keys(self, class_context: Tensor, cells: int) -> tuple[Tensor, ...]:
        """Keys [B, heads, T, d] of the class prompts, of every cross-attention with so many cells."""
        if self._classes is None or self._classes[0] is not class_context or self._classes[1] != cells:
            tables = self.texts(class_context.to(self.device, self.unet_dtype))
            slots = self.unet.text_layers
            keys = {
                slot: table[0] for slot, table in zip(slots, tables) if self.model.levels[slot[0]].side ** 2 == cells
            }
            self._classes = (class_context, cells, keys)
        return tuple(self._classes[2].values())

    def _call(
        self,
        step: Callable[..., tuple[Tensor, ...]],
        latents: Tensor,
        timestep: float,
        context: Tensor,
        own: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """The noise [2B, 4, h, w], and whatever [B, ...] `step` gives besides, from the UNet's own inputs: latents, the
        timestep's biases, what else is every image's `own`, and the keys and values of every text layer.
        """
        self._refresh_for(context)
        row, latents = self._row(timestep), self._latents(latents)
        if self.device.type == "cpu":
            self._keep_alone()
            parts = self._in_slices(step, latents, row, context, own, slice_of(len(latents)))
        else:
            size = min(self.widest or len(latents), len(latents))
            parts, worked = halving(
                lambda size: self._in_slices(step, latents, row, context, own, size), size, self._forget
            )
            if worked < size:
                self.widest, self.adjustments = worked, self.adjustments | {"unet_batch": worked}
        noise, *others = zip(*parts)
        unconditional, conditional = zip(*(part.chunk(2) for part in noise))
        return torch.cat([*unconditional, *conditional]), *(torch.cat(other) for other in others)

    def _in_slices(
        self,
        step: Callable[..., tuple[Tensor, ...]],
        latents: Tensor,
        row: Tensor,
        context: Tensor,
        own: tuple[Tensor, ...],
        size: int,
    ) -> list[tuple[Tensor, ...]]:
        tables, parts = self._text_layers(context, size), zip(*(value.split(size) for value in (latents, *own)))
        slices = [(part, row, *others, *table) for (part, *others), table in zip(parts, tables)]
        if self.device.type == "cpu":
            return self.lanes.map(step, slices)
        return [self._graph(one, step)(*one) for one in slices]

    def _forget(self) -> None:
        """Drops every recorded call and the tables of the texts."""
        self._graphs.clear()
        self._pool = self._text = None
        torch.cuda.empty_cache()

    def _forget_labels(self) -> None:
        """The same of the autoencoder and the decoders."""
        self._label_graphs.clear()
        self._label_pool = None
        torch.cuda.empty_cache()

    def _latents(self, latents: Tensor) -> Tensor:
        return latents.to(self.device, self.unet_dtype).contiguous(memory_format=torch.channels_last)

    def _row(self, timestep: float) -> Tensor:
        if (row := self._rows.get(float(timestep))) is None:
            if len(self._rows) >= TIMES:
                self._rows.clear()
            row = self.times(torch.full((), float(timestep), device=self.device)).to(self.unet_dtype)
            self._rows[float(timestep)] = row
        return row

    def _is_kept(self, context: Tensor) -> bool:
        """Whether it is the text of the call before, unchanged."""
        version = _changes(context)
        return version >= 0 and self._text is not None and self._text[0] is context and self._text[1] == version

    def _refresh_for(self, context: Tensor) -> None:
        """Reads weights that were changed, where a call has another text than the one before."""
        if not self._is_kept(context):
            self._refresh()

    def _text_layers(self, context: Tensor, size: int) -> list[tuple[Tensor, ...]]:
        """Keys and values of the texts of every slice, computed when they were not those of the call before."""
        if not self._is_kept(context) or self._text[2] != size:
            tables, batch = self._tabled(context.to(self.device)), len(context) // 2
            self._keys_values = [
                tuple(_rows_of(table, batch, start, size) for table in tables) for start in range(0, batch, size)
            ]
            self._text = (context, _changes(context), size)
        return self._keys_values

    def _tabled(self, context: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of every layer; those of the unconditional rows, where all are one text, are kept from one
        batch of prompts to the next, and where they are not, each is computed alone: rounded alike in any company.
        """
        batch, text = len(context) // 2, context.to(self.unet_dtype)
        # On a GPU the comparison would make the host wait, for a product that is small there.
        if self.device.type != "cpu":
            return self.texts(text)
        if not torch.equal(context[:batch], context[:1].expand(batch, -1, -1)):
            rows = [self.texts(row) for row in text[:batch].split(1)]
            return tuple(torch.cat(parts, 1) for parts in zip(*rows, self.texts(text[batch:])))
        if self._empty is None or not torch.equal(self._empty[0], text[:1]):
            self._empty = (text[:1].clone(), self.texts(text[:1]))
        return tuple(
            torch.cat([kept.expand(-1, batch, -1, -1, -1), own], 1)
            for kept, own in zip(self._empty[1], self.texts(text[batch:]))
        )

    def _run(self, hook: CaptureHook, latents: Tensor, row: Tensor, *keys_values: Tensor) -> Tensor:
        return self.unet(latents, row, keys_values, hook).float().contiguous()

    def _plain(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self._run(NoCapture(self.ops), *inputs),)

    def _captured(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        hook = ProjectedSums(self.projection, inputs[0], self.ops)
        return self._run(hook, *inputs), *hook.result()

    def _summed(
        self, latents: Tensor, row: Tensor, cells: Tensor, tokens: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        slots = list(self._classes[2])
        keys, keys_values = others[: len(slots)], others[len(slots) :]
        sums = AttentionSums(cells, tokens)
        hook = SummedAttention(self.model.levels, sums, dict(zip(slots, keys)), self.ops)
        noise = self._run(hook, latents, row, *keys_values)
        return noise, hook.cells, hook.tokens

    def _graph(self, inputs: Sequence[Tensor], step: Callable[..., tuple[Tensor, ...]]) -> StepGraph:
        key = (step.__name__, *(tuple(value.shape) for value in inputs))
        if key not in self._graphs:
            self._pool = self._pool or GraphPool(inputs[0].device)
            self._graphs[key] = StepGraph(step, inputs, self._pool)
        return self._graphs[key]

    def _labelled(
        self, name: str, run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """run(*inputs) as one replay of a graph on a GPU that compiles nothing itself."""
        if self.device.type != "cuda" or self.is_compiled:
            return run(*inputs)
        key = (name, *(tuple(value.shape) for value in inputs))
        if key not in self._label_graphs:
            self._label_pool = self._label_pool or GraphPool(inputs[0].device)
            self._label_graphs[key] = StepGraph(run, inputs, self._label_pool, fresh=len(inputs))
        return self._label_graphs[key](*inputs)

    def decode_image(self, latents: Tensor) -> Tensor:  # [B, H, W, 3] uint8
        return self.decode_and_check(latents)[0]

    @computed
    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        size = self._chunk(latents.shape[-1] * 8)
        size = min(size, (self.widest_chunk or len(latents)) if self.device.type == "cuda" else slice_of(len(latents)))
        latents = latents.to(self.device)
        if self.device.type == "cuda":  # a thread of its own would work on another stream, which nothing waits for
            parts, worked = halving(
                lambda size: list(map(self._decoded, latents.split(size))), size, self._forget_labels, times=size
            )
            if worked < size:
                self.widest_chunk, self.adjustments = worked, self.adjustments | {"image_batch": worked}
        else:
            self._refresh()  # as in annotate
            self._keep_alone("image_decoder")
            decoder, chunks = self.image_decoder, latents.split(size)  # read once, before threads ask for it
            if len(chunks) == 1 and is_large(decoder):
                del self.image_decoder  # the next call of another network would let it go
                return as_images(decoder.spent(_channels_last(chunks[0], self.dtype), make_room))
            parts = self.lanes.map(self._decoded, [(chunk,) for chunk in chunks])
        return tuple(torch.cat(part) for part in zip(*parts))

    def _decoded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        found = self._labelled("image", self._pixels, (_channels_last(latents, self.dtype),))
        # Some autoencoders leave the range of fp16.
        if self.dtype != torch.float16 or bool(found[1].all()):
            return found
        return as_images(self._wide_image_decoder(_channels_last(latents, torch.float32)))

    def _pixels(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return as_images(self.image_decoder(latents))

    @functools.cached_property
    def _wide_image_decoder(self) -> nn.Module:
        decoder = self.kinds[1](self.model.networks["vae"].read(), self.ops)
        return placed(decoder, self.device, torch.float32)

    @computed
    def encode_image(
        self, images: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:  # [B, 4, h, w]
        self._refresh()
        self._keep_alone("image_encoder")
        parts = to_device(images, self.device).split(self._chunk(images.shape[2]))
        moments = torch.cat(
            [
                self.image_encoder(_channels_last(part.permute(0, 3, 1, 2).float() / 127.5 - 1, self.dtype)).float()
                for part in parts
            ]
        )
        return drawn(moments.contiguous(), generators) * self.model.networks["vae"].config.scaling_factor

    def _chunk(self, side: int) -> int:
        return max(CHUNK_PIXELS[self.device.type] // side**2, 1)

    @computed
    def annotate(self, task: str, capture: ProjectedCapture | Capture, text: Tensor | None = None) -> dict[str, Tensor]:
        if task not in self.decoders:
            loaded = ", ".join(self.decoders) or "none"
            raise Missing(
                f"task: no decoder for {task!r} was loaded, there are {loaded}",
                "Name a folder with that decoder: --decoder DIR",
            )
        if self.device.type == "cpu":  # elsewhere a thread of its own labels, beside the UNet
            self._refresh()
        decoder = self._stored_decoders[task]
        own = capture.of(task) if isinstance(capture, ProjectedCapture) else capture
        own = own.to(next(decoder.parameters()).dtype)
        if not isinstance(own, ProjectedCapture) or (self.device.type == "cuda" and not is_folded(decoder)):
            return {name: value.float() for name, value in decoder(own, text).items()}
        if self.device.type == "cuda":
            return self._replayed(task, decoder, own, text)
        winograd.let_go()  # what the UNet alone works with
        size = slice_of(own.batch)
        texts = [None] * own.batch if text is None else text.split(size)
        sums = zip(*(total.split(size) for total in own.sums))
        parts = self.lanes.map(decoder, [(ProjectedCapture(part, own.slices), some) for part, some in zip(sums, texts)])
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _replayed(self, task: str, decoder: Decoder, own: ProjectedCapture, text: Tensor | None) -> dict[str, Tensor]:
        """The decoder's answers, by one replay of its graph."""

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            sums, words = inputs[: len(own.sums)], inputs[len(own.sums) :]
            found = decoder(ProjectedCapture(sums, {}), *words)
            names[:] = found
            return tuple(value.float() for value in found.values())

        names: list[str] = self._answers.setdefault(task, [])
        inputs = (*own.sums, *([] if text is None else [text]))
        answers = self._labelled(task, run, inputs)
        return dict(zip(names, answers, strict=True))

    @property
    def side_by_side(self) -> Callable[[Sequence[Callable[[], Any]]], list[Any]] | None:
        """Makes calls about a single small image at once on a CPU, each on a core of its own, as its operations are too
        short for several; None where that does not pay.
        """
        if self.device.type != "cpu" or self.is_compiled or self._has_large_unet:
            return None
        return lambda works: self._calls.map(lambda work: work(), [(work,) for work in works])

    def fp32_fallback(self) -> FastEngine | None:
        return None if self.precision == "fp32" else self._wide

    @functools.cached_property
    def _wide(self) -> FastEngine:
        return FastEngine(self.model, self.decoders, dtype="fp32", device=str(self.device), compile=self.is_compiled)

    @computed
    def suggested_batch(self) -> int:
        """Images to make together where nobody says: from the free memory of a GPU, from the caches of a CPU."""
        return suggested(self.model.size // 8, self.device, self._bytes_of)

    def _bytes_of(self, batch: int) -> int:
        """Peak memory of one captured call."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        side = self.model.size // 8
        latents, context = (
            torch.zeros(batch, 4, side, side, device=self.device),
            self.encode_text([""]).expand(2 * batch, -1, -1),
        )
        self._captured(self._latents(latents), self._row(1), *self._tabled(context))
        return torch.cuda.max_memory_allocated(self.device) - before

    def fingerprint(self) -> dict[str, str]:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        extras = {"compiled": "yes"} if self.is_compiled else {}
        if self.device.type == "cuda":  # which algorithms they choose for a shape is theirs
            extras |= {"cudnn": str(torch.backends.cudnn.version()), "cuda": str(torch.version.cuda)}
            extras |= {"triton": triton.__version__} if triton else {}
            if self._has_usual_ops and not self.is_compiled and (lost := gave_way(self.ops, self.device)):
                extras["plain"] = ", ".join(lost)
        return {
            "engine": self.name,
            "device": str(self.device),
            "device_name": device,
            "dtype": self.precision,
            "torch": torch.__version__,
            **extras,
        }


Building = Callable[[FastEngine, Mapping[str, Weighted]], nn.Module]
NETWORKS: dict[str, Building] = {
    "times": lambda engine, sources: TimeTable(sources["unet"]),
    "texts": lambda engine, sources: TextTable(sources["unet"]),
    "unet": lambda engine, sources: engine.kinds[0](sources["unet"], engine.ops),
    "projection": lambda engine, sources: Projection(
        engine.model.levels, engine.decoders, largest_held=LARGEST_STACKED if engine.device.type == "cpu" else math.inf
    ),
}
AT_NEED: dict[str, Building] = {
    "text_encoder": lambda engine, sources: TextEncoder(sources["text_encoder"], engine.ops),
    "image_decoder": lambda engine, sources: engine.kinds[1](sources["vae"], engine.ops),
    "image_encoder": lambda engine, sources: ImageEncoder(sources["vae"], engine.ops),
}


def _changes(context: Tensor) -> int:
    """A counter that advances when it is changed in place; -1 of inference tensors, which count no changes, so that it
    cannot be known that they are still the same.
    """
    return -1 if context.is_inference() else context._version


def state_distance(value: Tensor, truth: Tensor) -> float:
    """The largest difference of two weights, as a share of the largest number in `truth`; what is no number counts as
    farther than any.
    """
    if not truth.numel():
        return 0.0
    farthest = (value.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)
    return float(farthest.nan_to_num(nan=torch.finfo(torch.double).max))


def _distance(held: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The same of the weight that lies farthest from its truth, in whatever form it is held."""
    return max((state_distance(held[key], weight_as(held[key], value)) for key, value in truth.items()), default=0.0)


def drawn(moments: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Latents of the autoencoder's moments [B, 8, h, w]: their mean, or with generators a sample."""
    latents, log_variance = moments.chunk(2, 1)
    if generators is None:
        return latents
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    return latents + (0.5 * log_variance.clamp(-30, 20)).exp() * to_device(noise, latents.device)


def slice_of(batch: int) -> int:
    """Images of a batch that a CPU works on together. It depends on nothing but the batch, so that threads and ranks
    change no rounding.
    """
    return min(-(-batch // 2), WIDEST_SLICE)


def _rows_of(table: Tensor, batch: int, start: int, count: int) -> Tensor:
    """The part of a TextTable's [2, 2B, heads, T, d] that belongs to images start .. start + count."""
    if batch <= count:
        return table
    return table.unflatten(1, (2, batch))[:, :, start : start + count].flatten(1, 2)


def as_images(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, H, W, 3] uint8 of pixels [B, 3, H, W] about -1 .. 1, and whether each was finite."""
    pixels = pixels.float()
    images = ((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).to(torch.uint8)
    return images, pixels.isfinite().flatten(1).all(1)


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
