"""The page of a run over HTTP, for browsers of this machine alone: files are read, marks of a review written."""

import errno
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.gallery import review
from datasetdm_fast.untrusted import documents

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")  # by which a browser of this machine may ask: any other name is a page of another site
FIRST_PORT, TRIED_PORTS, HTTP_PORT = 8765, 32, 80
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".jpg": "image/jpeg",
    ".png": "image/png",
}
HIDDEN = ("state", "exports", "review")  # folders whose files are never given out
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
PIECE = 1 << 18  # bytes of a file that are sent at once
LARGEST_REQUEST = 1 << 20  # bytes of marks
IDLE_SECONDS = 60.0  # after which a connection that asks for nothing is closed
RANGE = re.compile(r"bytes=(?=.*\d)(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True)
class ServedRun:
    """A run folder that is given out; where its samples are elsewhere, `bring` gives the copy of a file by its name
    inside the run, None where there is none.
    """

    folder: Path
    command_path: str  # names the run in the commands that the page shows, empty where none takes it
    review: review.Review
    bring: Callable[[str], Path | None] | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> "ServedRun":
        return cls(folder.resolve(), str(folder.resolve()), review.FolderReview(folder.resolve()))


class RunServer(ThreadingHTTPServer):
    """Serves a run on this machine's own address, below /NAME/, and one beside it below /against/NAME/."""

    daemon_threads = True
    allow_reuse_address = False  # or a port that another server holds would seem to be free

    def __init__(self, run: ServedRun, port: int, against: ServedRun | None = None):
        self.run = run
        self.prefix = f"/{_quoted(run.folder)}/"
        self.runs = {self.prefix: run}  # by the prefix of their addresses
        self.against = ""
        if against is not None:
            beside = "against" if self.prefix != "/against/" else "beside"  # no address is of both
            self.against = f"/{beside}/{_quoted(against.folder)}/"
            self.runs[self.against] = against
        self.marking = threading.Lock()
        super().__init__((LOOPBACK, port), Handler)
        self.hosts = hosts_of(self.server_port)
        self.address = f"http://{LOOPBACK}:{self.server_port}{self.prefix}gallery/index.html"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says what went wrong; a browser that goes away in the middle of an answer is no error."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def _quoted(folder: Path) -> str:
    """The name of a run folder in an address; bytes of it that are no UTF-8, which no page could read, become marks."""
    return quote(os.fsencode(folder.name).decode(errors="replace") or "run")


def hosts_of(port: int) -> frozenset[str]:
    """What a browser of this machine calls a server on a port: it does not say the usual one."""
    return frozenset(f"{name}:{port}" for name in NAMES) | (frozenset(NAMES) if port == HTTP_PORT else frozenset())


def opened(run: ServedRun, port: int, say: Callable[[str], None], against: ServedRun | None = None) -> RunServer:
    """A server on `port` or, where it is taken, on the next that is free."""
    for wanted in range(port, min(port + TRIED_PORTS, 2**16)):
        try:
            server = RunServer(run, wanted, against)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            raise Missing(f"{LOOPBACK}:{wanted}: {error.strerror}", "Choose another --port.") from error
        if wanted != port:
            say(f"port {port} is taken, so it is {wanted}")
        return server
    raise Missing(f"--port {port}: it and the {TRIED_PORTS - 1} ports after it are in use", "Choose another --port.")


class Handler(BaseHTTPRequestHandler):
    """Answers one browser: GET and HEAD of the run's files, and PUT of its review."""

    server: RunServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        """Marks of samples; only the page itself may send them, as a page of another site has another origin."""
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > LARGEST_REQUEST:
            self.close_connection = True
            return self._refuse(413)
        content = self.rfile.read(int(size))
        is_own = self.headers.get("Origin") in {f"http://{host}" for host in self.server.hosts}
        if not self._is_asked_here() or not is_own:
            return self._refuse(403)
        if self._path() != f"{self.server.prefix}review":
            return self._refuse(404)
        try:
            marks = review.parse_marks(documents.parse_json(content.decode(), "the marks"))
            with self.server.marking:
                self.server.run.review.change(marks)
        except (ValueError, Refused):
            return self._refuse(400)
        except Missing:
            return self._refuse(507)
        self._send(204, b"", "")

    def _answer(self) -> None:
        if not self._is_asked_here():
            return self._refuse(403)
        path = self._path()
        if path in ("/", self.server.prefix):
            return self._send(302, b"", "", {"Location": f"{self.server.prefix}gallery/index.html"})
        if path == "/favicon.ico":  # which browsers ask for without being told to
            return self._send(204, b"", "")
        if path == f"{self.server.prefix}review":
            run = self.server.run
            try:
                marks = sorted(run.review.read().items())
            except (Missing, Refused):  # the lists of marks cannot be read
                return self._refuse(500)
            told = {"path": run.command_path, "marks": marks, "against": self.server.against}
            return self._send(200, json.dumps(told).encode(), "application/json")
        try:
            found = self._file(path)
        except Missing:  # the store does not answer
            return self._refuse(502)
        return self._send_file(found) if found else self._refuse(404)

    def _path(self) -> str:
        """The path of the address that is asked for, empty where it is no address."""
        try:
            return urlsplit(self.path).path
        except ValueError:
            return ""

    def _is_asked_here(self) -> bool:
        """Whether the browser took this server for what it is: another name may be one that was pointed here."""
        return self.headers.get("Host", "") in self.server.hosts

    def _file(self, path: str) -> Path | None:
        """The file of a run folder that a path of an address names, None where it is none that may be read."""
        prefix = next((each for each in self.server.runs if path.startswith(each)), None)
        if prefix is None:
            return None
        run, parts = self.server.runs[prefix], unquote(path.removeprefix(prefix)).split("/")
        if len(parts) < 2 or parts[0] in HIDDEN or any(part.startswith(".") or not part for part in parts):
            return None
        if "\0" in path or any("\0" in part or "\\" in part for part in parts):
            return None
        found = run.folder.joinpath(*parts)
        try:
            if run.bring and found.suffix in KINDS and not found.exists():
                return run.bring("/".join(parts))
            whole = found.resolve(strict=True)
        except OSError:
            return None
        is_ours = whole.is_relative_to(run.folder) and whole.is_file() and whole.suffix in KINDS
        return whole if is_ours else None

    def _send_file(self, path: Path) -> None:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())  # another file may have the name by now
            size, time = found.st_size, found.st_mtime_ns
            tag, kind = f'"{size:x}-{time:x}"', KINDS[path.suffix]
            if self.headers.get("If-None-Match") == tag:
                return self._send(304, b"", "", {"ETag": tag})
            first, stop, headers = 0, size, {"ETag": tag, "Accept-Ranges": "bytes"}
            if asked := RANGE.fullmatch(self.headers.get("Range", "").strip()):
                begin, end = asked.groups()
                if begin:
                    first, stop = int(begin), min(int(end) + 1 if end else size, size)
                else:
                    first = max(size - int(end), 0)
                if first >= stop:
                    return self._send(416, b"", "", {"Content-Range": f"bytes */{size}"})
                headers["Content-Range"] = f"bytes {first}-{stop - 1}/{size}"
            self._begin(206 if "Content-Range" in headers else 200, stop - first, kind, headers)
            file.seek(first)
            while self.command == "GET" and first < stop and (piece := file.read(min(PIECE, stop - first))):
                self.wfile.write(piece)
                first += len(piece)

    def _refuse(self, status: int) -> None:
        self._send(status, f"{status}\n".encode(), "text/plain; charset=utf-8")

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self._begin(status, len(content), kind, headers or {})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(self, status: int, size: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        if kind:
            self.send_header("Content-Type", kind)
        if status not in (204, 304):
            self.send_header("Content-Length", str(size))
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself, other methods among it: without a page that repeats what was asked."""
        self.close_connection = True
        self._begin(405 if code == 501 else code, 0, "", {"Allow": "GET, HEAD, PUT"} if code == 501 else {})

    def version_string(self) -> str:
        return "datasetdm-fast"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not told: a page makes thousands."""
