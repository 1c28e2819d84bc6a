"""What lies in a folder of exported stages: files, tensors, digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.onnx_graph import check_onnx

NAME = "manifest.json"
LARGEST_MANIFEST = 16 << 20  # bytes of a manifest
FORMAT = 1
BEGINNING = b'{\n  "stages": {'  # of every manifest, also of one that was cut off
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a stage."""

    name: str
    axes: tuple[str | int, ...]  # size letters of stages.py
    shape: tuple[str | int, ...]  # the same as numbers, but for what a call decides: B, 2B, K
    dtype: str


@dataclass(frozen=True)
class StageFile:
    file: str
    data: str  # the file beside it that holds its large weights; stages may share one; empty where it has none
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file, self.data) if self.data else (self.file,)


@dataclass(frozen=True)
class FileInfo:
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Manifest:
    """The stages of one model and its decoders; `source` is a digest of every weight: equal sources, equal files."""

    stages: Mapping[str, StageFile]
    files: Mapping[str, FileInfo]
    precision: str
    runtime: str  # any, or the one library whose own operators the graphs use
    opset: int
    size: int  # pixels of a side
    source: str
    model: Mapping[str, str]  # name and digests of its parts
    tasks: Mapping[str, str]  # task -> kind of its decoder
    # task -> level -> its own channels of that level's sums, first and one past the last
    channels: Mapping[str, Mapping[str, tuple[int, int]]]
    exporter: str  # version of this package
    format: int = field(default=FORMAT)

    def digest(self) -> str:
        """SHA-256 of the manifest, thereby of every file it names."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, origin: str = NAME) -> Manifest:
        """The manifest of a JSON text; refuses what is none, and file names that lead out of its folder."""
        try:
            values = documents.parse_json(text, origin)
            if values.get("format") != FORMAT:
                raise Refused(
                    f"{origin}: format {values.get('format')!r}, expected {FORMAT}",
                    "Export the model again with this version.",
                )
            stages = {name: _read_stage(stage) for name, stage in values.pop("stages").items()}
            files = {name: FileInfo(**info) for name, info in values.pop("files").items()}
            channels = values.pop("channels").items()
            channels = {task: {level: tuple(part) for level, part in levels.items()} for task, levels in channels}
            manifest = Manifest(stages=stages, files=files, channels=channels, **values)
        except Refused:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refused(
                f"{origin}: not a manifest of exported stages ({type(error).__name__}: {error})",
                "Export the model again.",
            ) from None
        for name in [*files, *(name for stage in stages.values() for name in (stage.file, stage.data) if name)]:
            if Path(name).name != name or name.startswith(".") or name not in files:
                raise Refused(f"{origin}: {name!r} is not the name of a file beside it", "Export the model again.")
        return manifest

    @staticmethod
    def read(folder: Path) -> Manifest:
        path = folder / NAME
        if not path.exists():
            raise Missing(
                f"{path}: there is none",
                f"Export into that folder: python -m datasetdm_fast.export --to onnx --out {folder}",
            )
        return Manifest.from_json(storage.read(path, LARGEST_MANIFEST).decode(errors="replace"), str(path))

    def graph(self, folder: Path, stage: str) -> Path:
        """The file of a stage's graph, to be handed to onnx, ONNX Runtime or TensorRT; refuses a graph that none of
        them should be given.
        """
        path = folder / self.stages[stage].file
        check_onnx(path)
        return path

    def check_files(self, folder: Path) -> None:
        """Refuses a folder whose files are not, byte for byte, those that were exported."""
        for name, info in self.files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != info.size:
                size = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
                raise Refused(f"{path}: {size}, expected {info.size} bytes", "Export the model again.")
            if (sha256 := storage.sha256_of(path)) != info.sha256:
                raise Refused(
                    f"{path}: its SHA-256 is {sha256[:12]}, expected {info.sha256[:12]}", "Export the model again."
                )


def check_replaceable(folder: Path) -> None:
    """Refuses a folder whose manifest is not a damaged one of ours but somebody else's."""
    path = folder / NAME
    content = storage.read(path, LARGEST_MANIFEST) if path.is_file() else b""
    if content and b'"exporter"' not in content and not BEGINNING.startswith(content[: len(BEGINNING)]):
        raise Refused(
            f"{path}: it exists and does not describe an export, so it is not replaced",
            "Choose another --out, or delete the file.",
        )


def _read_stage(values: Mapping[str, Any]) -> StageFile:
    def tensors(name: str) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(info["name"], tuple(info["axes"]), tuple(info["shape"]), info["dtype"]) for info in values[name]
        )

    return StageFile(values["file"], values["data"], tensors("inputs"), tensors("outputs"))
