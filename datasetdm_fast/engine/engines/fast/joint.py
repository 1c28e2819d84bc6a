"""The fast engine of models whose image and text tokens attend to one another: their own modules in bf16, and captures
that cost one more product, as attention itself returns the logarithms of its sums.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.data import AttentionSums, Capture, ProjectedCapture, Text
from datasetdm_fast.engine.backbones.joint_attention import AttentionReader, JointReference
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.device import engine_call, multiplies_bf16, resolve_device
from datasetdm_fast.engine.engines.engine import check_task
from datasetdm_fast.engine.engines.fast.base import CHUNK_PIXELS, DTYPES
from datasetdm_fast.engine.engines.fast.weights import state_distance
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.models.capture import Projection
from datasetdm_fast.errors import Refused


def _bind_arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What is read of the arguments of an attention."""
    return query, key, value, attn_mask


def attend_and_sum(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output [R, heads, S, d] of an attention, and the logarithm [R, heads, S] of the sum of each softmax."""
    operations, width = torch.ops.aten, query.shape[-1]
    is_flash = query.dtype != torch.float32 and width % 8 == 0 and width <= 256 and multiplies_bf16(query.device)
    bias = as_bias(mask, query.dtype)
    if query.device.type == "cpu":
        output, sums = operations._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)
    elif bias is None and is_flash:
        output, sums = operations._scaled_dot_product_flash_attention(query, key, value)[:2]
    else:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        sums = sum_exponentials(query, key, bias)
    return output, sums[..., : query.shape[2]].float()


def as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What hides the masked keys when it is added to scores."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def sum_exponentials(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """The logarithms of the sums, where no attention returns them: the scores of one image at a time are held."""
    parts = []
    for row in range(len(query)):
        scores = query[row].float() @ key[row].float().mT / query.shape[-1] ** 0.5
        parts.append((scores if bias is None else scores + bias[row % len(bias)]).logsumexp(-1))
    return torch.stack(parts)


class SharesReader(AttentionReader):
    """Computes the shares of attention that go to text from the sums that attention returns."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._running is None or function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        query, key, value, mask = _bind_arguments(*args, **kwargs or {})
        output, sums = attend_and_sum(query, key, value, mask)
        query, key, sums = (part[-self.images :] for part in (query, key, sums))
        if mask is not None:  # [R, 1, 1, keys] and the like
            mask = mask.expand(len(output), *mask.shape[1:])[-self.images :, ..., self.text]
        self._keep(self._running, query[:, :, self.image], key[:, :, self.text], sums[:, :, self.image], mask)
        return output

    def _keep(self, attention: nn.Module, query: Tensor, key: Tensor, sums: Tensor, mask: Tensor | None) -> None:
        self.maps[attention] = shares(query, key, sums, mask)


def shares(query: Tensor, key: Tensor, sums: Tensor, mask: Tensor | None) -> Tensor:
    """[B, heads, S, T] exp(q k / sqrt(d) - log of the sum over all keys), 0 for keys that are masked."""
    scores = query.float() @ key.float().mT / query.shape[-1] ** 0.5
    parts = scores.sub_(sums[..., None]).exp_()
    return parts if mask is None else parts * mask


class ProjectingReader(SharesReader):
    """Keeps what the first layers of the decoders make of attentions: [B, S, F] for each level."""

    def __init__(self, levels: Sequence[Sequence[nn.Module]], projection: Projection):
        super().__init__([*dict.fromkeys(attention for level in levels for attention in level)])
        self.projection, self.sums = projection, cast(dict[int, Tensor], {})
        self.slots: dict[nn.Module, list[tuple[int, int]]] = {attention: [] for attention in self.attentions}
        for level, read in enumerate(levels):
            for place, attention in enumerate(read):
                self.slots[attention].append((level, place))

    def _add(self, level: int, values: Tensor) -> None:
        self.sums[level] = self.sums[level] + values if level in self.sums else values

    def _keep(self, attention: nn.Module, query: Tensor, key: Tensor, sums: Tensor, mask: Tensor | None) -> None:
        tokens = self.inputs[attention].float()
        for level, place in self.slots[attention]:
            if not self.projection.widths[level]:
                continue
            self._add(level, tokens @ self.projection.features[level][place][0])
            weight = self.projection.maps[level][place]  # [heads, T, F]
            count = min(weight.shape[1], key.shape[2])
            weight, texts = weight[:, :count].flatten(0, 1), key[:, :, :count]
            masks = [None] * len(key) if mask is None else mask[..., :count].split(1)
            rows = []
            for row in zip(query.split(1), texts.split(1), sums.split(1), masks, strict=True):  # one image at a time
                rows.append(shares(*row).transpose(1, 2).flatten(2) @ weight)
            self._add(level, torch.cat(rows))


class JointEngine(TorchEngine):
    """See engines.Engine. On a CPU in fp32 the modules are those of the model; otherwise copies on the device."""

    name = "fast"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, Decoder] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        compile: bool = False,
    ):
        place = resolve_device(device)
        precision = ("bf16" if place.type == "cuda" else "fp32") if dtype == "auto" else dtype
        if precision not in ("bf16", "fp32"):
            raise Refused(
                f"dtype: {precision}: {model.backbone.title} runs in bf16 and fp32, its activations leave fp16's range",
                "Use --dtype bf16 or --dtype fp32.",
            )
        self.dtype, narrow = DTYPES[precision], model
        if precision != "fp32" or place.type != "cpu":
            narrow = model.with_modules(
                **{
                    name: nn.Module.to(copy.deepcopy(network.module), place, self.dtype)
                    for name, network in model.networks.items()
                }
            )
        super().__init__(narrow, decoders, device=device)
        self.held, self.model, self.precision, self.is_compiled = narrow, model, precision, compile
        self.joint = cast(JointReference, self.reference)
        self.joint.reader = SharesReader
        self._eager = self.joint.network
        self._called = cast(nn.Module, torch.compile(self._eager, dynamic=False)) if compile else self._eager
        self.projection = Projection(model.levels, self.decoders).to(self.device)

    def _narrow(self, text: Text) -> Text:
        return text.to(self.device).cast(self.dtype)

    def weight_distance(self) -> float:
        """How far a weight of the engine lies from that of its model, as a share of the largest in its tensor."""
        if self.held is self.model:
            return 0.0
        farthest = 0.0
        for name, module in self.held.modules.items():
            truth = self.model.networks[name].module.state_dict()
            for key, value in module.state_dict().items():
                farthest = max(farthest, state_distance(value.cpu(), truth[key].to(value.dtype).cpu()))
        return farthest

    @engine_call
    def encode_text(self, prompts: Sequence[str]) -> Text:
        return super().encode_text(prompts).cast(torch.float32)

    @engine_call
    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        self.joint.network = self._called
        return self.joint.predict(latents.to(self.device, self.dtype), timestep, self._narrow(text)).float()

    @engine_call
    def denoise_and_capture(  # type: ignore[override]
        self, latents: Tensor, timestep: float, text: Text
    ) -> tuple[Tensor, Capture | ProjectedCapture]:
        if not self.decoders:
            return self.denoise_and_capture_raw(latents, timestep, text)
        self.joint.network = self._eager
        reader = ProjectingReader(self.joint.levels(), self.projection)
        with self.joint.reading(reader):
            output = self.joint.predict(latents.to(self.device, self.dtype), timestep, self._narrow(text)).float()
        clean, last = self.joint.clean, len(self.projection.sides) - 1
        assert clean is not None
        if self.projection.widths[last]:
            weight = cast(Tensor, self.projection.features[last][0])[0]
            reader.sums[last] = clean.float().flatten(2).mT @ weight
        sums = []
        for level, (side, width) in enumerate(zip(self.projection.sides, self.projection.widths)):
            total = reader.sums.get(level, torch.zeros(len(latents), side * side, width, device=self.device))
            sums.append(total.mT.unflatten(2, (side, side)))
        return output, ProjectedCapture(tuple(sums), self.projection.tasks)

    @engine_call
    def denoise_and_capture_raw(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        self.joint.network = self._eager
        with self.joint.capturing() as captures:
            output = self.joint.predict(latents.to(self.device, self.dtype), timestep, self._narrow(text)).float()
        return output, captures[0].to(torch.float32)

    @engine_call
    def denoise_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        self.joint.network = self._eager
        narrow, words = latents.to(self.device, self.dtype), self._narrow(text)
        output, sums = self.joint.predict_and_average(narrow, timestep, words, words, sums)
        return output.float(), sums

    @engine_call
    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        parts = latents.to(self.device).split(max(CHUNK_PIXELS[self.device.type] // self.model.size**2, 1))
        decoded = [super(JointEngine, self).decode_and_check(part) for part in parts]
        images, is_finite = (torch.cat(values) for values in zip(*decoded))
        return images, is_finite

    @engine_call
    def annotate(self, task: str, capture: Capture | ProjectedCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        check_task(task, self.decoders)
        return self.decoders[task](capture.of(task) if isinstance(capture, ProjectedCapture) else capture, text)

    def _versions(self) -> dict[str, str]:
        return super()._versions() | ({"compiled": "yes"} if self.is_compiled else {})
