"""hf: a folder for `load_dataset("imagefolder")`, metadata.jsonl in each split; hf-parquet: the same as Parquet."""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.exporting.export_folder import read_export
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format, SampleView
from datasetdm_fast.runs.exporting.wds import describe_sample, map_files, read_content, table_files
from datasetdm_fast.runs.run_folder.ledger import canonical
from datasetdm_fast.runs.run_folder.shards import require_pyarrow
from datasetdm_fast.untrusted import documents

SPLITS = {"val": "validation"}  # as `datasets` names them
ROWS = 64  # of a row group at most,
GROUP_BYTES = 2**28  # and of the pictures in it, when it is closed; a column of a group holds less than 2 GiB
VALUES = {"id": "string", "prompt": "string", "seed": "int64", "width": "int32", "height": "int32"}


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
                    f"hf: {splits} without any {name}; load_dataset refuses such splits together: take hf-parquet, or "
                    f"each alone (data_dir='.../hf/{empty[0]}')"
                )


class ParquetFormat(Format):
    """The features that `datasets` needs stand in the files' metadata; objects and people are lists."""

    has_maps = True

    def check(self, name: str, plan: ExportPlan) -> None:
        super().check(name, plan)
        require_pyarrow(f"--to {name}")

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        return {}, {}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        size, files = plan.layout.shard, {}
        for split, count in plan.splits.items():
            shards = -(-count // size)
            for k in range(shards):
                name = f"data/{SPLITS.get(split, split)}-{k:05d}-of-{shards:05d}.parquet"
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


def _schema(plan: ExportPlan) -> Any:
    """Columns with the features of `datasets` as metadata."""
    import pyarrow as pa

    def list_of(inner: Any) -> tuple[Any, dict[str, Any]]:
        kind, feature = inner
        return pa.list_(kind), {"feature": feature, "length": -1, "_type": "Sequence"}

    def value(name: str) -> tuple[Any, dict[str, Any]]:
        return pa.type_for_alias(name), {"dtype": name, "_type": "Value"}

    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"_type": "Image"}
    names = ["background", *plan.classes.names]
    number, category = value("float64"), (pa.int64(), {"names": names, "_type": "ClassLabel"})
    box = list_of(number)
    columns = {"image": picture}
    columns |= {name: picture for name in ("semantic", "depth") if name in plan.tasks}
    columns |= {name: value(kind) for name, kind in VALUES.items()}
    things = {"category": category, "bbox": box, "area": value("int64"), "score": number, "rle": value("string")}
    groups = {
        "instance": ("objects", things),
        "pose": ("people", {"bbox": box, "area": number, "score": number, "keypoints": list_of(number)}),
    }
    for task, (name, parts) in groups.items():
        if task in plan.tasks:
            lists = {part: list_of(inner) for part, inner in parts.items()}
            kind = pa.struct({part: kind for part, (kind, _) in lists.items()})
            columns[name] = kind, {part: feature for part, (_, feature) in lists.items()}
    features = {name: feature for name, (_, feature) in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}, ensure_ascii=False)}
    return pa.schema([(name, kind) for name, (kind, _) in columns.items()], metadata=metadata)


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
