"""A loaded diffusion model: its networks, tokenizers, sampler settings and where they came from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from datasetdm_fast.config import Defaults
from datasetdm_fast.engine.backbones import Backbone, Configs, Guidance, Latents
from datasetdm_fast.engine.backbones.fitting import check_fit, check_size
from datasetdm_fast.engine.loading.tokenizer import OwnTokenizer, limit, token_spans
from datasetdm_fast.engine.models.layers import room
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import Level
from datasetdm_fast.untrusted.tensors import check_finite

UNKNOWN_LICENCE = "unknown: ask the model's owner"
StorageType = Callable[[str, Tensor], torch.dtype]  # (name, tensor) -> the dtype in which it is kept in memory


class Modules(Mapping[str, nn.Module]):
    """The modules of networks; each is built when it is first read."""

    def __init__(self, networks: Mapping[str, Network]):
        self._networks = networks

    def __getitem__(self, part: str) -> nn.Module:
        return self._networks[part].module

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)


@dataclass(frozen=True, eq=False)
class Model:
    """A text-to-image model in fp32, in eval mode, without gradients, and what a run records of it."""

    name: str
    source: str
    backbone: Backbone
    loaded_tokenizers: Mapping[str, Any]  # by part
    networks: Mapping[str, Network]  # by part
    scheduler: dict[str, Any]
    defaults: Defaults
    size: int  # pixels of a side
    digests: dict[str, str]  # part -> SHA-256 of its files, or the recipe of seeded weights
    licence: str
    index: Mapping[str, Any] = field(default_factory=dict)  # of its model_index.json
    scale: float = 0.0  # the guidance that it is sampled with; 0: its default
    blocks: tuple[tuple[int, ...], ...] = ()  # that its levels low, mid and high read; (): those of its record

    @cached_property
    def draws(self) -> tuple[str, ...]:
        """The things that it can draw, if its card lists them as `draws: [ball, cube]`."""
        front = _front_matter(Path(self.source)) if self.source else ""
        listed = re.search(r"^draws:\s*\[(.*)\]\s*$", front, re.MULTILINE)
        return tuple(filter(None, (word.strip().strip("\"'") for word in listed[1].split(",")))) if listed else ()

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """By part, the modules of diffusers and transformers."""
        return Modules(self.networks)

    @property
    def denoiser(self) -> Network:
        """What is called at each step."""
        return self.networks[self.backbone.denoiser]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that limits the length of a prompt, a copy: tokens are counted in any thread, and that would
        change how one that encodes prompts pads and cuts them.
        """
        present = self.loaded_tokenizers if self.backbone.wrap is None else self.tokenizers
        tokenizer = present.get(self.backbone.tokenizer) or next(iter(present.values()))
        most = min(self.backbone.text(self.configs)[0], tokenizer.model_max_length)
        part, length = self.backbone.long_text(self.configs)
        longer = {"longer": limit(present[part], length)} if part in present else {}
        wrap, dropped = self.backbone.wrap, self.backbone.dropped
        return limit(tokenizer, most, spans=lambda text: token_spans(self.tokenizer, text, wrap, dropped), **longer)

    @cached_property
    def tokenizers(self) -> Mapping[str, Any]:
        """By part, as transformers have them."""
        return {
            part: tokenizer.load() if isinstance(tokenizer, OwnTokenizer) else tokenizer
            for part, tokenizer in self.loaded_tokenizers.items()
        }

    @cached_property
    def configs(self) -> Configs:
        parts = {part: network.config for part, network in self.networks.items()}
        return {**parts, "scheduler": self.scheduler, "model_index": self.index}

    @cached_property
    def latents(self) -> Latents:
        return self.backbone.latents(self.configs)

    @cached_property
    def guidance(self) -> Guidance:
        return self.backbone.guidance(self.configs)

    @property
    def halves(self) -> int:
        """Rows of a call for each image at the model's own guidance: two with classifier-free guidance."""
        return 2 if self.guidance_at(self.defaults.guidance) == "cfg" else 1

    def guidance_at(self, guidance: float) -> Guidance:
        """How calls are guided at this guidance scale."""
        return "none" if self.guidance == "cfg" and guidance <= self.backbone.unguided else self.guidance

    def has_negative(self, guidance: float) -> bool:
        """Whether a call at this guidance has rows of negative prompts, for its output or for what decoders read."""
        return self.guidance_at(guidance) == "cfg" or self.levels[-1].halves == 2

    @property
    def image_tokens(self) -> int:
        """Tokens of an image in a transformer."""
        return int((self.latent_shape()[1] // self.backbone.patch) ** 2)

    @property
    def flow(self) -> dict[str, Any]:
        """Arguments of make_schedule for a flow-matching model, none for others."""
        return {} if self.backbone.flow is None else {"flow": self.backbone.flow, "tokens": self.image_tokens}

    def latent_shape(self) -> tuple[int, int, int]:  # C, h, w
        """Of the latents of an image."""
        side = self.size // self.latents.pixels
        return self.latents.channels, side, side

    def with_modules(self, **modules: nn.Module) -> Model:
        """A copy of this model in which these networks replace those of the same name."""
        return replace(
            self, networks={**self.networks, **{name: Network.of(module) for name, module in modules.items()}}
        )

    @contextmanager
    def built_for_now(self) -> Iterator[None]:
        """Unloads at the end of the block the networks that are built within it."""
        unbuilt = [network for network in self.networks.values() if not network.is_built]
        try:
            yield
        finally:
            for network in unbuilt:
                network.unload()

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, padding included."""
        return int(self.tokenizer.model_max_length)

    @property
    def text_width(self) -> int:
        """Numbers of a token, as the denoiser reads it."""
        return self.backbone.text(self.configs)[1]

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels of its captures, low to highest."""
        levels = self.backbone.levels(self.configs, self.size, self.halves)
        chosen = tuple(level.reading(blocks) for level, blocks in zip(levels, self.blocks))
        return *chosen, *levels[len(chosen) :]

    def reading(self, blocks: Sequence[Sequence[int]], whose: str = "--blocks") -> Model:
        """This model with levels low, mid and high that read these blocks, by default those of its record. A refusal
        begins with `whose`, which named them.
        """
        count, named = self.backbone.blocks(self.configs), sorted({block for level in blocks for block in level})
        if named and not count:
            raise Refused(
                f"{whose}: {self.backbone.title} has no blocks to choose, its decoders read fixed levels",
                "Leave --blocks out, or use a decoder made for this model.",
            )
        if named and named[-1] >= count:
            raise Refused(
                f"{whose}: block {named[-1]} is not one of the {count} of {self.name}",
                f"Choose from 0 to {count - 1}, or use a decoder made for this model.",
            )
        usual, chosen = replace(self, blocks=()), tuple(map(tuple, blocks))
        is_usual = not named or chosen == tuple(level.blocks for level in usual.levels[: len(chosen)])
        return usual if is_usual else replace(self, blocks=chosen)

    def token_ids(self, prompts: Sequence[str], part: str = "") -> Tensor:  # [B, T] int64
        """The padded tokens of each prompt, cut off where the text encoder's positions end; by the tokenizer `part`, or
        the one that limits the length of a prompt.
        """
        return self.loaded_tokenizers[part or self.backbone.tokenizer](
            list(prompts), padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
        ).input_ids


def check_model(model: Model, *, is_seeded: bool = False) -> Model:
    """The model, after the checks that all sources share: its parts fit one another, and its weights are finite (of
    seeded ones that is known).
    """
    check_size(model.size, model.backbone.multiple, model.backbone.most_pixels(model.configs))
    check_fit(model)
    for name in model.networks if not is_seeded else ():
        check_finite(model.networks[name].read().state_dict(), f"model: {model.name}: {name}.")
    return model


def as_widest(name: str, value: Tensor) -> torch.dtype:
    """The StorageType that keeps weights in fp32, and integers as they are."""
    return torch.float32 if value.is_floating_point() else value.dtype


class ConfigFile(dict[str, Any]):
    """A config.json whose entries are attributes too, as those of diffusers' configs are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ReadOnce(dict[str, Tensor]):
    """Tensors by name; reading a weight of two dimensions or more removes it, so that its memory can be freed."""

    is_given_away = True  # there is no other reference to the tensors

    def __init__(self, tensors: Mapping[str, Tensor], computed_as: torch.dtype | None = None):
        super().__init__(tensors)
        self.computed_as = computed_as  # the dtype of what is computed from several of them

    def __getitem__(self, name: str) -> Tensor:
        return self.pop(name) if dict.__getitem__(self, name).dim() > 1 else dict.__getitem__(self, name)


@dataclass(frozen=True)
class WeightSource:
    """The configuration and the tensors of a network, as the fast engines read them to build their own."""

    config: Any
    state: Mapping[str, Tensor]

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.state


class Network:
    """A network whose `module` is built when it is first needed, and then holds the weights; until then they are read
    from their source each time. `count` returns how many weights there are, without reading them.
    """

    def __init__(
        self,
        config: Any,
        build: Callable[[], nn.Module],
        read: Callable[[StorageType], dict[str, Tensor]],
        count: Callable[[], int] = lambda: 0,
    ):
        self.config, self._build, self._read, self._count = config, build, read, count
        self._module: nn.Module | None = None
        self._device = torch.device("cpu")
        # Weights of the module, listed once, as finding them takes longer than to ask each, and their versions then:
        # counters that PyTorch advances when a weight is changed in place.
        self._held: list[tuple[Tensor, int]] = []

    @classmethod
    def of(cls, module: nn.Module, rebuild: Callable[[], nn.Module] | None = None) -> Network:
        """The network of a module that was built, and that `rebuild` builds once it is unloaded."""
        build = rebuild or (lambda: module)
        count = sum(value.numel() for value in module.parameters())
        network = cls(module.config, build, lambda _: build().state_dict(), lambda: count)
        network._hold(module)
        return network

    def _hold(self, module: nn.Module) -> nn.Module:
        self._module = module.eval().requires_grad_(False)
        self._held = [(weight, weight._version) for weight in module.parameters() if not weight.is_inference()]
        return module

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            with torch.device("cpu"), torch.inference_mode(False):  # whoever asks first
                return self._hold(self._build().to(self._device))
        return self._module

    def place(self, device: torch.device) -> None:
        """Moves the module to the device: now if it is built, and whenever it is built again."""
        self._device = device
        if self._module is not None:
            self._module.to(device)

    @property
    def is_built(self) -> bool:
        return self._module is not None

    def numel(self) -> int:
        """Numbers in its weights."""
        return self._count() if self._module is None else sum(value.numel() for value in self._module.parameters())

    def unload(self) -> None:
        """Drops the module, which is built again when it is next needed; one that was changed stays."""
        if not self.changes:
            self._module, self._held = None, []

    @property
    def changes(self) -> int:
        """How often a weight was changed in place since the module was built."""
        return sum(weight._version - version for weight, version in self._held)

    def read(self, stored: StorageType = as_widest, computed_as: torch.dtype | None = None) -> WeightSource:
        """The weights on the host: those of the module, or from their source in the dtypes of `stored`, each to be used
        once.
        """
        if self._module is not None:
            return WeightSource(self.config, {name: value.cpu() for name, value in self._module.state_dict().items()})
        return WeightSource(self.config, ReadOnce(self._read(stored), computed_as))

    def take(self, stored: StorageType = as_widest) -> WeightSource:
        """As `read`, but the module is unloaded, and each weight is freed once it is used."""
        weights = self.read(stored).state_dict()
        self.unload()
        return WeightSource(self.config, ReadOnce(weights))


def tensors_of(file: Path, stored: StorageType) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    tensors = {}
    with safetensors.safe_open(file, "pt") as opened:
        for name in opened.keys():
            value = opened.get_tensor(name)
            tensors[name] = room(value.shape, stored(name, value)).copy_(value)
    return tensors


def as_filled(
    shapes: Mapping[str, torch.Size], fill: Callable[[str, Tensor], Tensor], stored: StorageType
) -> dict[str, Tensor]:
    """Tensors of these shapes, each filled in the order of the names."""
    tensors = {}
    for name in sorted(shapes):
        value = fill(name, room(shapes[name]))
        dtype = stored(name, value)
        tensors[name] = value if dtype == value.dtype else room(value.shape, dtype).copy_(value)
    return tensors


def files_of(folder: Path) -> list[Path]:
    """The files of a folder, without the hidden ones that file managers leave."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def digest(files: list[Path]) -> str:
    """SHA-256 over the contents of `files` in order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)
    return f"sha256:{total.hexdigest()}"


def folder_licence(folder: Path) -> str:
    """Licence text of a model folder, else the licence its card names, else a line saying that it is unknown."""
    texts = sorted(
        path for path in folder.iterdir() if path.is_file() and path.stem.upper() in ("LICENSE", "LICENCE", "COPYING")
    )
    if texts:
        return texts[0].read_text(encoding="utf-8", errors="replace").strip()
    named = dict(re.findall(r"^(licen[sc]e(?:_name)?):\s*(\S.*)$", _front_matter(folder), re.MULTILINE))
    name: str = named.get("licence") or named.get("license") or UNKNOWN_LICENCE
    return (named.get("license_name", name) if name == "other" else name).strip().strip("\"'")


def _front_matter(folder: Path) -> str:
    """The YAML at the head of a folder's card, empty where there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return front[1] if front else ""
