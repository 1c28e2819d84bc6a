"""python -m datasetdm_fast.example FOLDER: lay out forty labelled pictures, as --data folder:FOLDER reads them."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_end
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import OutputSettings, setting

EXAMPLES = ("photos",)
PICTURES, SIDE = 40, 128
FIRST_SEED = 800_000  # of the scenes, which no decoder and no figure of the pages is of


@dataclass(frozen=True)
class ExampleConfig(OutputSettings):
    folder: str = setting(
        "", "folder for images, masks, classes.txt, captions.json and prompts.txt", metavar="FOLDER", positional=True
    )


@command_with(ExampleConfig, EXAMPLES)
def main(config: ExampleConfig, command: CommandLine) -> int:
    if not config.folder:
        raise Refused(f"{command.prog}: FOLDER is missing", "Name the folder to write, for example photos.")
    folder = Path(config.folder)
    files = dict(_example_files(folder))
    with storage.refusing(folder):
        if any(_is_foreign(path, files) for path in (folder, *folder.rglob("*"))):
            raise Refused(f"{folder}: is there and not empty", "Name another folder; nothing is overwritten.")
    if not config.dry_run:
        storage.remove_parts_of(files)
        storage.publish({path: content for path, content in files.items() if not path.exists()})
    verb = "would be" if config.dry_run else "are"
    line = (
        f"{folder}: {PICTURES} pictures of the demo world {verb} in images/, with masks/ of the numbers in classes.txt"
    )
    return print_end(config, {"path": config.folder, "pictures": PICTURES}, config.folder, line)


def _is_foreign(path: Path, files: dict[Path, bytes]) -> bool:
    """Whether a path is neither a folder nor a file that this command wrote, perhaps before it was interrupted."""
    if path.is_dir() or not (path.exists() or path.is_symlink()) or storage.is_temporary(path):
        return False
    return path not in files or path.read_bytes() != files[path]


def _example_files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file of the example: a photo and its class numbers each, the classes, a caption for each, and prompts."""
    from datasetdm_fast.engine.labels.label_files import image_bytes, index_png
    from datasetdm_fast.engine.scenes import world

    captions = {}
    for number in range(PICTURES):
        view, name = world.view(FIRST_SEED + number, SIDE), f"{number:03d}"
        yield folder / "images" / f"{name}.jpg", image_bytes(view.image, "jpg")
        yield folder / "masks" / f"{name}.png", index_png(view.semantic)
        captions[f"{name}.jpg"] = view.caption
    yield folder / "classes.txt", "".join(f"{name}\n" for name in world.CLASSES).encode()
    yield folder / "captions.json", f"{json.dumps(captions, indent=0)}\n".encode()
    yield folder / "prompts.txt", "".join(f"{caption}\n" for caption in dict.fromkeys(captions.values())).encode()


if __name__ == "__main__":
    sys.exit(main())
