"""What the transformers of mmdit.py are made of, family by family: where the layers of each stream stand in the state
dict of diffusers' module, the vectors of their norms, and the places of their tokens.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.engine.backbones.flux2_klein import CONCEPT_PLACE
from datasetdm_fast.engine.backbones.joint_attention import grid

State = MutableMapping[str, Tensor]
THREE = ("shift1", "scale1", "gate1")
SIX = (*THREE, "shift2", "scale2", "gate2")
NINE = (*SIX, "shift3", "scale3", "gate3")
LAST = ("scale1", "shift1")  # of a stream that nothing reads after its attention
BOUNDED = ("scale1", "gate1", "scale2", "gate2")  # Z-Image's
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
NORMS, ADDED_NORMS = ("attn.norm_q", "attn.norm_k"), ("attn.norm_added_q", "attn.norm_added_k")


class StreamPlan(NamedTuple):
    """One stream of a block; names of layers begin where the block's do, that of a modulation at the root."""

    qkv: tuple[str, ...]
    norms: tuple[str, str]  # of the heads of queries and keys
    out: str  # empty: nothing reads the stream after the attention
    modulation: str = ""
    vectors: tuple[str, ...] = ()  # what the modulation gives, in its order
    wide: tuple[str, ...] = ()  # empty: what is fed forward is part of the product of queries, keys and values
    narrow: str = ""
    is_gated: bool = False  # SwiGLU, otherwise GELU
    before: tuple[str, str] = ("", "")  # weights of RMS norms before attention and feed-forward layers
    after: tuple[str, str] = ("", "")  # and after them
    second: tuple[str, ...] = ()  # queries, keys and values of the image's second attention, to itself


class BlockPlan(NamedTuple):
    prefix: str
    streams: tuple[StreamPlan, ...]  # image and text, or one of both


@dataclass(frozen=True)
class JointPlan:
    state: State
    heads: int
    width: int  # of a head
    patch: int  # latent cells of a side of a token
    blocks: tuple[BlockPlan, ...]
    entry: str
    exit: str
    last: str  # what gives the vectors of the last norm
    text: str
    time: tuple[str, str]
    clock: Callable[[Tensor], Tensor]  # of a timestep 0 .. 1000 what its waves are of
    guidance: tuple[str, str] | None = None
    pooled: tuple[str, str] | None = None
    text_norm: str = ""
    learned: str = ""  # [1, largest ** 2, D] what is added to image tokens at their places
    # (tokens of a side, of the text, of that of each row, device) -> [R or 1, N, axes] places by which heads turn
    places: Callable[[int, int, Tensor | None, torch.device], Tensor] | None = None
    concept_place: int = 0  # the token of the text where each word of ConceptAttention stands
    axes: tuple[int, ...] = ()  # numbers of a head that turn by each
    theta: float = 10000.0
    eps: float = 1e-6
    head_eps: float = 1e-6
    last_eps: float = 1e-6  # of the norm before the last product
    padding: tuple[str, str] = ("", "")  # tokens that pad images and texts
    image_blocks: tuple[BlockPlan, ...] = ()  # of the image alone, before the others
    text_blocks: tuple[BlockPlan, ...] = ()
    final: tuple[str, ...] = LAST
    is_bounded: bool = False  # gates are hyperbolic tangents, and vectors are read from the embedding itself


PADDED_TOKENS = 32  # to a multiple of it Z-Image pads the tokens of an image, and those of a text


def _pair(prefix: str) -> tuple[str, str]:
    return f"{prefix}.linear_1", f"{prefix}.linear_2"


def _by_channel(value: Tensor, patch: int) -> Tensor:
    """Rows of (row, column, channel) in the order of pixel_unshuffle: channel, row, column."""
    return value.unflatten(0, (patch, patch, -1)).movedim(2, 0).flatten(0, 2)


def _gelu(name: str) -> dict[str, Any]:
    """Feed-forward layers of diffusers with GELU."""
    return {"wide": (f"{name}.net.0.proj",), "narrow": f"{name}.net.2"}


def _swiglu(name: str) -> dict[str, Any]:
    """Those of FLUX.2."""
    return {"wide": (f"{name}.linear_in",), "narrow": f"{name}.linear_out", "is_gated": True}


def _image(modulation: str, fed: dict[str, Any]) -> StreamPlan:
    """The image's stream of two, as diffusers names it."""
    return StreamPlan(QKV, NORMS, "attn.to_out.0", modulation, SIX, **fed)


def _text(modulation: str, fed: dict[str, Any]) -> StreamPlan:
    return StreamPlan(ADDED_QKV, ADDED_NORMS, "attn.to_add_out", modulation, SIX, **fed)


def _joint(config: Any, state: State, patch: int, blocks: Sequence[BlockPlan], **more: Any) -> JointPlan:
    """A network whose heads and last layers are named as diffusers usually does."""
    heads, width = config.num_attention_heads, config.attention_head_dim
    return JointPlan(state, heads, width, patch, tuple(blocks), exit="proj_out", last="norm_out.linear", **more)


def _by_sigma(timestep: Tensor) -> Tensor:
    """The timestep as it comes back from a sigma, with its rounding."""
    return timestep / 1000 * 1000


def _split_out(state: State, prefix: str, name: str, width: int) -> dict[str, Any]:
    """The halves of the product that ends a block: of the attention, and of what is fed forward beside it."""
    place = f"{prefix}.{name}"
    weight = state[f"{place}.weight"]
    state[f"{place}.attended.weight"], state[f"{place}.fed.weight"] = weight[:, :width], weight[:, width:]
    if f"{place}.bias" in state:
        state[f"{place}.attended.bias"] = state[f"{place}.bias"]
    return {"out": f"{name}.attended", "narrow": f"{name}.fed"}


def sd3(config: Any, state: State) -> JointPlan:
    for kind in ("weight", "bias"):
        state[f"proj_out.{kind}"] = _by_channel(state[f"proj_out.{kind}"], config.patch_size)
    blocks = []
    for number in range(config.num_layers):
        prefix = f"transformer_blocks.{number}"
        image = _image(f"{prefix}.norm1.linear", _gelu("ff"))
        if f"{prefix}.attn2.to_q.weight" in state:
            image = image._replace(vectors=NINE, second=tuple(name.replace("attn", "attn2") for name in QKV))
        text = _text(f"{prefix}.norm1_context.linear", _gelu("ff_context"))
        if number == config.num_layers - 1:
            text = StreamPlan(ADDED_QKV, ADDED_NORMS, "", text.modulation, LAST)
        blocks.append(BlockPlan(prefix, (image, text)))
    return _joint(
        config,
        state,
        config.patch_size,
        blocks,
        entry="pos_embed.proj",
        text="context_embedder",
        time=_pair("time_text_embed.timestep_embedder"),
        clock=lambda timestep: timestep,
        pooled=_pair("time_text_embed.text_embedder"),
        learned="pos_embed.pos_embed",
    )


def flux1(config: Any, state: State) -> JointPlan:
    width, blocks = config.num_attention_heads * config.attention_head_dim, []
    for number in range(config.num_layers):
        prefix = f"transformer_blocks.{number}"
        image = _image(f"{prefix}.norm1.linear", _gelu("ff"))
        text = _text(f"{prefix}.norm1_context.linear", _gelu("ff_context"))
        blocks.append(BlockPlan(prefix, (image, text)))
    for number in range(config.num_single_layers):
        prefix = f"single_transformer_blocks.{number}"
        halves = _split_out(state, prefix, "proj_out", width)
        single = StreamPlan((*QKV, "proj_mlp"), NORMS, modulation=f"{prefix}.norm.linear", vectors=THREE, **halves)
        blocks.append(BlockPlan(prefix, (single,)))
    return _joint(
        config,
        state,
        2,
        blocks,
        entry="x_embedder",
        text="context_embedder",
        time=_pair("time_text_embed.timestep_embedder"),
        clock=_by_sigma,
        guidance=_pair("time_text_embed.guidance_embedder") if config.guidance_embeds else None,
        pooled=_pair("time_text_embed.text_embedder"),
        places=lambda side, tokens, lengths, device: torch.cat(
            [grid(side, 3, device), torch.zeros(tokens, 3, device=device)]
        )[None],
        axes=tuple(config.axes_dims_rope),
    )


def _count_text(side: int, tokens: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Places of FLUX.2: rows and columns of the image, numbers of the text's tokens."""
    text = torch.zeros(tokens, 4, device=device)
    text[:, 3] = torch.arange(tokens)
    return torch.cat([grid(side, 4, device), text])[None]


def flux2(config: Any, state: State) -> JointPlan:
    width, blocks = config.num_attention_heads * config.attention_head_dim, []
    for number in range(config.num_layers):
        image = _image("double_stream_modulation_img.linear", _swiglu("ff"))
        text = _text("double_stream_modulation_txt.linear", _swiglu("ff_context"))
        blocks.append(BlockPlan(f"transformer_blocks.{number}", (image, text)))
    for number in range(config.num_single_layers):
        prefix = f"single_transformer_blocks.{number}"
        halves = _split_out(state, prefix, "attn.to_out", width)
        single = StreamPlan(
            ("attn.to_qkv_mlp_proj",),
            NORMS,
            modulation="single_stream_modulation.linear",
            vectors=THREE,
            is_gated=True,
            **halves,
        )
        blocks.append(BlockPlan(prefix, (single,)))
    return _joint(
        config,
        state,
        1,
        blocks,
        entry="x_embedder",
        text="context_embedder",
        time=_pair("time_guidance_embed.timestep_embedder"),
        clock=_by_sigma,
        places=_count_text,
        concept_place=CONCEPT_PLACE,
        axes=tuple(config.axes_dims_rope),
        theta=config.rope_theta,
        eps=config.eps,
        head_eps=config.eps,
        last_eps=config.eps,
    )


def _put_image_last(side: int, tokens: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Places of Z-Image: the first axis numbers the tokens of the text, and the whole image is one more of them."""
    ends = torch.full((1,), tokens, device=device) if lengths is None else lengths
    image = F.pad(grid(side, 3, device), (0, 0, 0, -(side**2) % PADDED_TOKENS))
    text = F.pad(torch.arange(1.0, tokens + 1, device=device)[:, None], (0, 2))
    fixed = torch.cat([image, text])
    is_image = torch.zeros_like(fixed)
    is_image[: side**2, 0] = 1
    return fixed + (ends + 1)[:, None, None].float() * is_image


def z_image(config: Any, state: State) -> JointPlan:
    """Z-Image, which gives the way back to noise: with the other sign."""
    first, last = "all_x_embedder.2-1", "all_final_layer.2-1"
    state[f"{first}.weight"] = _by_channel(state[f"{first}.weight"].T, 2).T
    for kind in ("weight", "bias"):
        state[f"{last}.linear.{kind}"] = -_by_channel(state[f"{last}.linear.{kind}"], 2)

    def build(name: str, count: int, is_modulated: bool = True) -> tuple[BlockPlan, ...]:
        stream = StreamPlan(
            tuple(f"attention.{part}" for part in ("to_q", "to_k", "to_v")),
            ("attention.norm_q", "attention.norm_k"),
            "attention.to_out.0",
            wide=("feed_forward.w1", "feed_forward.w3"),
            narrow="feed_forward.w2",
            is_gated=True,
            before=("attention_norm1", "ffn_norm1"),
            after=("attention_norm2", "ffn_norm2"),
        )
        prefixes = [f"{name}.{number}" for number in range(count)]
        modulations = [(f"{prefix}.adaLN_modulation.0", BOUNDED) if is_modulated else ("", ()) for prefix in prefixes]
        return tuple(
            BlockPlan(prefix, (stream._replace(modulation=modulation, vectors=vectors),))
            for prefix, (modulation, vectors) in zip(prefixes, modulations)
        )

    return JointPlan(
        state,
        config.n_heads,
        config.dim // config.n_heads,
        2,
        build("layers", config.n_layers),
        entry=first,
        exit=f"{last}.linear",
        last=f"{last}.adaLN_modulation.1",
        final=("scale1",),
        text="cap_embedder.1",
        text_norm="cap_embedder.0",
        time=("t_embedder.mlp.0", "t_embedder.mlp.2"),
        clock=lambda timestep: (1000 - timestep) / 1000 * config.t_scale,
        places=_put_image_last,
        axes=tuple(config.axes_dims),
        theta=config.rope_theta,
        eps=config.norm_eps,
        head_eps=1e-5,
        padding=("x_pad_token", "cap_pad_token"),
        image_blocks=build("noise_refiner", config.n_refiner_layers),
        text_blocks=build("context_refiner", config.n_refiner_layers, is_modulated=False),
        is_bounded=True,
    )


def _centre_image(side: int, tokens: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Places of Qwen-Image: rows and columns from the centre; the text goes on along the diagonal."""
    image = grid(side, 3, device)
    image[:, 1:] -= side - side // 2
    text = side // 2 + torch.arange(tokens, dtype=image.dtype, device=device)
    return torch.cat([image, text[:, None].expand(-1, 3)])[None]


def qwen_image(config: Any, state: State) -> JointPlan:
    blocks = []
    for number in range(config.num_layers):
        prefix = f"transformer_blocks.{number}"
        image, text = _image(f"{prefix}.img_mod.1", _gelu("img_mlp")), _text(f"{prefix}.txt_mod.1", _gelu("txt_mlp"))
        if number == config.num_layers - 1:
            text = text._replace(out="", wide=(), narrow="")
        blocks.append(BlockPlan(prefix, (image, text)))
    return _joint(
        config,
        state,
        2,
        blocks,
        entry="img_in",
        text="txt_in",
        text_norm="txt_norm",
        time=_pair("time_text_embed.timestep_embedder"),
        clock=_by_sigma,
        places=_centre_image,
        axes=tuple(config.axes_dims_rope),
    )
