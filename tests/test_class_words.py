"""The class tables, and which classes a text names."""

import re
import time
import unicodedata
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from stub_engine import Tokenizer

from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.class_tables import (
    always_named,
    count_named,
    find_classes,
    mirrored_names,
    mirrored_text,
    plural,
    token_places,
    with_article,
)
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.prompt_files import LARGEST_TABLE, own_table

pytestmark = pytest.mark.core

SENTENCES = [
    [cell.strip() for cell in line.split("|")]
    for line in Path(__file__).with_name("class_sentences.txt").read_text().splitlines()
    if not line.startswith("#")
]


def names_of(name):
    return tuple(word for word in class_tables.builtin_table(name).names if word != "background")


@pytest.mark.parametrize(
    "name, count",
    [("voc", 21), ("coco", 81), ("cityscapes", 19), ("deepfashion", 24), ("demo", 9)],
)
def test_a_table_numbers_its_classes_without_a_gap_and_colours_each(name, count):
    classes = class_tables.builtin_table(name).classes
    assert [word.number for word in classes] == list(range(count))
    colours = [word.colour for word in classes]
    assert all(colours) and len(set(colours)) == count


# Names in the order of their numbers and colours as they were published: by cityscapesScripts (train ids), panopticapi
# (of the 80 things), VOC's development kit and DeepFashion-MultiModal.
PUBLISHED = {
    "cityscapes": (
        "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, "
        "rider, car, truck, bus, train, motorcycle, bicycle",
        "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 "
        "003c64 005064 0000e6 770b20",
    ),
    "coco": (
        "background, person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire "
        "hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, "
        "backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
        "baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, "
        "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, "
        "bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
        "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush",
        "000000 dc143c 770b20 00008e 0000e6 6a00e4 003c64 005064 000046 0000c0 faaa1e 64aa1e dcdc00 af74af fa001e "
        "a52a2a ff4dff 00e2fc b6b6ff 005200 78a69d 6e4c00 ae39ff c76400 480076 ffb3f0 007d5c d10097 bcd0b6 00dcb0 "
        "ff63a4 5c0049 8581ff 4eb4ff 00e400 aefff3 2d59ff 868667 9194ae ffd0ba c5e2ff ab8601 6d3f36 cf8aff 97005f "
        "09503d 546933 4a4169 a6c466 d0c3d2 ff6d41 008f95 b300c2 d1636a 057900 e3ffcd 93bad0 994501 035fa1 a3ff00 "
        "7700aa 00b6c7 00a578 b78258 5f2000 827287 6e8185 a64a76 db8eb9 4fd272 b25a3e 41460f 7fa773 3b696a 8e6c2d "
        "c4ac00 5f3650 804cff c93901 f6007a bfa2d0",
    ),
    "voc": (
        "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, "
        "motorbike, person, pottedplant, sheep, sofa, train, tvmonitor",
        "",
    ),
    "deepfashion": (
        "background, top, outer, skirt, dress, pants, leggings, headwear, eyeglass, neckwear, belt, footwear, bag, "
        "hair, face, skin, ring, wrist wearing, socks, gloves, necklace, rompers, earrings, tie",
        "000000 fffafa dcdcdc faebd7 fffacd d3d3d3 4682b4 7fffd4 006400 32cd32 ffff00 f5deb3 ff8c00 ff0000 104e8b "
        "90ee90 32cdae 329bfa a08c58 d58c58 5a8c5a b9d2cd 82a5b4 e18d97",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_table_has_the_numbers_and_colours_that_were_published(name):
    classes, (names, colours) = class_tables.builtin_table(name).classes, PUBLISHED[name]
    assert [word.name for word in classes] == names.split(", ")
    if colours:  # those of VOC follow a rule
        assert [bytes(word.colour).hex() for word in classes] == colours.split()


def test_voc_has_the_colours_of_its_palette_rule():
    """Bits of the class number, lowest first, become the high bits of red, green and blue in turn."""
    for word in class_tables.builtin_table("voc").classes:
        colour = [sum((word.number >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)]
        assert word.colour == tuple(colour), word.name


def test_the_table_of_the_demo_world_has_its_classes():
    assert class_tables.builtin_table("demo").names == world.CLASSES


def test_most_sentences_name_their_classes():
    missed = [text for name, classes, text in SENTENCES if not wanted(classes) <= found(name, text)]
    wrong = [text for name, classes, text in SENTENCES if found(name, text) - wanted(classes)]
    assert len(SENTENCES) >= 200
    assert len(missed) <= 0.03 * len(SENTENCES), missed
    assert len(wrong) <= 0.04 * len(SENTENCES), wrong


def wanted(classes):
    return set(filter(None, classes.split(",")))


def found(name, text):
    return set(find_classes(text, names_of(name)))


@pytest.mark.parametrize(
    "text, classes, named",
    [
        ("a potted plant on a dining table", ("pottedplant", "diningtable"), ("pottedplant", "diningtable")),
        ("an aerosol can", ("aerosol_can",), ("aerosol_can",)),
        ("a bow and an arrow", ("bow_(weapon)",), ("bow_(weapon)",)),
        ("a woman with a dog", ("person", "dog"), ("person", "dog")),
        ("a woman with a dog", ("woman", "person"), ("woman",)),  # a class of that name goes before a synonym
        ("a hot dog", ("dog",), ()),
        ("a hot dog", ("dog", "sofa"), ()),
        ("a hot dog", ("dog", "hot dog"), ("hot dog",)),
        ("FIRE-HYDRANTS", ("fire hydrant",), ("fire hydrant",)),
        ("two wineglasses", ("wine glass",), ("wine glass",)),
        ("glasses of wine", ("wine glass",), ("wine glass",)),
        ("two fruitbaskets", ("fruit basket",), ("fruit basket",)),  # of which no table lists this form
        ("three policemen", ("person", "car"), ("person",)),
        (
            "two wolves beside bookshelves and loaves",
            ("wolf", "shelf", "bookshelf", "loaf"),
            ("wolf", "bookshelf", "loaf"),
        ),
        ("teeth and toothbrushes", ("tooth", "toothbrush"), ("tooth", "toothbrush")),
        ("a dog's breakfast", ("dog",), ("dog",)),
        ("catalogue", ("cat",), ()),
        ("an orange car, an orange", ("orange", "car"), ("orange", "car")),
        ("an orange car", ("orange", "car"), ("car",)),
        ("", ("cat",), ()),
        ("a cat", (), ()),
    ],
)
def test_what_a_text_names(text, classes, named):
    assert find_classes(text, classes) == named


def test_an_accent_may_be_a_character_of_its_own():
    """As in text that comes from file names of macOS."""
    for text, name in product(("eine Möwe", unicodedata.normalize("NFD", "eine Möwe")), ("NFC", "NFD")):
        own = unicodedata.normalize(name, "Möwe")
        assert find_classes(text, (own,)) == (own,)
        assert token_places(text, (own,), Tokenizer(), 77) == {own: (2,)}


def test_a_plural_is_spelled_as_people_do():
    nouns = ("wolf", "potato", "housewife", "roof", "piano", "bookshelf")
    assert [plural(noun) for noun in nouns] == ["wolves", "potatoes", "housewives", "roofs", "pianos", "bookshelves"]


def test_things_are_counted_where_a_text_says_how_many():
    def count(text):
        return count_named(text, ("ball", "cube", "cone", "cat"))

    counts = {"ball": 3, "cube": 12, "cone": 1, "cat": 10}
    assert count("three red balls, 12 cubes and a cone beside ten cats") == counts
    assert count("a ball and two blue balls") == {"ball": 3} and count("the ball and a cube") == {"cube": 1}
    assert count("a ball and the balls") == {}  # of some it does not say so
    assert count("a cat chasing two balls") == {"cat": 1, "ball": 2} and count("a cat chasing balls") == {"cat": 1}
    assert count("a woman holding two balls") == {"ball": 2} and count("two cats in one cube") == {"cat": 2, "cube": 1}
    assert count("a two tone cube") == {"cube": 1} and count("a cat cube") == {"cat": 1, "cube": 1}
    assert count("two cats watching one cube") == {"cat": 2, "cube": 1} and count("a few red balls") == {}
    assert count("one boy holding balls") == {}
    assert count("a big round shiny ball") == {"ball": 1} and count("a big round shiny old ball") == {}


@pytest.mark.parametrize(
    "prompt, counted",
    [
        ("a baby girl beside a dog", {"person": 1, "dog": 1}),
        ("two baby girls", {"person": 2}),
        ("a few baby girls", {}),
        ("a boy, a girl", {"person": 2}),
        ("a baby's mother", {}),
        ("a couple on a beach with a dog", {"dog": 1}),
        ("a family of ducks", {}),
        ("two families", {}),
        ("a crowd", {}),
        ("a pair of birds and a bird", {}),
    ],
)
def test_two_words_may_name_one_thing_and_one_word_several(prompt, counted):
    assert count_named(prompt, ("person", "dog", "bird")) == counted


def test_an_article_is_that_of_the_sound_and_plurals_end_as_people_write_them():
    some = ("apple", "unicorn", "hourglass", "SUV", "European car", "one-way sign", "x-ray", "umbrella", "used car")
    assert [with_article(noun).split()[0] for noun in some] == "an a an an a a an an a".split()
    assert with_article("Apple") == "an Apple"
    for noun in ("urinal", "utensil", "utility pole", "ukulele", "UFO"):
        assert with_article(noun) == f"a {noun}"
    assert with_article("urn") == "an urn"
    plurals = {"glass of wine": "glasses of wine", "police officer": "police officers", "man": "men", "box": "boxes"}
    plurals |= {"church": "churches", "dish": "dishes", "bus": "buses", "waltz": "waltzes", "baby": "babies"}
    plurals |= {"ottoman": "ottomans", "mongoose": "mongooses", "German": "Germans", "goose": "geese"}
    plurals |= {"toy": "toys", "human": "humans", "fireman": "firemen", "child in a car": "children in a car"}
    assert {noun: plural(noun) for noun in plurals} == plurals


@pytest.mark.parametrize("name", class_tables.TABLES)
def test_a_class_that_ends_a_prompt_is_found_where_longer_phrases_begin_with_it(name):
    table = class_tables.builtin_table(name)
    for word in table.classes[1:] if table.names[0] == "background" else table.classes:
        assert word.name in find_classes(f"a photo of a {word.spoken}", table.names)


def test_an_orange_is_a_fruit_before_a_word_that_ends_its_phrase():
    ends = "on in at by of near beside behind under over above below between inside into onto from to with without "
    ends += "and or next is are was were sits lies stands hangs resting lying sitting standing hanging against around"
    lacking = [end for end in ends.split() if not find_classes(f"an orange {end} the table", ("orange",))]
    assert not lacking and find_classes("an orange table", ("orange",)) == ()


def test_classes_are_found_in_their_order_and_read_once_however_many_there_are():
    class Names(list):
        times = 0

        def __iter__(self):
            self.times += 1
            return super().__iter__()

    names = Names(["cube", "ball", "mouse", "cube"])
    assert find_classes("mice and a ball on a cube", names) == ("cube", "ball", "mouse")
    names.times = 0
    assert find_classes("a mouse", names) == ("mouse",) and names.times == 1  # of 13,000 it took 5 ms a prompt


def test_an_own_table_goes_before_ours():
    own = class_tables.parse("name,say,words\nvehicle,,car | lorry\ncat,house cat,\n,,toy car\n")
    assert own.other == ("toy car",)
    assert find_classes("lorries beside a toy car", ("vehicle", "cat"), own) == ("vehicle",)
    assert find_classes("a toy car", ("vehicle",), own) == ()
    assert find_classes("a house cat", ("cat",), own) == ("cat",)
    shared = class_tables.parse("name,words\ncup,mug\nglass,mug\n")  # of two classes the first has a word
    assert [find_classes("a mug", names, shared) for names in (("cup", "glass"), ("glass", "cup"))] == [
        ("cup",),
        ("glass",),
    ]


def test_a_class_is_always_named_that_no_caption_leaves_out_where_it_is_shown():
    seen = [(("ball",), "a ball"), (("ball", "cube"), "a ball"), ((), "a cone")]
    assert always_named(("cube", "ball", "cone"), seen) == ("ball", "cone")
    own = class_tables.ClassTable((class_tables.ClassWord("ball", "ball", ("orb",)),))
    assert always_named(("ball",), [(("ball",), "a blue orb")]) == ()
    assert always_named(("ball",), [(("ball",), "a blue orb")], own) == ("ball",), "in a word of the user's table"


def test_a_table_that_is_not_there_is_bad_input(tmp_path):
    (tmp_path / "table.csv").write_text("name\ncat\n")
    for path, why in ((tmp_path / "tabel.csv", r"no such file \(did you mean table.csv\?\)"), (tmp_path, "not a file")):
        with pytest.raises(Refused, match=f"--class-table .*: {why}"):
            own_table(str(path))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("own.csv", b"name\n" + b"x" * LARGEST_TABLE, "larger than|bytes"),
        ("own.json", b'{"categories": [', "not readable as JSON"),
        ("own.json", b"[]", "JSON"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_the_flag(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=f"(?s)^--class-table: {tmp_path}/{name}: .*{why}"):
        own_table(str(tmp_path / name))


def test_a_table_in_another_encoding_is_told_so(tmp_path):
    (tmp_path / "own.csv").write_bytes("name\nBär\n".encode("latin-1"))
    with pytest.raises(Refused, match="own.csv: not UTF-8 at byte 6"):
        own_table(str(tmp_path / "own.csv"))


@pytest.mark.parametrize(
    "text, why",
    [
        ("class,words\ncat,kitten\n", "the first line must name columns out of number, name, say"),
        ("name,words\ncat\n", "line 2 has another number of cells"),
        ("number,name\nx,cat\n", "line 2: the number of a class is 'x'"),
        ("name,colour\ncat,1 2\n", "line 2: a colour is three numbers"),
        ("name,colour\ncat,1 2 256\n", "line 2: a colour is three numbers"),
        ("name\ncat\ncat\n", "the name 'cat' occurs twice"),
        ("number,name\n1,cat\n1,dog\n", "the number 1 occurs twice"),
    ],
)
def test_a_bad_table_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        class_tables.parse(text)


def test_the_classes_of_an_annotation_file_have_its_synonyms_as_words():
    rows = [
        {"id": 3, "name": "bow_(weapon)", "synonyms": ["bow", "long_bow", "long_bow"]},
        {"id": "4", "name": " cat "},
    ]
    found = class_tables.of_categories(rows).classes
    bow = class_tables.ClassWord("bow_(weapon)", "bow", ("long bow",), 3)
    assert found == (bow, class_tables.ClassWord("cat", "cat"))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"id": 3}, "a category has no name"),
        ({"name": " "}, "a category has no name"),
        ("cat", "a category has no name"),
        ({"name": "cat", "synonyms": "tom"}, "the synonyms of 'cat' are no list of words"),
        ({"name": "cat", "synonyms": [3]}, "the synonyms of 'cat' are no list of words"),
    ],
)
def test_categories_of_another_form_are_refused(row, why):
    with pytest.raises(ValueError, match=why):
        class_tables.of_categories([{"name": "dog"}, row])


@pytest.mark.parametrize(("colour", "is_read"), [([], True), ([1, 2, 3], True), ([1, 2], False), ([1, 2, 3, 4], False)])
def test_a_colour_of_a_stored_table_is_three_numbers(colour, is_read):
    rows = [{"name": "cat", "say": "cat", "words": [], "colour": colour}]
    if is_read:
        assert class_tables.of_rows(rows).classes[0].colour == (tuple(colour) or None)
    else:
        with pytest.raises(ValueError, match="class_table: the colour of 'cat' is not three numbers"):
            class_tables.of_rows(rows)


def test_a_class_is_said_as_a_person_says_it():
    assert class_tables.spoken(["diningtable", "flip-flop_(sandal)"]) == ["dining table", "flip-flop"]
    assert class_tables.spoken(names_of("voc"))[-1] == "television"
    assert class_tables.spoken(world.CLASSES) == list(world.CLASSES)


def test_a_thousand_classes_are_matched_in_less_time_than_one_by_one():
    named = names_of("coco")
    many = tuple(f"thing_{k}_(kind)" for k in range(1123)) + named
    text = "a photo of a man and his border collie on a wooden bench beside a fire hydrant in a busy street at night"
    seconds = {classes: [] for classes in (named, many)}
    for classes in (named, many) * 100:
        start = time.perf_counter()
        assert find_classes(text, classes) == ("person", "fire hydrant", "bench", "dog")
        seconds[classes].append(time.perf_counter() - start)
    assert min(seconds[many]) < 8 * min(seconds[named])  # fifteen times as many


def test_words_are_of_the_table_that_holds_most_of_the_names():
    """A ring of the demo world is a hoop, one of DeepFashion's is not."""
    for others, found in (("ball", "cube"), ("ring",)), (("skirt", "dress"), ()):
        assert find_classes("a hoop", (*others, "ring")) == found


def test_two_words_may_be_written_as_one_and_three_may_not():
    assert find_classes("a wineglass and a hotairballoon", ("wine glass", "hot air balloon")) == ("wine glass",)


def test_numbers_of_a_table_have_five_digits_at_most_and_accents_may_be_stored_in_two_ways():
    (word,) = class_tables.parse("name,number\ncat,65535\n").classes
    assert word.number == 65535
    with pytest.raises(ValueError, match="line 2: the number of a class is '100000'"):
        class_tables.parse("name,number\ncat,100000\n")
    own = class_tables.parse("name,say,colour\nMöwe,gull,1 2 3\n")
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "MÖWE")
        assert class_tables.spoken([name], own) == ["gull"] and own.colour(name) == (1, 2, 3)


def test_a_stored_table_has_its_classes_and_its_phrases_of_no_class():
    own = class_tables.parse("name,say,words\ncat,house cat,tom\n,,cat fish | copy cat\n")
    again = class_tables.of_rows(class_tables.rows_of(own, ("cat",)))
    assert (again.classes, again.other) == (own.classes, ("cat fish", "copy cat")) and again.names == ("cat",)
    texts = ("name,say,words\ncat,house cat,tom\n,,cat fish\n", "name,say,words\ncat,cat,tom\n,,cat fish | copy cat\n")
    more = "name,say,words,colour\ndog,dog,,\ncat,house cat,tom,1 2 3\n,,cat fish | copy cat,\n"
    first, *others, same = (
        class_tables.digest_of(table, ("cat",)) for table in (own, *(class_tables.parse(x) for x in (*texts, more)))
    )
    assert first not in others and first == same and re.fullmatch("sha256:[0-9a-f]{64}", first)
    kept = class_tables.of_words(class_tables.words_of(own, ("cat", "dog")))
    assert (kept.classes, kept.other) == (own.classes, own.other)


def test_texts_in_a_mirror_name_the_other_side_of_their_classes_alone():
    sides = ("lefthand", "righthand", "wall")
    assert mirrored_text("a lefthand on the right of a wall", sides) == "a righthand on the right of a wall"
    assert mirrored_text("a wall on the left", sides) == "a wall on the left"
    assert mirrored_text("an l_eye and a large L_Eye", ("l_eye", "r_eye")) == "an r_eye and a large R_Eye"
    letters = ("kneeL", "kneeR", "bright_L", "bright_R")
    assert mirrored_text("a kneel, a kneeL, a bright_L", letters) == "a kneer, a kneeR, a bright_R"
    words = (("l_eye", ("orb", "left orb")), ("r_eye", ()))
    own = class_tables.ClassTable(tuple(class_tables.ClassWord(name, name, more) for name, more in words))
    assert mirrored_text("an orb, a left orb", ("l_eye", "r_eye"), own) == "an orb, a right orb"
    spaced = ("left hand", "right hand")
    assert mirrored_text("a RIGHT hand and left hands", spaced) == "a LEFT hand and right hands"
    longer = "İ a hand left of it"  # whose lower case has one character more
    assert mirrored_text(longer, ("hand left", "hand right")) == "İ a hand right of it"
    decomposed = unicodedata.normalize("NFD", "a hand left of a café")
    assert mirrored_text(decomposed, ("hand left", "hand right")) == decomposed
    assert mirrored_names(("left", "right", "Left", "wall")) == [1, 0, 2, 3]


def test_a_word_that_a_tokenizer_cuts_off_has_no_place_behind_it():
    """In Stable Diffusion 3 the tokens of T5 follow those of CLIP."""
    tokenizer = Tokenizer()
    tokenizer.model_max_length = 7
    assert token_places("a dog in a big dog", ("dog",), tokenizer, 20) == {"dog": (2, 6)}
    tokenizer.longer = Tokenizer()
    assert token_places("a dog in a dog dog dog", ("dog",), tokenizer, 20) == {"dog": (2, 5)}


def test_other_classes_of_a_table_take_no_second_look_at_its_phrases(monkeypatch):
    """10,000 prompts that name other classes of COCO took two minutes before the first image."""
    class_tables.ClassMatcher(("dog", "person"))
    marks = class_tables.find_marks("two people")
    monkeypatch.setattr(class_tables, "find_marks", {"two people": marks}.__getitem__)
    assert class_tables.ClassMatcher(("person", "dog")).spans("two people") == {"person": [(4, 10)]}
    assert class_tables.look_up.cache_info().maxsize  # a service is asked for any words


def test_places_of_a_word_follow_what_stands_before_it():
    tokenizer = SimpleNamespace(model_max_length=77)  # a token each character, between two marks
    tokenizer.spans = lambda text: [(0, 0), *((at, at + 1) for at in range(len(text))), (0, 0)]
    assert token_places("a cat's ball", ("cat", "ball"), tokenizer, 77) == {"cat": (3, 4, 5), "ball": (9, 10, 11, 12)}
    assert token_places("a cat's ball", ("cat", "ball"), tokenizer, 11) == {"cat": (3, 4, 5), "ball": (9, 10)}
    assert token_places("a cat's ball", ("ball",), tokenizer, 9) == {}
    tokenizer.spans = lambda text: [(at - 4, at - 2) for at in range(0, 24, 2)]  # two characters, behind four others
    assert token_places("a cat's ball, cats", ("cat", "ball"), tokenizer, 77) == {"cat": (3, 4, 9, 10), "ball": (6, 7)}
    decomposed = unicodedata.normalize("NFD", "é é é é cat")
    assert token_places(decomposed, ("cat",), tokenizer, 77) == {"cat": (6, 7)}
    assert token_places("İİİİ cat", ("cat",), tokenizer, 77) == {"cat": (4, 5)}  # longer in lower case
