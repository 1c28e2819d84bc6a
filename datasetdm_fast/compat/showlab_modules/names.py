"""Which names a script finds in which module, and which modules stand in for libraries that are not installed."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from datasetdm_fast.compat.showlab_modules import libraries
from datasetdm_fast.compat.showlab_modules.answers import (
    dict2obj,
    get_findContours,
    get_max_preds,
    instance_inference,
    mask_image,
    plot_pose,
)
from datasetdm_fast.compat.showlab_modules.attention import AttentionStore
from datasetdm_fast.compat.showlab_modules.decoders import (
    Depthmodule,
    PoseModule,
    PoseModule_HeatMap,
    seg_decorder,
    seg_decorder_open_word,
)
from datasetdm_fast.compat.showlab_modules.networks import HubPipeline, PartOfModel
from datasetdm_fast.compat.showlab_modules.ptp_utils import (
    init_latent,
    latent2image,
    register_attention_control,
    save_images,
    text2image,
    text2image_ldm_stable,
)
from datasetdm_fast.compat.showlab_modules.unet import UNet2D, clear_feature_dic, get_feature_dic

_POSE = {"plot_pose": plot_pose, "get_max_preds": get_max_preds}
_IMAGES = {"text2image": text2image, "text2image_ldm_stable": text2image_ldm_stable, "save_images": save_images}
_IMAGES |= {"init_latent": init_latent, "latent2image": latent2image}
# In place of the modules of the checkout.
MODULES: dict[str, dict[str, Any]] = {
    "ptp_utils": {**_IMAGES, "register_attention_control": register_attention_control},
    "seq_aligner": {},
    "train": {"AttentionStore": AttentionStore},
    "dataset": {"random": random, "OrderedDict": OrderedDict},  # scripts use these two without importing them
    "model.unet": {"UNet2D": UNet2D, "get_feature_dic": get_feature_dic, "clear_feature_dic": clear_feature_dic},
    "model.segment.transformer_decoder": {"seg_decorder": seg_decorder},
    "model.segment.transformer_decoder_semantic": {"seg_decorder_open_word": seg_decorder_open_word},
    "model.depth_module": {"Depthmodule": Depthmodule},
    "model.pose_module": {"PoseModule": PoseModule},
    "model.pose_module_heat": {"PoseModule_HeatMap": PoseModule_HeatMap},
    "tools.train_instance_coco": {
        "dict2obj": dict2obj,
        "instance_inference": instance_inference,
        "AttentionStore": AttentionStore,
    },
    "tools.train_pose_coco": _POSE,
    "tools.train_pose_coco_heatmap": _POSE,
    "tools.utils": {"get_findContours": get_findContours, "mask_image": mask_image},
}
# In place of libraries, where they are not installed.
STAND_INS: dict[str, dict[str, Any]] = {
    "detectron2.utils.memory": {"retry_if_cuda_oom": libraries.retry_if_cuda_oom},
    "detectron2.modeling.postprocessing": {"sem_seg_postprocess": libraries.sem_seg_postprocess},
    "pytorch_lightning": {"seed_everything": libraries.seed_everything},
    "IPython.display": {"display": libraries.display, "Image": Image.Image},
    "cv2": {"imwrite": libraries.imwrite},
    "mmcv": {"imwrite": libraries.imwrite},
    "torchvision": {},
}
# Before the library's own names, for the script alone.
BEFORE: dict[str, dict[str, Any]] = {
    "multiprocessing": {
        "get_context": libraries.get_context,
        "Process": libraries.ProcessInTurn,
        "Manager": libraries.Manager,
    },
    "diffusers": {"AutoencoderKL": PartOfModel("vae"), "StableDiffusionPipeline": HubPipeline},
    "transformers": {
        "CLIPTextModel": PartOfModel("text_encoder"),
        "CLIPTokenizer": PartOfModel("clip_tokenizer"),
        "CLIPFeatureExtractor": None,  # imported by all scripts, used by none, gone from the library
    },
}


class StandInModule(ModuleType):
    """A module of given names, and behind them those of the library it stands before, if any."""

    def __init__(self, name: str, values: Mapping[str, Any], library: ModuleType | None = None):
        super().__init__(name)
        self.__dict__.update(values)
        self.__dict__["_library"] = library

    def __getattr__(self, name: str) -> Any:
        if self._library is not None:
            return getattr(self._library, name)
        raise AttributeError(f"{self.__name__}.{name} is none of the names that compat.showlab has")


def modules_of_scripts(has_gpu: bool) -> dict[str, ModuleType]:
    """Module -> what a script gets for it, packages above it included."""
    found = {name: StandInModule(name, values) for name, values in MODULES.items()}
    missing = [name for name in STAND_INS if find_spec(name.partition(".")[0]) is None]
    found |= {name: StandInModule(name, STAND_INS[name]) for name in missing}
    for name, values in BEFORE.items():
        __import__(name)
        found[name] = StandInModule(name, values, sys.modules[name])
    cuda = {"set_device": libraries.set_device} | ({} if has_gpu else {"is_available": lambda: False})
    found["torch"] = StandInModule("torch", {"cuda": StandInModule("torch.cuda", cuda, torch.cuda)}, torch)
    for name in list(found):
        while "." in name:
            child, (name, _, last) = name, name.rpartition(".")
            found.setdefault(name, StandInModule(name, {})).__dict__[last] = found[child]
    return found
