"""python -m bench.world.teach --out DIR: the five demo decoders, trained on 100 rendered, labelled scenes.

It is `python -m datasetdm_fast.train` with the settings of the decoders that ship with the package, and takes all of
its flags; `--world hard` uses scenes of the harder world. `--words DIR` trains no decoder: it only learns from the same
scenes which cross-attention heads distinguish the words of a caption, for the decoders in DIR.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.world.hard.reader import register
from bench.world.worlds import WORLDS
from datasetdm_fast import train
from datasetdm_fast.config import TASKS

SETTINGS = {
    "--model": "demo",
    "--data": "demo:100@1000",
    "--task": ",".join(TASKS),
    "--held-out": "0",
    "--folds": "no",
    "--augment": "strong",
    "--captions": "mixed",
    "--draws": "64",
    "--steps": "3000",
    "--storage": "fp16",
}


def learn_words(folder: Path) -> None:
    """Writes the heads that tell words into the configurations of a folder's decoders that have classes and masks."""
    from datasetdm_fast.disk import storage
    from datasetdm_fast.engine.decoders.config import find_decoders, read_config
    from datasetdm_fast.train import open_workflow
    from datasetdm_fast.training.settings import TrainConfig
    from datasetdm_fast.training.word_heads import learn_heads

    found = find_decoders(folder)
    configs = {path: read_config(path) for path in map(found.__getitem__, found.labels)}
    configs = {path: config for path, config in configs.items() if config.kind == "segmentation" and config.named}
    config = TrainConfig(model=SETTINGS["--model"], data=SETTINGS["--data"], held_out=0, quiet=True)
    session = open_workflow(config).session
    for path, own in configs.items():
        heads = learn_heads(session.views(own.task, session.numbers, 1), own, session.engine.model.tokenizer)
        storage.publish({path / "config.json": heads.add_to(own).to_json().encode()})
        print(f"{path}: {heads.right:.1%} of {heads.masks} masks named rightly", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) == 2 and given[0] == "--words":
        learn_words(Path(given[1]))
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m bench.world.teach",
        description=__doc__,
        epilog="`python -m datasetdm_fast.train --help` lists the other flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--world", choices=tuple(WORLDS), default="demo", help="world of the training scenes")
    parser.add_argument(
        "--words",
        metavar="DIR",
        help="folder of the decoders whose weights of attention heads are learned again; no other flag",
    )
    for flag in SETTINGS:  # one that is given takes the place of ours, so that the command told has it once
        parser.add_argument(flag, dest=flag, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    options, given = parser.parse_known_args(given)
    if options.words is not None:
        parser.error("--words stands alone")
    settings = SETTINGS | {"--data": SETTINGS["--data"].replace("demo", options.world)}
    settings |= {flag: value for flag, value in vars(options).items() if flag in SETTINGS}
    register()
    return train.main([*(word for pair in settings.items() for word in pair), *given])


if __name__ == "__main__":
    sys.exit(main())
