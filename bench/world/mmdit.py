"""python -m bench.world.mmdit PARTS --out DIR: the model folder, for StableDiffusion3Pipeline, of weights that
bench.world.flow stored in two files.
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from bench.world.tokenizer import build_tokenizer
from bench.world.train import SEED, SHIPPED, copy_text
from bench.world.worlds import WORLDS
from datasetdm_fast.command_line.ending import run_command

CELLS, WIDTH, HEADS, BLOCKS = 16, 192, 6, 6
STANDING = 3  # zero tokens in training, which stand for any number of them
ABSENT = -30.0  # of a token's logits: it is not there
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None, "dtype": torch.float32}  # how such a folder is loaded
PREFIX = "text_model."  # of the text encoder's weights, in some versions of transformers


def build_transformer(channels: int, text_width: int) -> SD3Transformer2DModel:
    torch.manual_seed(SEED)
    net = SD3Transformer2DModel(
        sample_size=CELLS, patch_size=1, in_channels=channels, out_channels=channels, num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, joint_attention_dim=2 * text_width,
        caption_projection_dim=WIDTH, pooled_projection_dim=2 * text_width, pos_embed_max_size=CELLS,
        qk_norm="rms_norm",
    )  # fmt: skip
    for name, module in net.named_modules():
        # Every block begins as the identity (Peebles and Xie 2023).
        if isinstance(module, torch.nn.Linear) and ("norm1" in name or "norm_out" in name or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return net


def build_text(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The demo model's text encoder, with rows for all tokens, and the identity as its projection."""
    config = CLIPTextConfig.from_pretrained(SHIPPED / "text_encoder")
    config.vocab_size, config.bos_token_id = len(tokenizer), tokenizer.bos_token_id
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    config.projection_dim = config.hidden_size
    torch.manual_seed(SEED)
    plain = CLIPTextModel(config)
    copy_text(SHIPPED, tokenizer, plain)
    text = CLIPTextModelWithProjection(config).float()  # not in the precision that the file was stored in
    projection = {"text_projection.weight": torch.eye(config.hidden_size)}
    load_text(text, {key.removeprefix(PREFIX): value for key, value in plain.state_dict().items()} | projection)
    return text


def load_text(text: CLIPTextModelWithProjection, state: dict[str, Tensor]) -> None:
    names = {key.removeprefix(PREFIX): key for key in text.state_dict()}
    text.load_state_dict({names[key]: value for key, value in state.items() if key in names})


def build_autoencoder(channels: int) -> AutoencoderKL:
    """The demo model's autoencoder; with another number of latent channels, the layers around them are fresh."""
    given = AutoencoderKL.from_pretrained(SHIPPED / "vae", dtype=torch.float32)
    torch.manual_seed(SEED)
    model = AutoencoderKL.from_config({**given.config, "latent_channels": channels})
    own = model.state_dict()
    model.load_state_dict(own | {k: v for k, v in given.state_dict().items() if v.shape == own[k].shape})
    return model


def encode(text: CLIPTextModelWithProjection, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What StableDiffusion3Pipeline makes of a prompt with this encoder as both of its CLIP encoders, before the zero
    tokens: [B, T, 2 C] and [B, 2 C].
    """
    output = text(tokens, output_hidden_states=True)
    states, pooled = output.hidden_states[-2], output.text_embeds
    return torch.cat([states, states], -1), torch.cat([pooled, pooled], -1)


class CountedAttention:
    """Joint attention of image and text with a bias per token. Equal tokens stay equal, so the zero tokens that the
    pipeline puts in place of a third text encoder's are a few with the logarithm of their number as bias.
    """

    def __call__(
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(values: Tensor) -> Tensor:
            return values.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states
        v = torch.cat([heads(attention.to_v(image)), heads(attention.add_v_proj(text))], 2)
        q = torch.cat(
            [
                attention.norm_q(heads(attention.to_q(image))),
                attention.norm_added_q(heads(attention.add_q_proj(text))),
            ],
            2,
        ).to(v.dtype)
        k = torch.cat(
            [
                attention.norm_k(heads(attention.to_k(image))),
                attention.norm_added_k(heads(attention.add_k_proj(text))),
            ],
            2,
        ).to(v.dtype)
        bias = None if attention_mask is None else attention_mask.to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        image, text = mixed.split([image.shape[1], text.shape[1]], 1)
        if not attention.context_pre_only:
            text = attention.to_add_out(text)
        return attention.to_out[0](image), text


def zero_tokens(context: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The context with standing zero tokens, and the bias [B, 1, 1, S] that makes them `counts` [B] of them."""
    rows, length, width = context.shape
    standing = torch.log(counts / STANDING).clamp(min=ABSENT)[:, None].expand(-1, STANDING)
    bias = torch.cat([standing.new_zeros(rows, CELLS**2 + length), standing], 1)
    return torch.cat([context, context.new_zeros(rows, STANDING, width)], 1), bias[:, None, None]


def draw_counts(rows: int, generator: torch.Generator, device: str) -> Tensor:
    """[rows] numbers of zero tokens: half of them 256, the pipeline's default, the others any number down to none."""
    some = torch.exp(torch.rand(rows, generator=generator, device=device) * math.log(257)).floor() - 1
    return torch.where(torch.rand(rows, generator=generator, device=device) < 0.5, 256.0, some)


def store_parts(
    folder: Path, world: str, net: SD3Transformer2DModel, text: CLIPTextModelWithProjection, autoencoder: AutoencoderKL
) -> None:
    """The weights in fp16, in two files below 16 MiB each, with what a folder is made of them from."""
    folder.mkdir(parents=True, exist_ok=True)
    others = {f"text.{key.removeprefix(PREFIX)}": value for key, value in text.state_dict().items()}
    others |= {f"vae.{key}": value for key, value in autoencoder.state_dict().items()}
    about = {"world": world, "vae": described(autoencoder)}
    files = {"transformer": (net.state_dict(), {"config": described(net)}), "others": (others, about)}
    for name, (state, metadata) in files.items():
        path = folder / f"{name}.safetensors"
        halved = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in state.items()}
        save_file(halved, path.with_suffix(".tmp"), metadata)
        path.with_suffix(".tmp").replace(path)


def described(model: SD3Transformer2DModel | AutoencoderKL) -> str:
    return json.dumps({key: value for key, value in model.config.items() if not key.startswith("_")})


def read_part(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def assemble(parts: Path, folder: Path) -> None:
    """Writes the model folder of stored weights, for the stock StableDiffusion3Pipeline."""
    from diffusers import StableDiffusion3Pipeline

    state, about = read_part(parts / "transformer.safetensors")
    net = SD3Transformer2DModel.from_config(json.loads(about["config"]))
    net.load_state_dict(state)
    state, about = read_part(parts / "others.safetensors")
    autoencoder = AutoencoderKL.from_config(json.loads(about["vae"]))
    autoencoder.load_state_dict({k.removeprefix("vae."): v for k, v in state.items() if k.startswith("vae.")})
    tokenizer = build_tokenizer(folder / "tokenizer", WORLDS[about["world"]])
    text = build_text(tokenizer)
    load_text(text, {k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")})
    text = text.half()
    pipeline = StableDiffusion3Pipeline(
        net.half(), FlowMatchEulerDiscreteScheduler(), autoencoder.half(),
        text, tokenizer, copy.deepcopy(text), tokenizer, None, None,
    )  # fmt: skip
    files = {name: (folder / "tokenizer" / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    pipeline.save_pretrained(folder, safe_serialization=True)
    for place in ("tokenizer", "tokenizer_2"):
        for name, content in files.items():
            (folder / place / name).write_bytes(content)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.world.mmdit", description=__doc__)
    parser.add_argument("parts", type=Path, help="folder of transformer.safetensors and others.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    options = parser.parse_args(arguments)
    assemble(options.parts, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
