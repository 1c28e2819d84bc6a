"""Names and shapes of the tensors of a U-Net, CLIP's text encoders and an autoencoder, from configurations alone."""

from collections.abc import Iterator, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def of_text_encoder(config: Mapping[str, Any]) -> Shapes:
    """The tensors of CLIP's text encoder, and with a `projection_dim` of the projection of the second one's."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for k in range(config["num_hidden_layers"]):
        place = f"encoder.layers.{k}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{place}self_attn.{name}", width, width)
        shapes |= _norm(f"{place}layer_norm1", width) | _norm(f"{place}layer_norm2", width)
        shapes |= _linear(f"{place}mlp.fc1", width, inner) | _linear(f"{place}mlp.fc2", inner, width)
    if "projection_dim" in config:
        shapes["text_projection.weight"] = (config["projection_dim"], width)
    return shapes | _norm("final_layer_norm", width)


def of_unet(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a UNet."""
    widths, count = config["block_out_channels"], config["layers_per_block"]
    read = config["cross_attention_dim"], config["use_linear_projection"]
    depths, first, lowest, time = _depths(config), widths[0], len(widths) - 1, 4 * widths[0]
    shapes = _convolution("conv_in", config["in_channels"], first)
    shapes |= _linear("time_embedding.linear_1", first, time) | _linear("time_embedding.linear_2", time, time)
    if config.get("addition_embed_type"):
        shapes |= _linear("add_embedding.linear_1", config["projection_class_embeddings_input_dim"], time)
        shapes |= _linear("add_embedding.linear_2", time, time)
    skips, width = [first], first
    for depth, wide in enumerate(widths):
        block = f"down_blocks.{depth}."
        for k in range(count):
            shapes |= _resnet(f"{block}resnets.{k}.", width, wide, time)
            shapes |= _transformer(f"{block}attentions.{k}.", wide, depths[depth], *read)
            width = wide
            skips.append(width)
        if depth < lowest:
            shapes |= _convolution(f"{block}downsamplers.0.conv", width, width)
            skips.append(width)
    for k in (0, 1):
        shapes |= _resnet(f"mid_block.resnets.{k}.", width, width, time)
    shapes |= _transformer("mid_block.attentions.0.", width, depths[-1] or 1, *read)
    for level, wide in enumerate(reversed(widths)):
        block = f"up_blocks.{level}."
        for k in range(count + 1):
            shapes |= _resnet(f"{block}resnets.{k}.", width + skips.pop(), wide, time)
            shapes |= _transformer(f"{block}attentions.{k}.", wide, depths[lowest - level], *read)
            width = wide
        shapes |= _convolution(f"{block}upsamplers.0.conv", width, width) if level < lowest else {}
    return shapes | _norm("conv_norm_out", first) | _convolution("conv_out", first, config["out_channels"])


def _depths(config: Mapping[str, Any]) -> list[int]:
    """The blocks of a transformer of each down block; none where it has no attention."""
    blocks = config.get("transformer_layers_per_block", 1)
    kinds = config["down_block_types"]
    each = [blocks] * len(kinds) if isinstance(blocks, int) else blocks
    return [depth if kind.startswith("CrossAttn") else 0 for kind, depth in zip(kinds, each, strict=True)]


def of_vae(config: Mapping[str, Any]) -> Shapes:
    """The tensors of the autoencoder: its encoder, its decoder and the convolutions between them."""
    widths, count, latents = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    shapes = dict(_half("encoder.", config["in_channels"], widths, count, 2 * latents, "down"))
    shapes |= dict(_half("decoder.", latents, widths[::-1], count + 1, config["out_channels"], "up"))
    if config.get("use_quant_conv", True):
        shapes |= _pointwise("quant_conv", 2 * latents, 2 * latents)
        shapes |= _pointwise("post_quant_conv", latents, latents)
    return shapes


def _half(
    place: str, inputs: int, widths: tuple[int, ...], count: int, outputs: int, way: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """One half of the autoencoder; its middle lies where the images are smallest."""
    width = widths[0]
    yield from _convolution(f"{place}conv_in", inputs, width).items()
    for level, wide in enumerate(widths):
        block = f"{place}{way}_blocks.{level}."
        for k in range(count):
            yield from _resnet(f"{block}resnets.{k}.", width, wide).items()
            width = wide
        if level < len(widths) - 1:
            yield from _convolution(f"{block}{way}samplers.0.conv", width, width).items()
    inner = widths[-1] if way == "down" else widths[0]
    for k in (0, 1):
        yield from _resnet(f"{place}mid_block.resnets.{k}.", inner, inner).items()
    attention = f"{place}mid_block.attentions.0."
    yield from _norm(f"{attention}group_norm", inner).items()
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{attention}{name}", inner, inner).items()
    yield from _norm(f"{place}conv_norm_out", width).items()
    yield from _convolution(f"{place}conv_out", width, outputs).items()


def _resnet(place: str, inputs: int, outputs: int, time: int = 0) -> Shapes:
    shapes = _norm(f"{place}norm1", inputs) | _convolution(f"{place}conv1", inputs, outputs)
    shapes |= _linear(f"{place}time_emb_proj", time, outputs) if time else {}
    shapes |= _norm(f"{place}norm2", outputs) | _convolution(f"{place}conv2", outputs, outputs)
    return shapes | (_pointwise(f"{place}conv_shortcut", inputs, outputs) if inputs != outputs else {})


def _transformer(place: str, width: int, depth: int, text: int, is_linear: bool) -> Shapes:
    if not depth:
        return {}
    shapes = _norm(f"{place}norm", width)
    for name in ("proj_in", "proj_out"):
        shapes |= _linear(f"{place}{name}", width, width) if is_linear else _pointwise(f"{place}{name}", width, width)
    for k in range(depth):
        block = f"{place}transformer_blocks.{k}."
        for name in ("norm1", "norm2", "norm3"):
            shapes |= _norm(f"{block}{name}", width)
        for name, read in (("attn1", width), ("attn2", text)):
            for part, inputs in (("to_q", width), ("to_k", read), ("to_v", read)):
                shapes[f"{block}{name}.{part}.weight"] = (width, inputs)
            shapes |= _linear(f"{block}{name}.to_out.0", width, width)
        shapes |= _linear(f"{block}ff.net.0.proj", width, 8 * width) | _linear(f"{block}ff.net.2", 4 * width, width)
    return shapes


def _convolution(place: str, inputs: int, outputs: int) -> Shapes:
    return {f"{place}.weight": (outputs, inputs, 3, 3), f"{place}.bias": (outputs,)}


def _pointwise(place: str, inputs: int, outputs: int) -> Shapes:
    return {f"{place}.weight": (outputs, inputs, 1, 1), f"{place}.bias": (outputs,)}


def _linear(place: str, inputs: int, outputs: int) -> Shapes:
    return {f"{place}.weight": (outputs, inputs), f"{place}.bias": (outputs,)}


def _norm(place: str, channels: int) -> Shapes:
    return {f"{place}.weight": (channels,), f"{place}.bias": (channels,)}
