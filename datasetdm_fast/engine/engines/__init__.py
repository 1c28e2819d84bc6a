"""Engines: ways to run the networks behind one narrow protocol, above which all else exists once; opened by name."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from datasetdm_fast.config import ENGINE_NAMES, ENGINES, HALF, REFERENCE, EngineKind
from datasetdm_fast.cores import before_torch
from datasetdm_fast.engine.backbones import check_source
from datasetdm_fast.engine.backbones.adapter_files import find_adapter
from datasetdm_fast.engine.decoders.config import SHIPPED, find_decoders, parts_of
from datasetdm_fast.errors import Missing, Refused, check_choice, nearest
from datasetdm_fast.plugins import load_place
from datasetdm_fast.settings import EngineSettings
from datasetdm_fast.stages import FACTOR

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from datasetdm_fast.data import AnyCapture, AttentionSums, Capture, Text
    from datasetdm_fast.engine.decoders.trunk import Decoder
    from datasetdm_fast.engine.loading.model import Model


class Engine(Protocol):
    """What every engine offers, and what a subclass need not write; tensors live on `device`, and none of the calls
    keeps a graph for gradients.

    Latents are [B, C, h, w] of the model's own space. A call has R rows of text, [uncond_0 .. uncond_{B-1}, cond_0 ..
    cond_{B-1}] of a model with classifier-free guidance and B of any other.
    """

    name: str
    model: Model
    decoders: Mapping[str, nn.Module]
    device: torch.device
    precision: str
    is_compiled: bool = False
    speeds: tuple[str, ...] = ()  # approximate ones, see loop/calls.py, whose calls it has beside those below
    adjustments: Mapping[str, int] = {}  # settings that had to be changed, for the rows of the samples made since

    def encode_text(self, prompts: Sequence[str]) -> Text:
        """A row of encoded text for each prompt."""

    def encode_classes(self, words: Sequence[str]) -> Tensor:
        """[K, D] class embeddings: the mean over all positions that are read."""
        text = self.encode_text(words)
        if text.mask is None:
            return text.context.mean(1)
        weights = text.mask[..., None].to(text.context.dtype)
        return (text.context * weights).sum(1) / weights.sum(1)

    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        """[R, C, h, w] output of the denoiser for latents [B, C, h, w] and R rows of text."""

    def denoise_and_capture(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, AnyCapture]:
        """The output of `denoise`, and what the decoders read."""

    def denoise_and_capture_raw(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        """The output of `denoise`, and every feature and map as it is."""

    def denoise_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        """The output of `denoise`, on a CPU bit by bit but for OpenVINO, and the sums with this call's attention added:
        of every self-attention with as many cells as `sums.cells`, and of the queries of every cross-attention with as
        many as `sums.tokens` over B rows of class prompts.
        """

    def decode_image(self, latents: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 images."""
        return self.decode_and_check(latents)[0]

    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The images of `decode_image`, and of each [B] whether its pixels were finite numbers."""

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """[B, C, h, w] latents of uint8 images [B, H, W, 3]: posterior means, or samples by `generators`."""

    def annotate(self, task: str, capture: AnyCapture, text: Tensor | None = None) -> dict[str, Tensor]:
        """Raw outputs of the task's decoder; `text` holds class embeddings for open-vocabulary decoders."""

    def prepare(self, batch: int) -> None:
        """Makes ready what calls of `batch` images would otherwise make at the first of them."""
        return

    def suggested_batch(self) -> int:
        """The default batch size."""
        from datasetdm_fast.engine.engines.device import BATCH, suggest_batch  # which import torch

        return BATCH if self.device.type == "cuda" else suggest_batch(self.model.size // FACTOR, self.device)

    def fp32_fallback(self) -> Engine | None:
        """An engine over the same weights in fp32, to retry quarantined samples; None where this one is in fp32."""
        return None if self.precision == "fp32" else self._wide

    @functools.cached_property
    def _wide(self) -> Engine:
        make = load_place(self.model.backbone.fast or ENGINES["fast"].engine)
        device, is_compiled = str(self.device), self.is_compiled
        return make(self.model, self.decoders, dtype="fp32", device=device, compile=is_compiled)

    def fingerprint(self) -> dict[str, str]:
        """Names and versions that decide the engine's rounding."""
        import torch

        is_gpu = self.device.type == "cuda"
        values = {
            "engine": self.name,
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if is_gpu else platform.machine(),
            "dtype": self.precision,
            **self._versions(),
        }
        if self.is_compiled:
            values["compiled"] = "yes"
        return values

    def _versions(self) -> dict[str, str]:
        """Versions and settings that decide rounding."""
        import torch

        return {"torch": torch.__version__}


def name_processor() -> str:
    """What Linux calls the processor; where that is not told its kind, such as arm64."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"model name\s*: (.+)", text)
    return model[1].strip() if model else platform.machine()


def check_task(task: str, decoders: Mapping[str, object]) -> None:
    """Raises Missing where no decoder of the task is loaded."""
    if task not in decoders:
        raise Missing(
            f"task: no decoder for {task!r} was loaded, there are {', '.join(decoders) or 'none'}",
            "Name a folder with that decoder: --decoder DIR",
        )


RANDOM = "random"  # as --decoder: untrained ones of seeded weights, for tests and measurements


def open_engine(
    model: str = "demo",
    decoder: str | None = "demo",
    tasks: Sequence[str] | None = None,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    size: int = 0,
    allow_download: bool = False,
    threads: int = 0,
    lora: Sequence[str] = (),
    loaded: Model | None = None,
    outlines: str = "auto",
    guidance: float = 0.0,
    **options: Any,
) -> tuple[Engine, dict[str, Any]]:
    """An engine with the decoders of `tasks` (None: all), and their description; options as in EngineSettings. The
    dtype "half" is that of a long run in which --dtype auto measures, or auto where engine and device have none.

    A task stands for its own decoder, TASK:NAME for the one in the folder NAME. `lora` are adapters to fuse into the
    model, which may be `loaded` already; `outlines` are those of the labels. `guidance` is that of the images, 0 the
    model's own: some families make one call of two rows of it, and of 1 one of one row.
    """
    check_engine(engine, **options)
    if loaded is None:
        check_sources(model, decoder, allow_download)
    for text in lora:
        find_adapter(text)
    before_torch()

    from datasetdm_fast.engine.engines.device import half_of, resolve_device, set_threads
    from datasetdm_fast.engine.loading import load_model

    set_threads(threads)
    if loaded is None:
        loaded = load_model(model, size=size, allow_download=allow_download)
    if dtype == HALF:
        half, fitting = half_of(resolve_device(device)), ENGINES["fast" if engine == "auto" else engine].halves
        dtype = half if half in fitting and half in loaded.backbone.halves else "auto"
    if guidance:
        loaded = replace(loaded, scale=guidance)
    if lora:
        from datasetdm_fast.engine.loading.lora import fuse_adapters  # which few runs need

        loaded = fuse_adapters(loaded, lora)
    decoders, descriptions = load_decoders(loaded, decoder, tasks, outlines=outlines)
    return build_engine(engine, loaded, decoders, dtype=dtype, device=device, **options), descriptions


def load_decoders(
    model: Model, decoder: str | None, tasks: Sequence[str] | None = None, *, outlines: str = "auto"
) -> tuple[dict[str, Decoder], dict[str, Any]]:
    """The decoders of `tasks` (None: all) that --decoder names, checked against the model, and their descriptions."""
    from datasetdm_fast.engine.decoders.checkpoint import check_fits, load_decoder, seeded_decoders
    from datasetdm_fast.engine.decoders.trunk import fold
    from datasetdm_fast.engine.loading.presets import SEEDED_LICENCE

    decoders: dict[str, Decoder] = {}
    descriptions: dict[str, Any] = {}
    is_seeded = decoder == "demo" and model.licence == SEEDED_LICENCE  # what was trained for the demo model fits none
    if is_seeded or decoder == RANDOM:
        seeded, holder = seeded_decoders(model.levels, model.text_width), f"--decoder {RANDOM}, of seeded weights,"
        for label in check_known(tasks, seeded, list(seeded), holder):
            decoders[label] = fold(seeded[label])
            descriptions[label] = {"digest": f"seeded: {label}", "licence": SEEDED_LICENCE}
    elif decoder is not None:
        source = model.name if decoder == "demo" and model.name in SHIPPED else decoder
        places = parts_of(source)
        if not all(path.is_dir() for path in places):
            from datasetdm_fast.engine.decoders.upstream import unpack_decoders  # of checkpoints

            places = unpack_decoders(source, model.levels)
        folders = find_decoders(places)
        labels = check_known(tasks, folders, folders.labels, decoder)
        decoders = {label: load_decoder(folders[label]) for label in labels}
        descriptions = describe_decoders(folders, labels)
    for label, network in decoders.items():
        has_blocks = model.backbone.blocks(model.configs) > 0  # else a decoder that names some fits another family
        read = model.reading(network.config.blocks, f"{label} decoder") if has_blocks else model
        check_fits(network, read.levels, label, model.text_width)
        network.config = replace(network.config, outlines=network.config.outlines if outlines == "auto" else outlines)
    return decoders, descriptions


def check_known(
    tasks: Sequence[str] | None, known: Collection[str], labels: Sequence[str], holder: str
) -> Sequence[str]:
    """The requested labels, by default one of each decoder; what is none of the `known` ones is refused."""
    for label in tasks or ():
        if label in known:
            continue
        task, colon, _ = label.partition(":")
        others = [name for name in known if name.startswith(f"{task}:")]
        if colon:
            raise Refused(
                f"--task {label}: {holder} holds no decoder of this name{nearest(label, others)}",
                f"Choose from {', '.join(others or labels)}.",
            )
        if others:
            raise Refused(
                f"--task {label}: {holder} holds several decoders for it, and none is called {task}",
                f"Choose from {', '.join(others)}.",
            )
        raise Missing(
            f"--task {label}: {holder} holds no decoder for it, only for {', '.join(labels)}",
            f"Name a folder that has one with --decoder, or write --task {','.join(labels)}.",
        )
    return labels if tasks is None else tasks


def describe_decoders(folders: Mapping[str, Path], labels: Sequence[str]) -> dict[str, Any]:
    """Digest and licence of each label's decoder files."""
    from datasetdm_fast.engine.loading.model import digest, folder_licence

    return {
        label: {
            "digest": digest([folders[label] / "config.json", folders[label] / "model.safetensors"]),
            "licence": folder_licence(folders[label].parent),
        }
        for label in labels
    }


def check_engine(name: str, **options: Any) -> None:
    """Raises Missing where an engine lacks what it runs on, before torch is imported or a model is read.

    The options are settings of EngineSettings.
    """
    kind, values = _select_options(name, options)
    if kind.requirement:
        place, *read = kind.requirement
        ENGINES.guard(name, lambda: load_place(place)(*(values[option] for option in read)))


def check_sources(model: str, decoder: str | None, allow_download: bool) -> None:
    """Refuses a model or folders of decoders that are not there, before libraries and weights are loaded."""
    check_source(model, allow_download)
    for folder in parts_of(decoder) if decoder is not None else ():
        is_checkpoint = folder.suffix or ":" in str(folder)  # which is judged where it is opened
        if not (folder.exists() or is_checkpoint or str(folder) == RANDOM):
            find_decoders([folder])


def check_installed(name: str, settings: EngineSettings) -> None:
    """Raises Missing where an engine lacks what it runs on with its own options of `settings`."""
    options = ENGINES["fast" if name == "auto" else name].options
    check_engine(name, **{option: getattr(settings, option) for option in options if hasattr(settings, option)})


def build_engine(
    name: str,
    model: Model,
    decoders: Mapping[str, nn.Module] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    **options: Any,
) -> Engine:
    """The engine `name` for a loaded model; "auto" is the fast one, or the reference where the family has no network of
    ours. The options are settings of EngineSettings: those of another engine are refused.
    """
    if name == "auto":
        name = "fast" if model.backbone.served_by(ENGINES["fast"].needs) else REFERENCE
    kind, values = _select_options(name, options)
    if not model.backbone.served_by(kind.needs):
        raise Refused(
            f"engine: {name} does not run {model.backbone.title}, {REFERENCE} does",
            f"Use --engine {REFERENCE}, which runs the modules of diffusers in fp32.",
        )
    if decoders and model.backbone.blocks(model.configs):
        from datasetdm_fast.engine.decoders.trunk import read_together  # which imports torch

        model, decoders = read_together(model, decoders)
    place = (model.backbone.fast if name == "fast" else None) or kind.engine
    return ENGINES.guard(name, lambda: load_place(place)(model, decoders or {}, dtype=dtype, device=device, **values))


def _select_options(name: str, options: Mapping[str, Any]) -> tuple[EngineKind, dict[str, Any]]:
    """The record of an engine, and the values of its options."""
    check_choice("engine", name, ENGINE_NAMES)
    chosen, usual = ENGINES["fast" if name == "auto" else name], EngineSettings()
    settings = EngineSettings(**options)
    if unknown := [option for option in chosen.options if not hasattr(usual, option)]:
        error = ValueError(f"there is no flag for its option {unknown[0]!r}")
        raise ENGINES.failure(name, error, "does not load")
    for kind in (kind for other, kind in ENGINES.items() if other not in ENGINES.others):
        for option, refusal in kind.options.items():
            value = getattr(settings, option)
            if option not in chosen.options and value != getattr(usual, option):
                cause, remedy = (text.format(engine=name, value=value) for text in refusal)
                raise Refused(cause, remedy)
    return chosen, {option: getattr(settings, option) for option in chosen.options}


_TURN, _REPLACED = Lock(), list[Any]()  # default dtypes and precisions of the process, those of the program first
_OLDER_NAMES = {"tf32": "high", "bf16": "medium"}  # of the precisions that torch.set_float32_matmul_precision sets


@contextmanager
def in_own_precision() -> Iterator[None]:
    """Within the block, torch's autocast, default dtype and default device are PyTorch's own, and a CPU multiplies fp32
    unrounded, also where a program around it has changed them: they would silently round weights, and change images and
    labels. After it, cuDNN chooses its algorithms as that program has set.
    """
    import torch

    backend, products, cudnn = torch.backends.mkldnn, torch.backends.cuda.matmul, torch.backends.cudnn
    operations = backend.matmul, backend.conv
    with ExitStack() as switched:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                switched.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            switched.enter_context(torch.device("cpu"))
        with _TURN:
            usual = backend.fp32_precision  # which operations with none of their own follow
            precisions = [operation.fp32_precision for operation in operations]
            precisions = ["none" if precision == usual else precision for precision in precisions]
            choice = cudnn.benchmark, cudnn.deterministic
            _REPLACED.append((torch.get_default_dtype(), products.fp32_precision, precisions, choice))
        try:
            torch.set_default_dtype(torch.float32)
            for operation in operations:
                operation.fp32_precision = "ieee"
            yield
        finally:
            with _TURN:  # the last thread within the block restores those of the program
                dtype, precision_on_gpu, precisions, choice = _REPLACED.pop()
                torch.set_default_dtype(dtype)
                if not _REPLACED:  # engines of a GPU change these, and other threads may be in the middle of a call
                    cudnn.benchmark, cudnn.deterministic = choice
                    if products.fp32_precision != precision_on_gpu:  # by PyTorch's older way
                        torch.set_float32_matmul_precision(_OLDER_NAMES.get(precisions[0], "highest"))
                        products.fp32_precision = precision_on_gpu
                for operation, precision in zip(operations, precisions, strict=True):
                    operation.fp32_precision = precision
