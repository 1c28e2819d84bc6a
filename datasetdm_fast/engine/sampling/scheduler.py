"""What the scheduler config of a model says: its sampler, and whether the model is a flow."""

from collections.abc import Mapping
from typing import Any

from datasetdm_fast.config import SCHEDULERS
from datasetdm_fast.errors import Refused

FLOW_PREDICTION = "flow_prediction"
# Settings that change images, for each class: what the samplers here follow, then what diffusers takes where a config
# does not say. Its pipelines turn clip_sample off where it is not given.
FOLLOWED: Mapping[str, Mapping[str, tuple[Any, Any]]] = {
    "PNDMScheduler": {"skip_prk_steps": (True, False)},
    "DDIMScheduler": {"clip_sample": (False, False), "thresholding": (False, False)},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "dpmsolver++"),
        "solver_order": (2, 2),
        "solver_type": ("midpoint", "midpoint"),
        "final_sigmas_type": ("zero", "zero"),
        **dict.fromkeys(
            ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
            (False, False),
        ),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2, 2),
        "solver_type": ("bh2", "bh2"),
        "predict_x0": (True, True),
        "lower_order_final": (True, True),
        "disable_corrector": ([], []),
        "solver_p": (None, None),
        "final_sigmas_type": ("zero", "zero"),
        **dict.fromkeys(
            ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False, False)
        ),
    },
    "LCMScheduler": {"clip_sample": (False, False), "thresholding": (False, False)},
}


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether the config is of a flow, whose latents at timestep t are (1 - t / 1000) * image + t / 1000 * noise."""
    return bool(
        scheduler.get("_class_name", "").startswith("FlowMatch")
        or scheduler.get("use_flow_sigmas")
        or scheduler.get("prediction_type") == FLOW_PREDICTION
    )


def choose_sampler(scheduler: Mapping[str, Any], sampler: str) -> str:
    """The sampler of this name; "auto" is the one that a scheduler config is of, refused where a setting of it would
    give other images than it does here.
    """
    if sampler != "auto":
        return sampler
    named = scheduler.get("_class_name", "PNDMScheduler")
    if named not in SCHEDULERS:
        raise Refused(
            f"scheduler: the model's own, {named}, is none of {', '.join(SCHEDULERS)}",
            f"Name another: sampler={'euler' if is_flow(scheduler) else 'ddim'!r}.",
        )
    for name, (followed, default) in FOLLOWED.get(named, {}).items():
        value = scheduler.get(name, default)
        if (default if value is None else value) != followed:
            raise Refused(
                f"scheduler: the model's {named} has {name}={value!r}, which the sampler here does not follow, so its "
                f"images would differ; expected {followed!r}",
                f"Change it, or take the images of sampler={SCHEDULERS[named]!r}.",
            )
    return SCHEDULERS[named]
