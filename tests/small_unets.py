"""Models with a smaller U-Net of seeded weights: every operation of the larger one, fewer times."""

from dataclasses import replace

from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.loading.presets import seed_network

ONE_LAYER = {"layers_per_block": 1}
FEW_ATTENTIONS = {  # at the first level and in the middle alone, which no folder may hold
    **ONE_LAYER,
    "down_block_types": ("CrossAttnDownBlock2D", *("DownBlock2D",) * 3),
    "up_block_types": (*("UpBlock2D",) * 3, "CrossAttnUpBlock2D"),
}


def with_small_unet(model: Model, settings=ONE_LAYER) -> Model:
    unet = seed_network("unet", {**model.networks["unet"].config, **settings}, seed=1)
    return replace(model, networks={**model.networks, "unet": unet})
