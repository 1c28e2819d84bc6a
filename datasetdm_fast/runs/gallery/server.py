"""Serves the page of a run over HTTP to browsers of this machine, and stores marks and corrections of a review."""

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.gallery import review
from datasetdm_fast.untrusted import documents

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost", "[::1]")  # any other may be another site's name for this address (DNS rebinding)
FIRST_PORT, TRIED_PORTS, HTTP_PORT = 8765, 32, 80
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".jpg": "image/jpeg",
    ".png": "image/png",
}
HIDDEN = ("state", "exports", "review")  # folders whose files are never served
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
LARGEST_REQUEST = 1 << 20  # bytes of marks
IDLE_SECONDS = 60.0  # after which a connection without a request is closed


@dataclass(frozen=True)
class ServedRun:
    """A run that is served; where files are not in its folder, `fetch` gives a copy by their names, or None."""

    folder: Path
    command_path: str  # names the run in the commands that the page shows
    review: review.Review
    fetch: Callable[[str], Path | None] | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> "ServedRun":
        return cls(folder.resolve(), str(folder.resolve()), review.Review(folder.resolve()))


class RunServer(ThreadingHTTPServer):
    """Serves a run on this machine's own address, below /NAME/, and another below /against/NAME/."""

    daemon_threads = True
    # so that an open page finds the server again; elsewhere a port that another server holds would seem to be free
    allow_reuse_address = sys.platform == "linux"

    def __init__(self, run: ServedRun, port: int, against: ServedRun | None = None):
        self.run = run
        self.prefix = f"/{_address_name(run.folder)}/"
        self.runs = {self.prefix: run}  # by the prefix of their addresses
        self.against = ""
        if against is not None:
            place = "against" if self.prefix != "/against/" else "beside"  # no address is of both
            self.against = f"/{place}/{_address_name(against.folder)}/"
            self.runs[self.against] = against
        self.marking = threading.Lock()
        super().__init__((LOOPBACK, port), Handler)
        self.hosts = hosts_of(self.server_port)
        self.address = f"http://{LOOPBACK}:{self.server_port}{self.prefix}gallery/index.html"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints the traceback, unless the browser went away in the middle of an answer."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def _address_name(folder: Path) -> str:
    """The name of a run folder in an address; bytes of it that are no UTF-8, which no page could read, become marks."""
    return quote(os.fsencode(folder.name).decode(errors="replace") or "run")


def hosts_of(port: int) -> frozenset[str]:
    """What a browser of this machine calls a server on a port: it leaves out the usual one."""
    return frozenset(f"{name}:{port}" for name in HOSTS) | (frozenset(HOSTS) if port == HTTP_PORT else frozenset())


def open_server(
    run: ServedRun, port: int, on_message: Callable[[str], None], against: ServedRun | None = None
) -> RunServer:
    """A server on `port` or, where it is taken, on the next that is free."""
    for number in range(port, min(port + TRIED_PORTS, 2**16)):
        try:
            server = RunServer(run, number, against)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            raise Missing(f"{LOOPBACK}:{number}: {error.strerror}", "Choose another --port.") from error
        if number != port:
            on_message(f"port {port} is taken, so it is {number}")
        return server
    raise Missing(f"--port {port}: it and the {TRIED_PORTS - 1} ports after it are in use", "Choose another --port.")


class Handler(SimpleHTTPRequestHandler):
    """Answers one browser: GET and HEAD of the run's files, and GET and PUT of its marks and corrections."""

    server: RunServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True  # else small files wait 40 ms for the acknowledgement of their heads
    extensions_map = CONTENT_TYPES

    def send_head(self) -> Any:
        return None if self._answer_page() else super().send_head()

    def _answer_page(self) -> bool:
        """Answers all but requests for files of a run, and refuses other hosts; returns whether it has answered."""
        self._path = ""
        if self.headers.get("Host", "") not in self.server.hosts:
            self.send_error(403)
        elif (path := _path_of(self.path)) in ("/", self.server.prefix):
            self._send(302, b"", {"Location": f"{self.server.prefix}gallery/index.html"})
        elif path == "/favicon.ico":  # which browsers request of any server
            self._send(204)
        elif path == f"{self.server.prefix}review":
            self._send_review()
        else:
            try:
                self._path = str(self._find_file(path) or "")
                return False
            except Missing:  # the store does not answer
                self.send_error(502)
        return True

    def _send_review(self) -> None:
        run = self.server.run
        try:
            marks = sorted(run.review.read().items())
            corrections = {f"{k:08d}": each.facts() for k, each in run.review.read_corrections().items()}
        except (Missing, Refused, ValueError):  # the lists of marks cannot be read
            return self.send_error(500)
        content = {"path": run.command_path, "marks": marks, "against": self.server.against, "corrections": corrections}
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def do_PUT(self) -> None:
        """Marks of samples; only the page itself may send them, as a page of another site has another origin."""
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > LARGEST_REQUEST:
            return self.send_error(413)
        content, hosts = self.rfile.read(int(size)), self.server.hosts
        if self.headers.get("Host") not in hosts or self.headers.get("Origin") not in {f"http://{h}" for h in hosts}:
            return self.send_error(403)
        if _path_of(self.path) != f"{self.server.prefix}review":
            return self.send_error(404)
        try:
            sent = documents.parse_json(content.decode(), "the marks")
            marks, corrections = review.parse_marks(sent), review.parse_sent_corrections(sent)
            before = review.parse_sent_corrections(sent, "before")
            with self.server.marking:
                if marks:
                    self.server.run.review.change(marks)
                if corrections:
                    self.server.run.review.correct(corrections, before)
        except (ValueError, Refused):
            return self.send_error(400)
        except Missing:
            return self.send_error(507)
        self._send(204)

    def _find_file(self, path: str) -> Path | None:
        """The file of a run folder that a path of an address names, None where it is none that may be read."""
        prefix = next((prefix for prefix in self.server.runs if path.startswith(prefix)), None)
        if prefix is None:
            return None
        run, parts = self.server.runs[prefix], unquote(path.removeprefix(prefix)).split("/")
        if len(parts) < 2 or parts[0] in HIDDEN or any(not part or part[0] == "." or "\\" in part for part in parts):
            return None
        try:
            file = run.folder.joinpath(*parts)
            if run.fetch and file.suffix in CONTENT_TYPES and not file.exists():
                return run.fetch("/".join(parts))
            file = file.resolve(strict=True)
        except (OSError, ValueError):  # also a NUL byte
            return None
        return file if file.is_relative_to(run.folder) and file.is_file() and file.suffix in CONTENT_TYPES else None

    def translate_path(self, path: str) -> str:
        """The file that the library is to send, empty where there is none."""
        return self._path

    def _send(self, status: int, content: bytes = b"", headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Without the library's page, which would repeat the request; other methods are 405, not its 501."""
        self.close_connection = True
        self._send(405 if code == 501 else code, headers={"Allow": "GET, HEAD, PUT"} if code == 501 else {})

    def version_string(self) -> str:
        return "datasetdm-fast"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not reported: a page makes thousands."""


def _path_of(address: str) -> str:
    """The path of the address of a request, empty where it is no address."""
    try:
        return urlsplit(address).path
    except ValueError:
        return ""
