"""The service: what clients get, what shares a batch, and what is refused, over HTTP on this machine."""

import asyncio
import base64
import gc
import http.client
import importlib
import io
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import yaml
from browser import Watched, browser
from forked import ForkedPython
from PIL import Image
from pycocotools.coco import COCO

from datasetdm_fast import Pipeline, generate
from datasetdm_fast import serve as command
from datasetdm_fast.data import Quarantined, Request, Sample, Trust
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.errors import GateFailed

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="uvicorn is not installed")

from starlette.exceptions import HTTPException  # noqa: E402

from datasetdm_fast.service import app as http_side  # noqa: E402
from datasetdm_fast.service import requests  # noqa: E402
from datasetdm_fast.service.app import Metrics  # noqa: E402
from datasetdm_fast.service.batching import Batcher, PendingImage, QueueFull  # noqa: E402
from datasetdm_fast.service.requests import encode_sample, read_generation, read_labelling  # noqa: E402
from datasetdm_fast.untrusted import images  # noqa: E402

pytestmark = pytest.mark.loopback
ROOT = Path(__file__).parents[1]
PROMPT = "a red ball on a table"
IMAGES, LABEL = "/v1/images/generations", "/v1/label"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_pretrained("demo")


@contextmanager
def serving(pipeline, *, size=8, wait=0.02, most=64, token="", hosts=()):
    """A running service; its port and its batcher."""
    listening = socket.create_server(("127.0.0.1", 0))
    with Batcher(pipeline, size, wait, most) as batcher:
        app = http_side.Service(batcher, 50).app(hosts, token)
        settings = uvicorn.Config(app, http=http_side.TimedProtocol, lifespan="off", ws="none", log_level="critical")
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield SimpleNamespace(port=listening.getsockname()[1], batcher=batcher)
        finally:
            server.should_exit = True
            thread.join()
            listening.close()


@pytest.fixture(scope="module")
def service(pipeline):
    with serving(pipeline) as running:
        yield running


def ask(service, path, body=None, method=None, **headers):
    """Status and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("POST" if body is not None else "GET"), path, content, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    is_json = answer.headers.get("Content-Type", "") == "application/json"
    return SimpleNamespace(
        status=answer.status, text=text, headers=answer.headers, json=json.loads(text) if is_json else None
    )


def pixels(entry):
    return np.array(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The run folder of `generate --batch-size 1`."""
    out = tmp_path_factory.mktemp("stored") / "run"
    line = ["--prompts", PROMPT, "--number", "2", "--seed", "7", "--steps", "2", "--batch-size", "1", "--quiet"]
    assert generate.main([*line, "--force-domain", "--out", str(out)]) == 0
    return out


def test_alone_an_image_and_its_labels_have_the_bytes_of_generate(service, stored):
    body = {"model": "demo", "prompt": PROMPT, "n": 2, "seed": 7, "steps": 2, "deterministic": True}
    answer = ask(service, IMAGES, body | {"labels": ["semantic", "instance", "depth", "pose"]})
    assert answer.status == 200, answer.text
    coco = json.loads((stored / "instances.json").read_text())
    for index, entry in enumerate(answer.json["data"]):
        id = f"{index:08d}"
        assert base64.b64decode(entry["b64_json"]) == (stored / "images" / f"{id}.png").read_bytes()
        files = [item for label in entry["labels"].values() for item in label["files"].items()]
        assert {role for role, _ in files} == {"semantic", "confidence", "depth"}
        for role, content in files:
            assert base64.b64decode(content) == (stored / role / f"{id}.png").read_bytes()
        (image,) = [image["id"] for image in coco["images"] if id in image["file_name"]]
        parts = ("category_id", "segmentation", "bbox", "score")
        expected = [[each[part] for part in parts] for each in coco["annotations"] if each["image_id"] == image]
        made = entry["labels"]["instance"]["coco"]
        assert [[each[part] for part in parts] for each in made["annotations"]] == expected
        assert {each["category_id"] for each in made["annotations"]} <= {each["id"] for each in made["categories"]}
        assert [each["id"] for each in made["annotations"]] == [
            *range(1, len(expected) + 1)
        ]  # 0 is none to pycocotools


def test_what_decides_a_recipe_decides_who_shares_a_batch_and_seeds_are_those_that_were_sent(pipeline, monkeypatch):
    usual = {"prompt": PROMPT, "n": 2, "seed": 7, "steps": 2, "labels": ["semantic"]}
    items = read_generation(usual, pipeline, 50).items
    assert [each.request.seed for each in items] == [7, 8] and items[0].group == items[1].group
    most = read_generation(usual | {"n": requests.MOST_IMAGES, "steps": 50}, pipeline, 50).items
    assert len(most) == requests.MOST_IMAGES and len(most[0].recipe.schedule) == 51  # PNDM calls once more
    others = [{"steps": 3}, {"labels": []}, {"guidance": 2.0}, {"sampler": "ddim"}, {"classes": ["ball"]}]
    groups = [read_generation(usual | other, pipeline, 50).items[0].group for other in others]
    assert len({items[0].group, *groups}) == 6
    monkeypatch.setattr(pipeline, "label", lambda picture, **choices: SimpleNamespace(samples=[choices]))
    image, picture = io.BytesIO(), Image.new("RGB", (64, 64))
    picture.save(image, "PNG")
    body = {"image": base64.b64encode(image.getvalue()).decode(), "seed": 5, "prompt": "a cube", "labels": ["depth"]}
    sent = read_labelling(body, pipeline).items[0].label()
    assert (sent["seed"], sent["prompts"], sent["tasks"]) == (5, "a cube", ["depth"])


def test_requests_of_many_clients_share_batches_and_none_is_lost_or_swapped(service, pipeline):
    begin = service.batcher.batches
    prompts = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("ball", "cube", "cone", "star")] * 2

    def image(k):
        body = {
            "prompt": prompts[k],
            "seed": k,
            "steps": 2,
            "labels": ["semantic"],
            "negative_prompt": "grey" * (k % 2),
        }
        entry = ask(service, IMAGES, body).json["data"][0]
        assert (entry["prompt"], entry["seed"]) == (prompts[k], k)
        return pixels(entry)

    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(image, range(16)))
    assert service.batcher.batches - begin < 16
    negatives = ["grey" * (k % 2) for k in range(16)]
    alone = pipeline(prompts, seeds=range(16), steps=2, tasks=["semantic"], negative_prompt=negatives, batch_size=1)
    for got, expected in zip(made, alone.images):
        assert 10 * np.log10(255**2 / max(np.square(got.astype(float) - expected).mean(), 1e-9)) > 45


def test_lines_come_one_by_one(service):
    answer = ask(
        service, IMAGES, {"prompt": PROMPT, "n": 3, "seeds": [4, 9, 1], "steps": 2, "labels": [], "stream": True}
    )
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.headers["Content-Type"].startswith("application/x-ndjson")
    assert [(line["index"], line["seed"], line["labels"]) for line in lines] == [(0, 4, {}), (1, 9, {}), (2, 1, {})]


def test_an_image_that_came_out_broken_is_told_and_the_others_are_sent(service, pipeline, monkeypatch):
    whole = Sample(Request(1, PROMPT, 2), np.zeros((8, 8, 3), np.uint8), {})
    results = {1: Quarantined(Request(0, PROMPT, 1), "its numbers are not finite"), 2: whole}

    def made(batches, recipe, make):
        return ([results[request.seed] for request in batch.requests] for batch in batches)

    monkeypatch.setattr(pipeline, "generate_batches", made)
    body = {"prompt": PROMPT, "n": 2, "seed": 1, "steps": 2, "labels": []}
    answer = ask(service, IMAGES, body)
    assert answer.status == 422 and answer.json["error"]["message"].startswith("its numbers are not finite")
    broken, sent = map(json.loads, ask(service, IMAGES, body | {"stream": True}).text.splitlines())
    assert broken["index"] == 0 and broken["error"]["message"].startswith("its numbers are not finite")
    assert (sent["index"], sent["seed"]) == (1, 2) and "error" not in sent


def test_a_request_that_is_too_large_is_read_up_to_a_limit(service, monkeypatch):
    assert ask(service, IMAGES, b" " * http_side.LARGEST_TEXT).status == 400
    assert ask(service, IMAGES, b" " * (http_side.LARGEST_TEXT + 1)).status == 413
    monkeypatch.setattr(http_side, "MOST_READ", 50)
    for count, read in ((5, 5), (6, 6), (9, 6)):
        chunks = iter([b" " * 10] * count)

        async def stream(chunks=chunks):
            for chunk in chunks:
                yield chunk

        async def send(stream=stream):
            side = http_side.Service(SimpleNamespace(pipeline=None), 50)
            async with side._body(SimpleNamespace(headers={"content-type": "application/json"}, stream=stream), 20):
                pass

        with pytest.raises(HTTPException) as refused:
            asyncio.run(send())
        assert refused.value.status_code == 413 and len(list(chunks)) == count - read


def test_a_request_of_very_many_values_is_refused_before_it_is_parsed(service, monkeypatch):
    parsed, parse = [], http_side.documents.parse_json
    monkeypatch.setattr(http_side.documents, "parse_json", lambda *given: parsed.append(given) or parse(*given))
    for values in (b"[],", b"{},", b"1,", b"[" * 900 + b"]" * 900 + b","):
        many = b"[" + values * (3 * http_side.LARGEST_TEXT // len(values)) + b"0]"
        answer = ask(service, LABEL, many)
        assert answer.status == 413 and "65536 values" in answer.json["error"]["message"] and not parsed
    assert ask(service, LABEL, b'{"image": "' + b"A" * 3 * http_side.LARGEST_TEXT + b'"}').status == 400 and parsed


def test_pictures_that_are_sent_at_once_are_bounded_in_memory_and_short_requests_pass(pipeline, monkeypatch):
    most = b'{"image": "' + b"A" * 150_000 + b'"}'
    monkeypatch.setattr(http_side, "MOST_HELD", len(most))
    head = f"POST {LABEL} HTTP/1.1\r\nHost: a\r\nContent-Type: Application/JSON\r\nContent-Length: {len(most)}\r\n\r\n"
    with serving(pipeline) as service:
        with socket.create_connection(("127.0.0.1", service.port), 60) as slow:
            slow.sendall(head.encode() + most[:-1])
            wait_until(lambda: ask(service, LABEL, most).status == 429)
            assert ask(service, LABEL, most).headers["Retry-After"] == "1"
            assert ask(service, IMAGES, {"prompt": PROMPT, "steps": 2, "labels": []}).status == 200
            slow.sendall(most[-1:])
            assert b" 400 " in slow.recv(100)  # it is no picture
        assert ask(service, LABEL, most).status == 400


def test_an_existing_picture_is_labelled(service, stored, pipeline):
    path = stored / "images" / "00000000.png"
    body = {"image": base64.b64encode(path.read_bytes()).decode(), "prompt": PROMPT, "preview": True}
    (entry,) = ask(service, LABEL, body).json["data"]
    expected = pipeline.label(Image.open(path), PROMPT)
    assert (pixels(entry) == expected.images[0]).all()
    shown = np.array(Image.open(io.BytesIO(base64.b64decode(entry["labels"]["semantic"]["files"]["semantic"]))))
    assert (shown == expected.semantic[0].labels).all()
    assert Image.open(io.BytesIO(base64.b64decode(entry["labels"]["depth"]["preview"]))).size == (128, 128)


BAD = {
    "no object": ([], 400, "expected an object"),
    "no prompt": ({"n": 1}, 400, "prompt is missing"),
    "a number for a prompt": ({"prompt": 1}, 400, "expected text"),
    "an unknown field": ({"prompt": "a", "lables": []}, 400, "did you mean labels?"),
    "an unknown label": ({"prompt": "a", "labels": ["depht"]}, 400, "labels: depht"),
    "a label twice": ({"prompt": "a", "labels": ["depth", "depth"]}, 400, "labels: "),
    "a label without a decoder": ({"prompt": "a", "labels": ["semantic:other"]}, 400, "semantic:other"),
    "another model": ({"prompt": "a", "model": "dall-e-3"}, 400, "model: 'dall-e-3' is not served, 'demo' is"),
    "a URL": ({"prompt": "a", "response_format": "url"}, 400, "is not b64_json"),
    "another size": ({"prompt": "a", "size": "512x512"}, 400, "is not auto or 128x128"),
    "many images": ({"prompt": "a", "n": 11}, 400, "n: 11 is not within 1 .. 10"),
    "many steps": ({"prompt": "a", "steps": 51}, 400, "steps: 51 is not within 1 .. 50"),
    "a negative seed": ({"prompt": "a", "seed": -1}, 400, "seed -1"),
    "other seeds than images": ({"prompt": "a", "n": 2, "seeds": [1]}, 400, "1 sent for 2"),
    "seed and seeds": ({"prompt": "a", "seed": 1, "seeds": [1]}, 400, "seeds: both they and seed were sent"),
    "many tokens": ({"prompt": "word " * 200}, 400, "tokens, at most 77 fit"),
    "many labels": ({"prompt": PROMPT, "labels": ["semantic"] * 3000}, 400, "labels: semantic,semantic"),
    "10 MB": (b'{"prompt": "' + b"a" * 10**7 + b'"}', 413, "more than 65536 bytes"),
    "brackets": (b"[" * 60_000, 400, "not readable as JSON"),
    "twice": (b'{"prompt": "a", "prompt": "b"}', 400, "occurs twice"),
    "NaN": (b'{"prompt": "a", "guidance": NaN}', 400, "NaN"),
    "much guidance": ({"prompt": "a", "guidance": 1e308}, 400, "guidance 1e+308: expected a number from 0 to 1000"),
    "more guidance": ({"prompt": "a", "guidance": 10**320}, 400, "expected a number from 0 to 1000"),  # than a float
    "no JSON": (b"hello", 400, "not readable as JSON"),
    "nothing": (b"", 400, "empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_made_is_refused_in_one_sentence(service, name):
    body, status, said = BAD[name]
    answer = ask(service, IMAGES, body)
    assert answer.status == status and said in answer.json["error"]["message"], answer.text
    assert len(answer.text) < 1200
    assert service.batcher.waiting == 0


@pytest.mark.parametrize("image", ["%%", "AAAA", "", "iVBORw0KGgo="])
def test_what_is_no_picture_is_refused(service, image):
    answer = ask(service, LABEL, {"image": image})
    assert answer.status == 400 and answer.json["error"]["message"].startswith("image: ")


def test_other_paths_methods_kinds_and_names(pipeline):
    with serving(pipeline, hosts=("localhost",)) as named:
        assert ask(named, "/healthz").status == 403
        assert ask(named, "/healthz", Host="localhost").json["labels"] == list(pipeline.tasks)
        assert ask(named, "/nothing", Host="localhost").status == 404
        assert ask(named, IMAGES, Host="localhost").status == 405
        assert ask(named, IMAGES, {"prompt": "a"}, Host="localhost", Content_Type="text/plain").status == 415
        with_letters = {"Host": "localhost", "Content_Type": "application/json; charset=utf-8"}
        assert ask(named, IMAGES, {"n": 1}, **with_letters).json["error"]["message"] == "prompt is missing"
        assert ask(named, "/v1/nothing", Host="localhost").status == 404
        figures = ask(named, "/metrics", Host="localhost").text.decode()
        assert figures.count("/v1/nothing") == 0 and f'{{path="{IMAGES}",status="400"}} 1' in figures
        named.batcher.failure = "the engine failed"
        assert ask(named, "/healthz", Host="localhost").status == 503


@pytest.mark.parametrize(
    ("trust", "told"), [(None, None), (Trust(), []), (Trust(("cat",), reasons=("no cat",)), ["no cat"])]
)
def test_the_doubts_of_an_image_are_the_reasons_of_its_trust(trust, told):
    sample = Sample(Request(0, 1, "a cat"), np.zeros((8, 8, 3), np.uint8), {}, trust=trust)
    assert encode_sample(sample, {}, False).get("doubts") == told


def test_what_a_server_asks_beside_http_passes(pipeline):
    """Ray Serve starts and ends an application, which has no host and no token."""
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    guard = http_side.Guard(app, ["localhost"], "secret", Metrics(pipeline))
    asyncio.run(guard({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


def test_who_has_no_token_sees_the_page_alone(pipeline):
    with serving(pipeline, token="secret") as closed:
        body = {"prompt": PROMPT, "steps": 2, "labels": []}
        assert ask(closed, IMAGES, body).status == ask(closed, "/metrics").status == 401
        assert ask(closed, IMAGES, body, Authorization="Bearer other").status == 401
        assert ask(closed, IMAGES, body, Authorization="Bearer secret").status == 200
        page = ask(closed, "/")
        assert page.status == 200 and "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert ask(closed, "/page.js").status == ask(closed, "/page.css").status == 200


def test_who_has_no_token_writes_no_line_of_the_figures(pipeline):
    with serving(pipeline, token="secret", hosts=("localhost",)) as closed:
        forged = "/v1/%22,status=%22200%22%7D%201%0Adatasetdm_images_total%20999%0A"
        assert ask(closed, forged, Host="localhost").status == 401 and ask(closed, forged).status == 403
        assert ask(closed, IMAGES, {"prompt": "a"}, Host="localhost").status == 401
        figures = ask(closed, "/metrics", Host="localhost", Authorization="Bearer secret").text.decode()
        requests = [line for line in figures.splitlines() if line.startswith("datasetdm_requests_total")]
        assert requests == [
            f'datasetdm_requests_total{{path="{IMAGES}",status="401"}} 1',
            'datasetdm_requests_total{path="other",status="401"} 1',
            'datasetdm_requests_total{path="other",status="403"} 1',
        ]
        assert "images_total 999" not in figures


def test_slow_clients_are_closed(pipeline, monkeypatch):
    monkeypatch.setattr(http_side, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(http_side, "BODY_SECONDS", 0.3)
    with serving(pipeline) as service:
        for head in (b"", b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\n"):
            with socket.create_connection(("127.0.0.1", service.port), 60) as slow:
                slow.sendall(head)
                assert slow.recv(100) == b""
        monkeypatch.setattr(http_side, "HEAD_SECONDS", 60)
        with socket.create_connection(("127.0.0.1", service.port), 60) as slow:
            slow.sendall(head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(100)
        assert ask(service, "/healthz").status == 200


def test_clients_that_send_a_byte_now_and_then_are_ended_and_keep_nobody_waiting(pipeline, monkeypatch):
    monkeypatch.setattr(http_side, "HEAD_SECONDS", 4.0)
    monkeypatch.setattr(http_side, "BODY_SECONDS", 4.0)
    head = (
        b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 999\r\n"
    )
    known, connected = head + b"Authorization: Bearer secret\r\n\r\n", threading.Barrier(13)

    def drip(port, first):
        answer = b""
        with socket.create_connection(("127.0.0.1", port), 0.05) as slow:
            slow.sendall(first)
            connected.wait(60)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                try:
                    slow.sendall(b"a")
                    if not (part := slow.recv(1000)):
                        return answer
                    answer += part
                except TimeoutError:
                    pass
                except ConnectionError:
                    return answer
        raise AssertionError("the client was not ended")

    with serving(pipeline, token="secret") as service, ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(drip, service.port, first) for first in (b"", head + b"\r\n", known) * 4]
        connected.wait(60)
        assert ask(service, "/healthz").status == 200 and not any(client.done() for client in clients)
        begins = [client.result()[9:12] for client in clients]
    assert begins == [b"", b"401", b"408"] * 4


class Blocked:
    """A pipeline that waits before every batch, and keeps what it made."""

    def __init__(self):
        self.engine = SimpleNamespace(device=SimpleNamespace(type="cuda"), model=SimpleNamespace(name="demo", size=128))
        self.go, self.made = threading.Semaphore(0), []

    def generate_batches(self, batches, recipe, make):
        for batch in batches:
            assert self.go.acquire(timeout=20)
            if batch.requests[0].prompt == "broken":
                raise ZeroDivisionError
            self.made.append(([request.prompt for request in batch.requests], batch.padding))
            yield [request.prompt for request in batch.requests]


def item(prompt, group="", **options):
    return PendingImage(None, Request(0, prompt, 0), group, **options)


PATIENT = """import sys
from datasetdm_fast import serve
from datasetdm_fast.command_line import interruption
interruption.ENDING_SECONDS = 600
sys.exit(serve.main(sys.argv[1:]))"""


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_batches_hold_one_recipe_and_nobody_who_left():
    blocked = Blocked()
    with Batcher(blocked, 3, 0.0, 8) as batcher:
        batcher.submit([item("first")])
        wait_until(lambda: batcher.batches == 1)
        gone = item("gone")
        items = [
            item("a"),
            item("b"),
            gone,
            item("other", "x"),
            item("alone", is_alone=True),
            item("c"),
            item("d"),
        ]
        batcher.submit(items)
        with pytest.raises(QueueFull) as full:
            batcher.submit([item("e"), item("f")])
        assert full.value.seconds >= 1 and batcher.waiting == 7
        assert gone.future.cancel() and batcher.waiting == 6
        for _ in range(9):
            blocked.go.release()
        assert [each.future.result(20) for each in items if each is not gone] == ["a", "b", "other", "alone", "c", "d"]
    assert blocked.made == [(["first"], 0), (["a", "b", "c"], 0), (["other"], 0), (["alone"], 0), (["d"], 0)]


def test_a_batch_that_has_begun_takes_none_of_another_recipe():
    batcher, one = Batcher(Blocked(), 3, 0.0, 8), item("a", "x")
    batcher.submit([one])
    assert batcher._take("y") == [] and batcher._take("x") == [one]
    batcher.submit([item("alone", "x", is_alone=True)])
    assert batcher._take("x") == [] and batcher.waiting == 1


def test_a_full_queue_tells_in_how_many_seconds_its_batches_are_made():
    batcher = Batcher(Blocked(), 3, 0.0, 8)
    batcher._seconds = 2.5  # of the last batch
    batcher.submit([item(str(k)) for k in range(7)])
    with pytest.raises(QueueFull) as full:
        batcher.submit([item("a"), item("b")])
    assert full.value.seconds == 6  # 7 / 3 * 2.5


def test_a_request_of_more_images_than_may_wait_is_taken_where_none_waits():
    batcher = Batcher(Blocked(), 3, 0.0, 4)
    batcher.submit(several := [item(str(k)) for k in range(5)])
    with pytest.raises(QueueFull) as full:
        batcher.submit(several)
    assert full.value.seconds > 0 and batcher.waiting == 5


def test_a_stream_tells_that_the_engine_failed_and_is_counted_with_the_seconds_of_all_its_lines(
    pipeline, monkeypatch, capsys
):
    def fail(batches, recipe, make):
        next(batches)
        time.sleep(0.3)
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "generate_batches", fail)
    with serving(pipeline) as service:
        body = {"prompt": PROMPT, "n": 2, "steps": 2, "labels": [], "stream": True}
        lines = [json.loads(line) for line in ask(service, IMAGES, body).text.splitlines()]
        assert [line["index"] for line in lines] == [0, 1]
        assert all(line["error"]["message"].startswith("the engine failed") for line in lines)
        (total,) = (line for line in ask(service, "/metrics").text.decode().splitlines() if "seconds_sum" in line)
    assert float(total.split()[1]) >= 0.3


def test_a_latency_is_counted_in_every_bucket_that_it_does_not_exceed():
    metrics = Metrics(None)
    for seconds in (0.1, 0.11):
        metrics.add("/", 200, seconds)
    assert [metrics.buckets[end] for end in (0.05, 0.1, 0.25, 60.0)] == [0, 1, 2, 2]
    cpu = SimpleNamespace(engine=SimpleNamespace(device=SimpleNamespace(type="cpu")))
    metrics.batcher = Batcher(cpu, 3, 0.0, 8)
    lines = metrics.text().splitlines()
    for line in ("request_seconds_count 2", "request_seconds_sum 0.21", 'request_seconds_bucket{le="+Inf"} 2'):
        assert f"datasetdm_{line}" in lines
    (peak,) = (line for line in lines if line.startswith("datasetdm_peak_memory_bytes "))
    assert 2**25 < float(peak.split()[1]) < 2**40  # bytes, where the system counts kilobytes


def test_the_oldest_image_decides_when_a_batch_leaves():
    batcher, now = Batcher(Blocked(), 4, 60.0, 8), time.monotonic()
    batcher.submit(due := [item("a", arrived=now - 61), item("b", arrived=now)])
    assert batcher._take("") == due
    batcher.submit([item("a", arrived=now - 50), item("b", arrived=now - 61)])
    assert batcher._take("") == []


def test_a_client_that_leaves_amid_its_lines_waits_for_no_image():
    whole = Sample(Request(0, PROMPT, 2), np.zeros((8, 8, 3), np.uint8), {})
    first, second = work = [item("a"), item("b")]
    first.finish(whole)

    async def read_one():
        service = object.__new__(http_side.Service)
        lines = service._lines(SimpleNamespace(items=work, tables={}, has_previews=False))
        assert json.loads(await anext(lines))["seed"] == 2
        await lines.aclose()

    asyncio.run(read_one())
    assert first.is_left and second.is_left and second.future.cancelled()


def test_the_largest_picture_fits_into_a_request_and_its_sides_are_told_width_first():
    envelope = len(json.dumps({"image": "", "prompt": "word " * 77, "labels": ["semantic"] * 9}))
    assert -(-images.LARGEST_IMAGE_FILE // 3) * 4 + envelope <= http_side.LARGEST_PICTURE
    sample = Sample(Request(3, PROMPT, 2), np.zeros((4, 6, 3), np.uint8), {})
    (image,) = requests._coco(sample, [], [])["images"]
    assert image == {"id": 1, "width": 6, "height": 4, "file_name": "00000003.png"}


def test_the_persons_of_an_answer_have_the_category_of_its_file():
    sample = Sample(Request(0, PROMPT, 2), np.zeros((4, 6, 3), np.uint8), {})
    person = {"keypoints": [1, 2, 2], "num_keypoints": 1, "score": 0.5, "bbox": [0, 0, 2, 3], "area": 6}
    categories = kind_of("pose").categories({"joints": ["head"], "limbs": [], "category": 1})
    read = COCO()
    read.dataset = requests._coco(sample, [person], categories)
    read.createIndex()
    assert read.getAnnIds(imgIds=[1], catIds=read.getCatIds(["person"])) == [1]


def test_a_batch_waits_for_others_until_it_is_full():
    blocked = Blocked()
    blocked.go.release(9)
    with Batcher(blocked, 4, 600.0, 8) as batcher:
        batcher.submit([item("a"), item("b")])
        time.sleep(0.05)
        batcher.submit([item("c")])
        batcher.submit([late := item("d")])
        assert late.future.result(20) == "d"
    with Batcher(blocked, 4, 0.1, 8) as batcher:
        batcher.submit(few := [item("e"), item("f"), item("g")])
        few[0].future.result(20)
    assert blocked.made == [(["a", "b", "c", "d"], 0), (["e", "f", "g"], 1)]  # sizes of graphs are powers of two


def test_a_batch_ends_between_calls_once_all_its_clients_have_left(pipeline, capsys):
    recipe, requests = pipeline.prepare([PROMPT] * 2, [0, 1], tasks=[], steps=20)
    first, second = (PendingImage(recipe, request, "") for request in requests)
    with Batcher(pipeline, 2, 600.0, 8) as batcher:
        batcher.submit([first, second])
        wait_until(second.future.running)
        first.leave()
        assert second.future.result(60).request.seed == 1  # whose client still waits
        first, second = (PendingImage(recipe, item.request, "") for item in (first, second))
        batcher.submit([first, second])
        wait_until(second.future.running)
        first.leave()
        second.leave()
        with pytest.raises(GateFailed, match="all clients"):
            second.future.result(60)
    assert not batcher.failure and not capsys.readouterr().err


def test_a_failure_of_the_engine_is_told_and_the_next_batch_is_made(capsys):
    blocked = Blocked()
    blocked.go.release(9)
    with Batcher(blocked, 4, 0.0, 8) as batcher:
        batcher.submit([broken := item("broken")])
        with pytest.raises(RuntimeError, match="the engine failed .ZeroDivisionError."):
            broken.future.result(20)
        assert batcher.failure and "ZeroDivisionError" in capsys.readouterr().err
        batcher.submit([good := item("good")])
        assert good.future.result(20) == "good"
    assert not batcher.failure


def test_a_failure_reaches_the_clients_of_its_batch_however_many_were_made_before(capsys):
    blocked = Blocked()
    with Batcher(blocked, 1, 0.0, 8) as batcher:
        batcher.submit([first := item("first")])
        wait_until(lambda: batcher.batches == 1)
        batcher.submit([broken := item("broken"), later := item("later")])
        blocked.go.release(9)
        assert first.future.result(20) == "first"
        with pytest.raises(RuntimeError, match="the engine failed"):
            broken.future.result(20)
        assert later.future.result(20) == "later"
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_full_queue_and_a_client_that_leaves(pipeline, monkeypatch, caplog):
    begun, free, undisturbed = threading.Event(), threading.Event(), pipeline.generate_batches

    def held(batches, recipe, make):
        begun.set()
        assert free.wait(60)
        return undisturbed(batches, recipe, make)

    monkeypatch.setattr(pipeline, "generate_batches", held)
    body = {"prompt": PROMPT, "steps": 2, "labels": []}
    with serving(pipeline, most=2) as service, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, service, IMAGES, body)
        assert begun.wait(60)
        connection = http.client.HTTPConnection("127.0.0.1", service.port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", IMAGES, json.dumps({**body, "n": 2}), headers)
        wait_until(lambda: service.batcher.waiting == 2)
        full = ask(service, IMAGES, body)
        assert full.status == 429 and int(full.headers["Retry-After"]) >= 1
        connection.close()
        wait_until(lambda: service.batcher.waiting == 0)
        free.set()
        assert first.result(60).status == 200
        assert service.batcher.images == 1
        figures = ask(service, "/metrics").text.decode()
    gc.collect()
    assert not caplog.records  # of exceptions that nobody retrieved
    assert f'datasetdm_requests_total{{path="{IMAGES}",status="429"}} 1' in figures
    assert "\ndatasetdm_images_total 1\n" in figures and "datasetdm_request_seconds_count" in figures


def test_the_page_shows_an_image_and_its_labels(service):
    with browser() as running:
        page = Watched(running)
        page.page.goto(f"http://127.0.0.1:{service.port}/")
        page.page.wait_for_selector("#labels input")
        page.page.fill("#seed", "4")
        page.page.click("button")
        page.page.wait_for_selector("figure img", timeout=60_000)
        assert page.page.locator("figure").count() == 1 + len(service.batcher.pipeline.tasks)
        sizes = [image.evaluate("image => image.naturalWidth") for image in page.page.locator("img").all()]
        assert set(sizes) == {128} and not page.errors
        page.page.fill("#prompt", "word " * 150)
        page.page.click("button")
        page.page.wait_for_selector("#status:has-text('at most 77 fit')")


def test_the_command_serves_until_a_signal_and_answers_what_was_asked(tmp_path):
    """A batch has ten seconds to end, and more here: the machine may do other work."""
    line = ["-c", PATIENT, "--port", "0", "--quiet"]
    with ForkedPython(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        address = process.stdout.readline().strip()
        running = SimpleNamespace(port=int(address.rpartition(":")[2]))
        assert ask(running, "/healthz").json["status"] == "ok"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, running, IMAGES, {"prompt": PROMPT, "steps": 20, "labels": []})
            wait_until(lambda: b"\ndatasetdm_batches_total 1" in ask(running, "/metrics").text)
            process.terminate()
            _, errors = process.communicate(timeout=60)
        assert asked.result().status == 200
    assert process.returncode == 143 and "Traceback" not in errors


def test_a_token_lets_the_service_have_any_name_and_a_wait_is_in_milliseconds(monkeypatch, capsys):
    asked, engine = [], SimpleNamespace(suggested_batch=lambda: 5, model=SimpleNamespace(name="demo"))
    pipeline = SimpleNamespace(engine=engine, tasks=())
    monkeypatch.setattr("datasetdm_fast.engine.pipeline.Pipeline.from_pretrained", lambda *_, **__: pipeline)
    batcher = command.open_batcher(command.ServeConfig(wait=50, queue=7))
    assert (batcher.size, batcher.wait, batcher.most_waiting) == (5, 0.05, 7)
    assert command.open_batcher(command.ServeConfig(batch_size=3)).size == 3
    monkeypatch.setattr(http_side.Service, "app", lambda self, *given: asked.append(given))
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: None)
    for token in ("", "secret"):
        monkeypatch.setenv(command.TOKEN, token)
        assert command.main(["--port", "0", "--quiet"]) == 0
    port = capsys.readouterr().out.split()[0].rpartition(":")[2]
    names = {"127.0.0.1", "localhost", "[::1]"}
    assert asked == [({f"{name}:{port}" for name in names}, ""), ((), "secret")]
    at_80 = MagicMock(**{"getsockname.return_value": ("127.0.0.1", 80)})  # a port that clients leave out of the name
    opened = MagicMock(return_value=at_80)
    monkeypatch.setattr(command.socket, "create_server", opened)
    monkeypatch.delenv(command.TOKEN)
    assert command.main(["--port", "80", "--quiet"]) == 0
    assert asked[-1] == (names | {f"{name}:80" for name in names}, "")
    assert command.main(["--host", "::1", "--port", "80", "--quiet"]) == 0
    assert opened.call_args.kwargs["family"] == socket.AF_INET6 and "http://[::1]:80\n" in capsys.readouterr().out


def test_other_addresses_need_a_token(monkeypatch, capsys):
    monkeypatch.delenv(command.TOKEN, raising=False)
    assert command.main(["--host", "0.0.0.0"]) == 2
    assert "DATASETDM_TOKEN holds no token" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert command.main(["--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert command.main([]) == 3 and "pip install 'datasetdm-fast[serve]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("grpc_reflection") is None, reason="Ray Serve is not installed")
def test_ray_serve_runs_the_deployment_of_the_page(tmp_path, monkeypatch):
    """One replica without a GPU, as this machine may have none; all else is as docs/serve.yaml says."""
    import ray
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    told = yaml.safe_load((ROOT / "docs" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema(**told).applications
    module, _, name = application.import_path.partition(":")
    deployment = getattr(importlib.import_module(module), name)(application.args)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    environment = {
        **application.runtime_env,
        "env_vars": {**application.runtime_env["env_vars"], "OMP_NUM_THREADS": "1"},
    }
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployment, name=application.name, route_prefix=application.route_prefix)
        running = SimpleNamespace(port=port)
        body = {"prompt": PROMPT, "steps": 2, "labels": ["semantic"]}
        token = application.runtime_env["env_vars"]["DATASETDM_TOKEN"]
        assert ask(running, "/healthz").json["status"] == "ok" and ask(running, IMAGES, body).status == 401
        answer = ask(running, IMAGES, body, Authorization=f"Bearer {token}")
        assert answer.status == 200 and pixels(answer.json["data"][0]).shape == (128, 128, 3)
    finally:
        serve.shutdown()
        ray.shutdown()
