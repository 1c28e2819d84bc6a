"""What a run can be made of, by name: tasks, labellers, engines, samplers and formats; and each model's defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from datasetdm_fast.plugins import Registry


@dataclass(frozen=True)
class TaskKind:
    """The three classes of a task, each as module:class; they are imported on first use."""

    label: str  # a LabelKind: files, pictures and distances of its labels
    task: str  # a Task: from a decoder's raw tensors to labels, and how it is taught
    meter: str  # a Meter: the figures


OWN_TASKS = {
    "semantic": TaskKind(
        "datasetdm_fast.engine.labels.semantic:SemanticKind",
        "datasetdm_fast.engine.tasks.semantic:SemanticTask",
        "datasetdm_fast.training.evaluation.metrics:Semantic",
    ),
    "instance": TaskKind(
        "datasetdm_fast.engine.labels.instance:InstanceKind",
        "datasetdm_fast.engine.tasks.instance:InstanceTask",
        "datasetdm_fast.training.evaluation.ranking:Instance",
    ),
    "depth": TaskKind(
        "datasetdm_fast.engine.labels.depth:DepthKind",
        "datasetdm_fast.engine.tasks.depth:DepthTask",
        "datasetdm_fast.training.evaluation.metrics:Depth",
    ),
    "pose": TaskKind(
        "datasetdm_fast.engine.labels.pose:PoseKind",
        "datasetdm_fast.engine.tasks.pose:PoseTask",
        "datasetdm_fast.training.evaluation.ranking:Pose",
    ),
    "open-vocabulary": TaskKind(
        "datasetdm_fast.engine.labels.semantic:OpenVocabularyKind",
        "datasetdm_fast.engine.tasks.open_vocabulary:OpenVocabularyTask",
        "datasetdm_fast.training.evaluation.metrics:OpenVocabulary",
    ),
}
TASK_KINDS = Registry("tasks", OWN_TASKS, TaskKind)
TASKS = TASK_KINDS.names
ATTENTION = "attention"  # labels read from the attention of the calls that draw an image
DECODER = "decoder"
FROM_DECODER, FROM_IMAGE = OUTLINES = ("decoder", "image")  # where labels have their outlines from


@dataclass(frozen=True)
class LabellerKind:
    """The two classes of a labeller, each as module:class; they are imported on first use."""

    label: str  # a LabelKind: files, pictures and distances of its labels
    labeller: str  # a Labeller: what reads them


OWN_LABELLERS = {
    DECODER: None,
    ATTENTION: LabellerKind("datasetdm_fast.engine.labels.semantic:AttentionKind", ""),
}  # ours are built in
LABELLER_KINDS = Registry("labellers", OWN_LABELLERS, LabellerKind, reserved=TASKS)
LABELLERS = LABELLER_KINDS.names
UNDECODED = tuple(name for name in LABELLERS if name != DECODER)  # labels that no decoder reads, called as what does
LABELS = (*TASKS, *UNDECODED)
# what a checkpoint of DatasetDM was trained on
UPSTREAM_KINDS = ("voc", "cityscapes", "deepfashion", "coco", "lvis", "nyu", "kitti", "vkitti2", "pose", "pose-simcc")
PARITIES = {  # name -> settings that a work was made with, where others are not given
    "dataset-diffusion": {
        "steps": 100,
        "guidance": 7.5,
        "profile": "0.14.0",
        "negative_prompt": "dataset-diffusion",
        "exponent": 4,
        "threshold": 0.6,
        "uncertainty": 0.5,
    }
}


# the first changes no image; the others must pass the gate of labels
SPEEDS = ("exact", "fast25", "cache3", "fast25-cache3", "fp8")
EXACT, FAST, CACHED, FAST_CACHED, FP8 = SPEEDS
FAST_SAMPLER, FAST_STEPS = "dpm-solver++", 25  # of fast25 and fast25-cache3


@dataclass(frozen=True)
class EngineKind:
    """What the rest must know of an engine before any of its libraries is imported."""

    engine: str  # module:class, built from a model, its decoders, dtype, device and `options`
    # settings of its own -> cause and remedy of the refusal where they are given to another engine
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    requirement: tuple[str, ...] = ()  # module:function that raises Missing early, and the options it reads
    halves: tuple[str, ...] = ()  # precisions that --dtype auto tries for a long run
    needs: Literal["", "network", "export", "plans"] = ""  # of a family, see Backbone.served_by


OWN_ENGINES = {
    "torch": EngineKind("datasetdm_fast.engine.engines.torch:TorchEngine"),
    "fast": EngineKind(
        "datasetdm_fast.engine.engines.fast:FastEngine",
        options={
            "compile": (
                "--compile: the engine is {engine}, and only the fast one can be compiled",
                "Use it with --engine fast.",
            )
        },
        halves=("bf16", "fp16"),
        needs="network",
    ),
    "ort": EngineKind(
        "datasetdm_fast.engine.engines.exported.ort:OrtEngine",
        options={
            "provider": ("provider: {value} is one of ONNX Runtime's, and the engine is {engine}", "Add --engine ort.")
        },
        requirement=("datasetdm_fast.engine.engines.exported.providers:require_provider", "provider"),
        needs="export",
    ),
    "openvino": EngineKind(
        "datasetdm_fast.engine.engines.exported.openvino:OpenVinoEngine",
        options={"streams": ("--streams: OpenVINO has streams, and the engine is {engine}", "Add --engine openvino.")},
        requirement=("datasetdm_fast.engine.engines.exported.providers:require_openvino", "streams"),
        halves=("bf16",),
        needs="export",
    ),
    "trt": EngineKind(
        "datasetdm_fast.engine.engines.exported.trt:TrtEngine",
        requirement=("datasetdm_fast.export.tensorrt.flavours:require_gpu",),
        needs="plans",
    ),
}
ENGINES = Registry("engines", OWN_ENGINES, EngineKind)
ENGINE_NAMES = ("auto", *ENGINES.names)  # auto is the fast one
PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")  # of ONNX Runtime
SEEDS = 2**63  # a seed is one of so many from 0 on, which a generator and the ledger can hold
MOST_CALLS = 16  # captured calls that a decoder reads
MOST_TRIES = 10  # samples that a run makes for every one that is asked for, before it gives up
DEMO_PROMPTS = "demo world"  # what stands for the prompts of a run that takes the captions of the demo world
HALF = "half"  # a dtype: half precision where engine and device have it, see --dtype auto
OWN_SAMPLERS = {  # name -> module:record
    "pndm": "datasetdm_fast.engine.sampling.multistep:SAMPLER",
    "ddim": "datasetdm_fast.engine.sampling.ddim:SAMPLER",
    "dpm-solver++": "datasetdm_fast.engine.sampling.dpm_solver:SAMPLER",
    "euler": "datasetdm_fast.engine.sampling.euler:SAMPLER",
    "euler-ancestral": "datasetdm_fast.engine.sampling.euler:ANCESTRAL",
    "lcm": "datasetdm_fast.engine.sampling.lcm:SAMPLER",
    "heun": "datasetdm_fast.engine.sampling.euler:HEUN",
    "unipc": "datasetdm_fast.engine.sampling.unipc:SAMPLER",
}
SAMPLERS = Registry("samplers", OWN_SAMPLERS)  # of other packages, the records themselves
SCHEDULERS = {  # diffusers' class -> sampler
    "PNDMScheduler": "pndm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm-solver++",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "UniPCMultistepScheduler": "unipc",
}
USUAL_SAMPLER = "pndm"  # of runs that name none
INVERSION = "inversion"  # the sampler of runs of label, whose pictures were given
PROFILES = ("0.3.0", "0.14.0")
OWN_FORMATS = {  # name -> module:format
    "coco": "datasetdm_fast.runs.exporting.coco:CocoFormat",
    "voc": "datasetdm_fast.runs.exporting.voc:VocFormat",
    "yolo-detect": "datasetdm_fast.runs.exporting.yolo:YoloDetect",
    "yolo-seg": "datasetdm_fast.runs.exporting.yolo:YoloSegment",
    "yolo-pose": "datasetdm_fast.runs.exporting.yolo:YoloPose",
    "cityscapes": "datasetdm_fast.runs.exporting.cityscapes:CityscapesFormat",
    "nyu": "datasetdm_fast.runs.exporting.depth:NyuFormat",
    "kitti": "datasetdm_fast.runs.exporting.depth:KittiFormat",
    "lvis": "datasetdm_fast.runs.exporting.coco:LvisFormat",
    "hf": "datasetdm_fast.runs.exporting.hf:ImageFolderFormat",
    "hf-parquet": "datasetdm_fast.runs.exporting.hf:ParquetFormat",
    "wds": "datasetdm_fast.runs.exporting.wds:WebDatasetFormat",
    "labelme": "datasetdm_fast.runs.exporting.annotation_tools:LabelMeFormat",
    "cvat": "datasetdm_fast.runs.exporting.annotation_tools:CvatFormat",
    "label-studio": "datasetdm_fast.runs.exporting.annotation_tools:LabelStudioFormat",
    "mmseg": "datasetdm_fast.runs.exporting.mmseg:MmsegFormat",
}
EXPORT_FORMATS = Registry("writers", OWN_FORMATS)  # of other packages, the formats themselves


REFERENCE = "torch"  # the engine that others are compared with


@dataclass(frozen=True)
class AttentionDefaults:
    """The numbers with which labels are read from the attention of a model; those of Dataset Diffusion."""

    exponent: int = 4
    threshold: float = 0.6
    uncertainty: float = 0.5
    self_divisor: int = 2  # cells of a side of the latents for one of the self-attention that is read
    cross_divisor: int = 4
    appends: bool = True  # whether the class words are added to the prompt
    start: str = ""  # of a class prompt, and what stands between its words: as the model's captions have them
    between: str = " "
    # Seg4Diff instead: the blocks whose attention from the image to the words of the prompt is averaged, at one call
    blocks: tuple[int, ...] = ()
    timestep: int = 500
    concept_blocks: tuple[int, ...] = ()  # ConceptAttention's, where words may be asked for that prompts do not name


@dataclass(frozen=True)
class FlowRule:
    """How the pipeline of a family of flows asks its scheduler for noise levels."""

    spacing: Literal["scheduler", "uniform", "uniform-fp32"] = "scheduler"  # its own, or from 1 to 1 / steps
    mu: Literal["linear", "empirical"] = "linear"  # the logarithm of a dynamic shift: by the tokens, or by steps, too
    is_imposed: bool = False  # whether UniPC takes the pipeline's spacing, too, in place of its own


@dataclass(frozen=True)
class Defaults:
    """What a model was made to be sampled with."""

    size: int
    steps: int
    guidance: float
    capture: int = 0  # timestep at which decoders are trained by default
    attention: AttentionDefaults = AttentionDefaults()
    sampler: str = "auto"  # what stands for USUAL_SAMPLER; auto: the sampler that the scheduler config is of
    stock: tuple[int, float] = (0, 0.0)  # steps and guidance of its pipeline of diffusers, where they are others


# Upstream draws with 50 PLMS steps at guidance 5; the demo model was judged with the figures of its model card.
SD_STOCK = (50, 7.5)
SD_DEFAULTS = Defaults(size=512, steps=50, guidance=5.0, sampler=USUAL_SAMPLER, stock=SD_STOCK)
# Its features say most at timestep 100: at the last calls a v-prediction is nearly the noise alone.
DEMO_DEFAULTS = Defaults(
    size=128,
    steps=50,
    guidance=3.0,
    capture=100,
    sampler=USUAL_SAMPLER,
    stock=SD_STOCK,
    attention=AttentionDefaults(
        1, 0.45, 0.35, self_divisor=1, cross_divisor=2, appends=False, start="a ", between=" and a "
    ),
)
SHARD_SIZE = 1000  # samples of a shard where run.json names no other number
SHARD_BYTES = 256_000_000  # of a tar file, beyond which a shard gets fewer samples by default
