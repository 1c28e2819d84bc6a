"""The state of a training, saved in one file and resumed to the same bits."""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.checkpoint import build_decoder
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import Decoder, SpectralConv2d
from datasetdm_fast.kernels import plain
from datasetdm_fast.training import checkpoint
from datasetdm_fast.training.recipes import TrainingSchedule

NORM_ITERATIONS = 8  # power iterations after which a spectral norm fits averaged weights


@dataclass
class EarlyStopping:
    """Evaluations on the held-out images so far."""

    evaluations: int = 0
    best_figure: float | None = None
    best_step: int = 0
    without_improvement: int = 0  # evaluations since the best one


class TrainingState:
    """Everything the next step depends on: decoder, optimiser, averaged weights and data position, which is the number
    of steps taken; and the best weights so far.
    """

    def __init__(
        self,
        config: DecoderConfig,
        schedule: TrainingSchedule,
        words: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(schedule.seed)
            self.decoder = build_decoder(config, plain).train().to(device)
        if config.text_centre:
            self.decoder.fit_text_centre(words)
        self.named_parameters = dict(self.decoder.named_parameters())
        self.parameters = list(self.named_parameters.values())
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[schedule.optimiser]
        # In one kernel, which on a GPU also decides by itself whether the gradients of fp16 are finite.
        self.optimiser = kind(self.parameters, lr=schedule.rate, weight_decay=schedule.weight_decay, fused=True)
        self.average = [parameter.detach().clone() for parameter in self.parameters] if schedule.average else []
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.step, self.loss = 0, 0.0
        self.early_stopping = EarlyStopping()
        self.best_weights: dict[str, Tensor] = {}

    def averaged_decoder(self) -> Decoder:
        """A decoder with the averaged weights, to be saved or folded; the training can continue."""
        decoder = copy.deepcopy(self.decoder)
        if not self.average:
            return decoder
        with torch.no_grad():
            for parameter, value in zip(decoder.parameters(), self.average):
                parameter.copy_(value)
            for module in decoder.modules():
                if isinstance(module, SpectralConv2d):
                    for _ in range(NORM_ITERATIONS):
                        module.normalise_weight()
        return decoder

    def record_evaluation(self, decoder: Decoder, figure: float, is_improvement: bool) -> None:
        """Counts an evaluation towards early stopping, and keeps the weights of the best one."""
        stopping = self.early_stopping
        if is_improvement:
            self.best_weights = {name: value.detach().cpu().clone() for name, value in decoder.state_dict().items()}
            stopping.best_figure, stopping.best_step, stopping.without_improvement = figure, self.step, 0
        else:
            stopping.without_improvement += 1

    def save(self, folder: Path) -> None:
        """Replaces the folder's checkpoint."""
        tensors = {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best_weights.items()}
        tensors |= {f"average.{name}": value for name, value in zip(self.named_parameters, self.average)}
        for name, parameter in self.named_parameters.items():
            moments = self.optimiser.state.get(parameter, {})
            tensors |= {f"optimiser.{name}.{part}": value for part, value in moments.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        numbers = {"step": self.step, "loss": self.loss, "scaler": self.scaler.state_dict()}
        checkpoint.write(folder, tensors, numbers | {"early_stopping": asdict(self.early_stopping)})

    def resume(self, folder: Path) -> None:
        """Resumes from the folder's checkpoint, where there is one."""
        if (stored := checkpoint.read(folder)) is None:
            return
        tensors, numbers = stored
        with checkpoint.restoring(folder):
            self.decoder.load_state_dict(_below("decoder.", tensors))
            for value, name in zip(self.average, self.named_parameters):
                value.copy_(tensors[f"average.{name}"])
            for name, parameter in self.named_parameters.items():
                if moments := _below(f"optimiser.{name}.", tensors):
                    moments = {part: value.to(parameter, copy=True) for part, value in moments.items()}
                    self.optimiser.state[parameter] = moments
            self.scaler.load_state_dict(dict(numbers["scaler"]))
            self.best_weights = _below("best.", tensors)
            self.step, self.loss = numbers["step"], numbers["loss"]
            self.early_stopping = EarlyStopping(**numbers["early_stopping"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
