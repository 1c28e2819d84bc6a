"""ONNX graphs of unknown origin: their operators and data files are checked before a runtime loads them."""

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted.documents import GET_AGAIN, check_inside, quote, reason_of

LARGEST_ONNX = 2**31 - 1  # bytes of the graph itself, protobuf's own limit
DOMAINS = ("", "ai.onnx", "com.microsoft")
NATIVE = ("EPContext",)  # nodes that make a runtime load compiled code from a file


def check_onnx(path: Path) -> list[Path]:
    """The data files of an ONNX file, all inside its folder; a graph unfit for onnx or a runtime is refused."""
    try:
        import onnx
    except ImportError as error:
        raise Missing(f"{path}: the package onnx is needed to check it", "Install it: pip install onnx.") from error
    data = storage.read(path, LARGEST_ONNX)
    files: dict[Path, None] = {}
    try:
        model = onnx.load_model_from_string(data)
        domains = {*DOMAINS, *(function.domain for function in model.functions)}
        if not model.opset_import:
            raise ValueError("it names no operator set")
        for message in _submessages(model):
            if isinstance(message, onnx.NodeProto):
                if message.domain not in domains:
                    raise Refused(
                        f"{path}: the operator {quote(message.op_type)} of {quote(message.domain)} is not supported",
                        "Export the model without custom operators.",
                    )
                if message.op_type in NATIVE:
                    raise Refused(
                        f"{path}: the operator {message.op_type} would load compiled code from a file",
                        "Export the model anew on this machine.",
                    )
            elif isinstance(message, onnx.TensorProto) and message.external_data:
                files[_data_file(path, {entry.key: entry.value for entry in message.external_data})] = None
    except Refused:
        raise
    except Exception as error:  # protobuf's reader, whose errors differ between its versions
        raise Refused(f"{path}: not an ONNX file ({reason_of(error)})", GET_AGAIN) from error
    return list(files)


def _submessages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages in it, whose nesting protobuf bounds."""
    remaining = [message]
    while remaining:
        message = remaining.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                remaining += [value] if hasattr(value, "ListFields") else value


def _data_file(path: Path, entry: Mapping[str, str]) -> Path:
    """The data file of an external tensor: a plain file within the folder, of at least as many bytes."""
    location = entry.get("location", "")
    try:
        name = check_inside(location)
        offset, length = int(entry.get("offset", "0")), int(entry.get("length", "0"))
    except ValueError as error:
        raise Refused(f"{path}: external data {error}", "Keep the data in files beside the graph.") from error
    file = path.parent
    for part in PurePosixPath(name).parts:
        file = file / part
        if file.is_symlink():
            raise Refused(
                f"{path}: external data {quote(location)} is reached through a link",
                "Keep the data in files beside the graph.",
            )
    try:
        facts = file.lstat()
    except OSError as error:
        raise Refused(f"{path}: external data {quote(location)} is not there ({error.strerror})", GET_AGAIN) from error
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
        raise Refused(
            f"{path}: external data {quote(location)} is not a regular file of its own",
            "Copy the file instead of linking it.",
        )
    if offset < 0 or length < 0 or offset + length > facts.st_size:
        raise Refused(
            f"{path}: external data {quote(location)} has {facts.st_size} bytes, the graph asks for {offset} + "
            f"{length}",
            GET_AGAIN,
        )
    return file
