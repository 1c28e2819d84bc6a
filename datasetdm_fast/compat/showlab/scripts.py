"""DatasetDM's generators, one record each."""

from dataclasses import replace

from datasetdm_fast.compat.showlab import files, prompts
from datasetdm_fast.compat.showlab.generator import Generator
from datasetdm_fast.compat.showlab.lines import PROMPTS, Flag


def _root(folder: str) -> Flag:
    return replace(Generator.prompt_root, default=f"{PROMPTS}/{folder}")


LAION = Flag("laion400m", False, "switch", has_effect=False)
_GENERATORS = (
    Generator(
        "parallel_generate_Semantic_VOC_AnyClass",
        "VOC's classes one after the other, a mask of the one class of each image.",
        ("voc",),
        "open-vocabulary",
        prompts.voc,
        files.write_class_mask,
        "Mask",
        "voc",
        guidance=7.0,
        prompt_root=_root("voc2012"),
        extra=(LAION,),
    ),
    Generator(
        "parallel_generate_Semantic_CityScapes_AnyClass",
        "Street scenes of Cityscapes' classes with label maps.",
        ("cityscapes",),
        "semantic",
        prompts.cityscapes,
        files.write_class_map,
        "Mask",
        "cityscapes",
    ),
    Generator(
        "parallel_generate_Semantic_Medical_CT",
        "CT images, labelled by the decoder of Cityscapes.",
        ("cityscapes",),
        "semantic",
        prompts.medical,
        files.write_class_map,
        "Mask",
        "cityscapes",
        asks_class=False,
    ),
    Generator(
        "parallel_generate_Semantic_DeepFashion",
        "People with label maps of their clothes.",
        ("deepfashion",),
        "semantic",
        prompts.sentence,
        files.write_class_map,
        "Mask",
    ),
    Generator(
        "parallel_generate_Instance_COCO_AnyClass",
        "COCO's classes one after the other, with contours of instances.",
        ("coco",),
        "instance",
        prompts.coco,
        files.write_contours,
        "Mask",
        "coco",
        prompt_root=_root("coco"),
        without=("category",),
        suffix="txt",
    ),
    Generator(
        "parallel_generate_Depth_KITTI",
        "Street scenes with depth up to 80 m.",
        ("kitti", "nyu"),
        "depth",
        prompts.general,
        files.write_depth,
        "Annotation",
    ),
    Generator(
        "parallel_generate_Depth_NYU",
        "Rooms with depth up to 10 m.",
        ("nyu", "kitti"),
        "depth",
        prompts.general,
        files.write_depth,
        "Annotation",
        count="number_data",
    ),
    Generator(
        "parallel_generate_Pose_COCO_HeatMap",
        "People with the joints of one of them, from heatmaps.",
        ("pose",),
        "pose",
        prompts.sentence,
        files.write_heatmap_joints,
        "Annotation",
        count="number_data",
        suffix="txt",
    ),
    Generator(
        "parallel_generate_Pose_COCO",
        "People with the joints of one of them, from bins.",
        ("pose-simcc",),
        "pose",
        prompts.pose,
        files.write_bin_joints,
        "Annotation",
        count="number_data",
    ),
)
GENERATORS = {each.name: each for each in _GENERATORS}
