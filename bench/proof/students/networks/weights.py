"""A student network without a download: from its settings, or from a local folder that transformers has written."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.proof.students.networks.network import StudentNetwork
from bench.proof.students.student_data import Vocabulary
from datasetdm_fast.errors import Missing, Refused, nearest
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.tensors import check_safetensors

REMEDY = "Name a folder with the config.json and model.safetensors of this network."


def build(
    network: StudentNetwork, vocabulary: Vocabulary, size: str, side: int, seed: int, weights: str = ""
) -> nn.Module:
    """The network for a vocabulary and images of side x side pixels; what has no weights starts from the seed."""
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        settings = network.settings(vocabulary, side)
        names = network.names(vocabulary) if network.names else ()
        if weights:
            model = _of_folder(network, Path(weights), settings, names)
        else:
            model = _of_size(network, size, settings, names)
    return network.prepared(model)


def size_of(network: StudentNetwork, size: str) -> str:
    """A size the network has: its first where none is named."""
    if size and size not in network.sizes:
        known = ", ".join(network.sizes)
        raise Refused(
            f"--student-size: {size!r} is not one of {known}{nearest(size, network.sizes)}",
            "Choose one of these, or leave it out.",
        )
    return size or next(iter(network.sizes))


def _of_size(network: StudentNetwork, size: str, settings: Mapping[str, Any], names: Sequence[str]) -> nn.Module:
    import transformers

    return getattr(transformers, network.model)(_config(network, joined(network.sizes[size], settings), names))


def _config(network: StudentNetwork, settings: Mapping[str, Any], names: Sequence[str]):
    import transformers

    config = getattr(transformers, network.config).from_dict(dict(settings))
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    return config


def joined(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of `above` in their place, tables within tables, too."""
    both = dict(below)
    for name, value in above.items():
        both[name] = joined(both.get(name, {}), value) if isinstance(value, Mapping) else value
    return both


def check_folder(network: StudentNetwork, folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The settings and the files of weights of a folder; anything but this network, undamaged, is missing weights."""
    import transformers

    try:
        found = documents.read_object(folder / "config.json")
        files = sorted(folder.glob("*.safetensors"))
        for path in files:
            check_safetensors(path)
    except (Refused, Missing) as stop:
        raise Missing(f"--weights {folder}: {stop.cause}", REMEDY) from stop
    kind = getattr(transformers, network.config).model_type
    if found.get("model_type") != kind:
        there = documents.quote(found.get("model_type"))
        raise Missing(f"--weights {folder}: its config.json is of {there}, expected {kind!r}", REMEDY)
    if not files:
        raise Missing(f"--weights {folder}: no model.safetensors in it", REMEDY)
    return found, files


def _of_folder(network: StudentNetwork, folder: Path, settings: Mapping[str, Any], names: Sequence[str]) -> nn.Module:
    import transformers

    found, _ = check_folder(network, folder)
    try:
        config = _config(network, joined(found, settings), names)
        options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
        model, told = getattr(transformers, network.model).from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    except Exception as error:  # what is wrong with a folder ends in errors of every kind
        raise Missing(f"--weights {folder}: {documents.reason_of(error)}", REMEDY) from error
    begins = {name for name, _ in model.named_parameters() if name.startswith(network.body)}
    absent = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])} & begins
    if absent:
        raise Missing(
            f"--weights {folder}: {len(absent)} of {len(begins)} backbone tensors are missing or differ in size, "
            f"such as {min(absent)}",
            REMEDY,
        )
    return (_with_new_head(model, network, config, names) if _has_other_names(found, names) else model).float()


def _has_other_names(found: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether the outputs of stored weights stand for something else; names that transformers made up say nothing."""
    stored = found.get("id2label")
    if not names or not isinstance(stored, Mapping) or len(stored) != len(names):
        return False  # of another number they start anew as it is
    words = [str(stored.get(str(number))) for number in range(len(names))]
    is_made_up = all(word == f"LABEL_{number}" for number, word in enumerate(words))
    return not is_made_up and [word.casefold() for word in words] != [name.casefold() for name in names]


def _with_new_head(model: nn.Module, network: StudentNetwork, config: Any, names: Sequence[str]) -> nn.Module:
    """The network with the tensors started anew whose size the number of outputs decides."""
    more = _config(network, config.to_dict(), [*names, "another"])
    fresh, wider = (dict(type(model)(one).named_parameters()) for one in (config, more))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if fresh[name].shape != wider[name].shape:
                value.copy_(fresh[name])
    return model


@contextmanager
def _quiet():
    """Within the block, transformers tells nothing and shows no bar: what matters is refused here."""
    from transformers.utils import logging as told

    level, has_bar = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity(logging.CRITICAL)
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(level)
        if has_bar:
            told.enable_progress_bar()
