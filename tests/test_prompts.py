import errno
import json
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from datasetdm_fast.command_line import run_settings
from datasetdm_fast.engine.decoders.config import find_decoders
from datasetdm_fast.engine.labels import class_tables as class_words
from datasetdm_fast.engine.loading.folder import DEMO
from datasetdm_fast.engine.loading.tokenizer import OwnTokenizer
from datasetdm_fast.engine.loop import prompts
from datasetdm_fast.engine.loop.prompts import class_and_turn, make_plan, template
from datasetdm_fast.engine.loop.recipe import check_seed
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.jobs import prompt_files
from datasetdm_fast.runs.jobs.labelling import open_pictures
from datasetdm_fast.runs.jobs.prompt_files import parse_lines, read_source
from datasetdm_fast.runs.run_settings import PromptSettings, RunConfig


def test_a_prompt_in_a_message_has_60_signs_and_none_that_steers_a_terminal():
    assert prompts.shorten("a" * 60) == repr("a" * 60) and prompts.shorten("a" * 61) == repr("a" * 57 + "...")
    assert prompts.shorten("a\x1b[2J\n") == r"'a\x1b[2J\n'"


class Tokenizer:
    model_max_length = 77

    def __call__(self, prompt, truncation=False):
        return SimpleNamespace(input_ids=[0, *prompt.split(), 1])


def plan_of(number=5, batch_size=2, seed=0, words=(), **config):
    settings = RunConfig(number=number, batch_size=batch_size, seed=seed, **config)
    source = read_source(settings, has_captions=settings.model == "demo")
    return make_plan(
        source,
        Tokenizer(),
        number=number,
        seed=seed,
        batch_size=batch_size,
        words=words,
        truncate=settings.truncate_prompts,
    )


def test_layer_needs_no_torch():
    modules = ("engine.loop.prompts", "runs.run_folder", "runs.run_folder.ledger", "runs.gallery")
    imports = "; ".join(f"import datasetdm_fast.{name}" for name in modules)
    code = f"import sys; {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompts_are_taken_in_turn_and_seeds_count_up():
    plan = plan_of(prompts="a ball\n\n  two cubes \r\n", seed=7, words=("cube", "ball"))
    assert [(request.prompt, request.seed, request.classes) for request in plan] == [
        ("a ball", 7, ("ball",)),
        ("two cubes", 8, ("cube",)),
        ("a ball", 9, ("ball",)),
        ("two cubes", 10, ("cube",)),
        ("a ball", 11, ("ball",)),
    ]


def test_batches_have_a_fixed_composition_and_a_padded_tail():
    plan = plan_of(number=5, batch_size=2, prompts="a ball")
    assert [len(plan.batch(k).padded) for k in range(len(plan))] == [2, 2, 2]
    assert [[request.index for request in plan.batch(k).requests] for k in range(len(plan))] == [[0, 1], [2, 3], [4]]
    chosen = list(plan.batches_of([4, 0, 2], turn=1))
    assert [(batch.index, batch.padding, len(batch.padded)) for batch in chosen] == [(0, 0, 2), (1, 1, 2)]
    assert [request for batch in chosen for request in batch.requests] == [plan.request(k, 1) for k in (4, 0, 2)]


@pytest.mark.parametrize(("number", "asked", "used"), [(1, 8, 1), (9, 8, 5), (16, 8, 8), (3, 2, 2)])
def test_batch_size_leaves_little_padding(number, asked, used):
    assert plan_of(number=number, batch_size=asked, prompts="a ball").batch_size == used


def test_demo_captions_are_a_function_of_the_seed():
    early, late = plan_of(number=4, seed=0), plan_of(number=2, seed=2)
    assert [request.prompt for request in early][2:] == [request.prompt for request in late]
    scenes = [world.sample_scene(900_000_000 + seed) for seed in range(4)]  # which the demo model has not seen
    assert [request.prompt for request in early] == [scene.caption for scene in scenes]


def test_other_models_need_prompts():
    with pytest.raises(Refused, match="no prompts"):
        read_source(PromptSettings(), has_captions=False)


def test_the_last_image_of_a_run_has_a_seed_that_a_generator_takes():
    assert check_seed(2**63 - 2, 2) == 2**63 - 2 and check_seed(np.int64(0)) == 0
    for seed, number in ((2**63 - 1, 2), (2**63, 1), (-1, 1)):
        with pytest.raises(Refused, match=f"--seed {seed}: expected a whole number from 0 to {2**63 - number}"):
            check_seed(seed, number)
    with pytest.raises(Refused, match=f"--number {2**64}: there are {2**63} seeds"):
        check_seed(0, 2**64)


def test_per_class_is_balanced_and_varied():
    plan = plan_of(number=1, classes=("ball", "orange"), per_class=4)
    found = list(plan)
    assert plan.number == 8
    assert sum("ball" in request.prompt for request in found) == 4
    assert found[1].prompt == "a photo of an orange" and found[1].classes == ("orange",)
    assert len({request.prompt for request in found}) == 8
    again = [plan.request(index, turn=1) for index in range(8)]  # in whose place they may stand
    assert [request.classes for request in again] == [request.classes for request in found]
    assert [after.seed - before.seed for before, after in zip(found, again)] == [100_000_007] * 8
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 2), (0, 3), (1, 2)]  # class and turn, two of a class
    assert [class_and_turn(index, 2, 3) for index in range(9)] == pairs
    lines = plan_of(prompts="one\ntwo\nthree", number=3)
    assert [lines.request(index, turn=1).prompt for index in range(3)] == ["three", "one", "two"]  # 100000007 on
    assert [lines.batch(1).padding, replace(lines, most=4).batch(1).padding] == [1, 0]  # a fourth may replace one
    assert [template("ball", turn) for turn in (1, 2, 3, 11, 12)] == [
        "a picture of a ball",
        "a scene with a ball",
        "a photo of a ball at night",
        "a scene with a ball in fog",
        "a photo of a ball",
    ]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("Two BALLS", ("ball",)),
        ("a football", ()),
        ("people near cherries", ("cherry", "person")),
        ("earrings", ()),
        ("a traffic-light", ("traffic light",)),
        ("several traffic  lights.", ("traffic light",)),
    ],
)
def test_class_words_are_whole_words_and_simple_plurals(prompt, found):
    assert class_words.find_classes(prompt, ("ball", "ring", "cherry", "person", "traffic light")) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"a ball\n\xffb", "line 2: not valid UTF-8"),
        (b"a ball\na\0b", "line 2: holds a NUL byte"),
        (b"a \x1b[31mball", "control character U\\+001B"),
        (b"x " * 80, "line 1: 82 tokens, at most 77"),
        (b"x" * 5000, "5000 bytes"),
        (rb'{"prompt": "a \ud83d ball"}', "not valid Unicode"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(Refused, match=message):
        plan_of(prompts=str(path))


def test_the_demo_model_names_the_prompts_it_can_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "an aerial view of a locomotive crossing a viaduct between snowy mountains, early winter morning light"
    )
    tokenizer = OwnTokenizer(DEMO / "tokenizer")
    source = read_source(PromptSettings(prompts=str(path)), has_captions=True)
    with pytest.raises(Refused, match="tokens, at most 77") as stop:
        make_plan(source, tokenizer, number=1, seed=0, batch_size=1, words=())
    assert "datasetdm_fast.prompts --set demo" in stop.value.remedy


def test_a_file_of_nearly_the_same_name_is_told(tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball")
    with pytest.raises(Refused, match=r"\(did you mean prompts.txt\?\)"):
        prompt_files.read_prompts(str(tmp_path / "promts.txt"))
    with pytest.raises(Missing, match=r"\(did you mean prompts.txt\?\)"):
        find_decoders(tmp_path / "prompt.txt")
    with pytest.raises(Refused, match=r"\(did you mean prompts.txt\?\)"):
        open_pictures(str(tmp_path / "prompts.tx"), "")


@pytest.mark.parametrize("name", ["missing.txt", "folder/with/no/prompts"])
def test_what_looks_like_a_file_must_be_one(name):
    with pytest.raises(Refused, match="cannot be read"):
        prompt_files.read_prompts(name)


def test_a_prompt_that_is_no_utf_8_is_refused():
    with pytest.raises(Refused, match="--prompts: .* is not valid UTF-8"):
        prompt_files.read_prompts("a \udce9 ball")


def test_a_folder_is_no_prompt_file(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        prompt_files.read_prompts(str(tmp_path))


def test_a_file_in_a_folder_that_may_not_be_read_is_no_prompt(tmp_path, monkeypatch):
    def stat(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    settings = PromptSettings(prompts=str(tmp_path / "closed" / "p.txt"))
    monkeypatch.setattr(Path, "stat", stat)  # chmod does not bind root
    with pytest.raises(PermissionError, match="closed/p.txt"):
        read_source(settings, has_captions=True)


def test_text_keeps_unusual_characters(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein roter Bällchen\u2028Zeile 🎈\u202e\n".encode())
    assert [request.prompt for request in plan_of(number=1, prompts=str(path))] == [
        "ein roter Bällchen\u2028Zeile 🎈\u202e"
    ]


def test_truncation_keeps_whole_words_and_class_words():
    long = "a ball " + "word " * 100
    plan = plan_of(prompts=long, number=1, words=("ball",), truncate_prompts=True)
    assert plan.request(0).prompt == ("a ball " + "word " * 73).strip()
    with pytest.raises(Refused, match="lose the class word 'cube'"):
        plan_of(prompts=long + "cube", number=1, words=("ball", "cube"), truncate_prompts=True)


def test_truncation_cuts_before_a_word_that_does_not_fit():
    tokenizer = Tokenizer()
    tokenizer.__class__ = type(
        "Letters",
        (Tokenizer,),
        {"__call__": lambda self, prompt, truncation=False: SimpleNamespace(input_ids=[0, *prompt, 1])},
    )
    assert prompts.fit_prompt("abcde " * 20, tokenizer, "line", truncate=True) == ("abcde " * 12).strip()
    for length in range(76, 110):
        assert prompts.fit_prompt("x" * length, tokenizer, "line", truncate=True) == "x" * 75
    fitting = " ".join(["x" * 18] * 4)  # of 75 letters
    assert prompts.fit_prompt(f"{fitting} more", tokenizer, "line", truncate=True) == fitting
    for unspaced in ("a " + "\u732b" * 80, "\u732b " + "\u0e01" * 80):  # whose words stand side by side
        assert prompts.fit_prompt(unspaced, tokenizer, "line", truncate=True) == unspaced[:75]
    for text, remedy in (("\u732b" * 80, "Shorten it, or"), ("x" * 80, "The model's tokenizer knows few")):
        with pytest.raises(Refused, match="82 tokens") as stop:
            prompts.fit_prompt(text, tokenizer, "line", truncate=False)
        assert stop.value.remedy.startswith(remedy)


def test_the_tokenizer_cuts_where_another_work_leaves_it_to_it():
    long = "a ball " + "word " * 100 + "cube"
    given = prompts.PromptLine(1, long, negative="fog " * 90)
    source = prompts.PromptSource((given,), "list", (), 0, "dataset-diffusion", tokenizer_cuts=True)
    request = make_plan(source, Tokenizer(), number=1, seed=0, batch_size=1, words=("cube",)).request(0)
    assert (request.prompt, request.negative, request.classes) == (long, given.negative, ("cube",))
    with pytest.raises(Refused, match="tokens, at most 77 fit"):
        make_plan(replace(source, tokenizer_cuts=False), Tokenizer(), number=1, seed=0, batch_size=1)


def test_a_negative_prompt_with_a_name_stays_whole():
    """Its author leaves the cut to the tokenizer, which cuts within a word."""
    few = Tokenizer()
    few.model_max_length = 9
    whole = prompts.NEGATIVE_PROMPTS["dataset-diffusion"]
    for given in ("dataset-diffusion", whole):
        assert prompts.fit_negative(given, few, "--negative-prompt") == whole


def test_a_negative_prompt_without_a_name_is_cut_only_where_asked():
    with pytest.raises(Refused, match="tokens, at most 77 fit"):
        prompts.fit_negative("fog " * 90, Tokenizer(), "--negative-prompt")
    cut = prompts.fit_negative("fog " * 90, Tokenizer(), "--negative-prompt", truncate=True)
    assert cut == " ".join(["fog"] * 75)  # 77 less the marks of start and end


def test_the_name_of_a_set_stands_for_its_classes():
    def words(*classes):
        return run_settings.expand_names(RunConfig(classes=classes), {"classes"}).classes

    assert len(words("voc")) == 20 and words("voc")[0] == "aeroplane" and len(words("coco")) == 80
    assert words("voc", "ball") == ("voc", "ball") and words("ball") == ("ball",) and words() == ()


@pytest.mark.parametrize(
    ("classes", "message"),
    [(("",), "empty"), (("a\0b",), "control"), (("ball", "Ball"), "named twice"), (("a  b", "A b"), "named twice")],
)
def test_bad_class_words_are_refused(classes, message):
    with pytest.raises(Refused, match=message):
        prompts.check_classes(classes)


def test_too_long_class_words_are_refused():
    with pytest.raises(Refused, match="81 tokens|tokens, at most 77"):
        plan_of(classes=("x " * 80,), per_class=1)
    with pytest.raises(Refused, match="82 tokens, at most 77"):
        prompts.check_class_lengths(("x " * 80,), Tokenizer())


def test_parity_stands_for_the_settings_of_dataset_diffusion_but_those_that_are_given():
    """100 steps at guidance 7.5, self-attention to the fourth power, and 0.6 and 0.5 as its thresholds."""
    told = RunConfig(parity="dataset-diffusion", labeller=("attention",), classes=("dog",), exponent=2)
    found = run_settings.expand_names(told, {"parity", "labeller", "classes", "exponent"})
    assert (found.steps, found.guidance, found.profile) == (100, 7.5, "0.14.0")
    assert (found.exponent, found.threshold, found.uncertainty) == (2, 0.6, 0.5)
    assert found.negative_prompt == "dataset-diffusion" and RunConfig().most_tries == 10
    assert run_settings.expand_names(replace(told, exponent=-1), {"parity", "labeller", "classes"}).exponent == 4


def test_per_class_and_prompts_exclude_each_other():
    with pytest.raises(Refused, match="combined"):
        read_source(PromptSettings(classes=("ball",), per_class=2, prompts="a ball"), has_captions=True)
    with pytest.raises(Refused, match="no classes"):
        read_source(PromptSettings(per_class=2), has_captions=True)


def test_digest_follows_the_prompts_and_not_the_file(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a ball\n")
    digests = {
        read_source(PromptSettings(prompts=str(tmp_path / name)), has_captions=True).digest
        for name in ("a.txt", "b.txt")
    }
    assert len(digests | {read_source(PromptSettings(prompts="a ball"), has_captions=True).digest}) == 1
    assert read_source(PromptSettings(prompts="a cube"), has_captions=True).digest not in digests


def test_digest_of_runs_without_a_list_is_that_of_earlier_versions():
    """By it a run is resumed, and its card tells whether prompts were given: SHA-256 of `templates` and `demo world`"""
    templates, demo = prompts.PromptSource((), "x", ("ball",), 2), prompts.PromptSource((), "x", (), 0)
    assert templates.digest == "9c6641c1f9cfb0c678ea58b1a913a5d0d528e98047e04827dcf28e9d6e51e8ee"
    assert demo.digest == "be3cdc9b124b00c90fb6497de503807f167401cf503fa5a001a904cca445298f"


def test_json_lines_bring_classes_and_seeds(tmp_path):
    path = tmp_path / "list.jsonl"
    lines = [
        {"prompt": "two of them", "classes": ["ball"], "seed": 2**63 - 1, "group": "ball", "id": "x"},
        {"prompt": "a red star"},
        {"prompt": "a scene", "classes": [], "seed": 0},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source = read_source(PromptSettings(prompts=str(path)), has_captions=True)
    assert source.listed == ("ball",) and source.classes == ()
    plan = make_plan(source, Tokenizer(), number=3, seed=5, batch_size=2, words=("star", "ball"))
    assert [(request.seed, request.classes) for request in plan] == [(2**63 - 1, ("ball",)), (6, ("star",)), (0, ())]
    assert plan.has_seeds
    assert source.digest != read_source(PromptSettings(prompts="two of them"), has_captions=True).digest


def test_a_line_with_a_seed_draws_another_image_whenever_it_is_repeated(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a ball", "seed": seed}) + "\n" for seed in (0, 1, 2**63 - 1)))
    source = read_source(PromptSettings(prompts=str(path)), has_captions=True)
    plan = make_plan(source, Tokenizer(), number=9, seed=5, batch_size=3)
    seeds = [request.seed for request in plan]
    assert seeds[:3] == [0, 1, 2**63 - 1] and len({*seeds}) == 9 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[3:5] == [prompts.TURN, prompts.TURN + 1]


def test_classes_of_a_line_may_be_spelled_in_another_way(tmp_path):
    """As names of files are, which macOS stores with accents as characters of their own."""
    path, words = tmp_path / "list.jsonl", ("ball", "fire_hydrant", "Möwe", "cube", "Cube")
    listed = [["Ball"], ["Fire Hydrant"], [unicodedata.normalize("NFD", "Möwe")], ["Cube"], ["dog"]]
    path.write_text("".join(json.dumps({"prompt": "a\r\nscene", "classes": one}) + "\n" for one in listed))
    plan = make_plan(
        read_source(PromptSettings(prompts=str(path)), has_captions=True), Tokenizer(), number=5, seed=0, batch_size=5
    )
    plan = replace(plan, words=words)
    assert [request.classes for request in plan] == [("ball",), ("fire_hydrant",), ("Möwe",), ("Cube",), ()]
    assert {request.prompt for request in plan} == {"a scene"}


def test_negative_prompts_are_those_of_the_run_or_of_the_line(tmp_path):
    path = tmp_path / "list.jsonl"
    lines = [{"prompt": "a ball"}, {"prompt": "a cone", "negative": "fog"}, {"prompt": "a star", "negative": ""}]
    path.write_text("\n".join(map(json.dumps, lines)))
    source = read_source(PromptSettings(prompts=str(path), negative_prompt="dataset-diffusion"), has_captions=True)
    plan = make_plan(source, Tokenizer(), number=3, seed=5, batch_size=2)
    assert [request.negative for request in plan] == [prompts.NEGATIVE_PROMPTS["dataset-diffusion"], "fog", ""]
    assert len(plan.request(0).negative.split(",")) == 21
    assert [line.classes for line in parse_lines('{"prompt": "a", "classes": []}\n{"prompt": "a"}', "x")] == [(), None]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("\n".join(json.dumps({"prompt": line["prompt"]}) for line in lines))
    assert source.digest != read_source(PromptSettings(prompts=str(plain)), has_captions=True).digest
    for bad, message in ((("x " * 90), "--negative-prompt: 9[0-9] tokens"), ("a\0b", "control characters")):
        with pytest.raises(Refused, match=message):
            wrong = read_source(PromptSettings(prompts="a ball", negative_prompt=bad), has_captions=True)
            make_plan(wrong, Tokenizer(), number=1, seed=0, batch_size=1)
    assert RunConfig().identity() == {**RunConfig().identity(), **RunConfig(negative_prompt="").identity()}
    assert RunConfig(negative_prompt="fog").identity()["negative_prompt"] == "fog"


def test_a_folder_without_a_prompt_is_refused(tmp_path):
    (tmp_path / "knife.txt").write_text("\n")
    (tmp_path / "ball.md").write_text("a ball\n")
    with pytest.raises(Refused, match="holds no prompt") as refused:
        read_source(PromptSettings(prompts=str(tmp_path)), has_captions=True)
    assert "CLASS.txt" in refused.value.remedy


def test_a_folder_of_labelled_images_is_no_folder_of_prompts(tmp_path):
    (tmp_path / "classes.txt").write_text("wall\ntable\n")
    (tmp_path / "prompts.txt").write_text("a ball on a table\n")
    with pytest.raises(Refused, match="holds classes.txt, so it is a data set") as refused:
        read_source(PromptSettings(prompts=str(tmp_path)), has_captions=True)
    assert str(tmp_path / "prompts.txt") in refused.value.remedy


def test_a_folder_of_lists_names_the_class_of_each(tmp_path):
    (tmp_path / "bird.txt").write_text("something with feathers\nan old owl\n")
    (tmp_path / "general.txt").write_text("a quiet street\n")
    (tmp_path / "knife.txt").write_text("")
    source = read_source(PromptSettings(prompts=str(tmp_path)), has_captions=True)
    assert [(prompt.text, prompt.classes) for prompt in source.lines] == [
        ("something with feathers", ("bird",)),
        ("an old owl", ("bird",)),
        ("a quiet street", ()),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt": 3}',
        '{"text": "a ball"}',
        '{"classes": []}',
        '{"prompt": "a", "classes": "ball"}',
        '{"prompt": "a", "classes": [""]}',
        '{"prompt": "a", "negative": 3}',
        '{"prompt": "a", "negative": "b\\u0000"}',
        '{"prompt": "a", "seed": NaN}',
        '{"prompt": "a", "seed": -1}',
        '{"prompt": "a", "seed": 9223372036854775808}',
        '{"prompt": "a", "seed": 1.5}',
        '{"prompt": "a", "seed": true}',
        '{"prompt": "a\\u0000b"}',
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": ""}',
    ],
)
def test_bad_json_lines_are_refused_with_their_line(line, tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(Refused, match="line 2(?! line)|empty") as stop:
        read_source(PromptSettings(prompts=str(path)), has_captions=True)
    assert "checksum" not in stop.value.remedy and "None" not in stop.value.cause


@pytest.mark.usefixtures("one_engine_of_a_kind")
def test_a_run_can_be_made_again_from_its_samples_and_unnamed_prompts_are_refused(tmp_path, capsys):
    from datasetdm_fast import generate
    from datasetdm_fast.runs.run_folder.audit import audit

    line = [
        "--negative-prompt",
        "fog",
        "--steps",
        "2",
        "--task",
        "semantic,open-vocabulary",
        "--classes",
        "ball,cone",
        "--quiet",
        "--batch-size",
        "2",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    made = ["--prompts", "a sphere beside a cone", "--number", "2", "--seed", "40", "--out", str(first)]
    assert generate.main([*line, *made]) == 0
    again = ["--prompts", str(first / "samples.jsonl"), "--number", "2", "--out", str(second)]
    assert generate.main([*line, *again]) == 0
    for name in ("images/00000001.png", "open_vocabulary/00000001.png", "semantic/00000000.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert not audit(second).findings
    rows = [json.loads(row) for row in (second / "samples.jsonl").read_text().splitlines()]
    assert [row["negative"] for row in rows] == ["fog", "fog"]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps({**row, "negative": text}) + "\n" for row, text in zip(rows, ("fog", "night"))))
    third = tmp_path / "mixed"
    assert generate.main([*line[2:], "--prompts", str(mixed), "--number", "2", "--out", str(third)]) == 0
    pictures = [[(run / f"images/0000000{k}.png").read_bytes() for k in (0, 1)] for run in (second, third)]
    assert pictures[0][0] == pictures[1][0] and pictures[0][1] != pictures[1][1]
    (third / "images/00000001.png").unlink()
    assert generate.main(["--out", str(third), "--only", "00000001", "--quiet"]) == 0
    assert (third / "images/00000001.png").read_bytes() == pictures[1][1]
    capsys.readouterr()
    third = ["--prompts", "a quiet street", "--number", "1", "--out", str(tmp_path / "third")]
    assert generate.main([*line, *third]) == 2 and "1 of 1 prompts name none" in capsys.readouterr().err
    assert generate.main([*line, *third, "--allow-unnamed"]) == 0


def test_class_words_and_lines_fit_up_to_the_last_token_and_byte():
    prompts.check_class_lengths(("x " * 75,), Tokenizer())
    prompts.check_class_lengths(("x " * 72,), Tokenizer(), prompt="a photo {}  of")
    with pytest.raises(Refused, match="makes a prompt of 78 tokens"):
        prompts.check_class_lengths(("x " * 73,), Tokenizer(), prompt="a photo {}  of")
    assert len(prompts.split_prompts("ä" * 2048, "list")) == 1
    with pytest.raises(Refused, match="list line 3: 4098 bytes, at most 4096 are read"):
        prompts.split_prompts("\n" + "ä" * 2049, "list", first=2)
    assert prompts.split_prompts("ä" * 2049, "list", truncate=True)[0].text == "ä" * 2049


def test_of_two_text_encoders_the_longer_reads_the_prompt_and_the_other_its_class_words():
    tokenizer = Tokenizer()
    tokenizer.longer = Tokenizer()
    tokenizer.longer.model_max_length = 100
    long = "a ball " + "word " * 80 + "cube"
    assert prompts.fit_prompt(long, tokenizer, "line", ("ball",)) == long
    with pytest.raises(Refused, match="cutting it to 77 tokens would lose the class word 'cube'"):
        prompts.fit_prompt(long, tokenizer, "line", ("ball", "cube"))
    with pytest.raises(Refused, match="line: 102 tokens, at most 100 fit"):
        prompts.fit_prompt("word " * 100, tokenizer, "line", ("ball",))


def test_all_that_decides_an_image_is_in_the_digest_of_a_list():
    lines = [
        prompts.PromptLine(1, "a ball", **more)
        for more in ({}, {"classes": ("ball",)}, {"seed": 7}, {"negative": "fog"}, {"class_prompt": "ball"})
    ]
    digests = {prompts.PromptSource((line,), "list", (), 0).digest for line in lines}
    assert len(digests) == 5 and prompts.PromptSource((lines[0]._replace(line=2),), "x", (), 0).digest in digests


def test_a_prompt_with_a_class_prompt_may_be_cut_before_its_class_words():
    line = prompts.PromptLine(1, "word " * 80 + "cube", ("cube",), class_prompt="a cube")
    source, options = prompts.PromptSource((line,), "list", (), 0), {"number": 9, "seed": 0, "batch_size": 8}
    plan = make_plan(source, Tokenizer(), **options, words=("cube",), truncate=True)
    assert plan.request(0).prompt == ("word " * 75).strip() and plan.request(0).classes == ("cube",)
    with pytest.raises(Refused, match="would lose the class word 'cube'"):
        other = replace(source, lines=(line._replace(class_prompt=""),))
        make_plan(other, Tokenizer(), **options, words=("cube",), truncate=True)
    part = make_plan(replace(source, is_part=True), Tokenizer(), **options, words=("cube",), truncate=True)
    assert (plan.batch_size, part.batch_size) == (5, 8)


def test_a_class_fits_in_its_longest_template_and_a_caption_is_one_plain_line():
    plan_of(classes=("x " * 68 + "x",), per_class=1)  # "a scene with an ... at sunset" has six words more
    with pytest.raises(Refused, match="makes a prompt of 78 tokens"):
        plan_of(classes=("x " * 69 + "x",), per_class=1)
    assert prompts.check_line(" a ball\r\nbeside a cube ", "x") == "a ball beside a cube"
    for wrong in ("a\x1bball", "a\ud800"):
        with pytest.raises(Refused, match="x: .* holds control characters or invalid UTF-8"):
            prompts.check_line(wrong, "x")


def test_any_negative_prompt_is_refused_where_no_call_reads_one():
    prompts.check_negative(["", ""], False, "A model")
    prompts.check_negative(["", "fog"], True, "A model")
    with pytest.raises(Refused, match="--negative-prompt 'fog': A model is sampled without classifier-free guidance"):
        prompts.check_negative(["", "fog"], False, "A model")


def test_a_prompt_of_a_class_may_name_another_one():
    first, second = plan_of(number=1, classes=("photo", "ball"), per_class=1)
    assert (first.prompt, first.classes) == ("a photo of a photo", ("photo",))
    assert (second.prompt, second.classes) == ("a photo of a ball", ("photo", "ball"))
