"""Settings of commands: typed dataclasses that define the flags, the YAML file and run.json at once."""

from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypeVar

from datasetdm_fast.config import ENGINE_NAMES, OUTLINES, PROFILES, PROVIDERS, SAMPLERS, SPEEDS, USUAL_SAMPLER

MOST_THREADS = 1024
Group = TypeVar("Group")


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
    required: bool = False,
    least: float | None = None,
    most: float | None = None,
    other_names: Mapping[str, str] = MappingProxyType({}),
    may_repeat: bool = False,
):
    """The field of a setting; `identity` fields decide the bytes of the data set, the others only how it is made.
    With identity="if given" a setting counts only where it is not its default, so that runs made before there was such
    a setting can be resumed. `positional` needs no flag before it; `output` is "file", "folder" or "place" (a folder or
    its URL) where the setting names what is written. With `has_names` a choice may be followed by a colon and a name. A
    `required` setting that is missing or empty is refused, and so is a number below `least` or beyond `most`.
    `other_names` are what others call a choice, which a refusal suggests then. Words of a list count once, except where
    they `may_repeat`.
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
            "required": required,
            "least": least,
            "most": most,
            "other_names": other_names,
            "may_repeat": may_repeat,
        },
    )


def flags_of(cls: type) -> list[Field]:
    """The settings of a command in the order of its --help: those in FLAGS, or its own, then the others."""
    known = {field.name: field for field in fields(cls)}
    declared = [name for name in cls.__annotations__ if name in known]
    return [known[name] for name in getattr(cls, "FLAGS", dict.fromkeys([*declared, *known]))]


class CommandSettings:
    """Settings mixed from the groups below; one that FLAGS does not name is no flag of the command and keeps its
    default.
    """

    FLAGS: list[str]

    def group(self, cls: type[Group]) -> Group:
        """The settings of one of the groups."""
        return cls(**{each.name: getattr(self, each.name) for each in fields(cls)})

    def identity(self) -> dict[str, Any]:
        """The settings that decide the bytes of what is made, as JSON holds them."""
        values = {flag: getattr(self, flag.name) for flag in flags_of(type(self)) if flag.metadata["identity"]}
        return {
            flag.name: list(value) if isinstance(value, tuple) else value
            for flag, value in values.items()
            if flag.metadata["identity"] is True or value != flag.default
        }


@dataclass(frozen=True)
class ModelSettings:
    model: str = setting(
        "demo", "demo, demo-dit, tiny, random-NAME, a diffusers folder or a .safetensors/.ckpt file", metavar="MODEL"
    )
    decoder: str = setting(
        "demo",
        "folder of trained decoders, one sub-folder each, a checkpoint FILE.pth of DatasetDM, or several with commas "
        "between them; random: untrained ones, as random-sd14 and tiny have them",
        metavar="DIR",
    )
    outlines: str = setting(
        "auto",
        "outlines of labels: those of the decoder's masks, or outlines that follow the colours of the image near them; "
        "auto: as each decoder's configuration says",
        identity="if given",
        choices=("auto", *OUTLINES),
    )
    lora: tuple[str, ...] = setting(
        (),
        "low-rank adapters to fuse, comma-separated, each FILE or FILE:SCALE",
        identity="if given",
        metavar="LIST",
        may_repeat=True,
    )
    size: int = setting(
        0, "image side in pixels, a multiple of 64; 0 = what the model was made for", metavar="N", least=0
    )
    allow_download: bool = setting(
        False, "download --model where it names a repository on the model hub", identity=False
    )


@dataclass(frozen=True)
class EngineSettings:
    engine: str = setting("auto", "engine that runs the networks", choices=ENGINE_NAMES)
    dtype: str = setting("auto", "precision of the fast engines", choices=("auto", "fp32", "tf32", "fp16", "bf16"))
    device: str = setting("auto", "cpu, cuda or cuda:N", identity=False, metavar="DEVICE")
    threads: int = setting(0, "CPU threads, 0 = all cores", identity=False, metavar="N", least=0, most=MOST_THREADS)
    compile: bool = setting(
        False, "compile the fast engine's U-Net with torch.compile, which takes minutes before the first image"
    )
    provider: str = setting(
        "auto", "execution provider of ONNX Runtime for --engine ort", identity=False, choices=PROVIDERS
    )
    streams: int = setting(
        0, "with --engine openvino: slices of a batch that run at once; 0 = all of them", identity=False, metavar="N"
    )

    def engine_choices(self) -> dict[str, Any]:
        """All of these by name, as open_engine takes them."""
        return {flag.name: getattr(self, flag.name) for flag in fields(EngineSettings)}


@dataclass(frozen=True)
class SamplingSettings:
    """The steps in which images are sampled."""

    steps: int = setting(0, "sampling steps, 0 = what the model was made for", metavar="N")
    guidance: float = setting(0.0, "guidance scale, 0 = what the model was made for", metavar="G")
    sampler: str = setting(
        USUAL_SAMPLER, "sampler; the default stands for what a model was published with", choices=SAMPLERS.names
    )
    profile: str = setting("0.3.0", "diffusers version whose PNDM timesteps are used", choices=PROFILES)
    speed: str = setting(
        SPEEDS[0],
        "exact, or an approximation that is refused where it makes labels worse: fast25, DPM-Solver++ in 25 calls; "
        "cache3, the deep features of a U-Net kept for two of three calls; fast25-cache3, both; "
        "fp8, products of MM-DiTs in 8 bits, which save time on GPUs from Ada on and none on a CPU",
        identity="if given",
        choices=SPEEDS,
    )


@dataclass(frozen=True)
class OutputSettings:
    dry_run: bool = setting(False, "show what would be done, and write nothing", identity=False)
    json: bool = setting(False, "machine-readable result on stdout", identity=False)
    quiet: bool = setting(False, "show no progress", identity=False)
