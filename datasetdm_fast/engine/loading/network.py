"""One network of a model: a module of diffusers or transformers, or its source until it is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from datasetdm_fast.engine.models.layers import room

Stored = Callable[[str, Tensor], torch.dtype]  # the type in which a tensor of this name is to be kept


def as_widest(name: str, value: Tensor) -> torch.dtype:
    return torch.float32 if value.is_floating_point() else value.dtype


class ConfigFile(dict[str, Any]):
    """A config.json whose entries are attributes too, as those of diffusers' configs are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ReadOnce(dict[str, Tensor]):
    """Tensors by name; a weight is removed when it is read, so that what is made of it takes its place."""

    is_given_away = True  # there is no other reference to the tensors

    def __init__(self, tensors: Mapping[str, Tensor], computed_as: torch.dtype | None = None):
        super().__init__(tensors)
        self.computed_as = computed_as  # the type of what is made of several of them

    def __getitem__(self, name: str) -> Tensor:
        return self.pop(name) if dict.__getitem__(self, name).dim() > 1 else dict.__getitem__(self, name)


class Weighted:
    """The configuration and the tensors of a network, as those who build one of their own read them."""

    def __init__(self, config: Any, state: Mapping[str, Tensor]):
        self.config, self.state = config, state

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.state


class Network:
    """Its `module` is built when it is first needed, and then holds the weights; until then they are read from their
    source each time. `count` is how many numbers they are, found without them.
    """

    def __init__(
        self,
        config: Any,
        build: Callable[[], nn.Module],
        read: Callable[[Stored], dict[str, Tensor]],
        count: Callable[[], int] = lambda: 0,
    ):
        self.config, self._build, self._read, self._count = config, build, read, count
        self._module: nn.Module | None = None
        self._built = 0  # changes of the parameters when they were filled

    @classmethod
    def of(cls, module: nn.Module, rebuild: Callable[[], nn.Module] | None = None) -> Network:
        """The network of a module that was built, and that `rebuild` builds once it is unloaded."""
        build = rebuild or (lambda: module)
        count = sum(value.numel() for value in module.parameters())
        network = cls(module.config, build, lambda _: build().state_dict(), lambda: count)
        network._module, network._built = module.eval().requires_grad_(False), _versions(module)
        return network

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            with torch.device("cpu"), torch.inference_mode(False):  # whoever asks first
                self._module = self._build().eval().requires_grad_(False)
            self._built = _versions(self._module)
        return self._module

    @property
    def is_built(self) -> bool:
        return self._module is not None

    def numel(self) -> int:
        """Numbers in its weights."""
        return self._count() if self._module is None else sum(value.numel() for value in self._module.parameters())

    def unload(self) -> None:
        """Drops the module, which is built again when it is next needed; one that was changed stays."""
        if not self.changes:
            self._module = None

    @property
    def changes(self) -> int:
        """How often a weight was changed in place since the module was built."""
        return _versions(self._module) - self._built if self._module is not None else 0

    def read(self, stored: Stored = as_widest, computed_as: torch.dtype | None = None) -> Weighted:
        """The weights: those of the module, or from their source in the type that `stored` returns for each, to be read
        once.
        """
        if self._module is not None:
            return Weighted(self.config, self._module.state_dict())
        return Weighted(self.config, ReadOnce(self._read(stored), computed_as))

    def take(self, stored: Stored = as_widest) -> Weighted:
        """`read`; the module is unloaded, and each weight goes when it is read."""
        weights = self.read(stored).state_dict()
        self.unload()
        return Weighted(self.config, ReadOnce(weights))


def _versions(module: nn.Module) -> int:
    """A counter that PyTorch advances when a weight is changed in place."""
    return sum(parameter._version for parameter in module.parameters() if not parameter.is_inference())


def tensors_of(file: Path, stored: Stored) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    tensors = {}
    with safetensors.safe_open(file, "pt") as opened:
        for name in opened.keys():
            value = opened.get_tensor(name)
            tensors[name] = room(value.shape, stored(name, value)).copy_(value)
    return tensors


def count_numbers(file: Path) -> int:
    """Numbers in a safetensors file."""
    with safetensors.safe_open(file, "pt") as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())


def as_filled(
    shapes: Mapping[str, torch.Size], fill: Callable[[str, Tensor], Tensor], stored: Stored
) -> dict[str, Tensor]:
    """Tensors of these shapes, each filled in the order of the names."""
    tensors = {}
    for name in sorted(shapes):
        value = fill(name, room(shapes[name]))
        dtype = stored(name, value)
        tensors[name] = value if dtype == value.dtype else room(value.shape, dtype).copy_(value)
    return tensors
