"""Settings of the commands: typed dataclasses that define the flags, the YAML file and run.json at once."""

from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from datasetdm_fast.plugins import Registry


@dataclass(frozen=True)
class TaskKind:
    """The three classes of a task, each as module:class; they are imported on first use."""

    label: str  # a LabelKind: files, pictures and distances of its labels
    task: str  # a Task: from a decoder's raw tensors to labels, and how it is taught
    meter: str  # a Meter: the figures


_LABELS, _TASKS, _METERS = (
    f"datasetdm_fast.{room}" for room in ("engine.labels", "engine.tasks", "training.evaluation")
)
OWN_TASKS = {
    "semantic": TaskKind(
        f"{_LABELS}.semantic:SemanticKind", f"{_TASKS}.semantic:SemanticTask", f"{_METERS}.metrics:Semantic"
    ),
    "instance": TaskKind(
        f"{_LABELS}.instance:InstanceKind", f"{_TASKS}.instance:InstanceTask", f"{_METERS}.metrics:Instance"
    ),
    "depth": TaskKind(f"{_LABELS}.depth:DepthKind", f"{_TASKS}.depth:DepthTask", f"{_METERS}.metrics:Depth"),
    "pose": TaskKind(f"{_LABELS}.pose:PoseKind", f"{_TASKS}.pose:PoseTask", f"{_METERS}.metrics:Pose"),
    "open-vocabulary": TaskKind(
        f"{_LABELS}.open_vocabulary:OpenVocabularyKind",
        f"{_TASKS}.open_vocabulary:OpenVocabularyTask",
        f"{_METERS}.metrics:OpenVocabulary",
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


OWN_LABELLERS = {DECODER: None, ATTENTION: LabellerKind(f"{_LABELS}.attention:AttentionKind", "")}  # ours are built in
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


@dataclass(frozen=True)
class EngineKind:
    """What the rest must know of an engine before any of its libraries is imported."""

    engine: str  # module:class, built from a model, its decoders, dtype, device and `options`
    # settings of its own -> cause and remedy of the refusal where they are given to another engine
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    requirement: tuple[str, str] | None = None  # module:function that raises Missing early, and the option it reads
    races: bool = False  # whether --engine auto tries it for a long run on a CPU
    halves: tuple[str, ...] = ()  # precisions that --dtype auto tries for a long run


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
    ),
    "ort": EngineKind(
        "datasetdm_fast.engine.engines.exported.ort:OrtEngine",
        options={
            "provider": ("provider: {value} is one of ONNX Runtime's, and the engine is {engine}", "Add --engine ort.")
        },
        requirement=("datasetdm_fast.engine.engines.exported.providers:require_provider", "provider"),
        races=True,
    ),
    "openvino": EngineKind(
        "datasetdm_fast.engine.engines.exported.openvino:OpenVinoEngine",
        options={"streams": ("--streams: OpenVINO has streams, and the engine is {engine}", "Add --engine openvino.")},
        requirement=("datasetdm_fast.engine.engines.exported.providers:require_openvino", "streams"),
        races=True,
        halves=("bf16",),
    ),
    "trt": EngineKind(
        "datasetdm_fast.engine.engines.exported.trt:TrtEngine",
        options={
            "engines": ("--engines: plans are TensorRT's, and the engine is {engine}", "Add --engine trt."),
            "trt_flavour": ("--trt-flavour: TensorRT has variants, and the engine is {engine}", "Add --engine trt."),
        },
        requirement=("datasetdm_fast.export.tensorrt.flavours:require_gpu", "trt_flavour"),
    ),
}
ENGINES = Registry("engines", OWN_ENGINES, EngineKind)
ENGINE_NAMES = ("auto", *ENGINES.names)  # auto is the fast one, unless a race in a long run on a CPU finds a faster
PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")  # of ONNX Runtime
SEEDS = 2**63  # a seed is one of so many from 0 on, which a generator and the ledger can hold
MOST_THREADS = 1024
MOST_TRIES = 10  # samples that a run makes for every one that is asked for, before it gives up
DEMO_PROMPTS = "demo world"  # what stands for the prompts of a run that takes the captions of the demo world
HALF = "half"  # a dtype: half precision where engine and device have it, see --dtype auto
FLAVOURS = ("auto", "tensorrt", "tensorrt-rtx")
OWN_SAMPLERS = {  # name -> module that ends with its SAMPLER
    "pndm": "datasetdm_fast.engine.sampling.multistep",
    "ddim": "datasetdm_fast.engine.sampling.ddim",
    "dpm-solver++": "datasetdm_fast.engine.sampling.dpm_solver",
}
SAMPLERS = Registry("samplers", OWN_SAMPLERS)  # of other packages, the records themselves
# diffusers' class -> sampler
SCHEDULERS = {"PNDMScheduler": "pndm", "DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpm-solver++"}
INVERSION = "inversion"  # the sampler of runs of label, whose pictures were given
PROFILES = ("0.3.0", "0.14.0")
OWN_FORMATS = {  # name -> module:format
    "coco": "datasetdm_fast.runs.exporting.coco:COCO",
    "voc": "datasetdm_fast.runs.exporting.voc:VOC",
    "yolo-detect": "datasetdm_fast.runs.exporting.yolo:DETECT",
    "yolo-seg": "datasetdm_fast.runs.exporting.yolo:SEGMENT",
    "yolo-pose": "datasetdm_fast.runs.exporting.yolo:POSE",
    "cityscapes": "datasetdm_fast.runs.exporting.cityscapes:CITYSCAPES",
    "nyu": "datasetdm_fast.runs.exporting.depth:NYU",
    "kitti": "datasetdm_fast.runs.exporting.depth:KITTI",
    "vkitti2": "datasetdm_fast.runs.exporting.depth:VKITTI2",
    "lvis": "datasetdm_fast.runs.exporting.lvis:LVIS",
    "ade": "datasetdm_fast.runs.exporting.ade:ADE",
    "deepfashion-mm": "datasetdm_fast.runs.exporting.deepfashion:DEEPFASHION",
    "hf": "datasetdm_fast.runs.exporting.hf:IMAGEFOLDER",
    "hf-parquet": "datasetdm_fast.runs.exporting.hf:PARQUET",
    "wds": "datasetdm_fast.runs.exporting.wds:WDS",
    "mmseg": "datasetdm_fast.runs.exporting.configs:MMSEG",
    "mask2former": "datasetdm_fast.runs.exporting.configs:MASK2FORMER",
    "simcc": "datasetdm_fast.runs.exporting.configs:SIMCC",
    "depthformer": "datasetdm_fast.runs.exporting.configs:DEPTHFORMER",
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


@dataclass(frozen=True)
class Defaults:
    """What a model was made to be sampled with."""

    size: int
    steps: int
    guidance: float
    capture: int = 0  # UNet timestep at which decoders are taught where nobody says
    attention: AttentionDefaults = AttentionDefaults()


# Upstream draws with 50 PLMS steps at guidance 5; the demo model was judged with the figures of its model card.
SD_DEFAULTS = Defaults(size=512, steps=50, guidance=5.0)
# Its features say most at timestep 100: at the last calls a v-prediction is nearly the noise alone.
DEMO_DEFAULTS = Defaults(
    size=128,
    steps=50,
    guidance=3.0,
    capture=100,
    attention=AttentionDefaults(
        1, 0.45, 0.35, self_divisor=1, cross_divisor=2, appends=False, start="a ", between=" and a "
    ),
)


def setting(
    default,
    help: str,
    *,
    identity: bool | str = True,
    choices: Collection[str] = (),
    metavar: str | None = None,
    positional: bool = False,
    output: str = "",
    has_names: bool = False,
    least: float | None = None,
    most: float | None = None,
):
    """The field of a setting; `identity` fields decide the bytes of the data set, the others only how it is made.
    With identity="if given" a setting counts only where it is not its default, so that runs made before there was such
    a setting can be resumed. `positional` needs no flag before it; `output` is "file" or "folder" where the setting
    names what is written. With `has_names` a choice may be followed by a colon and a name. A number below `least`
    or beyond `most` is refused.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "identity": identity,
            "choices": tuple(choices),
            "metavar": metavar,
            "positional": positional,
            "output": output,
            "has_names": has_names,
            "least": least,
            "most": most,
        },
    )


def flags_of(cls: type) -> list[Field]:
    """The settings of a command in the order of its --help: those that it names in FLAGS, or all."""
    known = {field.name: field for field in fields(cls)}
    return [known[name] for name in getattr(cls, "FLAGS", known)]


def listed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


class CommandSettings:
    """Settings mixed from the groups below; one that FLAGS does not name is no flag of the command and keeps its
    default.
    """

    FLAGS: list[str]

    def identity(self) -> dict[str, Any]:
        """The settings that decide the bytes of what is made."""
        values = {flag: getattr(self, flag.name) for flag in flags_of(type(self)) if flag.metadata["identity"]}
        return {
            flag.name: value
            for flag, value in values.items()
            if flag.metadata["identity"] is True or value != flag.default
        }


@dataclass(frozen=True)
class ModelSettings:
    model: str = setting(
        "demo", "demo, random-sd14, tiny, a diffusers folder or a .safetensors/.ckpt file", metavar="MODEL"
    )
    decoder: str = setting(
        "demo",
        "folder of trained decoders, one sub-folder each, a checkpoint FILE.pth of DatasetDM, or several with commas "
        "between them; random-sd14 and tiny have decoders of random weights",
        metavar="DIR",
    )
    outlines: str = setting(
        "auto",
        "outlines of labels: those of the decoder's masks, or outlines that follow the colours of the image near them; "
        "auto: as each decoder's configuration says",
        identity="if given",
        choices=("auto", *OUTLINES),
    )
    size: int = setting(0, "image side in pixels, a multiple of 64; 0 = what the model was made for", metavar="N")
    allow_download: bool = setting(
        False, "allow --model to name a repository on the model hub, which is downloaded", identity=False
    )


@dataclass(frozen=True)
class EngineSettings:
    engine: str = setting("auto", "engine that runs the networks", choices=ENGINE_NAMES)
    dtype: str = setting("auto", "precision of the fast engines", choices=("auto", "fp32", "tf32", "fp16", "bf16"))
    device: str = setting("auto", "cpu, cuda or cuda:N", identity=False, metavar="DEVICE")
    threads: int = setting(0, "CPU threads, 0 = all cores", identity=False, metavar="N", most=MOST_THREADS)
    compile: bool = setting(
        False, "compile the fast engine's U-Net with torch.compile, which takes minutes before the first image"
    )
    provider: str = setting(
        "auto", "execution provider of ONNX Runtime for --engine ort", identity=False, choices=PROVIDERS
    )
    streams: int = setting(
        0,
        "with --engine openvino: slices of a batch that run at once, each on its share of the threads; 0 = all of them",
        identity=False,
        metavar="N",
    )
    engines: str = setting(
        "",
        "folder of exported stages and plans for --engine trt; default: a cache",
        identity=False,
        metavar="ENGINES",
        output="folder",
    )
    trt_flavour: str = setting(
        "auto", "TensorRT variant to use where both are installed", identity=False, choices=FLAVOURS
    )

    def engine_choices(self) -> dict[str, Any]:
        """All of these by name, as open_engine takes them."""
        return {flag.name: getattr(self, flag.name) for flag in fields(EngineSettings)}


@dataclass(frozen=True)
class SamplingSettings:
    """What images are made of, and in which steps."""

    prompts: str = setting(
        "",
        "a prompt, a UTF-8 file with one prompt per line, or JSON lines as the command prompts writes them; default: "
        "captions of the demo world",
        metavar="FILE|TEXT",
    )
    classes: tuple[str, ...] = setting((), "class words for open-vocabulary labels", metavar="LIST")
    seed: int = setting(0, "seed of image 0; image k has seed + k, of which the last 32 bits count", metavar="N")
    steps: int = setting(0, "sampling steps, 0 = what the model was made for", metavar="N")
    guidance: float = setting(0.0, "guidance scale, 0 = what the model was made for", metavar="G")
    sampler: str = setting("pndm", "sampler", choices=SAMPLERS.names)
    profile: str = setting("0.3.0", "diffusers version whose PNDM timesteps are used", choices=PROFILES)


def dry_run_setting() -> Any:
    """The flag of every command that writes."""
    return setting(False, "show what would be done, and write nothing", identity=False)


@dataclass(frozen=True)
class OutputSettings:
    dry_run: bool = dry_run_setting()
    json: bool = setting(False, "machine-readable result on stdout", identity=False)
    quiet: bool = setting(False, "show no progress", identity=False)


@dataclass(frozen=True)
class RunConfig(ModelSettings, EngineSettings, SamplingSettings, OutputSettings, CommandSettings):
    FLAGS = (
        "model lora decoder outlines task combine labeller classes class_table ask exponent threshold uncertainty "
        "self_cells cross_cells parity engine prompts negative_prompt allow_unnamed truncate_prompts number "
        "per_class keep accept most_tries refill ignore ignore_below seed steps guidance sampler profile size "
        "batch_size image_format palette format out only resume mixed limit page_every verify verify_anyway "
        "verify_every dry_run allow_download json quiet threads gpus ranks cluster store make_bucket dtype compile "
        "device provider streams engines trt_flavour"
    ).split()

    lora: tuple[str, ...] = setting(
        (),
        "low-rank adapters to fuse into the model, comma-separated, each FILE or FILE:SCALE",
        identity="if given",
        metavar="LIST",
    )
    task: tuple[str, ...] = setting(
        ("semantic", "instance", "depth", "pose"),
        "labels to make, comma-separated, by default all that the decoders of --decoder make: "
        + ", ".join(LABELS)
        + "; TASK:NAME takes the decoder in the folder NAME, so that a task may have several",
        choices=LABELS,
        has_names=True,
        metavar="LIST",
    )
    combine: tuple[str, ...] = setting(
        (),
        'keep a label only where another shows a class, comma-separated, each as "semantic within instance:person"',
        metavar="LIST",
        identity="if given",
    )
    labeller: tuple[str, ...] = setting(
        (),
        "what makes the labels, comma-separated: decoder, those of --task; attention, the class words of the prompts "
        "without any decoder; a labeller that another package registers, by its name"
        + (f": {', '.join(sorted(LABELLER_KINDS.others))}" if LABELLER_KINDS.others else ""),
        identity=False,
        choices=LABELLERS,
        metavar="LIST",
    )
    ask: str = setting(
        "named",
        "class words for which a picture gets labels: those its prompt names, or all of --classes",
        identity="if given",
        choices=("named", "all"),
    )
    exponent: int = setting(
        -1,
        "with --labeller attention: times a class's map is multiplied by the self-attention, -1 = the model's default",
        identity="if given",
        metavar="N",
    )
    threshold: float = setting(
        0.0,
        "with --labeller attention: minimum value of a class, 0 = the model's default",
        identity="if given",
        metavar="X",
    )
    uncertainty: float = setting(
        0.0,
        "with --labeller attention: values from here to the threshold become 255, 0 = the model's default",
        identity="if given",
        metavar="X",
    )
    self_cells: int = setting(
        0,
        "with --labeller attention: cells per side of the self-attention that is read, 0 = the model's default",
        identity="if given",
        metavar="N",
    )
    cross_cells: int = setting(
        0,
        "with --labeller attention: cells per side of the cross-attention that is read, 0 = the model's default",
        identity="if given",
        metavar="N",
    )
    parity: str = setting(
        "",
        "with --labeller attention: word positions, noise and settings of another project, for comparison: "
        "dataset-diffusion",
        identity="if given",
        choices=("", *PARITIES),
        metavar="PROJECT",
    )
    classes: tuple[str, ...] = setting(
        (),
        "class words, comma-separated, or the name of a set (voc, coco, cityscapes, deepfashion, demo): for "
        "open-vocabulary labels, labels from attention and --per-class",
        metavar="LIST",
    )
    class_table: str = setting(
        "",
        "class words of your own: a CSV file (number,name,say,words), or an annotation file of LVIS or COCO; --classes "
        "then chooses some of them",
        identity="if given",
        metavar="FILE",
    )
    negative_prompt: str = setting(
        "",
        "text that images are steered away from, used in the unconditional half; dataset-diffusion: the text of that "
        "project",
        identity="if given",
        metavar="TEXT",
    )
    allow_unnamed: bool = setting(
        False, "accept prompts that name none of the class words; their label maps are empty", identity=False
    )
    truncate_prompts: bool = setting(
        False, "cut prompts beyond 77 tokens where no class word is lost, instead of refusing them"
    )
    number: int = setting(16, "images to make in all; prompts are repeated in turn", metavar="N")
    per_class: int = setting(
        0, "images per class of --classes, from templates; replaces --number and --prompts", metavar="N"
    )
    keep: str = setting(
        "all",
        "all: doubtful samples are kept and counted; trusted: they are set aside with their reason, and the run makes "
        "more until it has --number trusted ones",
        choices=("all", "trusted"),
        identity="if given",
    )
    accept: str = setting(
        "",
        'condition on scores, such as "score >= 0.5 and agreement > 0.8": samples that do not meet it are set aside, '
        "and the run makes more until --number samples meet it, or with --per-class that many of every class",
        metavar="COND",
        identity="if given",
    )
    most_tries: int = setting(
        MOST_TRIES,
        "with --keep trusted or --accept: maximum number of samples made per requested one, for each class if the run "
        "counts by class",
        metavar="N",
        identity="if given",
    )
    refill: bool = setting(
        False,
        "replace dropped samples by new ones; with --keep trusted also set aside and replace the doubtful samples of a "
        "run that kept all",
        identity=False,
    )
    ignore_below: float = setting(
        0.0,
        "pixels of label maps are 255 where the decoder's confidence is below this, 0 to 1",
        metavar="SHARE",
        identity="if given",
    )
    ignore: str = setting(
        "nothing",
        "disagreeing: pixels of label maps are 255 where two labels differ or the prompt does not name the thing",
        choices=("nothing", "disagreeing"),
        identity="if given",
    )
    batch_size: int = setting(
        0, "images per batch (changes results by rounding only); 0 = as many as fit into memory", metavar="N"
    )
    image_format: str = setting("png", "image files", choices=("png", "jpg"))
    palette: str = setting(
        "ours",
        "colours of the label maps: ours, those of a data set that has all of their classes, or with --class-table "
        "those of that table",
        choices=("ours", "voc", "cityscapes", "coco", "table"),
        identity="if given",
    )
    format: tuple[str, ...] = setting(
        (),
        "formats that the finished run is converted to, in its folder exports: " + ", ".join(EXPORT_FORMATS.names),
        identity=False,
        choices=EXPORT_FORMATS.names,
        metavar="LIST",
    )
    out: str = setting(
        "runs/demo",
        "run folder; if only other settings are given, a folder in runs/ that is named after them",
        identity=False,
        metavar="RUN",
        output="folder",
    )
    only: str = setting("", "regenerate this one sample of the run folder", identity=False, metavar="ID")
    resume: str = setting(
        "auto",
        "auto: resume an existing run folder with the same settings; never: refuse it",
        identity=False,
        choices=("auto", "never"),
    )
    limit: int = setting(0, "stop after N new images; the same command resumes", identity=False, metavar="N")
    verify: int = setting(
        0,
        "before the run, compare the first N samples with those of the reference engine; if they do not agree, nothing "
        "is written",
        identity=False,
        metavar="N",
    )
    verify_anyway: bool = setting(
        False, "with --verify: run even if they do not agree, and record that", identity=False
    )
    mixed: str = setting(
        "verified",
        "verified: another engine, dtype, device or version may continue a run folder, once it has made some of the "
        "stored samples again and their images and labels agree; no: it is refused, and so is another --batch-size",
        identity=False,
        choices=("verified", "no"),
    )
    verify_every: int = setting(
        0,
        "after every N samples compare the newest with the reference engine, less often after the first time if that "
        "would take over 1 % of the time; of several processes one does it; if it does not agree, the run stops; "
        "0 = never",
        identity=False,
        metavar="N",
    )
    page_every: float = setting(
        5.0,
        "minutes between updates of the page and index files of a run in progress, less often if that would take over "
        "1 % of the time; 0 = only at the end",
        identity=False,
        metavar="MINUTES",
    )
    threads: int = setting(
        0,
        "CPU threads of a process, 0 = all cores, divided among the ranks",
        identity=False,
        metavar="N",
        most=MOST_THREADS,
    )
    gpus: str = setting(
        "",
        "GPUs to use, one process each: all, how many, or a list such as 0,2,5",
        identity=False,
        metavar="all|N|LIST",
    )
    ranks: int = setting(0, "processes that share the work on a CPU", identity=False, metavar="N")
    cluster: str = setting(
        "",
        "run on a Ray cluster: ray starts one on this machine, ray://HEAD[:PORT] joins a running one",
        identity=False,
        metavar="ray[://HEAD]",
    )
    store: str = setting(
        "",
        "with --cluster: fsspec URL for the data set, such as s3://bucket/run; --out keeps the ledger",
        identity=False,
        metavar="URL",
    )
    make_bucket: bool = setting(False, "create the bucket of --store where there is none", identity=False)
    dtype: str = setting(
        "auto",
        "precision of the fast engines; auto is fp32 on a CPU and fp16 on a GPU, and in a new run of 100 images or "
        "more bf16 or fp16 where the device has it and four samples agree with the reference, else fp32; tf32 is fp32 "
        "with TF32 convolutions on a GPU, fp8 only with --engine trt",
        choices=("auto", "fp32", "tf32", "fp16", "bf16", "fp8"),
    )


@dataclass(frozen=True)
class LabelConfig(RunConfig):
    FLAGS = (
        "images captions tiles model decoder outlines task labeller classes class_table exponent threshold uncertainty "
        "self_cells cross_cells timesteps engine size seed batch_size image_format out only limit page_every dry_run "
        "allow_download json quiet threads dtype compile device"
    ).split()

    images: str = setting("", "folder of PNG and JPEG files", identity=False, metavar="IMAGES", positional=True)
    captions: str = setting(
        "",
        'JSON file {"a.jpg": "a dog on a sofa"}: what the pictures show; without it every picture is searched for '
        "all words of --classes",
        identity=False,
        metavar="FILE",
    )
    tiles: bool = setting(
        False,
        "read pictures larger than the model tile by tile, each overlapping the next, and join the labels at the "
        "picture's own size; not for depth and pose",
        identity="if given",
    )
    ask: str = "named"
    timesteps: tuple[str, ...] = setting(
        ("100", "200", "300", "400"), "with --labeller attention: noise levels, a UNet call each", metavar="LIST"
    )
    seed: int = setting(0, "seed of the noise of picture 0; picture k has seed + k", metavar="N")
    out: str = setting("runs/labelled", "run folder", identity=False, metavar="RUN", output="folder")
    only: str = setting("", "label this one picture of the run folder again", identity=False, metavar="ID")
