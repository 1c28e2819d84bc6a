"""The data set card: its header, command, verdict, licences and pictures."""

import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rendered import document, write_run

from datasetdm_fast.data import Trust
from datasetdm_fast.engine import engines
from datasetdm_fast.engine.loop import prompts
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.indexes import card
from datasetdm_fast.runs.run_folder.indexes.licences import KNOWN, conflicts, hub_names, licence_of
from datasetdm_fast.runs.run_folder.ledger import Ledger

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    write_run(path, 12, 64)
    return path


def text(run, **changes) -> str:
    with Ledger(run / "state/ledger.sqlite", read_only=True) as ledger:
        return b"".join(given(card.Card(document(12) | changes, ledger)).end()).decode()


def given(file, /):
    """An index file that was given all rows."""
    file.add(list(file.ledger.rows()))
    return file


def test_the_header_is_what_hubs_read(run):
    _, header, _ = (run / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(header)
    assert found["license"] == ["apache-2.0"] and found["size_categories"] == ["n<1K"]
    assert found["task_categories"] == [
        "image-segmentation",
        "object-detection",
        "depth-estimation",
        "keypoint-detection",
    ]
    [config] = found["configs"]
    assert config.pop("description").startswith("SHA-256 ")
    assert config == {"config_name": "default", "data_files": "samples.jsonl"}
    big = yaml.safe_load("\n".join(card._header(document(12), 5000, {card.GENERATED}, "")).split("---")[1])
    assert big["size_categories"] == ["1K<n<10K"]


def test_the_header_tells_apart_what_datasets_would_take_from_its_cache(run):
    """It caches a folder with a card by the folder's name and the card's header."""

    def header(rows):
        file = card.Card(document(12), ledger)
        file.add(rows)
        return b"".join(file.end()).decode().split("---\n")[1]

    with Ledger(run / "state/ledger.sqlite", read_only=True) as ledger:
        rows = list(ledger.rows())
        first, *others = rows
        image = first.files["image"]
        files = {"image": image._replace(stored=replace(image.stored, sha256="0" * 64))}
        changes = {"request": replace(first.request, prompt="another"), "files": files, "labels": {}, "trust": Trust()}
        changed = [header([replace(first, **{name: value}), *others]) for name, value in changes.items()]
        assert len({header(rows), header(others), *changed}) == 6 and header(rows) == header([*rows])


@pytest.mark.parametrize(
    ("done", "size"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (10**4, "10K<n<100K"), (10**5, "100K<n<1M"), (10**6, "n>1M")],
)
def test_the_header_tells_hubs_of_what_size_the_data_set_is(done, size):
    assert f"size_categories:\n- {size}\n" in "\n".join(card._header(document(12), done, {card.GENERATED}, ""))


def test_the_command_names_every_setting_that_is_no_default():
    told = document(12, seed=3, steps=20, negative_prompt="a 'dark' room", truncate_prompts=True)
    line = card.command_line(told)
    assert line.startswith("python -m datasetdm_fast.generate ") and line.endswith("--out THIS_FOLDER")
    for part in ("--seed 3", "--steps 20", "--truncate-prompts", "--number 12", "dark"):
        assert part in line, part
    assert "--guidance" not in line and "--no-" not in line
    assert "--exponent 0" in card.command_line(document(12, exponent=0))  # where -1 leaves it to the labeller
    assert card.command_line(told | {"command": "merge"}) is None


def test_the_command_of_a_run_that_made_its_own_prompts_names_none(run):
    told = document(12, per_class=4, classes=["ball", "cube", "tree"], prompts="sha256:00")
    line = card.command_line(told)
    assert "--per-class 4" in line and "--prompts" not in line and "--number" not in line
    assert "- The command: `python -m datasetdm_fast.generate" in text(run, config=told["config"])
    assert "- The command, where PROMPTS are" in text(run, config=document(12, prompts="sha256:00")["config"])
    aside = document(12, prompts="sha256:00", keep="trusted")["config"]
    assert "- The command, where PROMPTS is the list that it was given" in text(run, config=aside)
    chosen = document(12, prompts="sha256:00", accept="score >= 0.5")["config"]
    assert "- The command, where PROMPTS is the list that it was given" in text(run, config=chosen)
    table = document(12, prompts="sha256:00", class_table="sha256:11")["config"]
    assert "PROMPTS are those of `samples.jsonl` and TABLE has the words" in text(run, config=table)
    assert "--class-table TABLE" in text(run, config=table) and "sha256:11" not in text(run, config=table)
    demo = f"sha256:{prompts.PromptSource((), '', (), 0).digest}"
    assert "--prompts" not in card.command_line(document(12, prompts=demo))


def test_the_card_of_pictures_that_were_given_does_not_call_them_the_models(run):
    read = document(12)["config"] | {"sampler": "inversion"}
    drawn, given_ = text(run), text(run, command="label", config=read)
    assert "The images have the biases" in drawn and "the labels have the biases" not in drawn
    assert "The images have the biases" not in given_ and "the labels have the biases" in given_
    assert "\n- synthetic\n" in drawn and "\n- synthetic\n" not in given_


def composed(run, command: str, source: dict, **changes) -> str:
    """The card of a run that was made from others."""
    composition = {"told": "Made", "sides": "64 × 64 pixels", "source": {"path": "", "digests": {}, **source}}
    return text(run, command=command, composition=composition, **changes)


def part(licence: str = "Apache-2.0", **config) -> dict:
    """What a merged run tells of one of its runs."""
    told = document(12)
    model = told["model"] | {"licence": licence}
    return {"config": told["config"] | config, "model": model, "decoders": told["decoders"], "engine": told["engine"]}


def test_the_card_of_a_composition_tells_where_the_images_of_its_runs_come_from(run):
    drawn, read = part(), part(sampler="inversion")
    assert "all synthetic" in composed(run, "splice", {"config": drawn["config"]})
    assert "all synthetic" in composed(run, "merge", {"runs": [drawn, drawn]})
    for pictures in (
        composed(run, "splice", {"config": read["config"]}, config=read["config"]),
        composed(run, "merge", {"runs": [read, read]}),
    ):
        assert "synthetic" not in pictures and "rights to the pictures are those of their authors" in pictures
    both = {"composition": {"source": {"runs": [drawn, read]}}}
    for mixed in (
        composed(run, "merge", {"runs": [drawn, read]}),
        composed(run, "splice", {"config": drawn["config"], **both}),
        composed(run, "merge", {"runs": [{**drawn, **both}]}),
    ):
        assert "all synthetic" not in mixed and "generated some of the images; the others are pictures" in mixed
        assert "\n- synthetic\n" in mixed and "\n# Pictures and their labels\n" in mixed


def test_the_card_of_merged_runs_tells_the_samplers_of_all(run):
    quick = part(sampler="ddim") | {"sampling": {"size": 64, "steps": 10, "calls": 10, "guidance": 5.0}}
    usual = part() | {"sampling": document(12)["sampling"]}
    told = composed(run, "merge", {"runs": [usual, quick, usual]})
    assert "- Sampler pndm, 50 steps in 51 calls, guidance 3; ddim, 10 steps in 10 calls, guidance 5\n" in told
    labelled = part() | {"sampling": {"size": 64, "steps": 0, "calls": 1, "guidance": 0.0, "sampler": "inversion"}}
    assert "- Sampler inversion, 1 call\n" in composed(run, "merge", {"runs": [labelled]})
    before = composed(run, "merge", {"runs": [part(), part()]})  # as earlier versions wrote it
    assert "- Sampler pndm, 50 steps in 51 calls, guidance 3\n" in before


def test_the_card_of_merged_runs_tells_the_speeds_and_verdicts_of_all(run):
    """Without them, samples of a cache would look as those of an exact run do."""
    figure = {"measure": "IoU semantic", "speed": 0.98, "exact": 0.985}
    by_cache = part() | {"speed": {"name": "cache3", "number": 64, "measures": [figure]}}
    fast, torch = ({"engine": name, "dtype": "fp32", "device_name": "cpu"} for name in ("fast", "torch"))
    verdict = {"agrees": True, "number": 8, "engine": fast, "against": torch, "setting": {}}
    verified = part() | {"engine": fast, "verified": verdict}
    told = composed(run, "merge", {"runs": [verified, {**part(), "composition": {"source": {"runs": [by_cache]}}}]})
    judged = "cache3, approximate; labels of 64 images against exact ones: IoU semantic 0.9800 for 0.9850"
    assert f"- Speed `{judged}`\n" in told
    assert "- `fast fp32 on cpu` agrees with `torch` on 8 of its samples\n" in told and card.UNVERIFIED in told
    assert card.UNVERIFIED not in composed(run, "merge", {"runs": [verified, verified]})
    assert card.UNVERIFIED in composed(run, "edit", {"composition": {"source": {"runs": [verified]}}})
    assert "- Speed" not in composed(run, "merge", {"runs": [verified]})


def test_the_card_of_merged_runs_names_the_licences_of_all_weights(run):
    runs = {"runs": [part("MIT License"), part("CC BY-NC-SA 4.0"), part("CC BY-SA 4.0"), part("CC BY-SA 4.0")]}
    joined = document(12)["model"] | {"licence": "MIT License and CC BY-NC-SA 4.0 and CC BY-SA 4.0"}
    for said in (
        composed(run, "merge", runs, model=joined),
        composed(run, "splice", {"composition": {"source": runs}}, model=joined),
    ):
        header = yaml.safe_load(said.split("---\n", 2)[1])
        assert header["license"] == ["apache-2.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0", "mit"]
        rows = [line for line in said.splitlines() if line.startswith("| model | ")]
        assert [row.split(" | ")[1:3] for row in rows] == [
            ["MIT", "yes"],
            ["CC BY-NC-SA 4.0", "no"],
            ["CC BY-SA 4.0", "yes"],
        ]
        assert "**CC BY-NC-SA 4.0 and CC BY-SA 4.0 conflict" in said and "licence is unknown" not in said


def test_what_a_sample_offers_is_what_its_run_made():
    assert card._attributes(("semantic", "instance")) == ".image .semantic .instances .prompt .seed"
    assert card._attributes(("attention", "depth:nyu")) == '.image .attention .label("depth:nyu") .prompt .seed'


def test_the_processor_is_named_as_the_system_calls_it(run, monkeypatch):
    cpu, processor = {"engine": "fast", "device": "cpu", "device_name": "x86_64"}, "Intel(R) Xeon(R) Processor"
    assert f"device_name `{processor}`" in text(run, engine=cpu, processor=processor)
    assert "device_name `x86_64`" in text(run, engine=cpu)  # of an earlier version
    gpu = {**cpu, "device": "cuda", "device_name": "NVIDIA H200"}
    assert "device_name `NVIDIA H200`" in text(run, engine=gpu, processor=processor)
    for content, name in ((f"processor: 0\nmodel name\t: {processor}\n", processor), ("", platform.machine())):
        monkeypatch.setattr(engines.Path, "read_text", lambda path, encoding, content=content: content)
        assert engines.name_processor() == name


def test_the_verdict_stands_there_or_that_there_is_none(run):
    assert card.UNVERIFIED in text(run)
    engine = {"engine": "fast", "dtype": "fp16", "device_name": "a GPU"}
    verdict = {"agrees": True, "number": 8, "engine": engine, "against": {"engine": "torch"}, "measures": []}
    for more, compared in (({"setting": {}}, "8 of its samples"), ({}, "8 other images of this model")):
        told = text(run, verified=verdict | more)
        assert f"`fast fp16 on a GPU` agrees with `torch` on {compared}" in told and card.UNVERIFIED not in told
    assert card.UNVERIFIED not in text(run, engine={"engine": "torch"})
    measures = [{"measure": name, "passed": name == "psnr"} for name in ("psnr", "miou", "depth")]
    told = text(run, verified=verdict | {"agrees": False, "measures": measures})
    assert "`fast fp16 on a GPU` does NOT agree with `torch`: `miou, depth` is beyond its limit" in told


@pytest.mark.parametrize(
    "names, said",
    [
        (["apache-2.0", "MIT", "cc-by-4.0"], []),
        (["creativeml-openrail-m", "cc-by-nc-4.0"], []),
        (["CC BY-SA 4.0", "cc-by-nc-4.0"], ["CC BY-SA 4.0 and CC BY-NC 4.0 conflict"]),
        (["cc-by-nc-sa-4.0", "cc-by-sa-4.0"], ["each asks that what is derived carries it alone"]),
        (["cc-by-nc-sa-4.0", "cc-by-nc-4.0"], []),
        (["gpl-3.0", "openrail++"], ["GNU GPL 3.0 and CreativeML Open RAIL++-M conflict: the first lets no rules"]),
        (["creativeml-openrail-m", "gpl-3.0"], ["GNU GPL 3.0 and CreativeML Open RAIL-M conflict"]),
        (["cc-by-nc-nd-4.0", "none of ours"], ["does not allow to pass on"]),
    ],
)
def test_licences_that_contradict_one_another_are_named(names, said):
    found = list(conflicts(names))
    assert len(found) == len(said) and all(part in sentence for part, sentence in zip(said, found)), found


def test_what_the_known_licences_allow():
    """Commercial use and changed copies, as their texts have it."""
    free, alike, rules = ("yes", "yes"), ("yes", "under the same licence"), "yes, within its list of forbidden uses"
    wanted = dict.fromkeys(("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0"), free)
    wanted |= dict.fromkeys(("cc-by-sa-4.0", "gpl-3.0", "agpl-3.0"), alike)
    wanted |= {"cc-by-nc-sa-4.0": ("no", "under the same licence"), "cc-by-nc-nd-4.0": ("no", "no")}
    for_nobody = ("flux-1-dev-non-commercial-license", "flux-non-commercial-license", "sai-nc-community")
    wanted |= dict.fromkeys(("cc-by-nc-4.0", *for_nobody), ("no", "yes"))
    with_rules = ("creativeml-openrail-m", "openrail++", "stabilityai-ai-community")
    wanted |= dict.fromkeys(with_rules, (rules, "yes"))
    assert {hub: tuple(licence.row.split(" | ")[1:3]) for hub, licence in KNOWN.items()} == wanted
    for hub in with_rules:
        assert "the first lets no rules be added" in " ".join(conflicts(["gpl-3.0", hub]))
    assert {hub for hub, licence in KNOWN.items() if licence.restricts_use} == {*for_nobody, *with_rules}
    assert hub_names([*for_nobody, "stabilityai-ai-community"]) == ["other"]


def test_an_unknown_licence_is_called_unknown(run):
    model = document(12)["model"] | {"licence": "see | LICENSE\n<b> of the owner" + 1000 * "!"}
    (line,) = [line for line in text(run, model=model).splitlines() if line.startswith("| model | see")]
    assert line.endswith("| unknown | unknown | unknown |") and line.count("|") == 6 and "<" not in line
    told = text(run, model=model)
    assert "ask its owner" in told and hub_names(["apache-2.0", "mine"]) == ["apache-2.0", "unknown"]
    assert licence_of("Apache License 2.0") is KNOWN["apache-2.0"] and licence_of("") is None


def test_names_in_the_card_break_no_table_and_a_licence_is_known_behind_a_wide_margin():
    assert card._part("decoder a|b`c") == "decoder `a/b'c`" and card._part("model") == "model"
    assert card._code(" a  b\nc ") == "`a b c`"
    assert licence_of(" " * 500 + "MIT License\n\nPermission is hereby granted").hub == "mit"
    assert licence_of("x" * 401 + " mit license") is None


def test_works_are_cited_whose_method_made_the_labels():
    def cited(*tasks, **labellers):
        return "".join(card._citations({"config": {"task": list(tasks)}, "sampling": {"labellers": labellers}}))

    assert [name in cited("depth", "semantic:b") for name in ("wu2023datasetdm", "nguyen2023")] == [True, False]
    assert [name in cited("attention") for name in ("wu2023datasetdm", "nguyen2023")] == [False, True]
    both = cited("attention", "depth")
    assert both.index("wu2023datasetdm") < both.index("nguyen2023dataset") and both.count("```") == 2
    assert cited("attention", attention="theirs 1.0") == "The works behind `attention`."
    assert "nguyen2023" not in cited("attention", "depth", attention="theirs 1.0")


def test_labels_from_the_attention_of_transformers_are_cited_as_their_authors_publish_it():
    def run_of(ask, **attention):
        return {"config": {"task": ["attention"], "ask": ask}, "sampling": {"attention": attention}}

    runs = [run_of("named", blocks=[9]), run_of("all", blocks=[9]), run_of("all"), run_of("named", blocks=[9])]
    keys = ["kim2025seg4diff", "helbling2025conceptattention", "nguyen2023dataset"]
    for run, key in zip(runs, keys):
        assert re.findall(r"@\w+{(\w+),", "".join(card._citations(run))) == [key]
    merged = runs[0] | {"composition": {"source": {"runs": runs}}}
    assert re.findall(r"@\w+{(\w+),", "".join(card._citations(merged))) == keys


def test_the_text_of_a_licence_is_known_by_its_title():
    begin = "Copyright (c) 2022 Robin Rombach and Patrick Esser and contributors\n\nCreativeML Open RAIL-M\ndated"
    assert licence_of(begin + 9000 * " word") is KNOWN["creativeml-openrail-m"]
    commons = ("-NonCommercial", "-NonCommercial-ShareAlike", "-NonCommercial-NoDerivatives", "-ShareAlike", "")
    texts = [f"Creative Commons\nAttribution{kind} 4.0 International\n" for kind in commons]
    assert [licence_of(text).hub for text in texts] == [
        f"cc-by{end}-4.0" for end in ("-nc", "-nc-sa", "-nc-nd", "-sa", "")
    ]
    assert licence_of((ROOT / "LICENSE").read_text()) is KNOWN["apache-2.0"]


def test_a_run_without_labels_to_count_has_a_card(tmp_path):
    with RunFolder(tmp_path / "run", document(1)) as folder:
        finish_run(folder)
    assert "0 of 1 images" in (tmp_path / "run" / "README.md").read_text()
