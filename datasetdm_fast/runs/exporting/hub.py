"""An export uploaded as a data set of the Hugging Face Hub, with the account that huggingface_hub is logged in to."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.exporting.export_folder import read_export
from datasetdm_fast.runs.exporting.hf import SPLITS
from datasetdm_fast.untrusted import documents

REPOSITORY = re.compile(r"(?!-)[\w.-]+/[\w.-]+", re.ASCII)
MESSAGE = "Made by datasetdm_fast"


def check_hub(name: str) -> None:
    """Refuses a name that is none of a repository, and a machine that is offline or not logged in, before any work."""
    if not REPOSITORY.fullmatch(name):
        raise Refused(f"--push-to-hub {documents.quote(name)}: no repository", "Write OWNER/NAME, such as me/balls.")
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise Missing("--push-to-hub: HF_HUB_OFFLINE forbids the network", "Unset it, or drop the flag.")
    if get_token() is None:
        raise Missing("--push-to-hub: no account is logged in", "Run `hf auth login`, or set HF_TOKEN.")


def push_to_hub(folder: Path, name: str) -> str:
    """The address of the data set that a complete export was uploaded to; a new one is private."""
    from huggingface_hub import HfApi

    api, card = HfApi(), describe_export(name, read_export(folder)).encode()
    with _as_missing(name):
        url = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(repo_id=name, repo_type="dataset", folder_path=folder, commit_message=MESSAGE)
        api.upload_file(repo_id=name, repo_type="dataset", path_or_fileobj=card, path_in_repo="README.md")
    return str(url)


def describe_export(name: str, export: Mapping[str, Any]) -> str:
    """The page of the data set; its head tells `load_dataset` where the Parquet files of each split are."""
    formats, splits = export["settings"]["to"], export["splits"]
    parquet = [
        f"  - {{split: {SPLITS.get(split, split)}, path: 'hf-parquet/data/{SPLITS.get(split, split)}-*'}}\n"
        for split in splits
    ]
    head = f"configs:\n- config_name: default\n  data_files:\n{''.join(parquet)}" if "hf-parquet" in formats else ""
    licences = ", ".join(export.get("licences", ())) or "not known"
    counts = ", ".join(f"{split} {count}" for split, count in splits.items())
    return (
        f"---\ntags: [synthetic, datasetdm_fast]\n{head}---\n# {name.partition('/')[2]}\n\n"
        f"{export['samples']} generated images with their labels ({counts}), as {', '.join(formats)}. "
        f"`export.json` says what they were made of. Licences of the models: {licences}.\n"
    )


@contextmanager
def _as_missing(name: str) -> Iterator[None]:
    """Errors of the upload, of which the library raises many kinds, as one that says that the same command resumes."""
    try:
        yield
    except Exception as error:
        cause = documents.one_line(f"{type(error).__name__}: {error}")
        raise Missing(
            f"--push-to-hub {name}: the upload failed ({cause})",
            "The export is complete; the same command uploads it again, without what is there.",
        ) from error
