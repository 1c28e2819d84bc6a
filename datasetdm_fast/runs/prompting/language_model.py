"""Prompts from a language model: an OpenAI-compatible endpoint or a local program; replies are checked and kept."""

import hashlib
import ipaddress
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib import error, parse, request

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.class_tables import ClassTable, spoken
from datasetdm_fast.engine.labels.words import find_classes
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.prompting.grammar import Sentence
from datasetdm_fast.untrusted.documents import one_line

KEY_VARIABLES = ("DATASETDM_LLM_KEY", "OPENAI_API_KEY")
LARGEST_REPLY = 2**20  # bytes
LARGEST_REPLIES_FILE = 2**28  # bytes
SECONDS = 120.0  # for one reply
TRIES = 4  # of one request
LONGEST_WAIT = 30.0  # seconds before a request is sent again
AT_ONCE = 25  # prompts asked for in one request
LEAST_WORDS, MOST_WORDS = 4, 50  # of a prompt: 77 tokens of CLIP hold about 50 words
MOST_CHARACTERS = 350
MOST_FOREIGN = 8  # characters beyond ASCII: quotes, dashes and accents; of other scripts each takes several tokens
UNWANTED = re.compile(r"[\x00-\x1f\x7f<>{}\[\]\\`;|$#@=*_^~]|https?:|www\.", re.IGNORECASE)

GUIDE = """You write captions of photographs. They are given to a text-to-image model, whose pictures then teach a
computer vision model to find {what}. Write {count} captions that all show: {wanted}.
Rules: one sentence of at least {least} and at most 30 English words; name {wanted} in plain words; describe things
that can be seen - kind, number, colour, what they do, place, light, weather, distance, viewpoint; make the captions
differ in all of these; name none of these other things: {others}; no brand, no text in the picture, no names of people.
Answer with one JSON list of {count} strings and nothing else. This is request {number} of its kind."""

Ask = Callable[[str], str]  # the text of a request -> the text of the reply


class UnusableReply(Exception):
    """A reply that cannot be used; the message is the reason that is counted."""


@dataclass
class Replies:
    """The replies so far, kept in a file: the same requests are answered from it, without asking again."""

    path: Path
    ask: Ask
    most_requests: int
    secret: str = ""
    asked: int = 0  # requests that were sent now
    used: int = 0  # those and the ones that the file answers
    known: dict[str, tuple[str, str]] = field(default_factory=dict)  # digest of a request -> reply, what was wrong

    def __post_init__(self) -> None:
        storage.make_folder(self.path.parent)  # before anything is asked, as a reply may have its price
        if not self.path.exists():
            return
        text = storage.read(self.path, LARGEST_REPLIES_FILE).decode(errors="replace")
        for line in text.split("\n")[:-1]:  # what follows the last line end was cut off while it was written
            try:
                row = json.loads(line)
                self.known[row["request"]] = str(row["reply"]), str(row["problem"])
            except (ValueError, TypeError, KeyError):
                raise Refused(
                    f"{self.path}: one of its lines is not a stored reply",
                    "Delete the file to ask the language model again.",
                ) from None

    def __call__(self, text: str) -> str:
        key = hashlib.sha256(text.encode()).hexdigest()
        if self.used >= self.most_requests:  # counted with the file, so that the same line ends with the same list
            raise UnusableReply("the limit of --llm-requests was reached")
        self.used += 1
        if key not in self.known:
            self.asked += 1
            try:
                reply, problem = self.ask(text), ""
            except UnusableReply as why:
                reply, problem = "", str(why)
            if self.secret and self.secret in _unescaped(reply):
                reply, problem = "", "the reply repeats the key"
            self._keep(key, reply, problem)
        reply, problem = self.known[key]
        if problem:
            raise UnusableReply(problem)
        return reply

    def _keep(self, key: str, reply: str, problem: str) -> None:
        self.known[key] = reply, problem
        line = json.dumps({"request": key, "reply": reply, "problem": problem}).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                file.truncate(_whole_lines(self.path))
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as stop:
            raise storage.refusal(stop, self.path) from stop


def _unescaped(reply: str) -> str:
    """The reply with the characters that its JSON escapes stand for."""
    return re.sub(r"\\u([0-9a-fA-F]{4})|\\(.)", lambda one: chr(int(one[1], 16)) if one[1] else one[2], reply)


def _whole_lines(path: Path) -> int:
    """Bytes of the file without the half line that a killed process may have left."""
    return path.read_bytes().rfind(b"\n") + 1


def written(
    plan: Sequence[tuple[str, ...]],
    classes: Sequence[str],
    replies: Replies,
    on_progress: Callable[[int], None],
    own: ClassTable | None = None,
) -> tuple[list[Sentence], Counter[str]]:
    """One sentence for each entry of the plan as far as replies gave one, and why others were left out."""
    wanted = Counter(plan)
    found: dict[tuple[str, ...], list[str]] = {names: [] for names in wanted}
    reasons: Counter[str] = Counter()
    used: dict[frozenset[str], set[str]] = {frozenset(names): set() for names in wanted}  # a pair in either order
    for names, count in wanted.items():
        kept, said, number, empty = found[names], used[frozenset(names)], 0, 0
        while len(kept) < count and empty < 2:
            number += 1
            before = len(kept)
            try:
                reply = replies(guide(names, classes, AT_ONCE, number, own))
                for prompt in items(reply):
                    if reason := why_not(prompt, names, classes, said, own):
                        reasons[reason] += 1
                    elif len(kept) < count:
                        kept.append(" ".join(prompt.split()))
                        said.add(kept[-1].lower())
            except UnusableReply as problem:
                reasons[str(problem)] += 1
            empty = 0 if len(kept) > before else empty + 1
            on_progress(sum(map(len, found.values())))
    turn = {names: iter(prompts) for names, prompts in found.items()}
    sentences = [
        Sentence(prompt, tuple(one for one in classes if one in names), names[0])
        for names in plan
        if (prompt := next(turn[names], None)) is not None
    ]
    return sentences, reasons


def guide(names: Sequence[str], classes: Sequence[str], count: int, number: int, own: ClassTable | None = None) -> str:
    """The text of a request."""
    others = [name for name in classes if name not in names]
    return GUIDE.format(
        what=", ".join(spoken(classes, own)),
        wanted=" and ".join(spoken(names, own)),
        others=", ".join(spoken(others, own)) or "none",
        count=count,
        least=LEAST_WORDS,
        number=number,
    ).replace("\n", " ")


def items(reply: str) -> list[Any]:
    """The list that a reply holds, also where it stands in a code fence, between sentences or in an object."""
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        start, end = reply.find("["), reply.rfind("]")
        try:
            value = json.loads(reply[max(start, 0) : end + 1])
        except (ValueError, RecursionError):
            raise UnusableReply("the reply is not JSON") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else None
    if not isinstance(value, list):
        raise UnusableReply("the reply is not a JSON list")
    return value


def why_not(
    prompt: Any, names: Sequence[str], classes: Sequence[str], said: Container[str], own: ClassTable | None = None
) -> str:
    """Why a prompt is left out, `said` being those that are used, in lower case; nothing where it is used."""
    if not isinstance(prompt, str):
        return "not a text"
    words = prompt.split()
    if not LEAST_WORDS <= len(words) <= MOST_WORDS or len(prompt) > MOST_CHARACTERS:
        return "too short or too long"
    if UNWANTED.search(prompt) or not prompt.isprintable():
        return "holds marks that no caption has"
    if sum(not letter.isascii() for letter in prompt) > MOST_FOREIGN:
        return "is not English"
    there = set(find_classes(prompt, classes, own))
    if not set(names) <= there:
        return "does not name its class"
    if there - set(names):
        return "names another class"
    if " ".join(words).lower() in said:
        return "is there twice"
    return ""


# Endpoints ------------------------------------------------------------------------------------------------------------
def key_of(environment: Mapping[str, str]) -> str:
    """The key of the endpoint; it comes from the environment alone, where no process list shows it."""
    return next((environment[name].strip() for name in KEY_VARIABLES if environment.get(name, "").strip()), "")


def check_url(url: str, key: str) -> str:
    """The address of the endpoint's chat completions."""
    try:
        parts = parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("http", "https"):
        raise Refused(f"--llm-url {one_line(url)}: not the address of an endpoint", "Write https://HOST/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise Refused(
            "--llm-url: it contains a user name, a password or a query",
            f"Write https://HOST/v1 and set {KEY_VARIABLES[0]} in the environment.",
        )
    if key and parts.scheme == "http" and not _is_loopback(host):
        raise Refused(f"--llm-url {one_line(url)}: the key would travel unencrypted", "Use https.")
    path = parts.path.rstrip("/")
    ending = "" if path.endswith("/chat/completions") else "/chat/completions"
    return f"{parts.scheme}://{parts.netloc}{path}{ending}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirect(request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """An OpenAI-compatible endpoint; it is asked again, ever later, where it is busy or silent."""

    def __init__(self, url: str, model: str, key: str, sleep: Callable[[float], None] = time.sleep):
        self.url, self.model, self.key, self.sleep = check_url(url, key), model, key, sleep
        # a proxy would get what is meant for this machine, the key of an unencrypted request among it
        is_here = _is_loopback(parse.urlsplit(self.url).hostname or "")
        proxies = [request.ProxyHandler({})] if is_here else []
        self._open = request.build_opener(_NoRedirect(), *proxies).open

    def __call__(self, text: str) -> str:
        for turn in range(TRIES):
            problem, wait = "", 2.0**turn
            try:
                return _content(_within(SECONDS, self._fetched, text))
            except error.HTTPError as answer:
                problem = f"answered with status {answer.code}"
                if 300 <= answer.code < 400:
                    problem = "answered with a redirect, which is not followed"
                wait = _asked_to_wait(answer.headers.get("Retry-After"), wait)
                answer.close()
                if answer.code != 429 and answer.code < 500:
                    break
            except (error.URLError, HTTPException, OSError, ValueError) as stop:
                reason = getattr(stop, "reason", stop)
                problem = f"cannot be reached or broke off ({one_line(str(reason) or type(reason).__name__)})"
            if turn + 1 < TRIES:
                self.sleep(min(wait, LONGEST_WAIT))
        shown = problem.replace(self.key, "***") if self.key else problem
        raise Missing(
            f"--llm-url {self.url}: {shown}",
            "Check address, model and key, then run the same command again; the replies so far are kept.",
        )

    def _fetched(self, text: str) -> bytes:
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": text}]}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        with self._open(request.Request(self.url, body, headers), timeout=SECONDS) as answer:
            found = answer.read(LARGEST_REPLY + 1)
            if answer.length and len(found) <= LARGEST_REPLY:
                raise ConnectionError("the reply ended too early")
        if len(found) > LARGEST_REPLY:
            raise UnusableReply("the reply is longer than 1 MiB")
        return found


def _within(seconds: float, call: Callable[[str], bytes], text: str) -> bytes:
    """The call's result; a reply that comes in drops never lets a socket's own limit of time expire."""
    results: SimpleQueue[tuple[bytes, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            results.put((call(text), None))
        except BaseException as stop:
            results.put((b"", stop))

    threading.Thread(target=run, daemon=True).start()
    try:
        found, stop = results.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no whole reply within {seconds:.0f} s") from None
    if stop is not None:
        raise stop
    return found


def _asked_to_wait(header: str | None, wait: float) -> float:
    return float(header) if header and re.fullmatch(r"\d{1,4}", header) else wait


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UnusableReply("the endpoint's answer has another form than OpenAI's") from None
    if not isinstance(content, str):
        raise UnusableReply("the endpoint's answer has another form than OpenAI's")
    return content


class Program:
    """A local program that reads a request on stdin and writes the reply to stdout."""

    def __init__(self, line: str):
        try:
            self.arguments = shlex.split(line)
        except ValueError as stop:
            raise Refused(
                f"--llm-command: {stop}", 'Quote it as a shell would: --llm-command "my-model --short".'
            ) from None
        if not self.arguments:
            raise Refused("--llm-command: names no program", 'For example --llm-command "my-model --short".')

    def __call__(self, text: str) -> str:
        try:
            process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name not in KEY_VARIABLES},
            )
        except OSError as stop:
            raise Missing(
                f"--llm-command {self.arguments[0]}: cannot be started ({stop.strerror})",
                "Name a program that is installed.",
            ) from stop
        try:
            found, said = process.communicate(text.encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise self._failed(f"did not answer within {SECONDS:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            last = one_line(said.decode(errors="replace").strip().rpartition("\n")[2])
            raise self._failed(f"ended with an error{f' ({last})' if last else ''}")
        if len(found) > LARGEST_REPLY:
            raise UnusableReply("the reply is longer than 1 MiB")
        return found.decode(errors="replace")

    def _failed(self, how: str) -> Missing:
        return Missing(
            f"--llm-command {self.arguments[0]}: {how}",
            "Try the program by hand, then run the same command again; the replies so far are kept.",
        )
