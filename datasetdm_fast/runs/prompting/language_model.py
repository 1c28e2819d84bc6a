"""Prompts from a language model: requests, the cache of its replies, and the checks that a prompt must pass."""

import asyncio
import hashlib
import ipaddress
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.class_tables import ClassTable, find_classes, spoken
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.prompting.grammar import Sentence
from datasetdm_fast.untrusted.documents import one_line

KEY_VARIABLES = ("DATASETDM_LLM_KEY", "OPENAI_API_KEY")
LARGEST_REPLY = 2**20  # bytes
SECONDS = 120.0  # for one reply
MOST_TRIES = 4  # of one request
LONGEST_WAIT = 30.0  # seconds before a retry
COMPLETIONS = "/chat/completions"  # the end of the address
REMEDY = "then run the same command again; the replies so far are kept."

Ask = Callable[[str], str]  # the text of a request -> the text of the reply


class UnusableReply(Exception):
    """A reply that cannot be used; the message is the reason that is counted."""


class Endpoint:
    """An OpenAI-compatible endpoint; a request is retried after growing delays where it is busy or silent."""

    def __init__(self, url: str, model: str, key: str):
        self.url, self.model, self.key = check_url(url, key), model, key
        try:
            import httpx2
        except ImportError as error:
            raise Missing(
                "--llm-url: httpx2 is not installed", "Install it with: pip install 'datasetdm-fast[prompts]'."
            ) from error
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL as error:  # such as a name that no host may have
            raise Refused(f"--llm-url {one_line(url)}: {one_line(str(error))}", "Write https://HOST/v1.") from error
        self._library = httpx2
        try:
            self._open_client()
        except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:  # of SOCKS without its library
            raise Missing(
                f"--llm-url: the proxy or certificates that the environment names: {one_line(str(error))}",
                "Correct HTTPS_PROXY, ALL_PROXY or SSL_CERT_FILE, or install what is missing.",
            ) from error

    def _open_client(self) -> Any:
        # a proxy would read requests to this machine, with the key of an unencrypted one
        is_proxied = not _is_loopback(urlsplit(self.url).hostname or "")
        return self._library.AsyncClient(trust_env=is_proxied, timeout=SECONDS)

    def __call__(self, text: str) -> str:
        wait = 0.0
        for attempt in range(MOST_TRIES):
            time.sleep(min(wait, LONGEST_WAIT))
            wait = 2.0**attempt
            try:  # the limit of time is also that of a reply that comes in drops
                status, headers, body = asyncio.run(asyncio.wait_for(self._post(text), SECONDS))
            except (TimeoutError, self._library.HTTPError) as error:
                reason = one_line(str(error)) or f"no whole reply within {SECONDS:.0f} s"
                problem = f"cannot be reached or broke off ({reason})"
                continue
            if status == 200:
                return _content(body)
            # a redirect would carry the key to another host
            is_redirect = 300 <= status < 400
            problem = f"answered with {'a redirect, which is not followed' if is_redirect else f'status {status}'}"
            if status != 429 and status < 500:
                break
            if re.fullmatch(r"\d{1,4}", seconds := headers.get("Retry-After", "")):
                wait = float(seconds)
        shown = problem.replace(self.key, "***") if self.key else problem
        raise Missing(f"--llm-url {self.url}: {shown}", f"Check address, model and key, {REMEDY}")

    async def _post(self, text: str) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the reply."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with self._open_client() as client, client.stream("POST", self.url, json=body, headers=headers) as reply:
            content = b""
            async for chunk in reply.aiter_bytes():
                content += chunk
                if len(content) > LARGEST_REPLY:
                    raise UnusableReply("the reply is longer than 1 MiB")
            return reply.status_code, reply.headers, content


def check_url(url: str, key: str) -> str:
    """The address of the endpoint's chat completions."""
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.port != 0 and parts.scheme in ("http", "https") else None
    except ValueError:
        host = None
    if not host:
        raise Refused(f"--llm-url {one_line(url)}: not the address of an endpoint", "Write https://HOST/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise Refused(
            "--llm-url: it contains a user name, a password or a query",
            f"Write https://HOST/v1 and set {KEY_VARIABLES[0]} in the environment.",
        )
    if not key.isascii() or not key.isprintable():
        raise Refused(
            "--llm-url: the key holds a character that a request cannot", f"Copy it once more to {KEY_VARIABLES[0]}."
        )
    if key and parts.scheme == "http" and not _is_loopback(host):
        raise Refused(f"--llm-url {one_line(url)}: the key would travel unencrypted", "Use https.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix(COMPLETIONS)}{COMPLETIONS}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _content(body: bytes) -> str:
    """The text of a reply in OpenAI's form."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise UnusableReply("the endpoint's answer has another form than OpenAI's")
    return content


LARGEST_CACHE = 2**28  # bytes
PROMPTS_PER_REQUEST = 25
LEAST_WORDS, MOST_WORDS = 4, 50  # of a prompt: 77 tokens of CLIP hold about 50 words
MOST_CHARACTERS = 350
MOST_FOREIGN = 8  # characters beyond ASCII: quotes, dashes and accents; of other scripts each takes several tokens
UNWANTED = re.compile(r"[\x00-\x1f\x7f<>{}\[\]\\`;|$#@=*_^~]|https?:|www\.", re.IGNORECASE)

REQUEST = """You write captions of photographs. They are given to a text-to-image model, whose pictures then teach a
computer vision model to find {what}. Write {count} captions that all show: {shown}.
Rules: one sentence of at least {least} and at most 30 English words; name {shown} in plain words; describe things
that can be seen - kind, number, colour, what they do, place, light, weather, distance, viewpoint; make the captions
differ in all of these; name none of these other things: {others}; no brand, no text in the picture, no names of people.
Answer with one JSON list of {count} strings and nothing else. This is request {number} of its kind."""


@dataclass
class Replies:
    """A language model whose replies are cached in a file: requests that the file answers are not sent. Replies of
    another model are none of these; earlier versions did not store whose they are.
    """

    path: Path
    ask: Ask
    most_requests: int
    secret: str = ""
    model: str = ""
    answered: int = 0  # requests, those that the file answered among them
    cached: dict[str, tuple[str, str]] = field(default_factory=dict)  # digest of a request -> reply, what is wrong

    def __post_init__(self) -> None:
        storage.make_folder(self.path.parent)  # before anything is sent, as a reply may have its price
        if not self.path.exists():
            return
        content = storage.read(self.path, LARGEST_CACHE)
        whole = content.rfind(b"\n") + 1  # the process may have been killed while it wrote the line that follows
        if whole < len(content):
            os.truncate(self.path, whole)
        for line in content[:whole].decode(errors="replace").splitlines():
            try:
                row = json.loads(line)
                if row.get("model", self.model) == self.model:
                    self.cached[row["request"]] = str(row["reply"]), str(row["problem"])
            except (ValueError, TypeError, KeyError, AttributeError):
                raise Refused(
                    f"{self.path}: one of its lines is not a stored reply",
                    "Delete the file to ask the language model again.",
                ) from None

    def __call__(self, text: str) -> str:
        """The reply to a request; raises UnusableReply."""
        key = hashlib.sha256(text.encode()).hexdigest()
        if self.answered >= self.most_requests:  # with those of the file: the same command ends with the same list
            raise UnusableReply("the limit of --llm-requests was reached")
        self.answered += 1
        if key not in self.cached:
            try:
                reply, problem = self.ask(text), ""
                if self.secret and self.secret in _decode_escapes(reply):
                    reply, problem = "", "the reply repeats the key"
            except UnusableReply as error:
                reply, problem = "", str(error)
            self.cached[key] = reply, problem
            row = {"request": key, "model": self.model, "reply": reply, "problem": problem}
            with storage.refusing(self.path), self.path.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        reply, problem = self.cached[key]
        if problem:
            raise UnusableReply(problem)
        return reply


def _decode_escapes(reply: str) -> str:
    """The reply with the characters that its JSON escapes stand for."""
    return re.sub(r"\\u([0-9a-fA-F]{4})|\\(.)", lambda match: chr(int(match[1], 16)) if match[1] else match[2], reply)


def collect_sentences(
    plan: Sequence[tuple[str, ...]],
    classes: Sequence[str],
    replies: Callable[[str], str],
    on_progress: Callable[[int], None],
    table: ClassTable | None = None,
) -> tuple[list[Sentence], Counter[str]]:
    """One sentence for each entry of the plan as far as replies gave one, and the reasons of rejected prompts."""
    counts = Counter(plan)
    prompts: dict[tuple[str, ...], list[str]] = {names: [] for names in counts}
    rejected: Counter[str] = Counter()
    used: dict[frozenset[str], set[str]] = {frozenset(names): set() for names in counts}  # a pair in either order
    for names, count in counts.items():
        accepted, texts, number, useless = prompts[names], used[frozenset(names)], 0, 0
        while len(accepted) < count and useless < 2:
            number += 1
            before = len(accepted)
            try:
                for prompt in parse_list(replies(request_text(names, classes, PROMPTS_PER_REQUEST, number, table))):
                    if reason := rejection_reason(prompt, names, classes, texts, table):
                        rejected[reason] += 1
                    elif len(accepted) < count:
                        accepted.append(" ".join(prompt.split()))
                        texts.add(accepted[-1].lower())
            except UnusableReply as problem:
                rejected[str(problem)] += 1
            useless = 0 if len(accepted) > before else useless + 1
            on_progress(sum(map(len, prompts.values())))
    waiting = {names: iter(accepted) for names, accepted in prompts.items()}
    sentences = [
        Sentence(prompt, tuple(name for name in classes if name in names), names[0])
        for names in plan
        if (prompt := next(waiting[names], None)) is not None
    ]
    return sentences, rejected


def request_text(
    names: Sequence[str], classes: Sequence[str], count: int, number: int, table: ClassTable | None
) -> str:
    """The text of a request for captions that show these classes and no others."""
    others = [name for name in classes if name not in names]
    return REQUEST.format(
        what=", ".join(spoken(classes, table)),
        shown=" and ".join(spoken(names, table)),
        others=", ".join(spoken(others, table)) or "none",
        count=count,
        least=LEAST_WORDS,
        number=number,
    ).replace("\n", " ")


def parse_list(reply: str) -> list[Any]:
    """The list in a reply, also where it stands in a code fence, between sentences or in an object."""
    for text in (reply, reply[max(reply.find("["), 0) : reply.rfind("]") + 1]):
        with suppress(ValueError, RecursionError):
            value = json.loads(text)
            break
    else:
        raise UnusableReply("the reply is not JSON")
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else None
    if not isinstance(value, list):
        raise UnusableReply("the reply is not a JSON list")
    return value


def rejection_reason(
    prompt: Any, names: Sequence[str], classes: Sequence[str], used: Container[str], table: ClassTable | None = None
) -> str:
    """Why a prompt is left out, empty where it is not; `used` are accepted prompts in lower case."""
    if not isinstance(prompt, str):
        return "not a text"
    words = prompt.split()
    if not LEAST_WORDS <= len(words) <= MOST_WORDS or len(prompt) > MOST_CHARACTERS:
        return "too short or too long"
    if UNWANTED.search(prompt) or not prompt.isprintable():
        return "holds marks that no caption has"
    if sum(not letter.isascii() for letter in prompt) > MOST_FOREIGN:
        return "is not English"
    present = set(find_classes(prompt, classes, table))
    if not set(names) <= present:
        return "does not name its class"
    if present - set(names):
        return "names another class"
    return "is there twice" if " ".join(words).lower() in used else ""
