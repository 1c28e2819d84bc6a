"""hf: a folder for `load_dataset("imagefolder")`, metadata.jsonl in each split; hf-parquet: the same as Parquet."""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.exporting.export_folder import read_export
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format, SampleView
from datasetdm_fast.runs.exporting.wds import (
    MAPS,
    README,
    Column,
    check_splits,
    describe_columns,
    describe_sample,
    map_files,
    name_split,
    read_content,
    table_files,
)
from datasetdm_fast.runs.run_folder.ledger import canonical
from datasetdm_fast.runs.run_folder.shards import require_pyarrow
from datasetdm_fast.untrusted import documents

ROWS = 64  # of a row group at most,
GROUP_BYTES = 2**28  # and of the pictures in it, when it is closed; a column of a group holds less than 2 GiB


class ImageFolderFormat(Format):
    """Columns image, semantic and depth are pictures; objects and people are lists."""

    has_maps = True

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, image = sample.picture(self.forms)
        # beside other pictures the plain name `file_name` is not taken for the column image
        names = {"image_file_name": f"images/{sample.name}.{ending}"}
        files: Files = {f"{sample.split}/images/{sample.name}.{ending}": image}
        for name, content in map_files(sample, plan, has_colours=True):
            names[f"{name}_file_name"] = f"{name}/{sample.name}.png"
            files[f"{sample.split}/{name}/{sample.name}.png"] = content
        return files, {**names, **describe_sample(sample, plan)}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        rows = {
            f"{split}/metadata.jsonl": (f"{canonical(entry)}\n".encode() for entry in samples.entries(split))
            for split in plan.splits
        }
        return {**rows, **table_files(plan)}

    def find_limits(self, plan: ExportPlan, samples: AllSamples) -> Iterator[str]:
        """Lists that are empty in all of a split: of these `datasets` guesses another type than of the other splits."""
        for name in ("objects", "people"):
            empty = [s for s in plan.splits if not any(row.get(name, {}).get("score") for row in samples.entries(s))]
            if 0 < len(empty) < len(plan.splits):
                splits = " and ".join(empty)
                yield (
                    f"hf: {splits} without any {name}; load_dataset refuses such splits together: take hf-parquet or "
                    f"wds, or each alone (data_dir='.../hf/{empty[0]}')"
                )


class ParquetFormat(Format):
    """The features that `datasets` needs stand in the files' metadata; objects and people are lists."""

    has_maps = True

    def check(self, name: str, plan: ExportPlan) -> None:
        super().check(name, plan)
        check_splits(name, plan)
        require_pyarrow(f"--to {name}")

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        return {}, {}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        size, files = plan.layout.shard, {}
        for split, count in plan.splits.items():
            shards = -(-count // size)
            for k in range(shards):
                name = f"data/{name_split(split)}-{k:05d}-of-{shards:05d}.parquet"
                files[name] = _parquet(plan, samples.views(split, k * size, (k + 1) * size))
        return {**files, **table_files(plan)}


def _parquet(plan: ExportPlan, views: Iterator[SampleView]) -> Iterator[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    schema, sink = _schema(plan), io.BytesIO()
    with parquet.ParquetWriter(pa.PythonFile(sink, "w"), schema, compression="none") as writer:
        for rows in _groups(views, plan):
            writer.write_table(pa.Table.from_pylist(rows, schema))
            yield sink.getvalue()
            sink.seek(0)
            sink.truncate()
    yield sink.getvalue()


def _groups(views: Iterator[SampleView], plan: ExportPlan) -> Iterator[list[dict[str, Any]]]:
    """The rows of each row group."""
    rows: list[dict[str, Any]] = []
    size = 0
    for view in views:
        rows.append(_row(view, plan))
        size += sum(len(value["bytes"]) for value in rows[-1].values() if isinstance(value, dict) and "bytes" in value)
        if len(rows) == ROWS or size >= GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _row(sample: SampleView, plan: ExportPlan) -> dict[str, Any]:
    ending, image = sample.picture(ParquetFormat.forms)
    row: dict[str, Any] = {"image": {"bytes": read_content(image), "path": f"{sample.name}.{ending}"}}
    for name, content in map_files(sample, plan, has_colours=True):
        row[name] = {"bytes": read_content(content), "path": f"{sample.name}.png"}
    return row | describe_sample(sample, plan)


def _columns(plan: ExportPlan) -> dict[str, Column]:
    maps = (name for name in MAPS if name in plan.tasks)
    return {**dict.fromkeys(("image", *maps), "image"), **describe_columns(plan)}


def _schema(plan: ExportPlan) -> Any:
    """Columns with the features of `datasets` as metadata."""
    import pyarrow as pa

    def type_of(column: Column) -> tuple[Any, Any]:
        """The type of a column, and its feature."""
        if column == "image":
            return pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"_type": "Image"}
        if isinstance(column, str):
            return pa.type_for_alias(column), {"dtype": column, "_type": "Value"}
        if isinstance(column, tuple):
            return pa.int64(), {"names": list(column), "_type": "ClassLabel"}
        if isinstance(column, list):
            kind, feature = type_of(column[0])
            return pa.list_(kind), {"feature": feature, "length": -1, "_type": "Sequence"}
        parts = {name: type_of(part) for name, part in column.items()}
        kinds = {name: kind for name, (kind, _) in parts.items()}
        return pa.struct(kinds), {name: feature for name, (_, feature) in parts.items()}

    kind, features = type_of(_columns(plan))
    metadata = {"huggingface": json.dumps({"info": {"features": features}}, ensure_ascii=False)}
    return pa.schema(list(kind), metadata=metadata)


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

    api, card = HfApi(), describe_export(name, folder).encode()
    try:
        url = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(repo_id=name, repo_type="dataset", folder_path=folder, commit_message=MESSAGE)
        api.upload_file(repo_id=name, repo_type="dataset", path_or_fileobj=card, path_in_repo="README.md")
    except Exception as error:  # the library raises many kinds
        cause = documents.one_line(f"{type(error).__name__}: {error}")
        raise Missing(
            f"--push-to-hub {name}: the upload failed ({cause})",
            "The export is complete; the same command uploads it again, without what is there.",
        ) from error
    return str(url)


def describe_export(name: str, folder: Path) -> str:
    """The page of the data set; its head tells `load_dataset` the files of hf-parquet or, without these, of wds."""
    export = read_export(folder)
    formats, head = export["settings"]["to"], {"tags": ["synthetic", "datasetdm_fast"]}
    if "hf-parquet" in formats:
        names = map(name_split, export["splits"])
        files = [{"split": split, "path": f"hf-parquet/data/{split}-*"} for split in names]
        head["configs"] = [{"config_name": "default", "data_files": files}]
    elif (path := folder / "wds" / README).exists():
        head |= yaml.safe_load(path.read_text(encoding="utf-8").split("\n---\n")[0])
        for part in head["configs"][0]["data_files"]:
            part["path"] = f"wds/{part['path']}"
    licences = ", ".join(export.get("licences", ())) or "not known"
    counts = ", ".join(f"{split} {count}" for split, count in export["splits"].items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {name.partition('/')[2]}\n\n"
        f"{export['samples']} generated images with their labels ({counts}), as {', '.join(formats)}. "
        f"`export.json` says what they were made of. Licences of the models: {licences}.\n"
    )
