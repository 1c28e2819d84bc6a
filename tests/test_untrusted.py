"""Each guard of untrusted.py: what it lets through, and what it refuses before anything else reads it."""

import json
import math
import os
import struct
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from proofs import external, message, onnx_model

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.label_files import image_bytes
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import documents, images, onnx_graph
from datasetdm_fast.untrusted.tensors import check_safetensors

pytestmark = pytest.mark.core


@pytest.fixture
def file(tmp_path):
    def write(content: bytes | str, name: str = "file"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refused(call, *arguments, match: str, **options) -> None:
    with pytest.raises(Refused, match=match) as stop:
        call(*arguments, **options)
    assert stop.value.remedy and "\n" not in stop.value.cause and stop.value.cause.isprintable()


def test_only_plain_relative_names_lead_inside():
    for name in ("a", "images/00000001.png", "a b/ü.txt", "..a"):
        assert documents.check_inside(name) == name
    for name in ("", "/a", "../a", "a/../b", "a\0b", "a\nb", "c:x", "a\\b", "x" * 2000, None, 3):
        with pytest.raises(ValueError):
            documents.check_inside(name)


def test_what_is_shown_cannot_steer_a_terminal():
    assert (
        documents.quote("a\x1b[2J\u202e") == "'a\\x1b[2J\\u202e'"
        and documents.one_line("a\x1b\nb \u202e") == "a\\x1b b \\u202e"
    )
    assert len(documents.one_line("x" * 10_000)) == 400 and len(documents.quote("x" * 10_000)) == 80
    assert documents.one_line("ein Bällchen 🎈") == "ein Bällchen 🎈"
    assert documents.reason_of(ValueError("x\n" * 500)) == ("x " * 80)


def test_files_that_never_end_are_not_begun(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        refused(storage.read, path, 100, match="not a regular file")
    (tmp_path / "large").write_bytes(bytes(101))
    refused(storage.read, tmp_path / "large", 100, match="101 bytes, at most 100")
    with pytest.raises(Missing, match="none"):
        storage.read(tmp_path / "none", 100)


# JSON, YAML, XML ------------------------------------------------------------------------------------------------------


def test_json_is_read_whole_or_not(file):
    assert documents.read_object(file('\ufeff{"a": [1, 2.5, null, "é"]}')) == {"a": [1, 2.5, None, "é"]}
    assert documents.read_object(file("{}")) == {}
    assert documents.read_object(file('{"a": -Infinity, "b": 1e999}')) == {"a": -math.inf, "b": math.inf}
    for content, word in (
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": NaN}', "NaN"),
        ("[" * 33 + "]" * 33, "nested"),
        ("[" * 100_000, "not readable"),
        ("[" + "9" * 5000 + "]", "not readable"),
        (b"\xff", "not readable"),
        ('{"a": 1', "not readable"),
    ):
        refused(documents.read_object, file(content), match=word)
    refused(documents.read_object, file("[]"), match="expected an object")
    long = '{"a": [' + "0," * 600_000 + "0]}"
    refused(documents.read_object, file(long), match="at most")
    assert len(documents.read_object(file(long), most=2**21)["a"]) == 600_001


def test_forms():
    documents.check_form(
        {"a": [1], "b": 2.5, "c": True, "d": "x", "more": None}, {"a": [int], "b": float, "c": bool, "d": str}
    )
    documents.check_form({"b": 2}, {"b": float})
    for value, form, word in (
        ({"a": True}, {"a": int}, "a is True, expected a whole number"),
        ({"a": float("nan")}, {"a": float}, "expected a number"),
        ({"a": [1, "x"]}, {"a": [int]}, r"a\[1\] is 'x', expected a whole number"),
        ({}, {"a": {"b": str}}, "a is missing"),
        ({"a": {}}, {"a": {"b": str}}, "a.b is missing"),
        ([], {"a": str}, r"it is \[\], expected an object"),
        ("x", [str], "expected a list"),
        (1, bool, "expected true or false"),
    ):
        with pytest.raises(ValueError, match=word):
            documents.check_form(value, form)


def test_yaml_holds_plain_values(file):
    assert documents.read_yaml(file("a: 1\nb: [x, y]\nc: {d: 2.5}\n")) == {"a": 1, "b": ["x", "y"], "c": {"d": 2.5}}
    assert documents.read_yaml(file("# nothing\n")) is None
    for content, word in (
        ("a: &x 1", "anchors"),
        ("a: *x", "anchors"),
        ("a: !!python/object/apply:os.system [ls]", "tags"),
        ("a: !!str 1", "tags"),
        ("a: " + "[" * 40 + "]" * 40, "nested"),
        ("a: 2001-99-99", "not valid YAML"),
        ("a: [", "at line 1"),
        (b"\xff\xfe", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("x" * 70_000, "at most"),
    ):
        refused(documents.read_yaml, file(content), match=word)


def test_xml_declares_nothing(file):
    root = documents.read_xml(
        file('<?xml version="1.0"?><annotation><object id="3">cat &amp; dog</object><object/></annotation>')
    )
    assert [element.text for element in root.iter("object")] == ["cat & dog", None] and root[0].attrib == {"id": "3"}
    for content, word in (
        ("<!DOCTYPE a><a/>", "document type"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "document type"),
        ('<!DOCTYPE a SYSTEM "http://127.0.0.1/x.dtd"><a/>', "document type"),
        ("<a>&b;</a>", "not readable"),
        ("<a>" * 40 + "</a>" * 40, "nested"),
        ("<a><b></a>", "not readable"),
        ("", "not readable"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "not readable"),
        ("<a>" + "x" * 2**20 + "</a>", "at most"),
    ):
        refused(documents.read_xml, file(content), match=word)


# Images and archives --------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def test_images_are_whole_and_of_a_known_size(file, tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    assert (np.array(images.read_image(tmp_path / "a.png")) == pixels).all() and images.read_image(
        tmp_path / "a.jpg"
    ).size == (4, 4)
    Image.fromarray(pixels).save(tmp_path / "b.png", save_all=True, append_images=[Image.fromarray(255 - pixels)])
    whole = (tmp_path / "a.png").read_bytes()
    assert images.sides_of(tmp_path / "a.jpg") == (4, 4)
    for name in ("a.gif", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(Refused, match=f"{name}: not a complete image"):
            images.sides_of(tmp_path / name)
    for content, word in (
        ((tmp_path / "a.gif").read_bytes(), "neither a PNG nor a JPEG"),
        ((tmp_path / "b.png").read_bytes(), "file: it is an animation"),
        (png(5000, 5000, chunk(b"IDAT", zlib.compress(b"\0"))), "file: 5000 x 5000 pixels, at most 16,777,216 are"),
        (
            png(
                4,
                4,
                chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(30_000_000))),
                chunk(b"IDAT", zlib.compress(bytes(20))),
            ),
            "not a complete image",
        ),
        (whole[:-20], "not a complete image"),
        (whole[:30], "not a complete image"),
        (b"", "empty"),
        ((tmp_path / "a.jpg").read_bytes()[:-40], "not a complete image"),
    ):
        refused(images.read_image, file(content), match=word)
    refused(images.read_image, tmp_path / "a.png", most_pixels=15, match="at most 15")


def test_pictures_of_very_many_parts_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.linear_gradient("L").save(tmp_path / "a.jpg", progressive=True)
    whole = (tmp_path / "a.jpg").read_bytes()
    last = whole[whole.rindex(b"\xff\xda") : -2]  # a scan, which a decoder takes as often as it comes
    scans = whole.count(b"\xff\xda")
    images.decode_image(whole[:-2] + last * (images.MOST_SCANS - scans) + b"\xff\xd9\0\0" + last * 200, "a.jpg")
    Image.effect_noise((400, 400), 100).save(tmp_path / "b.jpg", quality=95)
    images.decode_image((tmp_path / "b.jpg").read_bytes(), "b.jpg")  # of a scan with more bytes than may be between
    empty, thumbnail = b"\xff\xfe\0\2", b"\xff\xe1\xff\xff" + (last + b"\xff\xd9").ljust(65533, b"a")
    hostile = {
        "scans.jpg": whole[:-2] + last * (images.MOST_SCANS - scans + 1) + b"\xff\xd9",
        "hidden.jpg": whole[:2] + thumbnail + whole[2:-2] + b"\xff" + last * images.MOST_SCANS + b"\xff\xd9",
        "segments.jpg": whole[:2] + empty * images.MOST_PARTS + whole[2:],
        "chunks.png": png(4, 4, *[chunk(b"prVt", b"")] * images.MOST_PARTS, chunk(b"IDAT", zlib.compress(bytes(20)))),
    }
    fill, head = b"\xff" * (images.MOST_PARTS + 2), whole[:20]  # which may stand before a marker
    hostile |= {
        "fill.jpg": head + fill + whole[20:],
        "filled.jpg": head + fill,
        "ended.jpg": head + b"\xff\xd9" + fill,
    }
    for name in ("JpegImagePlugin.jpeg_factory", "PngImagePlugin.PngImageFile"):
        monkeypatch.setattr(f"PIL.{name}", None)
    for name, data in hostile.items():
        refused(images.decode_image, data, name, match=f"{name}: not a complete image .*more than 65536")


def test_reading_an_image_has_no_warning_of_a_program_shown_again(tmp_path, monkeypatch):
    """Python shows each again once a filter changes; and threads that change filters undo each other's."""
    Image.linear_gradient("L").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            warnings.warn("of the program", stacklevel=1)
            images.read_image(tmp_path / "a.png")
            assert images.sides_of(tmp_path / "a.png") == (256, 256)
    assert len(shown) == 1


def test_a_photo_with_others_behind_it_is_its_first_one(tmp_path):
    pixels = np.linspace(0, 255, 48 * 48 * 3).reshape(48, 48, 3).astype(np.uint8)
    first, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[other])
    for found in (
        images.read_image(tmp_path / "phone.jpg"),
        images.decode_image((tmp_path / "phone.jpg").read_bytes(), "phone.jpg", least_side=16),
    ):
        shown = np.asarray(first.resize(found.size), np.int16)
        assert np.abs(np.asarray(found.convert("RGB")) - shown).mean() < 12


def test_no_byte_of_a_png_may_change(tmp_path):
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    images.check_png(whole)
    images.check_png(whole + b"\0")  # what a camera wrote after it is none of it
    for place in range(len(whole)):
        for bit in (1, 128):
            with pytest.raises(ValueError):
                images.check_png(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(ValueError):
            images.check_png(whole[:place])


def test_archives_hold_plain_members(tmp_path, monkeypatch):
    def pack(*members, **options):
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", **options) as made:
            for name, content in members:
                made.writestr(name, content)
        return path

    assert [member.filename for member in documents.zip_members(pack(("a/b", "x"), ("c", "y")), most_bytes=10)] == [
        "a/b",
        "c",
    ]
    monkeypatch.setattr(documents, "MOST_MEMBERS", 2)
    assert len(documents.zip_members(pack(("a", "x"), ("b", "x")), most_bytes=10)) == 2
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    for members, word in (
        ((("../a", "x"),), "leads out"),
        ((("/a", "x"),), "leads out"),
        (((link, "/etc/passwd"),), "is a link"),
        ((("a", "x" * 11),), "11 bytes, at most 10"),
        ((("a", "x"), ("b", "x"), ("c", "x")), "3 members, at most 2"),
    ):
        refused(documents.zip_members, pack(*members), most_bytes=10, match=word)
    packed = pack(("a", "x" * 1000), compression=zipfile.ZIP_DEFLATED)
    refused(documents.zip_members, packed, most_bytes=packed.stat().st_size, match="unpacks to 1000 bytes")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = pack(("a", "x"), ("a", "y"))
    refused(documents.zip_members, twice, most_bytes=10, match="twice")
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    refused(documents.zip_members, tmp_path / "a.zip", most_bytes=10, match="not a readable zip")


# safetensors, ONNX ----------------------------------------------------------------------------------------------------


def tensors(header, data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape, begin: int, end: int, kind: str = "F32") -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def test_safetensors_headers_hold_together(file):
    whole = tensors(
        {"__metadata__": {"a": "b"}, "x": entry([2], 0, 8), "y": entry([], 8, 10, "BF16"), "z": entry([0, 5], 10, 10)},
        bytes(10),
    )
    assert check_safetensors(file(whole)) == {"x": ("F32", (2,)), "y": ("BF16", ()), "z": ("F32", (0, 5))}
    for content, word in (
        (b"", "truncated or not a safetensors"),
        (struct.pack("<Q", 2**63) + b"{}", "header too large"),
        (tensors([]), "invalid type: sequence"),
        (tensors(b'{"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}"), "recursion limit"),
        (tensors({"__metadata__": {"a": 1}}), "expected a string"),
        (tensors({"x": entry([2**40, 2**40], 0, 8)}, bytes(8)), "overflow"),
        (tensors({"x": entry([2], 0, 4)}, bytes(4)), "invalid shape"),
        (tensors({"x": entry([-1], 0, 4)}, bytes(4)), "invalid value"),
        (tensors({"x": entry([True], 0, 4)}, bytes(4)), "invalid type: boolean"),
        (tensors({"x": entry([1], 4, 0)}, bytes(4)), "invalid offset for tensor"),
        (tensors({"x": entry([1], 0, 4, "OBJECT")}, bytes(4)), "unknown variant"),
        (tensors({"x": {"dtype": "F32"}}), "missing field"),
        (tensors({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, bytes(4)), "invalid offset for tensor"),
        (tensors({"x": entry([1], 4, 8)}, bytes(8)), "invalid offset for tensor"),
        (tensors({"x": entry([1], 0, 4)}, bytes(5)), "truncated"),
        (whole[:-1], "truncated"),
    ):
        refused(check_safetensors, file(content), match=word)
    with pytest.raises(Missing):
        check_safetensors(file(b"").with_name("none"))


def test_a_missing_onnx_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(Missing, match="m.onnx: the package onnx is needed"):
        onnx_graph.check_onnx(tmp_path / "m.onnx")


def test_onnx_graphs_keep_to_their_folder(file, tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    relu = message(1, message(4, b"Relu"))
    assert onnx_graph.check_onnx(file(onnx_model(nodes=relu))) == []
    assert onnx_graph.check_onnx(file(onnx_model(nodes=relu, tensors=external("weights.bin")))) == [
        tmp_path / "weights.bin"
    ]
    function = message(25, message(1, b"f") + message(10, b"mine") + message(7, message(4, b"Relu")))
    assert (
        onnx_graph.check_onnx(file(onnx_model(nodes=message(1, message(4, b"f") + message(7, b"mine"))) + function))
        == []
    )

    def part(offset: bytes, length: bytes) -> bytes:
        entries = [(b"location", b"weights.bin"), (b"offset", offset), (b"length", length)]
        return message(5, b"".join(message(13, message(1, key) + message(2, value)) for key, value in entries))

    assert onnx_graph.check_onnx(file(onnx_model(tensors=part(b"32", b"32")))) == [tmp_path / "weights.bin"]
    hidden = relu
    for _ in range(3):  # inside a branch of a branch
        hidden = message(1, message(4, b"If") + message(5, message(6, hidden + external("../x"))))
    for content, word in (
        (b"", "names no operator set"),
        (b"\x08\x0a", "names no operator set"),
        (b"\xff" * 20, "not an ONNX file"),
        (b"\x12\xff", "not an ONNX file"),
        (onnx_model()[:-2], "not an ONNX file"),
        (onnx_model(nodes=hidden), "leads out of its folder"),
        (onnx_model(tensors=external("none.bin")), "is not there"),
        (onnx_model(tensors=external("")), "no plain relative path"),
        (onnx_model(tensors=part(b"60", b"8")), r"has 64 bytes, the graph asks for 60 \+ 8"),
        (onnx_model(tensors=part(b"-1", b"8")), "asks for -1"),
        (onnx_model(tensors=part(b"x", b"8")), "invalid literal"),
        (onnx_model(nodes=message(1, message(4, b"Evil") + message(7, b"evil"))), "'Evil' of 'evil' is not supported"),
        (onnx_model(nodes=message(1, message(4, b"EPContext") + message(7, b"com.microsoft"))), "compiled code"),
    ):
        refused(onnx_graph.check_onnx, file(content), match=word)


def test_what_the_exporter_writes_is_let_through(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import helper

    weight = helper.make_tensor("w", onnx.TensorProto.FLOAT, [300], np.zeros(300, np.float32).tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [300])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [300])],
        [weight],
    )
    onnx.save(
        helper.make_model(graph), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    assert onnx_graph.check_onnx(tmp_path / "m.onnx") == [tmp_path / "m.data"]


def test_limits_are_the_largest_that_is_read(tmp_path):
    def nested(count):
        return "[" * count + "]" * count

    def elements(count):
        return "<a>" * count + "</a>" * count

    (path := tmp_path / "it").write_text(nested(documents.DEEPEST))
    assert documents.parse_json(path.read_text(), "it") == documents.read_yaml(path) is not None
    path.write_text(nested(documents.DEEPEST + 1))
    for read in (documents.read_yaml, lambda path: documents.parse_json(path.read_text(), "it")):
        with pytest.raises(Refused, match="nested more than 32 deep"):
            read(path)
    path.write_text(elements(documents.DEEPEST))
    assert len(list(documents.read_xml(path).iter("a"))) == 32
    path.write_text(elements(documents.DEEPEST + 1))
    with pytest.raises(Refused, match="nested more than 32 deep"):
        documents.read_xml(path)
    (tmp_path / "a.png").write_bytes(image_bytes(np.zeros((3, 5, 3), np.uint8), "png"))
    assert images.read_image(tmp_path / "a.png", most_pixels=15).size == (5, 3)
    with pytest.raises(Refused, match="5 x 3 pixels, at most 14 are decoded"):
        images.read_image(tmp_path / "a.png", most_pixels=14)
    assert documents.check_inside("a" * documents.LONGEST_NAME)
    with pytest.raises(ValueError, match="no plain relative path"):
        documents.check_inside("a" * (documents.LONGEST_NAME + 1))
    assert documents.one_line("a" * 400) == "a" * 400 and documents.one_line("a" * 401) == "a" * 397 + "..."
    assert documents.quote("a" * 78) == repr("a" * 78) and documents.quote("a" * 79) == "'" + "a" * 76 + "..."


def test_data_of_a_graph_that_another_name_reaches_is_refused(tmp_path):
    """A hard link looks like a file of its own, and is one of anywhere."""
    (tmp_path / "elsewhere").write_bytes(bytes(8))
    (tmp_path / "w").hardlink_to(tmp_path / "elsewhere")
    (tmp_path / "graph.onnx").write_bytes(onnx_model(tensors=external("w")))
    with pytest.raises(Refused, match="'w' is not a regular file of its own"):
        onnx_graph.check_onnx(tmp_path / "graph.onnx")
    (tmp_path / "elsewhere").unlink()
    assert onnx_graph.check_onnx(tmp_path / "graph.onnx") == [tmp_path / "w"]
