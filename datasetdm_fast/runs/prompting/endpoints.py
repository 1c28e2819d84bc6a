"""Where a language model is reached: an OpenAI-compatible endpoint."""

import asyncio
import ipaddress
import json
import re
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from datasetdm_fast.errors import Missing, Refused
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


def read_key(environment: Mapping[str, str]) -> str:
    """The key of the endpoint; it comes from the environment alone, where no process list shows it."""
    return next((environment[name].strip() for name in KEY_VARIABLES if environment.get(name, "").strip()), "")


class Endpoint:
    """An OpenAI-compatible endpoint; a request is retried after growing delays where it is busy or silent."""

    def __init__(self, url: str, model: str, key: str):
        self.url, self.model, self.key = check_url(url, key), model, key
        try:
            import httpx2
        except ImportError as error:
            raise Missing("--llm-url: httpx2 is not installed", "Install datasetdm-fast[prompts].") from error
        self._library = httpx2

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
        # a proxy would read requests to this machine, with the key of an unencrypted one
        is_proxied = not _is_loopback(urlsplit(self.url).hostname or "")
        async with (
            self._library.AsyncClient(trust_env=is_proxied, timeout=SECONDS) as client,
            client.stream("POST", self.url, json=body, headers=headers) as reply,
        ):
            content = b""
            async for chunk in reply.aiter_bytes():
                content += chunk
                if len(content) > LARGEST_REPLY:
                    raise UnusableReply("the reply is longer than 1 MiB")
            return reply.status_code, reply.headers, content


def open_model(url: str, model: str, key: str) -> Endpoint | None:
    """The language model of an endpoint; None where none is named."""
    if bool(url) != bool(model):
        raise Refused(
            "--llm-url and --llm-model: one needs the other", "Add --llm-url https://HOST/v1 --llm-model NAME."
        )
    return Endpoint(url, model, key) if url else None


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
