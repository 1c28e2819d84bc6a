"""Settings that a command line leaves open and that follow from the others: the labels to make, and the run folder."""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from datasetdm_fast.engine.decoders.folders import find_decoders, parts_of
from datasetdm_fast.engine.labels.names import by_task
from datasetdm_fast.runs.run_folder.document import GROWING
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.settings import flags_of

LONGEST_NAME = 48  # letters of the readable part of a run folder's name
FIRST_WORDS = 8  # of a prompt, in that part


def with_labels(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The settings with all labels that the decoders of --decoder make, where --task does not choose."""
    folders = parts_of(config.decoder)
    if "task" in given or config.decoder == "demo" or not all(path.is_dir() for path in folders):
        return config
    return replace(config, task=tuple(by_task(find_decoders(folders).labels)))


def with_folder(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The settings with a run folder named after what differs from the demo run, where --out names none.

    Settings that a finished run can grow by are left out, so that the longer line finds it again; of prompts, the file
    counts and not its content.
    """
    if "out" in given:
        return config
    kept = {flag.name: getattr(config, flag.name) for flag in flags_of(RunConfig) if flag.metadata["identity"]}
    own = {name: value for name, value in kept.items() if value != getattr(RunConfig, name)}
    own = {name: value for name, value in own.items() if name not in GROWING or name == "prompts"}
    if not own:
        return config
    named = [*_words(config.prompts), *config.classes[:FIRST_WORDS]]
    named += [Path(value).stem for value in (config.model, *config.decoder.split(",")) if value != "demo"]
    readable = re.sub(r"[^a-z0-9]+", "-", " ".join(named or own).lower())[:LONGEST_NAME].strip("-")
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:6]
    return replace(config, out=f"runs/{readable or 'run'}-{digest}")


def _words(prompts: str) -> list[str]:
    """What a prompt or the file of a list is called."""
    words = prompts.split()
    return [Path(prompts).stem] if len(words) == 1 else words[:FIRST_WORDS]
