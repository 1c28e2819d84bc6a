"""The schemas of the package describe every file that is written."""

import json
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from pages import SCHEMAS, schema
from PIL import Image
from rendered import write_run

from datasetdm_fast import convert, filter, generate, label, split
from datasetdm_fast.engine.decoders.config import DecoderConfig, upstream
from datasetdm_fast.engine.loading.folder import DEMO
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.exporting import export_folder
from datasetdm_fast.runs.run_folder import document

pytestmark = pytest.mark.core


def faults(name: str, value) -> list[str]:
    """What a value has that its schema does not allow."""
    found = Draft202012Validator(schema(name)).iter_errors(value)
    return [f"{'.'.join(map(str, fault.path))}: {fault.message}" for fault in found]


def check_run(run: Path) -> None:
    assert faults("run", json.loads((run / "run.json").read_text())) == []
    lines = (run / "samples.jsonl").read_text().splitlines()
    assert lines and [fault for line in lines for fault in faults("sample", json.loads(line))] == []


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.stem)
def test_the_schemas_are_schemas(path):
    Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_the_schemas_have_the_formats_of_the_code():
    numbers = {
        "run": document.FORMAT,
        "sample": document.FORMAT,
        "export": export_folder.FORMAT,
    }
    for name, number in numbers.items():
        assert schema(name)["$id"] == f"urn:datasetdm-fast:{name}:{number}"
    assert schema("run")["properties"]["format"]["enum"] == [document.FORMAT]
    assert set(schema("run")["properties"]["command"]["enum"]) == set(document.COMMANDS)


def test_what_commands_write_is_described(tmp_path):
    run = tmp_path / "run"
    write_run(run, 4, 32)
    quiet = ["--quiet"]
    assert filter.main([str(run), "--where", "score >= 0", *quiet]) == 0
    assert split.main([str(run), "--shares", "50,50", *quiet]) == 0
    assert convert.main([str(run), "--to", "hf,coco", "--out", str(tmp_path / "export"), *quiet]) == 0
    check_run(run)
    for name, path in (
        ("kept", run / "state" / "kept.json"),
        ("split", run / "split.json"),
        ("export", tmp_path / "export" / "export.json"),
        ("classes", tmp_path / "export" / "hf" / "classes.json"),
    ):
        assert faults(name, json.loads(path.read_text())) == [], path


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not trained yet")
def test_what_generate_writes_is_described(tmp_path):
    assert generate.main(["--number", "2", "--steps", "2", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    check_run(tmp_path / "run")
    configs = sorted(DEMO.parent.rglob("decoders/*/config.json"))
    assert configs and [fault for path in configs for fault in faults("decoder", json.loads(path.read_text()))] == []


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not trained yet")
def test_labels_of_attention_own_class_tables_and_tiles_are_described(tmp_path):
    table, photos = tmp_path / "table.csv", tmp_path / "photos"
    table.write_text("name,say,colour,words\nball,ball,255 0 0,sphere\ncube,cube,0 255 0,\n")
    photos.mkdir()
    Image.fromarray(np.linspace(0, 255, 70 * 100 * 3).reshape(70, 100, 3).astype(np.uint8)).save(photos / "a.png")
    words = ["--labeller", "attention", "--class-table", str(table), "--palette", "table", "--prompts", "a ball"]
    assert generate.main([*words, "--number", "1", "--steps", "2", "--out", str(tmp_path / "words"), "--quiet"]) == 0
    tiles = ["--tiles", "--task", "semantic", "--out", str(tmp_path / "tiles"), "--quiet"]
    assert label.main([str(photos), *tiles]) == 0
    for name, field in (("words", "class_table"), ("tiles", "composition")):
        check_run(tmp_path / name)
        assert field in json.loads((tmp_path / name / "run.json").read_text())


@pytest.mark.parametrize("kind", ["segmentation", "open-vocabulary", "depth", "heatmap", "simcc"])
def test_a_decoder_of_each_kind_is_described_and_tells_its_format(kind):
    text = upstream(kind).to_json()
    assert faults("decoder", json.loads(text)) == [] and json.loads(text)["format"] == 1
    assert DecoderConfig.from_json(text) == upstream(kind)
    with pytest.raises(Refused, match="format 2, this version reads 1"):
        DecoderConfig.from_json(text.replace('"format": 1', '"format": 2'))


def test_what_is_not_described_is_noticed(tmp_path):
    write_run(tmp_path / "run", 1, 32)
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert faults("run", described | {"colour": 1}) and faults("run", described | {"format": 4})
    described["labels"]["depth"]["unit"] = "inch"
    assert faults("run", described)
