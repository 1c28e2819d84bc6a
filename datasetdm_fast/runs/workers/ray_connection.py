"""Joining a Ray cluster, or starting one here."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from datasetdm_fast.cores import count_cores
from datasetdm_fast.engine.loading.checks import first_line
from datasetdm_fast.errors import Missing, Refused

PORT = 6379  # of a head node, where none is named
CLIENT_PORT = 10001  # of Ray's client, through which no run goes
CONNECT_SECONDS = 10.0
HTTP2_SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # an empty frame; its fourth byte is its type, and each side begins with one
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HTTP2_SETTINGS
TOKEN, TOKEN_FILE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"
FIRST_WITH_TOKEN = (2, 52)  # version of Ray
STORE_BYTES = 2**28  # of shared memory for a Ray of our own: only rows travel through it


def address_of(text: str) -> str | None:
    """HOST:PORT that --cluster, or RAY_ADDRESS where --cluster names none, stands for; None for a Ray of our own."""
    named = text if text != "ray" else os.environ.get("RAY_ADDRESS", "")
    if named in ("", "local"):
        return None
    written = named if text != "ray" or "://" in named else f"ray://{named}"
    match = re.fullmatch(r"ray://(\[[\da-fA-F:.]+\]|[^\s/?#@:\[\]]+)(?::(\d{1,5}))?/?", written)
    port = int(match[2] or PORT) if match else 0
    if not 0 < port < 2**16:
        raise Refused(
            f"--cluster {text}: {named!r} is not the address of a Ray cluster",
            "Write ray, or ray://HEAD:PORT with what `ray start --head` printed.",
        )
    if port == CLIENT_PORT:
        raise Refused(
            f"--cluster {text}: {port} is the port of Ray's client, which this package does not use",
            f"Name the head's own port, {PORT} as a rule.",
        )
    return f"{match[1]}:{port}"


@contextmanager
def join_cluster(cluster: str, ranks: int, place: str) -> Iterator[None]:
    """Within the block this process is a driver on the cluster, and Ray's threads cannot write to standard output."""
    address = address_of(cluster)
    if address:
        _knock(cluster, address)
    # Read by Ray when it is imported or started: nothing is reported to anybody, a head that does not answer is not
    # waited for long, a call that comes too late does not start a Ray of its own, and a signal prints no stack.
    os.environ.update(RAY_ENABLE_AUTO_CONNECT="0", RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal")
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")
    # a Ray of our own would give its workers what every other process leaves over
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not address or any(name in os.environ for name in TOKEN) or TOKEN_FILE.exists():
        # a Ray of our own listens on all addresses of the machine; `ray start` asks for a token by default
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError as error:
        raise Missing(f"--cluster {cluster}: {error}", "Install it with: pip install 'datasetdm-fast[ray]'") from error
    if not address:
        _require_token(cluster, ray.__version__)
    options = {"num_cpus": max(count_cores(), ranks), "object_store_memory": STORE_BYTES, "include_dashboard": False}
    options = {} if address else options
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            try:
                with mute_stderr():
                    ray.init(address or "local", logging_level=logging.CRITICAL, log_to_driver=False, **options)
            except Exception as error:
                raise _refusal(cluster, address, error) from error
            logging.getLogger("ray").setLevel(logging.CRITICAL)
            yield
        except ray.exceptions.RayError as error:
            raise Missing(
                f"{place}: Ray ended the run ({type(error).__name__}: {first_line(error)})",
                "Run the same command again: it resumes.",
            ) from error
        finally:
            ray.shutdown()


def _require_token(cluster: str, version: str) -> None:
    """Refuses to start a Ray that anybody in the network could send commands to."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < FIRST_WITH_TOKEN:
        raise Missing(
            f"--cluster {cluster}: Ray {version} would take commands from everybody in the network",
            "Install Ray 2.52 or newer, which asks for a token: pip install 'datasetdm-fast[ray]'",
        )
    if os.environ["RAY_AUTH_MODE"] != "token":
        raise Refused(
            f"--cluster {cluster}: RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']!r}, so that everybody in the network "
            "could send commands",
            "Unset it, or start a cluster with `ray start --head` and name its address.",
        )


def _refusal(cluster: str, address: str | None, error: Exception) -> Missing:
    if "AuthToken" in "".join(traceback.format_exception(error)):
        return Missing(
            f"--cluster {cluster}: the cluster wants another token",
            "Put what `ray get-auth-token` prints on its head into RAY_AUTH_TOKEN.",
        )
    on_head = "Run this on a machine of the cluster, with the Python and the Ray it runs."
    remedy = on_head if address else "See what Ray says in /tmp/ray/session_latest/logs."
    return Missing(f"--cluster {cluster}: {first_line(error)}", remedy)


@contextmanager
def mute_stderr() -> Iterator[None]:
    """Within the block nothing reaches the screen, which Ray's native parts write to past Python."""
    sys.stderr.flush()
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        os.close(nowhere)


def _knock(cluster: str, address: str) -> None:
    """Refuses an address where nothing answers as a head does, before Ray waits for it for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as door:
            if os.environ.get("RAY_USE_TLS") != "1":
                door.sendall(HTTP2_GREETING)
                if door.recv(len(HTTP2_SETTINGS))[3:4] != HTTP2_SETTINGS[3:4]:
                    raise OSError("what answers is no head of a Ray cluster")
    except (OSError, UnicodeError, OverflowError) as error:
        raise Missing(
            f"--cluster {cluster}: no head at {address} ({getattr(error, 'strerror', None) or error})",
            "Start one there with `ray start --head`, or name the one that runs; --cluster ray starts one here.",
        ) from error
