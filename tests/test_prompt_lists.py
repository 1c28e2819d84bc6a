"""python -m datasetdm_fast.prompts: lists of the grammar, and of language models that misbehave."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from datasetdm_fast import prompts
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.class_tables import find_classes
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.prompting import balance, language_model
from datasetdm_fast.runs.prompting.grammar import (
    DemoGrammar,
    Grammar,
    PlaceGrammar,
    Sentence,
    open_grammar,
    read_vocabulary,
)

SECRET = "canary-5b1f0c77"
ESCAPED = "".join(f"\\u{ord(letter):04x}" for letter in SECRET)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_the_lists_of_the_recipes_have_a_prompt_for_each_image():
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    found = re.findall(r"`--set (\S+) --per-class (\d+)` \| ([\d,]+)", page)
    assert len(found) == 8
    for name, each, images in found:
        made, number = int(each) * len(open_grammar(name).classes), int(images.replace(",", ""))
        assert number <= made <= 1.01 * number, name


# The grammar ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["voc", "coco", "cityscapes", "deepfashion"])
def test_a_class_has_500_different_sentences_that_name_it_and_no_other(name):
    names = [word for word in class_tables.builtin_table(name).names if word != "background"]
    grammar = Grammar(names)
    for word in names[:: max(len(names) // 10, 1)]:
        found = [grammar.sentence(word, number) for number in range(520)]
        assert len({sentence.prompt for sentence in found}) >= 500, word
        assert all(sentence.classes == (word,) == find_classes(sentence.prompt, names) for sentence in found)
        assert all(len(sentence.prompt.split()) <= 40 for sentence in found)


def test_sentences_about_places_mean_no_class():
    phrases = read_vocabulary()
    for places, category in ((phrases.rooms, "room"), (phrases.streets, "scenery")):
        grammar = PlaceGrammar(places, phrases.categories[category])
        found = [grammar.sentence(places[0], number).prompt for number in range(520)]
        assert len(set(found)) >= 500 and all(places[0] in prompt for prompt in found)


def test_demo_sentences_use_the_words_its_model_knows():
    from bench.world.tokenizer import words_of
    from bench.world.worlds import WORLDS

    grammar, known = DemoGrammar(), set(words_of(WORLDS["demo"]))
    for number in range(200):
        sentence = grammar.sentence("cone", number)
        assert set(sentence.prompt.split()) <= known and "cone" in sentence.classes


def test_a_thousand_sentences_of_a_class_hold_few_near_duplicates():
    names = [word for word in class_tables.builtin_table("voc").names if word != "background"]
    planned = balance.plan_classes({"dog": 1000, "tvmonitor": 1000}, 0, 0)
    found = balance.build_list(Grammar(names), planned)
    assert balance.measure(found)["near_duplicates"] <= 0.02
    assert balance.count_prompts(("owl", "cat")) == {"owl": 100, "cat": 100}  # where nothing else is asked for
    assert Counter(sentence.group for sentence in found) == {"dog": 1000, "tvmonitor": 1000}


def test_a_class_without_another_sentence_is_not_tried_for_ever():
    """Of 10 sentences 3,000 are asked for: at most 100 tries each at first, and one each in the end."""
    tried, done = [], []

    class FewSentences:
        classes = ("owl", "cat")

        def sentence(self, name, number, others=()):
            tried.append(name)
            return Sentence(f"a {name} number {number % 10}", (name,), name)

    found = balance.build_list(FewSentences(), [("owl",)] * 3000 + [("cat",)] * 10, done.append)
    assert done == list(range(1, 3011)) and len({sentence.prompt for sentence in found}) == 20
    assert Counter(tried) == {"owl": 10 + sum(range(2, 101)) + 3000 - 10 - 99, "cat": 10}


def test_near_duplicates_are_those_of_the_plain_definition():
    prompts_ = [Grammar(["dog"]).sentence("dog", number).prompt for number in range(60)]
    prompts_ += [prompt + " today" for prompt in prompts_[:7]] + prompts_[:3]
    pieces = [balance._shingles(prompt) for prompt in prompts_]
    plain = [
        k
        for k, one in enumerate(pieces)
        if any(len(one & other) / len(one | other) > balance.NEAR for other in pieces[:k])
    ]
    assert balance.near_duplicates(prompts_) == plain and len(plain) >= 6
    assert balance.near_duplicates(["a b c d e f g h i", "a b c d e f g h"]) == []  # 4 of 5 sequences, which is 0.8
    assert balance.near_duplicates(["a b c d e f g h i j", "a b c d e f g h i"]) == [1]  # 5 of 6


@pytest.mark.parametrize("name", ["", "nyu", "demo", "kitti", "pose", "voc"])
def test_another_seed_makes_other_sentences_of_every_grammar(name):
    kind = {"nyu": "kitchen", "demo": "ball", "kitti": "motorway", "pose": "person", "voc": "dog"}.get(name, "owl")
    one, same, other = (open_grammar(name, (kind,), seed) for seed in (1, 1, 2))
    said = [[grammar.sentence(kind, number).prompt for number in range(20)] for grammar in (one, same, other)]
    assert said[0] == said[1] and len({*said[0]} & {*said[2]}) < 10


@pytest.mark.parametrize(("name", "has_article"), [("broccoli", False), ("owl", True)])
def test_a_noun_has_an_article_unless_it_takes_none(name, has_article):
    one_or_many = re.compile(rf"\ban? (\w+ )?{name}\b|\b{name}s\b")
    found = {bool(one_or_many.search(Grammar([name]).sentence(name, k).prompt)) for k in range(40)}
    assert found == {has_article}


def test_places_are_described_as_rooms_or_as_scenery():
    categories = read_vocabulary().categories
    assert open_grammar("nyu").category is categories["room"] and categories["room"].is_indoors
    assert open_grammar("kitti").category is categories["scenery"] and not categories["scenery"].is_indoors


@pytest.mark.parametrize(("name", "classes"), [("kitti", read_vocabulary().streets), ("pose", ("person",))])
def test_the_grammars_of_streets_and_persons_have_these_alone(name, classes):
    grammar = open_grammar(name)
    assert grammar.classes == classes and grammar.sentence(classes[-1], 0).group == classes[-1]
    assert grammar.sentence(classes[-1], 0).classes == (classes if name == "pose" else ())
    with pytest.raises(Refused, match="kitchen"):
        open_grammar(name, ["kitchen"])


def test_where_no_sentence_names_the_classes_alone_a_plain_one_is_taken(monkeypatch):
    monkeypatch.setattr("datasetdm_fast.runs.prompting.grammar.find_classes", lambda *_: ("owl", "cat", "dog"))
    sentence = Grammar(["cat", "owl", "dog"]).sentence("owl", 0, ["cat"])
    assert sentence == Sentence("a photo of an owl and a cat", ("cat", "owl"), "owl")


def test_the_figures_of_a_list_are_told_a_line_each():
    measures = {"prompts": 1200, "near_duplicates": 0.0125, "distinct_2": 0.5, "classes": {"owl": 700, "cat": 500}}
    together = [["cat", "owl", 9], ["a", "b", 8], ["a", "c", 7], ["b", "c", 1]]
    told = list(balance.report_lines(measures | {"together": together}, {"is not English": 2, "not a text": 1000}))
    assert told == [
        "prompts    1,200, 1.2% near duplicates, distinct-2 0.500",
        "classes    2, from 500 (cat) to 700 (owl)",
        "together   cat and owl: 9",
        "together   a and b: 8",
        "together   a and c: 7",
        "left out   1,000: not a text",
        "left out   2: is not English",
    ]
    alike = {"prompts": 2, "near_duplicates": 0, "distinct_2": 1, "classes": {"owl": 1, "cat": 1}, "together": []}
    assert list(balance.report_lines(alike, {}))[1] == "classes    2, 1 prompt each"
    assert len(list(balance.report_lines(alike | {"classes": {}}, {}))) == 1


def test_distinct_2_counts_pairs_of_words():
    assert balance.distinct_2(["a b c", "a b d"]) == 3 / 4


# Counts ---------------------------------------------------------------------------------------------------------------
def test_every_class_comes_up_exactly_as_often_as_planned_with_pairs_too():
    counts = {"cat": 7, "dog": 31, "car": 0, "bus": 12}
    for share in (0.0, 0.5, 1.0):
        plan = list(balance.plan_classes(counts, share, seed=3))
        assert Counter(name for names in plan for name in names) == {k: v for k, v in counts.items() if v}
    assert any(len(names) == 2 for names in plan)


def test_a_seed_has_one_plan_with_pairs_of_what_is_left():
    """The class that is furthest behind its share comes first; the second by how many prompts each still lacks."""
    plan = balance.plan_classes({"a": 6, "b": 3, "c": 2, "d": 0}, 0.5, 0)
    assert ["".join(names) for names in plan] == ["a", "b", "ca", "a", "bc", "ab", "a", "a"]
    plan = balance.plan_classes({"a": 6, "b": 3, "c": 2, "d": 0}, 0.5, 1)
    assert ["".join(names) for names in plan] == ["ac", "b", "ab", "ac", "a", "ab", "a"]
    plan = balance.plan_classes({"a": 2, "b": 3, "c": 4}, 1.0, 0)
    assert ["".join(names) for names in plan] == ["ac", "bc", "bc", "ab", "c"]


def test_a_class_with_a_new_sentence_has_its_tries_back():
    most, asked = balance.MOST_TRIES, []

    def sentence(name, number, others):
        asked.append(number)
        return SimpleNamespace(prompt=f"{name} {number > most}")

    balance.build_list(SimpleNamespace(sentence=sentence), [("owl",)] * 4)
    assert len(asked) == 1 + most + 1 + most  # a new one, tries in vain, a new one, tries in vain


def test_classes_are_spread_over_the_list():
    plan = [names[0] for names in balance.plan_classes({"cat": 100, "dog": 10}, 0.0, 0)]
    assert [Counter(plan[k : k + 55])["dog"] for k in (0, 55)] == [5, 5]


def test_balance_asks_for_what_rare_classes_lack():
    counts = balance.count_prompts(("cat", "dog", "bus"), images={"cat": 10, "dog": 4, "owl": 30})
    assert counts == {"cat": 0, "dog": 6, "bus": 10}


def test_the_command_shows_its_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasetdm_fast.command_line.output.SECONDS_PER_LINE", 0)
    assert prompts.main(["--per-class", "2", "--out", str(tmp_path / "list.jsonl")]) == 0
    assert "prompts, 3/14 prompts, about" in capsys.readouterr().err


def test_the_command_balances_a_labelled_data_set(tmp_path):
    out = tmp_path / "list.jsonl"
    assert prompts.main(["--set", "demo", "--balance", "demo:20@5", "--out", str(out), "--quiet"]) == 0
    from datasetdm_fast.training.readers import open_data

    source = open_data("demo:20@5", 64)
    present = Counter(name for record in range(20) for name in source.areas(record))
    most = max(present[name] for name in source.thing_classes)
    wanted = {name: most - present[name] for name in source.thing_classes}
    assert Counter(row["group"] for row in rows(out)) == {name: count for name, count in wanted.items() if count}


# The command ----------------------------------------------------------------------------------------------------------
def test_the_same_line_writes_the_same_bytes(tmp_path):
    for name in "ab":
        line = ["--set", "voc", "--per-class", "3", "--pairs", "0.3", "--seed", "9", "--quiet"]
        assert prompts.main([*line, "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = rows(tmp_path / "a")
    assert Counter(name for row in found for name in row["classes"]) == dict.fromkeys(
        class_tables.builtin_table("voc").names[1:], 3
    )


def test_letters_of_any_language_are_written_as_they_are(tmp_path):
    line = ["--classes", "café table", "--per-class", "1", "--quiet", "--out", str(tmp_path / "list")]
    assert prompts.main(line) == 0 and "café table" in (tmp_path / "list").read_text("utf-8")


def test_another_list_is_not_overwritten(tmp_path, capsys):
    line = ["--classes", "owl", "--per-class", "2", "--quiet", "--out", str(tmp_path / "list"), "--seed"]
    assert prompts.main([*line, "1"]) == prompts.main([*line, "1"]) == 0
    before = (tmp_path / "list").read_bytes()
    assert prompts.main([*line, "2"]) == 2 and (tmp_path / "list").read_bytes() == before
    assert "it holds something other than this list\nChoose another --out" in capsys.readouterr().err


def test_the_command_says_how_often_classes_come_up(tmp_path, capsys):
    line = ["--classes", "cat,owl", "--per-class", "3", "--out", str(tmp_path / "list")]
    assert prompts.main(line) == 0 and "classes    2, 3 prompts each" in capsys.readouterr().out
    (tmp_path / "list").unlink()
    assert prompts.main([*line[:3], "1", *line[4:]]) == 0 and "classes    2, 1 prompt each" in capsys.readouterr().out
    (tmp_path / "counts.json").write_text('{"cat": 4, "owl": 2}')
    line[2:4] = ["--target-counts", str(tmp_path / "counts.json")]
    (tmp_path / "list").unlink()
    assert prompts.main(line) == 0 and "classes    2, from 2 (owl) to 4 (cat)" in capsys.readouterr().out


def test_target_counts_and_own_words(tmp_path, capsys):
    counts = tmp_path / "real.json"
    counts.write_text('{"owl": 2, "fire hydrant": 5}')
    line = ["--classes", "owl,fire hydrant,kettle", "--target-counts", str(counts), "--out", str(tmp_path / "list")]
    assert prompts.main([*line, "--quiet"]) == 0
    assert Counter(row["group"] for row in rows(tmp_path / "list")) == {"owl": 2, "fire hydrant": 5}
    for text in ("", "{owl: 2}", "[2]", '{"owl": "two"}', '{"owl": -1}', '{"owl": 10000001}', '{"owl": true}'):
        counts.write_text(text)
        assert prompts.main(line) == 2
        assert capsys.readouterr().err.endswith('Write a whole number for each class: {"cat": 40, "dog": 25}.\n')
    for text, told in (
        ('{"owls": 2}', "'owls' is not a class of this list (did you mean owl?)\nThe classes are owl, fire"),
        ('{"owl": 0}', "0 prompts: expected 1 to"),
    ):
        counts.write_text(text)
        assert prompts.main(line) == 2 and told in capsys.readouterr().err


def test_classes_of_an_annotation_file_are_said_without_their_marks(tmp_path):
    table = tmp_path / "lvis_v1_val.json"
    categories = [{"id": 1, "name": "aerosol_can", "synonyms": ["aerosol_can", "spray_can"]}]
    categories.append({"id": 2, "name": "bow_(weapon)", "synonyms": ["bow_(weapon)"]})
    table.write_text(json.dumps({"images": [], "categories": categories}))
    line = ["--class-table", str(table), "--per-class", "20", "--out", str(tmp_path / "list"), "--quiet"]
    assert prompts.main(line) == 0
    text = " ".join(row["prompt"] for row in rows(tmp_path / "list"))
    assert "aerosol can" in text and "spray can" in text and "_" not in text and "weapon" not in text
    assert {name for row in rows(tmp_path / "list") for name in row["classes"]} == {"aerosol_can", "bow_(weapon)"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["--set", "vco"], "did you mean voc?"),
        (["--classes", "blal", "--set", "demo"], "did you mean ball?"),
        (["--classes", "caf\udce9"], "'caf\\udce9' is not valid Unicode"),
        (["--classes", "classes.txt"], "--classes: 'classes.txt' names a file, expected class words"),
        (["--per-class", "-1"], "--per-class -1: expected 0 to"),
        (["--per-class", "9000000", "--classes", "cat,owl"], "18,000,000 prompts: expected 1 to 10,000,000"),
        (["--pairs", "1.5"], "--pairs 1.5: expected 0 to 1"),
        (["--per-class", "2", "--balance", "demo:3"], "--balance and --per-class: each sets"),
        (["--llm-url", "ftp://x", "--llm-model", "m"], "not the address of an endpoint"),
        (["--llm-url", "https://[::1/v1", "--llm-model", "m"], "not the address of an endpoint"),
        (["--llm-url", "https://host:0/v1", "--llm-model", "m"], "not the address of an endpoint"),
        (["--llm-url", "https://host:99999/v1", "--llm-model", "m"], "not the address of an endpoint"),
        (["--llm-url", "http://u:p@host/v1", "--llm-model", "m"], "contains a user name, a password"),
        (["--llm-url", "https://host/v1"], "--llm-url and --llm-model: one needs the other"),
        (["--class-table", "nowhere.csv"], "nowhere.csv"),
        (["--class-table", "/dev/zero"], "--class-table /dev/zero: not a file\n"),
        (
            ["--class-table", str(Path(prompts.__file__).parent / "schemas" / "run.json")],
            "it has no categories\nName the annotation file of LVIS",
        ),
        (["--target-counts", "nowhere.json"], "nowhere.json"),
        (["--balance", "coco"], "--balance coco: no folder named"),
        (["--classes", "cat,dog", "--balance", "demo:1@5"], "--balance: no image shows a class of this list"),
        (["--classes", "cone,person", "--balance", "demo:1@5"], "every class of this list is in as many images"),
        (["--out", "."], "is a folder"),
    ],
)
def test_wrong_lines_are_refused_in_a_sentence(line, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = prompts.main([*line, "--quiet"])
    assert told in capsys.readouterr().err and code in (2, 3) and not os.listdir(tmp_path)


def test_a_prompt_of_two_classes_is_used_once_whichever_is_named_first():
    owl, lamp = "A small owl beside a tall lamp", "a tall lamp beside a small owl"
    replies = iter([owl, owl.title().replace("Owl", "Owl "), lamp])
    plan = [("owl", "lamp"), ("lamp", "owl")]
    found, reasons = language_model.collect_sentences(
        plan, ["owl", "lamp"], lambda _: json.dumps([next(replies)]), lambda _: None
    )
    assert [sentence.prompt for sentence in found] == [owl, lamp] and reasons == {"is there twice": 1}


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (7, "not a text"),
        ("a red dog", "too short or too long"),
        ("a red dog outside", ""),
        ("dog " * 50, ""),
        ("dog " * 51, "too short or too long"),
        ("a dog near " + "w" * 339, ""),
        ("a dog near " + "w" * 340, "too short or too long"),
        ("a dog on a caf" + "é" * 8, ""),
        ("a dog on a caf" + "é" * 9, "is not English"),
        ("a dog on\u200b a porch", "holds marks that no caption has"),
        ("a dog on a porch | night", "holds marks that no caption has"),
        ("a dog at www.x.com today", "holds marks that no caption has"),
        ("a cat on a porch", "does not name its class"),
    ],
)
def test_a_caption_is_english_of_four_to_fifty_words_and_350_letters(prompt, reason):
    assert language_model.rejection_reason(prompt, ("dog",), ("dog", "cat"), ()) == reason


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://h/v1", "https://h/v1/chat/completions"),
        ("https://h:8/v1/", "https://h:8/v1/chat/completions"),
        ("https://h/v1/chat/completions/", "https://h/v1/chat/completions"),
        ("http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1/chat/completions"),
        ("http://localhost", "http://localhost/chat/completions"),
        ("http://h/v1", "would travel unencrypted"),
        ("http://h:0/v1", "not the address of an endpoint"),
        ("ftp://h/v1", "not the address of an endpoint"),
        ("https://u:p@h/v1", "a user name, a password or a query"),
        ("https://h/v1?key=1", "a user name, a password or a query"),
        ("https://h/v1#x", "a user name, a password or a query"),
    ],
)
def test_the_address_of_an_endpoint(url, address):
    if " " in address:
        with pytest.raises(Refused, match=address):
            language_model.check_url(url, "key")
    else:
        assert language_model.check_url(url, "key") == address


@pytest.mark.parametrize("key", ["sk-sécret", "sk-sec\nret"])
def test_a_key_that_no_request_holds_is_refused_and_not_shown(key):
    with pytest.raises(Refused, match="the key holds a character that a request cannot") as stop:
        language_model.check_url("https://h/v1", key)
    assert "ret" not in str(stop.value)


def test_a_host_that_no_name_may_have_is_refused():
    with pytest.raises(Refused, match="Invalid IDNA hostname"):
        language_model.Endpoint("https://\u2603.invalid/v1", "model", "")


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('Here they are: ["a [b]", "c"] - enjoy.', ["a [b]", "c"]),
        ('{"captions": ["a"], "count": 1}', ["a"]),
        ('{"captions": ["a"], "others": ["b"]}', "the reply is not a JSON list"),
        ('"a"', "the reply is not a JSON list"),
        ("none", "the reply is not JSON"),
    ],
)
def test_a_list_is_found_wherever_it_stands_in_a_reply(reply, found):
    with pytest.raises(language_model.UnusableReply, match=found) if isinstance(found, str) else nullcontext():
        assert language_model.parse_list(reply) == found


def test_a_busy_endpoint_is_asked_again_after_growing_delays_or_when_it_says(monkeypatch):
    waits, endpoint = [], object.__new__(language_model.Endpoint)
    endpoint.url, endpoint.key, endpoint._library = "https://h", "secret", SimpleNamespace(HTTPError=ZeroDivisionError)
    monkeypatch.setattr(language_model.time, "sleep", waits.append)

    async def post(text):
        return answers.pop(0)

    endpoint._post = post
    for status, headers, waited, told in (
        (503, {}, [0, 1, 2, 4], "status 503"),
        (429, {"Retry-After": "7"}, [0, 7, 7, 7], "status 429"),
        (500, {"Retry-After": "90"}, [0, 30, 30, 30], "status 500"),
        (302, {}, [0], "a redirect, which is not followed"),
        (401, {}, [0], "status 401"),
    ):
        answers = [(status, headers, b"")] * 4
        with pytest.raises(Missing, match=told):
            endpoint("text")
        assert waits == waited
        waits.clear()
    answers = [(503, {}, b""), (200, {}, json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode())]
    assert endpoint("text") == "yes" and waits == [0, 1]


def test_a_reply_that_repeats_the_key_in_escapes_is_not_stored(tmp_path):
    replies = language_model.Replies(tmp_path / "replies", lambda text: '["a \\u0073k-1 dog"]', 5, "sk-1")
    with pytest.raises(language_model.UnusableReply, match="repeats the key"):
        replies("text")
    assert "k-1" not in (tmp_path / "replies").read_text()


def test_escapes_of_a_reply_are_the_characters_that_they_stand_for():
    assert language_model._decode_escapes(r"a\/b \u0041\\ c") == "a/b A\\ c"


def test_a_key_does_not_travel_unencrypted(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    line = ["--llm-url", "http://example.org/v1", "--llm-model", "m", "--out", str(tmp_path / "x")]
    assert prompts.main(line) == 2 and "unencrypted" in (told := capsys.readouterr().err) and SECRET not in told


# Language models ------------------------------------------------------------------------------------------------------
GOOD = ["a small dog asleep on a wooden porch", "two black dogs run across a wet field"]


def reply_of(content):
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def good(handler):
    handler.answer(reply_of(json.dumps(GOOD)))


# name -> what the endpoint does; None where the run ends with exit code 3, else the reason that is counted
BAD = {
    "not JSON": (lambda h: h.answer(reply_of("Sure! Here you are.")), "the reply is not JSON"),
    "half of it": (lambda h: h.answer(reply_of(json.dumps(GOOD)[:40])), "the reply is not JSON"),
    "a number": (lambda h: h.answer(reply_of("17")), "the reply is not a JSON list"),
    "an object": (lambda h: h.answer(reply_of('{"a": 1}')), "the reply is not a JSON list"),
    "two lists": (lambda h: h.answer(reply_of('{"a": [], "b": []}')), "the reply is not a JSON list"),
    "nested deep": (lambda h: h.answer(reply_of("[" * 5000)), "the reply is not JSON"),
    "empty list": (lambda h: h.answer(reply_of("[]")), ""),
    "10 MB": (lambda h: h.answer(reply_of("x" * 10_000_000)), "the reply is longer than 1 MiB"),
    "numbers": (lambda h: h.answer(reply_of("[1, 2, null]")), "not a text"),
    "lists": (lambda h: h.answer(reply_of('[["a dog in a park at night"]]')), "not a text"),
    "wrong language": (lambda h: h.answer(reply_of('["ein kleiner Hund schläft auf der Veranda"]')), "does not name"),
    "class missing": (lambda h: h.answer(reply_of('["an empty porch in the evening light"]')), "does not name"),
    "too short": (lambda h: h.answer(reply_of('["a dog"]')), "too short or too long"),
    "too long": (lambda h: h.answer(reply_of(json.dumps(["dog " * 80]))), "too short or too long"),
    "a link": (lambda h: h.answer(reply_of('["a dog on a porch, see http://evil"]')), "holds marks"),
    "markup": (lambda h: h.answer(reply_of('["a dog <script>alert(1)</script> on a porch"]')), "holds marks"),
    "SQL": (lambda h: h.answer(reply_of('["a dog; DROP TABLE prompts on a porch"]')), "holds marks"),
    "a NUL": (lambda h: h.answer(reply_of('["a dog on a \\u0000 wooden porch"]')), "holds marks"),
    "bidi marks": (lambda h: h.answer(reply_of('["a dog on a \\u202e wooden porch"]')), "holds marks"),
    "line ends": (lambda h: h.answer(reply_of('["a dog on\\na wooden porch"]')), "holds marks"),
    "no choices": (lambda h: h.answer(b"{}"), "another form than OpenAI's"),
    "choices of numbers": (lambda h: h.answer(b'{"choices": [1]}'), "another form than OpenAI's"),
    "content of null": (lambda h: h.answer(reply_of(None)), "another form than OpenAI's"),
    "bad UTF-8": (lambda h: h.answer(b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'), "another form"),
    "other script": (lambda h: h.answer(reply_of('["a dog 狗在公园里玩耍的照片 on a porch"]')), "is not English"),
    "the key": (lambda h: h.answer(reply_of(json.dumps([f"a dog says {SECRET} on a porch"]))), "repeats the key"),
    "the key escaped": (lambda h: h.answer(reply_of(f'["a dog says {ESCAPED} on a porch"]')), "repeats the key"),
    "401": (lambda h: h.answer(f"wrong key {SECRET}".encode(), 401), None),
    "404": (lambda h: h.answer(b"", 404), None),
    "500 for ever": (lambda h: h.answer(b"", 500), None),
    "429 for ever": (lambda h: h.answer(b"", 429, {"Retry-After": "9999"}), None),
    "redirect": (lambda h: h.answer(b"", 302, {"Location": "http://127.0.0.1:9/v1"}), None),
    "slow body": (lambda h: h.drip(), None),
    "slow headers": (lambda h: h.drip(b"HTTP/1.1 200 OK\r\nX-A: "), None),
    "hang": (lambda h: h.server.ended.wait(600), None),
    "cut off": (lambda h: h.cut(), None),
    "not HTTP": (lambda h: h.wfile.write(b"\x00\x01 what\r\n\r\n"), None),
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.seen.append(
            (self.headers.get("Authorization"), self.rfile.read(int(self.headers["Content-Length"])))
        )
        self.server.behave(self)

    def answer(self, body, code=200, headers=()):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            pass

    def drip(self, first=b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"):
        self.wfile.write(first)
        try:
            while not self.server.ended.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()
        except OSError:
            pass

    def cut(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.seen, server.ended, server.behave = [], threading.Event(), good
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(language_model, "LONGEST_WAIT", 0.01)
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def line_for(server, out, count=2):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return [*("--set voc --classes dog --llm-model some --llm-requests 4".split()), "--llm-url", url] + [
        *("--per-class", str(count), "--out", str(out))
    ]


def test_prompts_of_an_endpoint_are_kept_and_the_same_line_runs_again_offline(endpoint, tmp_path, capsys):
    out = tmp_path / "list.jsonl"
    assert prompts.main(line_for(endpoint, out)) == 0
    first, asked = out.read_bytes(), len(endpoint.seen)
    assert [row["prompt"] for row in rows(out)] == GOOD and all(row["classes"] == ["dog"] for row in rows(out))
    assert endpoint.seen[0][0] == f"Bearer {SECRET}" and b"dog" in endpoint.seen[0][1]
    assert b"This is request 1 of its kind" in endpoint.seen[0][1]
    out.unlink()
    assert prompts.main(line_for(endpoint, out)) == 0
    assert out.read_bytes() == first and len(endpoint.seen) == asked
    assert SECRET not in capsys.readouterr().err
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_a_reply_half_written_by_a_killed_process_is_asked_for_again(endpoint, tmp_path):
    out = tmp_path / "list.jsonl"
    replies = tmp_path / "list.jsonl.replies"
    assert prompts.main([*line_for(endpoint, out), "--quiet"]) == 0
    first, whole = out.read_bytes(), replies.read_bytes()
    replies.write_bytes(whole[:-30])
    assert prompts.main([*line_for(endpoint, out), "--quiet"]) == 0
    assert out.read_bytes() == first
    assert replies.read_bytes() == whole
    assert prompts.main([*line_for(endpoint, out), "--quiet"]) == 0


@pytest.mark.parametrize("line", ["[]", "{", "7", '{"request": "a"}', '{"request": [], "reply": "", "problem": ""}'])
def test_a_file_of_replies_with_a_line_of_another_form_is_refused(tmp_path, line):
    (tmp_path / "list.replies").write_text(f"{line}\n")
    with pytest.raises(Refused, match="one of its lines is not a stored reply"):
        language_model.Replies(tmp_path / "list.replies", str, 1)


def test_a_reply_of_another_model_answers_no_request(tmp_path):
    """But those that an earlier version stored, which does not tell whose they are."""
    path, asked = tmp_path / "list.replies", []

    def ask(text):
        asked.append(text)
        return f"reply {len(asked)}"

    for model, reply in (("a", "reply 1"), ("a", "reply 1"), ("b", "reply 2"), ("a", "reply 1"), ("b", "reply 2")):
        assert language_model.Replies(path, ask, 1, model=model)("text") == reply
    assert len(asked) == 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(json.dumps({name: rows[0][name] for name in ("request", "reply", "problem")}) + "\n")
    assert language_model.Replies(path, ask, 1, model="c")("text") == "reply 1" and len(asked) == 2


@pytest.mark.parametrize(("size", "code"), [(2**20, 0), (2**20 + 1, 3)])
def test_a_reply_of_one_mib_is_read_and_no_longer_one(size, code, endpoint, tmp_path):
    endpoint.behave = lambda handler: handler.answer(reply_of(json.dumps(GOOD)).ljust(size))
    assert prompts.main(line_for(endpoint, tmp_path / "list")) == code


@pytest.mark.parametrize("name", BAD)
def test_a_bad_endpoint_ends_in_fewer_prompts_or_in_exit_code_3(name, endpoint, tmp_path, capsys, monkeypatch):
    behave, reason = BAD[name]
    if name in ("slow body", "slow headers", "hang"):
        monkeypatch.setattr(language_model, "SECONDS", 0.6)
    turns = []

    def first_bad_then_good(handler):
        turns.append(1)
        behave(handler) if reason is None or len(turns) == 1 else good(handler)

    endpoint.behave, out, start = first_bad_then_good, tmp_path / "list.jsonl", time.monotonic()
    code = prompts.main(line_for(endpoint, out, count=3))
    seen = capsys.readouterr()
    assert time.monotonic() - start < 60
    assert "Traceback" not in seen.err and SECRET not in seen.err + seen.out
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    if reason is None:
        assert code == 3 and not out.exists() and "--llm-url http://127.0.0.1" in seen.err
    else:
        assert code == 0 and {row["prompt"] for row in rows(out)} >= set(GOOD)
        assert reason in seen.out


def test_where_no_prompt_of_an_endpoint_can_be_used_the_reasons_are_told(tmp_path, monkeypatch, capsys):
    rejected = Counter({"it is too short": 3, "it holds marks": 2, "it names no class": 1, "a fourth": 1})
    monkeypatch.setattr(prompts.language_model, "collect_sentences", lambda *_: ([], rejected))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    line = ["--classes", "owl", "--llm-url", "http://127.0.0.1/v1", "--llm-model", "m", "--out", str(tmp_path / "list")]
    assert prompts.main([*line, "--quiet"]) == 3
    told = capsys.readouterr().err.splitlines()[0]
    assert told.endswith("came back: it is too short (3), it holds marks (2), it names no class (1)")
    assert not (tmp_path / "list").exists()


def test_the_statistics_of_a_list_are_one_object_on_stdout(tmp_path, capsys):
    assert prompts.main(["--classes", "cat,owl", "--per-class", "3", "--out", str(tmp_path / "list"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["asked_for"], told["left_out"]) == (str(tmp_path / "list"), 6, {})
    assert told["near_duplicates"] == 0


def test_a_prompt_that_names_another_class_of_the_list_is_left_out():
    assert (
        language_model.rejection_reason("a dog and a cat on a porch", ("dog",), ("dog", "cat"), ())
        == "names another class"
    )
    assert language_model.rejection_reason("a dog and a cat on a porch", ("dog", "cat"), ("dog", "cat"), ()) == ""
    assert (
        language_model.rejection_reason("A dog  on a porch", ("dog",), ("dog",), ["a dog on a porch"])
        == "is there twice"
    )


def test_the_number_of_requests_is_bounded_with_those_of_the_file(endpoint, tmp_path, capsys):
    endpoint.behave = lambda h: h.answer(reply_of(json.dumps([f"a dog on porch {len(endpoint.seen)} at night"])))
    for _ in range(2):
        assert prompts.main(line_for(endpoint, tmp_path / "list", count=50)) == 0
        assert len(endpoint.seen) == 4 and len(rows(tmp_path / "list")) == 4


def test_words_of_an_own_table_name_the_class_to_a_language_model(endpoint, tmp_path):
    table, out = tmp_path / "own.csv", tmp_path / "list"
    table.write_text("name,say,words\nc1,lorry,juggernaut\nc2,cat,\n")
    endpoint.behave = lambda h: h.answer(reply_of('["a juggernaut on a bridge at night", "a cat on a lorry at night"]'))
    line = [*line_for(endpoint, out, count=1)[4:], "--class-table", str(table), "--classes", "c1"]
    assert prompts.main(line) == 0
    assert b"lorry" in endpoint.seen[0][1] and rows(out)[0]["prompt"] == "a juggernaut on a bridge at night"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks5://user:secret@proxy.invalid:1080"),
        ("HTTPS_PROXY", "foo://user:secret@proxy.invalid"),
        ("HTTPS_PROXY", "http://user:secret@proxy.invalid:x"),
        ("SSL_CERT_FILE", "/none/of/these.pem"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_before_a_request(monkeypatch, variable, value):
    monkeypatch.setitem(sys.modules, "socksio", None)  # which SOCKS needs
    monkeypatch.setenv(variable, value)
    with pytest.raises(Missing, match="proxy or certificates") as raised:
        language_model.Endpoint("https://model.invalid/v1", "model", "")
    assert "secret" not in str(raised.value)
    language_model.Endpoint("http://127.0.0.1:1/v1", "model", "")  # which no proxy serves


def test_what_is_meant_for_this_machine_goes_through_no_proxy(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert prompts.main([*line_for(endpoint, tmp_path / "list"), "--quiet"]) == 0


def test_killed_and_started_again_the_command_writes_the_same_list(endpoint, tmp_path):
    """The endpoint answers slowly; the command is killed in between and finds the first replies in its file."""
    out = tmp_path / "list.jsonl"
    turns, killed = [], threading.Event()

    def slow(handler):
        turns.append(1)
        if len(turns) == 2:
            killed.wait(60)
        handler.answer(reply_of(json.dumps([f"a dog number {len(turns)} on a porch at night"])))

    endpoint.behave = slow
    command = [sys.executable, "-m", "datasetdm_fast.prompts", *line_for(endpoint, out, count=3)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(turns) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    killed.set()
    assert not out.exists()
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert rows(out)[0]["prompt"] == "a dog number 1 on a porch at night" and len(rows(out)) == 3


def test_without_the_library_an_endpoint_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    line = ["--llm-url", "https://host/v1", "--llm-model", "m", "--out", str(tmp_path / "list")]
    assert prompts.main(line) == 3
    assert (
        "--llm-url: httpx2 is not installed\nInstall it with: pip install 'datasetdm-fast[prompts]'."
        in capsys.readouterr().err
    )
