"""Run folder, exports and truth for tests/consumers/read_back.py: `python tests/consumers/prepare.py FOLDER`."""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import torchless
from rendered import write_run

from datasetdm_fast import convert, generate, open_run, split

NUMBER, SIZE = 24, 128
FORMATS = "coco,yolo-detect,yolo-seg,yolo-pose,voc,cityscapes,hf,hf-parquet,wds"
# names that Cityscapes knows as well
NAMES = "wall=road,table=sidewalk,ball=car,cube=truck,cone=bus,ring=train,star=motorcycle,tree=bicycle"


def main(folder: Path) -> None:
    run, out = folder / "run", folder / "exports"
    if not run.exists():
        write_run(run, NUMBER, SIZE)
    lines = [
        (split.main, [str(run), "--shares", "75,25", "--quiet"]),
        (convert.main, [str(run), "--to", FORMATS, "--out", str(out), "--classes", NAMES, "--quiet"]),
    ]
    for command, arguments in lines:
        if code := command(arguments):
            sys.exit(code)
    new = dict(pair.split("=") for pair in NAMES.split(","))
    arrays, names = {}, {}
    for sample in open_run(run):
        things, people = sample.instances, sample.keypoints
        arrays |= {
            f"{sample.id}/image": sample.image,
            f"{sample.id}/masks": things.masks,
            f"{sample.id}/semantic": sample.semantic.labels,
            f"{sample.id}/depth": sample.depth.metres,
            f"{sample.id}/joints": people.points[..., :2],
        }
        names[sample.id] = [new.get(things.classes[k], things.classes[k]) for k in things.class_ids]
    np.savez(folder / "truth.npz", **arrays)
    classes = [new.get(name, name) for name in open_run(run)[0].semantic.classes]
    parts = json.loads((run / "split.json").read_text())["parts"]
    (folder / "truth.json").write_text(json.dumps({"things": names, "classes": classes, "parts": parts}))


def make_shards(folder: Path) -> None:
    """A run in shards, of arithmetic in the place of networks."""
    torchless.install()
    line = ["--layout", "shards", "--shard-size", "5", "--number", "12", "--out", str(folder / "shards"), "--quiet"]
    if code := generate.main(line):
        sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    make_shards(Path(sys.argv[1]))
