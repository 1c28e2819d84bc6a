"""Folders of trained decoders, and the labels that those in them make."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.labels.names import DECODER_NAME, LabelName
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import documents

DEMO = Path(__file__).parents[2] / "demo" / "decoders"
SHIPPED = {"demo": DEMO, "demo-dit": DEMO.with_name("decoders-dit")}  # by the model that they read
FORM = "Give a folder with one sub-folder per trained decoder, or a DatasetDM checkpoint FILE.pth."


def read_config(folder: Path) -> DecoderConfig:
    """The configuration in a decoder's folder."""
    try:
        return DecoderConfig.from_json(storage.read(folder / "config.json", documents.LARGEST_CONFIG).decode())
    except (Refused, UnicodeDecodeError) as error:
        raise Refused(
            f"decoder {folder}: {str(error).splitlines()[0]}",
            error.remedy if isinstance(error, Refused) else "Give a folder written by training or save_decoder.",
        ) from error


@dataclass(frozen=True)
class DecoderFolders:
    """The decoders of one or several folders; where two folders have a decoder of one name, the first of them counts.

    A task's own decoder is the only one that the first folder with any has for the task, or the one called like it.
    """

    named: Mapping[LabelName, Path]  # every decoder by its folder's name
    unnamed: Mapping[str, Path]  # task -> the decoder without a name of its own

    def __getitem__(self, label: str) -> Path:
        """The folder of the decoder that makes a label, a KeyError where there is none."""
        name = LabelName.parse(label)
        return self.named[name] if name.decoder else self.unnamed[name.task]

    def __contains__(self, label: str) -> bool:
        name = LabelName.parse(label)
        return name in self.named if name.decoder else name.task in self.unnamed

    @property
    def labels(self) -> list[str]:
        """One label a decoder: its task where it is the task's own, else its name too."""
        return [name.task if self.unnamed.get(name.task) == path else str(name) for name, path in self.named.items()]


def find_decoders(source: str | Path | Iterable[Path]) -> DecoderFolders:
    """The decoders of folders that have a sub-folder for each, named one by one or in one text."""
    named: dict[LabelName, Path] = {}
    unnamed: dict[str, Path] = {}
    for folder in parts_of(source) if isinstance(source, (str, Path)) else source:
        configs = sorted(path.parent for path in folder.glob("*/config.json"))
        if not configs:
            remedy = f"Give the folder above: {folder.parent}." if (folder / "config.json").exists() else FORM
            lack = "no sub-folder holds a config.json"
            if not folder.exists():
                lack = f"no such folder{storage.named_alike(folder)}"
            elif any(folder.glob("*/training/**/log.jsonl")):
                lack, remedy = "its training has not ended", "Run the command that trains it again, which resumes it."
            raise Missing(f"decoders {folder}: {lack}", remedy)
        here = {LabelName(read_config(path).task, path.name): path for path in configs}
        for name, path in here.items():
            named.setdefault(name, path)
        for task in {name.task for name in here} - set(unnamed):
            paths = {name.decoder: path for name, path in here.items() if name.task == task}
            if len(paths) == 1 or task in paths:  # otherwise several have the same claim
                unnamed[task] = paths.get(task, next(iter(paths.values())))
        for name, path in here.items():
            if unnamed.get(name.task) != path and not DECODER_NAME.fullmatch(name.decoder):
                raise Refused(
                    f"decoders {folder}: {documents.quote(name.decoder)} is one of several for {name.task}, and "
                    "its name is not up to 63 letters, digits, - or _",
                    "Rename the folder.",
                )
    return DecoderFolders(named, unnamed)


def parts_of(source: str | Path) -> list[Path]:
    """The paths of one text, with commas between them; demo and demo-dit name the decoders shipped with the package. A
    comma belongs to a path where that is there, with KIND: before it or not.
    """
    words, folders = str(source).split(","), []
    while words:
        joined = (",".join(words[:count]) for count in range(len(words), 0, -1))
        part = next((text for text in joined if text not in SHIPPED and _is_there(text)), words[0].strip())
        words = words[part.count(",") + 1 :]
        folders += [SHIPPED.get(part, Path(part))] if part else []
    if not folders:
        raise Refused(f"decoders: {str(source)!r} names none", "Name a folder of trained decoders, or demo.")
    return folders


def _is_there(text: str) -> bool:
    """Whether a text is a path of something that is there, or KIND: and such a path."""
    paths = [path for path in (text, text.partition(":")[2]) if path]
    try:
        return any(Path(path).exists() for path in paths)
    except OSError:  # several paths make a name that is too long
        return False
