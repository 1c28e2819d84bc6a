"""The HTTP side of the service: addresses, limits, who may ask, answers, and its figures."""

from __future__ import annotations

import asyncio
import hmac
import json
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from datasetdm_fast.errors import GateFailed, Missing, Refused, Stop
from datasetdm_fast.service.batching import Batcher, QueueFull
from datasetdm_fast.service.requests import Work, encode_sample, read_generation, read_labelling
from datasetdm_fast.untrusted import documents, images

LARGEST_TEXT = 2**16  # bytes of a request without a picture
LARGEST_PICTURE = images.LARGEST_IMAGE_FILE * 4 // 3 + LARGEST_TEXT
MOST_READ = 2**26  # bytes of a request that is too large
MOST_HELD = 2**29  # bytes of the requests that are being sent or read, beyond which no picture is taken
LONGEST_ERROR = 1000  # letters
HEAD_SECONDS, BODY_SECONDS = 10.0, 30.0  # in which a client must have sent them
STATUSES = {Refused: 400, ValueError: 400, GateFailed: 422, QueueFull: 429, ClientDisconnect: 499, Missing: 503}
PAGES = Path(__file__).parent / "page"
ENDPOINTS = ("/v1/images/generations", "/v1/label")
OPEN = ("/", "/page.js", "/page.css", "/healthz")  # paths that need no token
POLICY = b"default-src 'none'; connect-src 'self'; img-src data:; script-src 'self'; style-src 'self'"
HEADERS = [(b"content-security-policy", POLICY), (b"x-content-type-options", b"nosniff")]


class Service:
    """The endpoints of one model."""

    def __init__(self, batcher: Batcher, most_steps: int):
        self.batcher, self.most_steps, self.metrics = batcher, most_steps, Metrics(batcher)
        self.pipeline, self.held = batcher.pipeline, 0

    def app(self, hosts: Collection[str], token: str) -> Starlette:
        """The ASGI application, which answers only under these host names, or any where there are none, and where
        there is a `token` only those who send it.
        """
        routes = [
            Route(ENDPOINTS[0], self.generate, methods=["POST"]),
            Route(ENDPOINTS[1], self.label, methods=["POST"]),
            Route("/healthz", self.health),
            Route("/metrics", self.figures),
            *(Route(path, self.page) for path in OPEN[:3]),
        ]
        handlers: dict[Any, Any] = dict.fromkeys((*STATUSES, HTTPException, Exception), _answer_error)
        guard = Middleware(Guard, hosts=hosts, token=token, metrics=self.metrics)
        return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)

    async def generate(self, request: Request) -> Response:
        async with self._body(request, LARGEST_TEXT) as body:
            work = await run_in_threadpool(read_generation, body, self.pipeline, self.most_steps)
        self.batcher.submit(work.items)
        if work.is_streamed:
            return StreamingResponse(self._lines(work), media_type="application/x-ndjson")
        return await self._answer(request, work)

    async def label(self, request: Request) -> Response:
        async with self._body(request, LARGEST_PICTURE) as body:
            work = await run_in_threadpool(read_labelling, body, self.pipeline)
        self.batcher.submit(work.items)
        return await self._answer(request, work)

    @asynccontextmanager
    async def _body(self, request: Request, most: int) -> AsyncIterator[Any]:
        """The JSON value that a client sends; within the block its bytes count among those that are held."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Content-Type: expected application/json")
        body, size, is_full = bytearray(), 0, False
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for chunk in request.stream():
                        size += len(chunk)
                        is_full |= size > LARGEST_TEXT and self.held + len(chunk) > MOST_HELD
                        if size <= most and not is_full:
                            body += chunk
                            self.held += len(chunk)
                        elif size > MOST_READ:
                            break  # up to here it is read, as who still sends does not see the answer
            except TimeoutError as error:
                raise HTTPException(408, f"the request was not sent within {BODY_SECONDS:g} seconds") from error
            if size > most:
                raise HTTPException(413, f"the request has more than {most} bytes")
            if is_full:
                raise HTTPException(429, "too many pictures are being sent; ask again", {"Retry-After": "1"})
            if sum(map(body.count, b",[{")) > LARGEST_TEXT:  # in memory they have 30 times the bytes
                raise HTTPException(413, f"the request has more than {LARGEST_TEXT} values")
            yield await run_in_threadpool(documents.parse_json, bytes(body), "the request")
        finally:
            self.held -= len(body)

    async def _answer(self, request: Request, work: Work) -> Response:
        """All images of a request; they leave the queue where the client goes."""
        made = asyncio.ensure_future(self._entries(work))
        gone = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not made.done():
                raise ClientDisconnect
            return Response(
                json.dumps({"created": int(time.time()), "data": made.result()}), media_type="application/json"
            )
        finally:
            gone.cancel()
            made.cancel()
            _cancel(work)

    async def _lines(self, work: Work) -> AsyncIterator[bytes]:
        """One line for each image, in the order of the request, as soon as it is there."""
        try:
            for place in range(len(work.items)):
                try:
                    entry = {"index": place, **await self._entry(work, place)}
                except (Stop, RuntimeError) as error:
                    entry = {"index": place, **_error(_cause(error))}
                yield json.dumps(entry).encode() + b"\n"
        finally:
            _cancel(work)

    async def _entries(self, work: Work) -> list[dict[str, Any]]:
        return [await self._entry(work, place) for place in range(len(work.items))]

    async def _entry(self, work: Work, place: int) -> dict[str, Any]:
        sample = await asyncio.wrap_future(work.items[place].future)
        return await run_in_threadpool(encode_sample, sample, work.tables, work.has_previews)

    async def health(self, request: Request) -> Response:
        failure, model = self.batcher.failure, self.pipeline.engine.model
        facts = {"status": failure or "ok", "model": model.name, "size": model.size, "labels": self.pipeline.tasks}
        return JSONResponse(facts, 503 if failure else 200)

    async def figures(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGES / (request.url.path[1:] or "page.html"))


class Guard:
    """Refuses other hosts and those without the token, and counts every answer."""

    def __init__(self, app: ASGIApp, hosts: Collection[str], token: str, metrics: Metrics):
        self.app, self.hosts, self.metrics = app, hosts, metrics
        self.token = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, path, status = time.monotonic(), scope["path"], 500

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
                status = message["status"]
            await send(message)

        headers, app = dict(scope["headers"]), self.app
        if self.hosts and headers.get(b"host", b"").decode("latin-1") not in self.hosts:
            app = JSONResponse(_error("Host: this service does not have this name"), 403)
        elif (
            self.token and path not in OPEN and not hmac.compare_digest(headers.get(b"authorization", b""), self.token)
        ):
            app = JSONResponse(_error("Authorization: expected Bearer and the token of this service"), 401)
        try:
            await app(scope, receive, send_counted)
        finally:
            known = path if path in ENDPOINTS and status != 405 else "other"
            self.metrics.add(known, status, time.monotonic() - begin)


class TimedProtocol(H11Protocol):
    """HTTP whose clients must have sent a whole head in time, which uvicorn itself waits for without end."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override, unused-ignore]  # as its base
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if self._late is None and is_idle:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        super().data_received(data)
        if self._late is not None and self.cycle is not None and not self.cycle.response_complete:
            self._late.cancel()
            self._late = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _cancel(work: Work) -> None:
    for item in work.items:
        item.leave()


def _error(text: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    message = documents.one_line(text)[:LONGEST_ERROR]
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def _cause(error: Any) -> str:
    text: str = getattr(error, "cause", str(error))
    return text.replace("--task ", "labels: ").replace("--", "")  # flags of commands are fields here


def _answer_error(_: Request, error: Any) -> Response:
    """What a client is told of a refusal, or of a failure of the engine."""
    status, headers, text = STATUSES.get(type(error), 500), None, _cause(error)
    if isinstance(error, HTTPException):
        status, headers, text = error.status_code, error.headers, error.detail
    elif isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.seconds)}
    return JSONResponse(_error(text), status, headers)


SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper ends of the buckets of latencies


class Metrics:
    """Counts replies by path and status, and their latencies; the text form is that of Prometheus."""

    def __init__(self, batcher: Batcher):
        self.batcher, self.seconds = batcher, 0.0
        self.replies: Counter[tuple[str, int]] = Counter()
        self.buckets: Counter[float] = Counter()

    def add(self, path: str, status: int, seconds: float) -> None:
        self.replies[path, status] += 1
        self.buckets.update(end for end in SECONDS if seconds <= end)
        self.seconds += seconds

    def text(self) -> str:
        batcher, replies = self.batcher, sorted(self.replies.items())
        total = sum(self.replies.values())
        families: dict[str, dict[str, float]] = {
            "images_total counter": {"": batcher.images},
            "batches_total counter": {"": batcher.batches},
            "queue_images gauge": {"": batcher.waiting},
            "peak_memory_bytes gauge": {"": peak_memory(batcher)},
            "requests_total counter": {f'{{path="{path}",status="{code}"}}': n for (path, code), n in replies},
            "request_seconds histogram": {
                **{f'_bucket{{le="{end}"}}': self.buckets[end] for end in SECONDS},
                **{'_bucket{le="+Inf"}': total, "_sum": self.seconds, "_count": total},
            },
        }
        lines = []
        for family, values in families.items():
            lines.append(f"# TYPE datasetdm_{family}")
            lines += [f"datasetdm_{family.split()[0]}{labels} {value:.12g}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"


def peak_memory(batcher: Batcher) -> int:
    """Bytes of the GPU that the engine uses, or of this process."""
    device = batcher.pipeline.engine.device
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
