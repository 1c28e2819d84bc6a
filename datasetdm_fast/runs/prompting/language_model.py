"""Prompts from a language model: requests, the cache of its replies, and the checks that a prompt must pass."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.class_tables import ClassTable, spoken
from datasetdm_fast.engine.labels.words import find_classes
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.prompting.endpoints import Ask, UnusableReply
from datasetdm_fast.runs.prompting.grammar import Sentence

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
    """A language model whose replies are cached in a file: requests that the file answers are not sent."""

    path: Path
    ask: Ask
    most_requests: int
    secret: str = ""
    sent: int = 0  # requests
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
                self.cached[row["request"]] = str(row["reply"]), str(row["problem"])
            except (ValueError, TypeError, KeyError):
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
            self.sent += 1
            try:
                reply, problem = self.ask(text), ""
                if self.secret and self.secret in _decode_escapes(reply):
                    reply, problem = "", "the reply repeats the key"
            except UnusableReply as error:
                reply, problem = "", str(error)
            self._store(key, reply, problem)
        reply, problem = self.cached[key]
        if problem:
            raise UnusableReply(problem)
        return reply

    def _store(self, key: str, reply: str, problem: str) -> None:
        self.cached[key] = reply, problem
        with storage.refusing(self.path), self.path.open("ab") as file:
            file.write(json.dumps({"request": key, "reply": reply, "problem": problem}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


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


def check_any(out: str, sentences: Sequence[Sentence], rejected: Counter[str]) -> None:
    """Refuses an empty list."""
    if not sentences:
        why = ", ".join(f"{reason} ({count})" for reason, count in rejected.most_common(3))
        raise Missing(f"{out}: no usable prompt came back: {why}", "Try another model, or leave it out.")


def request_text(
    names: Sequence[str], classes: Sequence[str], count: int, number: int, table: ClassTable | None = None
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
