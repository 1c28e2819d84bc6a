"""DatasetDM's scripts, one record each: their flags, labels, prompts and files."""

from dataclasses import dataclass, replace

from datasetdm_fast.compat.showlab import files, prompts
from datasetdm_fast.compat.showlab.lines import Flag
from datasetdm_fast.config import ENGINE_NAMES, PROFILES

PROMPTS = "./dataset/Prompts_From_GPT"
MODEL = "./dataset/ckpts/imagenet"
NO_EFFECT = (
    Flag("prompt", "a photo of a lion on a mountain top at sunset", has_effect=False, is_optional=True),
    Flag("category", "lion", has_effect=False, is_optional=True),
    Flag("skip_grid", False, "switch", has_effect=False),
    Flag("skip_save", False, "switch", has_effect=False),
    Flag("ddim_steps", 50, "whole", has_effect=False),
    Flag("plms", False, "switch", has_effect=False),
    Flag("fixed_code", False, "switch", has_effect=False),
    Flag("ddim_eta", 0.0, "number", has_effect=False),
    Flag("H", 512, "whole", has_effect=False),
    Flag("W", 512, "whole", has_effect=False),
    Flag("C", 4, "whole", has_effect=False),
    Flag("f", 8, "whole", has_effect=False),
    Flag("n_samples", 1, "whole", has_effect=False),
    Flag("n_rows", 0, "whole", has_effect=False),
    Flag("scale", 7.5, "number", has_effect=False),
    Flag("from_file", None, has_effect=False),
    Flag("sd_ckpt", "stable_diffusion.ckpt", has_effect=False),
    Flag("precision", "autocast", has_effect=False, choices=("full", "autocast")),
)
COMMON = (
    Flag("outdir", "./DataDiffusion/VOC/", "path", "folder to write", is_optional=True),
    Flag(
        "thread_num",
        8,
        "whole",
        "number of DatasetDM's processes whose seeds and prompts are used; one process makes them all",
    ),
    Flag("seed", 42, "whole", "seed for drawing the prompts"),
)
OURS = (
    Flag("root", ".", "text", "checkout of DatasetDM; all other paths start there"),
    Flag("model", MODEL, "path", "diffusers folder of the model, or the name of one of this package's"),
    Flag("engine", "auto", help="engine that runs the networks", choices=ENGINE_NAMES),
    Flag("dtype", "auto", help="precision of the fast engines"),
    Flag("device", "auto", help="cpu, cuda or cuda:N"),
    Flag("threads", 0, "whole", "CPU threads, 0 = all cores"),
    Flag("batch_size", 0, "whole", "images written together, 0 = as many as fit into memory"),
    Flag("together", False, "switch", "process whole batches: faster, but the batch size changes results by rounding"),
    Flag("steps", 50, "whole", "sampling steps"),
    Flag("guidance", 0.0, "number", "guidance scale, 0 = that of the script"),
    Flag("profile", PROFILES[0], help="diffusers version whose timesteps are used", choices=PROFILES),
    Flag("all", False, "switch", "also make the images left over when they are divided among processes"),
    Flag("fixed", False, "switch", "correct what DatasetDM's files lose: 16-bit depth, all parts, all joints, classes"),
    Flag("strict", False, "switch", "carry spectral norms from image to image, as DatasetDM does, one image at a time"),
    Flag("limit", 0, "whole", "stop after N new images; the same command resumes"),
    Flag("dry_run", False, "switch", "show what would be made and stop"),
    Flag("json", False, "switch", "machine-readable result on stdout"),
    Flag("quiet", False, "switch", "show no progress"),
)


@dataclass(frozen=True)
class Generator:
    """A script that makes images with one kind of label."""

    name: str
    told: str
    kinds: tuple[str, ...]  # of checkpoints it takes, the usual one first; --config chooses among several
    task: str
    draw: prompts.Draw
    write: files.Write
    folder: str  # of the labels
    classes: str = ""  # whose classes it makes images of, one after the other
    guidance: float = 5.0
    count: str = "n_each_class"
    prompt_root: Flag = Flag("prompt_root", f"{PROMPTS}/cityscapes", "path", "folder of prompt files", is_optional=True)
    reads_config: bool = True
    extra: tuple[Flag, ...] = ()
    without: tuple[str, ...] = ()  # flags of the others that it lacks
    script: str = ""  # of the checkout that holds its sentences, where that is not its own
    asks_class: bool = True  # whether its images show the class that they are made for
    suffix: str = "png"  # of the file of a label

    @property
    def folders(self) -> tuple[str, str]:
        """Of its output, for images and labels."""
        return "Image", self.folder

    @property
    def flags(self) -> tuple[Flag, ...]:
        own = (
            *COMMON,
            Flag(self.count, 20, "whole", f"images {'of each class' if self.classes else 'in all'}"),
            self.prompt_root,
            Flag("config", "", "path", "its configuration, checked against the weights", self.reads_config, True),
            Flag("grounding_ckpt", "grounding_module.pth", "path", "weights of the decoder"),
            *self.extra,
        )
        return tuple(flag for flag in (*own, *NO_EFFECT, *OURS) if flag.name not in self.without)


def _root(folder: str) -> Flag:
    return replace(Generator.prompt_root, default=f"{PROMPTS}/{folder}")


LAION = Flag("laion400m", False, "switch", has_effect=False)
LVIS_JSON = Flag("lvis_train_json", "./data/lvis/lvis_v1_train.json", "path", "annotation file that names the classes")
_GENERATORS = (
    Generator(
        "parallel_generate_Semantic_VOC_AnyClass",
        "VOC's classes one after the other, a mask of the one class of each image.",
        ("voc",),
        "open-vocabulary",
        prompts.of_voc,
        files.one_class,
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
        prompts.of_cityscapes,
        files.semantic,
        "Mask",
        "cityscapes",
        reads_config=False,
    ),
    Generator(
        "parallel_generate_Semantic_Medical_CT",
        "CT images, labelled by the decoder of Cityscapes.",
        ("cityscapes",),
        "semantic",
        prompts.of_medical,
        files.semantic,
        "Mask",
        "cityscapes",
        reads_config=False,
        asks_class=False,
    ),
    Generator(
        "parallel_generate_Semantic_DeepFashion",
        "People with label maps of their clothes.",
        ("deepfashion",),
        "semantic",
        prompts.in_sentence,
        files.semantic,
        "Mask",
    ),
    Generator(
        "parallel_generate_Instance_COCO_AnyClass",
        "COCO's classes one after the other, with contours of instances.",
        ("coco",),
        "instance",
        prompts.of_coco,
        files.instances,
        "Mask",
        "coco",
        prompt_root=_root("coco"),
        without=("category",),
        suffix="txt",
    ),
    Generator(
        "parallel_generate_Instance_LVIS_AnyClass",
        "LVIS's classes in the way of the script for COCO: DatasetDM names this script, but lacks it.",
        ("lvis",),
        "instance",
        prompts.of_coco,
        files.instances,
        "Mask",
        "lvis",
        prompt_root=_root("LVIS"),
        extra=(LVIS_JSON,),
        without=("category",),
        suffix="txt",
        script="parallel_generate_Instance_COCO_AnyClass",
    ),
    Generator(
        "parallel_generate_Depth_KITTI",
        "Street scenes with depth up to 80 m.",
        ("kitti", "nyu"),
        "depth",
        prompts.of_general,
        files.depth,
        "Annotation",
    ),
    Generator(
        "parallel_generate_Depth_NYU",
        "Rooms with depth up to 10 m.",
        ("nyu", "kitti"),
        "depth",
        prompts.of_general,
        files.depth,
        "Annotation",
        count="number_data",
    ),
    Generator(
        "parallel_generate_Pose_COCO_HeatMap",
        "People with the joints of one of them, from heatmaps.",
        ("pose",),
        "pose",
        prompts.in_sentence,
        files.heatmap_pose,
        "Annotation",
        count="number_data",
        suffix="txt",
    ),
    Generator(
        "parallel_generate_Pose_COCO",
        "People with the joints of one of them, from bins.",
        ("pose-simcc",),
        "pose",
        prompts.of_pose,
        files.bins_pose,
        "Annotation",
        count="number_data",
    ),
)
GENERATORS = {each.name: each for each in _GENERATORS}
