"""Engines: ways to run the networks behind one narrow protocol, above which all else exists once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import ENGINE_NAMES, ENGINES, REFERENCE, EngineKind
from datasetdm_fast.errors import Refused
from datasetdm_fast.plugins import load_place
from datasetdm_fast.settings import EngineSettings

if TYPE_CHECKING:
    from torch import nn

    from datasetdm_fast.engine.engines.engine import Engine
    from datasetdm_fast.engine.loading.model import Model


def check_engine(name: str, **options: Any) -> None:
    """Raises Missing where an engine lacks what it runs on, before torch is imported or a model is read.

    The options are settings of EngineSettings.
    """
    kind, values = _select_options(name, options)
    if kind.requirement:
        place, option = kind.requirement
        ENGINES.guard(name, lambda: load_place(place)(values[option]))


def check_installed(name: str, settings: EngineSettings) -> None:
    """Raises Missing where an engine lacks what it runs on with its own options of `settings`."""
    options = ENGINES["fast" if name == "auto" else name].options
    check_engine(name, **{option: getattr(settings, option) for option in options if hasattr(settings, option)})


def build_engine(
    name: str,
    model: Model,
    decoders: Mapping[str, nn.Module] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    **options: Any,
) -> Engine:
    """The engine `name` for a loaded model; "auto" is the fast one, or the reference where the family has no network of
    ours. The options are settings of EngineSettings: those of another engine are refused.
    """
    if name == "auto":
        name = "fast" if model.backbone.served_by(ENGINES["fast"].needs) else REFERENCE
    kind, values = _select_options(name, options)
    if not model.backbone.served_by(kind.needs):
        raise Refused(
            f"engine: {name} does not run {model.backbone.title}, {REFERENCE} does",
            f"Use --engine {REFERENCE}, which runs the modules of diffusers in fp32.",
        )
    place = (model.backbone.fast if name == "fast" else None) or kind.engine
    built: Engine = ENGINES.guard(
        name, lambda: load_place(place)(model, decoders or {}, dtype=dtype, device=device, **values)
    )
    return built


def _select_options(name: str, options: Mapping[str, Any]) -> tuple[EngineKind, dict[str, Any]]:
    """The record of an engine, and the values of its options."""
    if name not in ENGINE_NAMES:
        raise Refused(f"engine: {name!r} is none of {', '.join(ENGINE_NAMES)}", "Choose one of these with --engine.")
    chosen, usual = ENGINES["fast" if name == "auto" else name], EngineSettings()
    settings = EngineSettings(**options)
    if unknown := [option for option in chosen.options if not hasattr(usual, option)]:
        error = ValueError(f"there is no flag for its option {unknown[0]!r}")
        raise ENGINES.failure(name, error, "does not load")
    for kind in (kind for other, kind in ENGINES.items() if other not in ENGINES.others):
        for option, refusal in kind.options.items():
            value = getattr(settings, option)
            if option not in chosen.options and value != getattr(usual, option):
                cause, remedy = (text.format(engine=name, value=value) for text in refusal)
                raise Refused(cause, remedy)
    return chosen, {option: getattr(settings, option) for option in chosen.options}
