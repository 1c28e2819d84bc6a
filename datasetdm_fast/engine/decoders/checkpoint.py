"""P-Decoders by configuration: built, saved, loaded, and filled from DatasetDM's own checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from datasetdm_fast.disk import storage as files  # save_decoder has a parameter of that name
from datasetdm_fast.engine.decoders.config import DecoderConfig, read_config, upstream
from datasetdm_fast.engine.decoders.dense import DepthDecoder, HeatmapDecoder, SimccDecoder
from datasetdm_fast.engine.decoders.domain import mixtures, read_domain
from datasetdm_fast.engine.decoders.segmentation import OpenVocabularyDecoder, SegmentationDecoder
from datasetdm_fast.engine.decoders.trunk import Decoder, SpectralConv2d, fold
from datasetdm_fast.engine.models.layers import Uninitialised
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.kernels import reference
from datasetdm_fast.stages import Level
from datasetdm_fast.untrusted import tensors

DECODERS = {
    "segmentation": SegmentationDecoder,
    "open-vocabulary": OpenVocabularyDecoder,
    "depth": DepthDecoder,
    "heatmap": HeatmapDecoder,
    "simcc": SimccDecoder,
}
UNUSED = {  # parameters upstream creates and saves but never reads
    "segmentation": ("query_feat_mlp.", "query_embed_mlp."),
    "simcc": ("high_feature_conv.", "highest_feature_conv.", "high_feature_mix_conv.", "highest_feature_mix_conv."),
}
STORAGE = {"fp32": torch.float32, "fp16": torch.float16}


def build_decoder(config: DecoderConfig, ops: SimpleNamespace = reference) -> Decoder:
    """A decoder with fresh weights, in training mode."""
    return DECODERS[config.kind](config, ops)


def save_decoder(decoder: Decoder, folder: str | Path, storage: str = "fp32") -> Path:
    """The folder with config.json and model.safetensors; `storage` fp16 halves parameters, buffers stay fp32."""
    if storage not in STORAGE:
        raise Refused(
            f"save_decoder: storage is {storage!r}, expected one of {', '.join(STORAGE)}", "Choose one of these."
        )
    if not any(isinstance(module, SpectralConv2d) for module in decoder.modules()):
        raise Refused(
            "save_decoder: the decoder was folded for inference, expected one that can be trained further",
            "Save it before fold(), or read it with read_decoder.",
        )
    folder = Path(folder)
    parameters = dict(decoder.named_parameters())
    state = {
        name: value.detach().to(STORAGE[storage] if name in parameters else value.dtype).contiguous().cpu()
        for name, value in decoder.state_dict().items()
    }
    tensors.check_finite(state, f"{folder}: ")
    # The configuration last: a folder that has one is whole.
    files.publish(
        {folder / "model.safetensors": save(state), folder / "config.json": decoder.config.to_json().encode()}
    )
    return folder


@torch.no_grad()
def round_parameters(decoder: Decoder, storage: str) -> None:
    """Rounds them to what `storage` holds, so that figures are those of the weights that are written."""
    for parameter in decoder.parameters():
        parameter.copy_(parameter.to(STORAGE[storage]))


def load_decoder(folder: str | Path) -> Decoder:
    """The decoder of a folder written by save_decoder, fp32, for inference."""
    return fold(read_decoder(folder))


def read_decoder(folder: str | Path) -> Decoder:
    """The decoder of a folder written by save_decoder, fp32, as it was trained: with upstream's spectral norms, which
    move with every image, so that image k depends on the images before it.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise Missing(
                f"decoder {folder}: {name} is not there", "Give a folder written by training or save_decoder."
            )
    config, weights = read_config(folder), folder / "model.safetensors"
    tensors.check_safetensors(weights)
    with torch.device("meta"), Uninitialised():  # before memory is taken for what the configuration asks for
        decoder = build_decoder(config)
    fill(decoder, load_file(weights), str(folder))
    sketch_width = len(decoder.levels_read) * len(mixtures(decoder.config.width))
    decoder.domain = read_domain(folder, sketch_width)
    return decoder.requires_grad_(False)


FITTING = "Name the model that it was trained on (--model), or train one on this one; --labeller attention needs none."


def check_fits(decoder: Decoder, levels: tuple[Level, ...], label: str, text_width: int = 0) -> None:
    """Refuses a decoder that was trained on a U-Net of other levels, or a text encoder of another width."""
    config = decoder.config
    if config.has_text and text_width and config.text_width != text_width:
        widths = f"a text encoder of width {config.text_width}, but the model's has {text_width}"
        raise Refused(f"{label} decoder: trained on {widths}", FITTING)
    for ours, theirs in zip(config.levels, levels, strict=True):
        if replace(ours, side=theirs.side, blocks=ours.blocks or theirs.blocks) != theirs:
            raise Refused(
                f"{label} decoder: trained on a model whose level {ours.name} has {ours.channels} channels, but this "
                f"model's has {theirs.channels}",
                FITTING,
            )
    if config.kind == "simcc" and config.side != levels[-1].side:
        raise Refused(
            f"{label} decoder: trained on images of {8 * config.side} pixels, but the run makes {8 * levels[-1].side}",
            f"Use --size {8 * config.side}.",
        )


def fill(decoder: Decoder, state: Mapping[str, Tensor], origin: str) -> None:
    """Gives the decoder copies of the tensors in `state`; refused with all that does not match."""
    check_fit(decoder, state, origin)
    tensors.check_finite(state, f"{origin}: ")
    ours = decoder.state_dict()
    copies = {name: value.to(ours[name].dtype, copy=True) for name, value in state.items()}
    decoder.load_state_dict(copies, assign=True)


def check_fit(decoder: Decoder, state: Mapping[str, Tensor], origin: str) -> None:
    """Refuses a state that has not exactly the decoder's tensors, by every one that differs."""
    remedy = "Check that the configuration is the one it was trained with."
    tensors.check_fit(decoder.state_dict(), state, origin, f"this {decoder.config.kind} decoder", remedy)


COUNTED = {"semantic": 19, "instance": 80}  # classes of upstream's Cityscapes and COCO decoders
KINDS = {task: ("segmentation", {"classes": tuple(map(str, range(count)))}) for task, count in COUNTED.items()}
KINDS |= {"depth": ("depth", {}), "pose": ("heatmap", {})}


def seeded_decoders(levels: Sequence[Level], text_width: int) -> dict[str, Decoder]:
    """A decoder with seeded weights for each task but the open-vocabulary one, as wide against the UNet as upstream's,
    in training mode.
    """
    channels = levels[-1].features[0]
    width = max(16, 256 * channels // 320 // 16 * 16)
    sizes = {"levels": levels, "text_width": text_width, "width": width}
    sizes |= {"mask_dim": width, "depth_width": 4 * width, "feed_forward": 8 * width}
    decoders = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for task, (kind, names) in KINDS.items():
            decoders[task] = build_decoder(upstream(kind, task=task, min_area=0, **sizes, **names))
    for place in (0, 2):  # as initialised, the depth head gives the same depth everywhere and hides its inputs
        weight, generator = decoders["depth"].last_layer_depth[place].weight, torch.Generator().manual_seed(1)
        torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
    return decoders
