"""The course of a student network: AdamW with warm-up and polynomial decay, averaged weights, resumed to the bit.

Whatever is random in a step is drawn from the seed and the step's number, so an interruption changes nothing.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.proof.students.examples import Examples, as_tensor
from bench.proof.students.networks.network import StudentNetwork
from bench.proof.students.student_data import Vocabulary
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.kernels.transfer import to_device
from datasetdm_fast.training import checkpoint

HEAD_TIMES = 10.0  # how many times as fast a head learns as a body whose weights were given
BETWEEN = 60.0  # seconds from one checkpoint to the next


@dataclass(frozen=True)
class Course:
    """How a student network is taught; arms that are compared have the same one."""

    steps: int = 2000
    batch_size: int = 10
    is_fine: bool = False  # whether the body begins with given weights
    warmup: float = 0.1  # share of the steps
    power: float = 0.9  # of the decay
    weight_decay: float = 0.05  # of matrices and kernels; biases and norms have none
    average: float = 0.999  # of the weights
    clip: float = 1.0  # norm of the gradient
    generated_share: float = 0.5  # of a batch, where there are both

    def factor(self, step: int) -> float:
        """Of the learning rate."""
        rising = min(1.0, (step + 1) / max(1, round(self.warmup * self.steps)))
        return rising * (1 - step / self.steps) ** self.power


class NetworkTraining:
    """A student network on its way, with everything its next step depends on."""

    def __init__(
        self,
        network: StudentNetwork,
        model: nn.Module,
        vocabulary: Vocabulary,
        sets: Sequence[Examples],
        course: Course,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.network, self.vocabulary, self.sets, self.course, self.seed = network, vocabulary, sets, course, seed
        self.device, self.dtype, self.done = device, dtype, 0
        self.model = model.to(device).train()
        self.optimiser = torch.optim.AdamW(self._groups(), fused=True)
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        state = self.model.state_dict()
        self.average = {name: value.clone() for name, value in state.items() if value.is_floating_point()}

    def _groups(self) -> list[dict]:
        """Parameters of body and head, with and without weight decay."""
        found: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                found.setdefault((name.startswith(self.network.body), parameter.ndim > 1), []).append(parameter)
        body = self.network.fine_rate if self.course.is_fine else self.network.rate
        head = body * (HEAD_TIMES if self.course.is_fine else 1.0)
        return [
            {
                "params": parameters,
                "lr": body if is_body else head,
                "weight_decay": self.course.weight_decay if decays else 0.0,
            }
            for (is_body, decays), parameters in found.items()
        ]

    def step(self) -> float:
        """Takes one step; its loss."""
        step, course, network = self.done, self.course, self.network
        items = self._views(step)
        images = to_device(as_tensor(items, network.colours), self.device)
        for group, rate in zip(self.optimiser.param_groups, self.rates):
            group["lr"] = rate * course.factor(step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0]))
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                loss = network.loss(self.model, images, items, self.vocabulary)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), course.clip)
        self.optimiser.step()
        state = self.model.state_dict()
        share = 1 - min(course.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [state[name] for name in self.average], share)
        value = loss.item()  # last, so that all of the step is queued before the host waits for it
        if not math.isfinite(value):
            raise GateFailed(f"--student: the loss of step {step + 1} is {value}", "Use --dtype fp32, or other images.")
        self.done += 1
        return value

    def _views(self, step: int) -> list:
        """The views of a step: every set in a new order each time it was gone through."""
        found = []
        for number, (some, count) in enumerate(zip(self.sets, self._counts())):
            for place in range(count):
                turn, position = divmod(step * count + place, len(some))
                order = np.random.default_rng([self.seed, number, turn]).permutation(len(some))
                random = np.random.default_rng([self.seed, number, step, place])
                found.append(some.view(int(order[position]), self.network.scales, random))
        return found

    def _counts(self) -> list[int]:
        if len(self.sets) == 1:
            return [self.course.batch_size]
        generated = round(self.course.batch_size * self.course.generated_share)
        return [self.course.batch_size - generated, generated]

    def save(self, folder: Path) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for number, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": value for name, value in values.items()}
        # clones: tensors of one storage cannot be written
        checkpoint.write(
            folder, {name: value.detach().cpu().clone() for name, value in tensors.items()}, {"done": self.done}
        )

    def load(self, folder: Path) -> None:
        """Goes on from the folder's checkpoint, where there is one."""
        if (found := checkpoint.read(folder)) is None:
            return
        with checkpoint.restoring(folder):
            self._restore(*found)

    def _restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        self.average = {name: tensors[f"average.{name}"].to(self.device) for name in self.average}
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimiser."):
                _, number, key = name.split(".")
                states.setdefault(int(number), {})[key] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": states})
        self.done = numbers["done"]

    def finished(self) -> nn.Module:
        """The network with the averaged weights."""
        model = copy.deepcopy(self.model)
        model.load_state_dict({**model.state_dict(), **self.average})
        return model.eval().requires_grad_(False)


def taught(
    training: NetworkTraining, folder: Path, on_step: Callable[[int, float], None], between: float = BETWEEN
) -> nn.Module:
    """The network after its last step; the state lies in the folder's checkpoint from time to time."""
    training.load(folder)
    saved = time.monotonic()
    while training.done < training.course.steps:
        loss = training.step()
        on_step(training.done, loss)
        if time.monotonic() - saved >= between and training.done < training.course.steps:
            training.save(folder)
            saved = time.monotonic()
    return training.finished()
