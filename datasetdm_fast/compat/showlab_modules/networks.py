"""What DatasetDM's scripts load by diffusers and transformers: the parts of one checked model, and its sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.compat.showlab_modules import session
from datasetdm_fast.engine.loading.model import SD_SCHEDULER
from datasetdm_fast.engine.sampling import make_schedule
from datasetdm_fast.engine.sampling.walk import start, step


class PartOfModel:
    """Loads one part of a model, as a class of a library does."""

    def __init__(self, name: str):
        self.name = name

    def from_pretrained(self, folder: str, subfolder: str = "", **_: Any) -> Any:
        return getattr(session.current().open(folder, subfolder).model, self.name)


class ScriptSampler:
    """PNDM with the timesteps of DatasetDM's diffusers, over this package's schedule."""

    def __init__(self, config: dict, profile: str):
        self.scheduler, self.profile = config, profile

    def set_timesteps(self, steps: int, **_: Any) -> None:
        self.schedule = make_schedule(self.scheduler, "pndm", steps, self.profile)
        self.timesteps = torch.tensor(self.schedule.timesteps)
        self.place, self.state = 0, None

    def step(self, noise: Tensor, timestep: Tensor | int, latents: Tensor) -> dict[str, Tensor]:
        """The latents after the next call, whose guided output is `noise`."""
        if self.state is None:  # a script may begin at the last call
            self.place, self.state = self.schedule.timesteps.index(int(timestep)), start(latents)
        self.state = step(self.schedule, self.place, replace(self.state, latents=latents), noise)
        self.place += 1
        return {"prev_sample": self.state.latents}


class TrainingScheduler:
    """Makes diffusers' DDPM over the betas of Stable Diffusion 1.x; nothing is downloaded."""

    @classmethod
    def from_config(cls, *_: Any, **__: Any) -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler(**{name: SD_SCHEDULER[name] for name in ("beta_start", "beta_end", "beta_schedule")})

    from_pretrained = from_config


class HubPipeline:
    """Stands for the pipeline that scripts download to take its scheduler; nothing is downloaded."""

    @classmethod
    def from_pretrained(cls, name: str, **_: Any) -> HubPipeline:
        return cls()

    def to(self, *_: Any) -> HubPipeline:
        return self

    @property
    def scheduler(self) -> ScriptSampler:
        here = session.current()
        return ScriptSampler(here.model.scheduler if here.has_model else SD_SCHEDULER, here.settings.profile)
