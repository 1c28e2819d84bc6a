"""Which names a script finds in which module, and which modules stand in for libraries that are not installed."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image

from datasetdm_fast.compat.showlab_modules import detectron, libraries, opencv
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
from datasetdm_fast.compat.showlab_modules.importing import StandInModule
from datasetdm_fast.compat.showlab_modules.networks import HubPipeline, PartOfModel, TrainingScheduler
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
    "model.diffusers.models.unet_2d_condition": {"UNet2DConditionModel": None},  # imported, and used by none
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
    **detectron.MODULES,
    "pytorch_lightning": {"seed_everything": libraries.seed_everything},
    "IPython.display": {"display": libraries.display, "Image": Image.Image},
    "cv2": opencv.NAMES,
    "mmcv": {"imwrite": opencv.write_first},
    "matplotlib.cm": {"get_cmap": libraries.get_cmap},
    "matplotlib.pyplot": {},
    "torchvision": {"_is_tracing": torch.jit.is_tracing},
    "torchvision.transforms": {},
    "fvcore.common.timer": {"Timer": libraries.Timer},
    "lvis": {"LVIS": libraries.LvisFile},
    "distutils.version": {},
    "albumentations": {},
    "json_tricks": {},
    "skimage.util": {},
}
# Before the library's own names, for the script alone.
BEFORE: dict[str, dict[str, Any]] = {
    "multiprocessing": {
        "get_context": libraries.get_context,
        "Process": libraries.ProcessInTurn,
        "Manager": libraries.Manager,
    },
    "diffusers": {
        "AutoencoderKL": PartOfModel("vae"),
        "StableDiffusionPipeline": HubPipeline,
        "DDPMScheduler": TrainingScheduler,
    },
    "numpy": {"float": float, "int": int},  # gone from newer versions, and so are these colour maps
    "matplotlib.cm": {"get_cmap": libraries.get_cmap},
    "transformers": {
        "CLIPTextModel": PartOfModel("text_encoder"),
        "CLIPTokenizer": PartOfModel("clip_tokenizer"),
        "CLIPFeatureExtractor": None,  # imported by all scripts, used by none, gone from the library
    },
}


def modules_of_scripts(has_gpu: bool, *, is_trainer: bool = False) -> dict[str, StandInModule]:
    """Module -> what a script gets for it, packages above it included; a trainer has the checkout's data sets."""
    ours = {name: values for name, values in MODULES.items() if name != "dataset" or not is_trainer}
    found = {name: StandInModule(name, values) for name, values in ours.items()}
    missing = [name for name in STAND_INS if find_spec(name.partition(".")[0]) is None]
    found |= {name: StandInModule(name, STAND_INS[name], is_library=True) for name in missing}
    for name, values in BEFORE.items():
        if name not in found and find_spec(name.partition(".")[0]) is not None:
            __import__(name)
            found[name] = _before(name, values)
    cuda = {"set_device": libraries.set_device} | ({} if has_gpu else {"is_available": lambda: False})
    found["torch"] = _before("torch", {"cuda": _before("torch.cuda", cuda)})
    for name in list(found):
        while "." in name:
            child, (name, _, last) = name, name.rpartition(".")
            below = found[child]
            has_library = below._is_library and below._behind is not None
            holder = _before(name, {}) if has_library else StandInModule(name, {}, is_library=below._is_library)
            found.setdefault(name, holder).__dict__[last] = below
    return found


def _before(name: str, values: Mapping[str, Any]) -> StandInModule:
    """Names before those of a library."""
    return StandInModule(name, values, lambda: sys.modules[name], is_library=True)
