"""Families of diffusion models, one record and one file each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from datasetdm_fast.config import Defaults, FlowRule
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.plugins import Registry, load_place
from datasetdm_fast.stages import LEVELS, Level
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from datasetdm_fast.data import AttentionSums, Capture, Text


ANOTHER = "Name such a model with --model."
DAMAGED = "Get the model's files again and compare their checksums, or name another with --model."
Guidance = Literal["cfg", "embedded", "none"]
# Of a loaded model: part -> its config, whose entries are attributes; "scheduler" and "model_index" are mappings.
Configs = Mapping[str, Any]
NameAdapter = Callable[[dict[str, "Tensor"], Configs], dict[str, "Tensor"]]
Read = dict[str, dict[str, Any]]  # the same as a folder's files have them


@dataclass(frozen=True)
class Part:
    """One part of a pipeline, named as in its model_index.json."""

    kind: Literal["text_encoder", "tokenizer", "denoiser", "vae"]
    classes: tuple[str, ...]  # library:class it may be of by model_index.json; the first is what it is loaded as
    is_optional: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.classes, str) or not all(":" in each for each in self.classes):
            raise TypeError(f"classes of a Part are {self.classes!r}, expected a tuple of library:class")


@dataclass(frozen=True)
class Latents:
    """The space that a model draws in; latents are [B, channels, h, w], and packing is a network's own affair.

    An engine sees (z - shift) * scale of the autoencoder's z, or (z - mean) / std of each channel.
    """

    channels: int
    pixels: int  # of a side of one latent cell
    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()  # of each channel; empty: scale and shift say it all
    std: tuple[float, ...] = ()
    leaves_fp16: bool = False  # whether activations of the autoencoder are too large for fp16


@dataclass(frozen=True)
class Backbone:
    name: str
    title: str  # of its models in sentences
    parts: Mapping[str, Part]  # as in model_index.json, without the scheduler
    denoiser: str  # the part that is called at each step
    guidance: Callable[[Configs], Guidance]
    latents: Callable[[Configs], Latents]
    text: Callable[[Configs], tuple[int, int]]  # tokens of an encoded prompt at most, and their width
    multiple: int  # pixels that a side must divide by
    # None: its schedule is made of betas. A timestep of a flow is 1000 sigma and falls, and the output of a call is
    # d latents / d sigma: a BackboneReference turns what was trained with another sign or time.
    flow: FlowRule | None
    # (configs, pixels of a side, halves of a call: 2 for cfg, otherwise 1) -> the levels low, mid, high, highest
    levels: Callable[[Configs, int, int], tuple[Level, ...]]
    defaults: Callable[[Configs], Defaults]
    reference: str  # module:class, a BackboneReference of a name of its own, such as SD3Reference
    fast: str | None = None  # module:class of its fast engine; None: only the reference serves this family
    network_plan: str = ""  # module:function(config, state dict) -> backbones.mmdit_plans.JointPlan, for JOINT_ENGINE
    # of a transformer: how many blocks there are of which a decoder may name others than those of `levels`
    blocks: Callable[[Configs], int] = lambda configs: 0
    halves: tuple[str, ...] = ("bf16", "fp16")  # precisions with half the bits that its activations fit into
    guides_itself: bool = False  # whether it guides otherwise than by uncond + g (cond - uncond), in its reference
    unguided: float = 1.0  # the guidance with cfg at which, and below, the prompt alone counts
    text_network: str | None = None  # module:class of our own text encoders, see models.text_encoder.PromptEncoder
    pads_text: bool = False  # whether its texts are of several lengths, which a mask tells
    has_plans: bool = False  # whether TensorRT's plans are built of its graphs, and long runs on a CPU try these
    most_pixels: Callable[[Configs], int] = lambda configs: 0  # of a side that it has positions for; 0: of any
    patch: int = 2  # latent cells of a side of one image token, for shifts that depend on the size
    # (tensors of a low-rank adapter, configs) -> these under "part.layer" and an ending, or in kohya's form
    name_adapter: NameAdapter | None = None
    file_signs: tuple[str, ...] = ()  # in names of tensors in the original code's files, together in no other family's
    file_parts: Mapping[str, str] = field(default_factory=dict)  # part -> how the names of its tensors in them begin
    # what names and shapes of the denoiser's tensors in them tell of its config, beyond that of full size
    file_config: Callable[[Mapping[str, Tensor]], dict[str, Any]] = lambda state: {}
    file_tokenizers: Mapping[str, bool] = field(default_factory=dict)  # CLIP's -> whether it pads as Open CLIP does
    has_averages: bool = False  # whether labels can be read from the average of its calls' attention
    has_text_maps: bool = False  # whether they can be read from its attention to the prompt, as defaults.attention says
    has_deep_features: bool = False  # whether calls may start from the deep features of an earlier one
    index: Mapping[str, Any] = field(default_factory=dict)  # further entries of a model_index.json that is written
    tokenizer: str = "tokenizer"  # the part whose tokens limit the length of a prompt; where absent, the first
    # (tokenizer, prompt) -> the text with the prompt in it that is encoded; how many of its first tokens are dropped
    wrap: Callable[[Any, str], str] | None = None
    dropped: int = 0
    # the part, where there is one, that reads so many tokens of a prompt of which `tokenizer` cuts off an end
    long_text: Callable[[Configs], tuple[str, int]] = lambda configs: ("", 0)
    # (configs, where they are from) -> as they are used; or Refused
    check: Callable[[Read, str], Read] = lambda configs, source: configs
    # what of a text -> its width for the denoiser, and that which the encoders give
    text_widths: Callable[[Configs], Mapping[str, tuple[int, int]]] = lambda configs: {}
    check_fit: Callable[[LoadedModel], None] = lambda model: None  # raises Refused where parts do not fit otherwise
    licence: Callable[[Configs], str] = lambda configs: ""  # of weights without a card: its name on hubs
    full_size: Read = field(default_factory=dict)  # configs of a usual model, of which files and presets are made
    package: str = ""  # name and version of the package that it is from, where that is another
    seed: int = 0  # of the random weights of its model of full size

    def served_by(self, need: str) -> bool:
        """Whether an engine with this need (EngineKind.needs) runs the family."""
        is_exported = bool(self.text_network or self.network_plan)
        return {"network": self.fast is not None, "export": is_exported, "plans": self.has_plans}.get(need, True)

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The names of its parts of a kind, in their order."""
        return tuple(name for name, part in self.parts.items() if part.kind == kind)

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the parts that hold weights."""
        return tuple(name for name, part in self.parts.items() if part.kind != "tokenizer")


class LoadedModel(Protocol):
    """What a BackboneReference reads of a model; its modules are in fp32, in eval mode, and moved by the engine."""

    @property
    def name(self) -> str: ...

    @property
    def backbone(self) -> Backbone: ...

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...  # by part; an optional one that is absent is missing here

    @property
    def tokenizers(self) -> Mapping[str, Any]: ...  # by part, as transformers have them

    @property
    def loaded_tokenizers(self) -> Mapping[str, Any]: ...  # by part, before transformers are imported for them

    @property
    def configs(self) -> Configs: ...

    @property
    def latents(self) -> Latents: ...

    @property
    def levels(self) -> tuple[Level, ...]: ...

    @property
    def size(self) -> int: ...  # pixels of a side

    @property
    def defaults(self) -> Defaults: ...

    @property
    def text_length(self) -> int: ...  # tokens that a prompt is padded to or cut off at

    def token_ids(self, prompts: Sequence[str], part: str = "") -> Tensor: ...  # [B, T] of a tokenizer


class BackboneReference(Protocol):
    """Modules of diffusers and transformers as they come, run in fp32 and eagerly: the reference of a family."""

    def __init__(self, model: LoadedModel) -> None: ...

    def encode(self, prompts: Sequence[str]) -> Text:
        """What the stock pipeline makes of the prompts, one row each."""

    def predict(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        """[R, C, h, w] outputs for latents [B, C, h, w] and rows of text: [uncond | cond] with cfg, or R = B. Where
        `text.guidance` is given, a family that guides in a way of its own returns the B guided rows.
        """

    def capturing(self) -> AbstractContextManager[list[Capture]]:
        """Within the block one `predict` is captured; its Capture is appended to the list on leaving."""

    def predict_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        """The outputs of `predict`, and the sums with the attention of this call; asked for where a family
        `has_averages`, or `has_text_maps`: then the tokens are those of the prompt, and the class text is not read.
        """

    def predict_and_keep(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Tensor]:
        """The outputs of `predict`, and the deep feature of each image [B, R / B * C, h, w]; asked for, as is
        `predict_from`, where a family `has_deep_features`.
        """

    def predict_from(self, deep: Tensor, latents: Tensor, timestep: float, text: Text) -> Tensor:
        """The outputs of `predict` where the deep feature is that of an earlier call."""

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W] pixels about -1 .. 1."""

    def encode_image(self, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """[B, C, h, w] latents of pixels [B, 3, H, W] in -1 .. 1: posterior means, or samples by `generators`."""


_SD = "datasetdm_fast.engine.backbones.sd:SD"
_SDXL = "datasetdm_fast.engine.backbones.sdxl:SDXL"
_SD3 = "datasetdm_fast.engine.backbones.sd3:SD3"
_FLUX1 = "datasetdm_fast.engine.backbones.flux1:FLUX1"
_FLUX2 = "datasetdm_fast.engine.backbones.flux2_klein:FLUX2_KLEIN"
_Z_IMAGE = "datasetdm_fast.engine.backbones.z_image:Z_IMAGE"
OWN_PIPELINES = {  # diffusers' pipeline class, as model_index.json names it -> module:record
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _FLUX1,
    "Flux2KleinPipeline": _FLUX2,
    "ZImagePipeline": _Z_IMAGE,
    "QwenImagePipeline": "datasetdm_fast.engine.backbones.qwen_image:QWEN_IMAGE",
}
RANDOM_MODELS = {  # preset of full size with random weights -> module:record
    "random-sd14": _SD,
    "random-sdxl": _SDXL,
    "random-sd35": _SD3,
    "random-flux": _FLUX1,
    "random-klein": _FLUX2,
    "random-zimage": _Z_IMAGE,
}
OWN_MODELS = ("demo", "demo-dit", "tiny", *RANDOM_MODELS)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PIPELINES = Registry("backbones", OWN_PIPELINES, Backbone)


def every_backbone() -> list[Backbone]:
    """The records of all families of this package."""
    return [load_place(place) for place in dict.fromkeys(OWN_PIPELINES.values())]


def pipeline_of(backbone: Backbone) -> str:
    """The class of diffusers' pipeline that a record of this package is of."""
    return next(name for name, place in OWN_PIPELINES.items() if load_place(place) is backbone)


def list_supported() -> str:
    """What can be loaded, as the end of a sentence."""
    titles = [backbone.title for backbone in every_backbone()]
    return f"supported are text-to-image models of {', '.join(titles)}, as diffusers folders or single files"


def check_source(name: str, allow_download: bool) -> None:
    """Refuses a model that is neither one of this package's nor a path that is there, nor in the hub's local cache, nor
    may be downloaded.
    """
    path = Path(name)
    if name in OWN_MODELS or path.is_dir() or path.is_file():
        return
    alike = nearest(name, OWN_MODELS) or storage.named_alike(path)
    if not HUB_NAME.fullmatch(name):
        raise Refused(
            f"model: {name!r} is neither one of {', '.join(OWN_MODELS)} nor an existing folder or file{alike}",
            list_supported(),
        )
    if not (allow_download or _is_cached(name)):
        raise Refused(
            f"model: {name!r} is not a folder here{alike}, and as a name on the hub it would have to be downloaded",
            "Add --allow-download, or give a local folder.",
        )


def _is_cached(name: str) -> bool:
    """Whether a repository of the hub was downloaded before."""
    from huggingface_hub import try_to_load_from_cache  # which takes a while

    with suppress(ValueError):  # of a name that no repository has
        return isinstance(try_to_load_from_cache(name, "model_index.json"), str)
    return False


def open_backbone(pipeline: object, source: object) -> Backbone:
    """The record of the family of a pipeline of diffusers."""
    if not isinstance(pipeline, str):  # a list names a file of the folder and a class in it
        raise Refused(
            f"model: {source}: its pipeline is code of its own, {documents.quote(pipeline)}, which is not run here",
            "Take the model as its authors publish it for diffusers, or name another with --model.",
        )
    if pipeline not in PIPELINES:
        raise Refused(f"model: {source} holds a {pipeline}; {list_supported()}", ANOTHER)
    entry: str | Backbone = PIPELINES[pipeline]
    if isinstance(entry, str):
        return load_place(entry)
    return PIPELINES.guard(pipeline, lambda: _check_record(pipeline, entry))


def _check_record(pipeline: str, record: Backbone) -> Backbone:
    """The record of another package with the name of that. What it refers to is there; its levels are checked when they
    are asked for, which takes the configs of a model.
    """
    reference = load_place(record.reference)
    needed = {name for name in vars(BackboneReference) if not name.startswith("_")}
    if not (record.has_averages or record.has_text_maps):
        needed.remove("predict_and_average")
    if not record.has_deep_features:
        needed -= {"predict_and_keep", "predict_from"}
    if absent := sorted(name for name in needed if not hasattr(reference, name)):
        raise TypeError(f"{record.reference} has no {', '.join(absent)}")
    for place in filter(None, (record.fast, record.network_plan, record.text_network)):
        load_place(place)

    def levels(*arguments: Any) -> tuple[Level, ...]:
        return PIPELINES.guard(pipeline, lambda: _check_levels(record.levels(*arguments)), "fails")

    return replace(record, levels=levels, package=PIPELINES.package(pipeline))


def _check_levels(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    if [level.name for level in levels if isinstance(level, Level)] != [*LEVELS]:
        raise TypeError(f"its levels are {levels!r}, expected a Level for each of {', '.join(LEVELS)}")
    return levels
