"""Engines: ways to run the networks behind one narrow protocol; loop, guidance, tasks and writers sit above it and
exist once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from datasetdm_fast.config import ENGINES as KNOWN
from datasetdm_fast.errors import Missing, Refused

if TYPE_CHECKING:
    from torch import nn

    from datasetdm_fast.data import Capture as Capture
    from datasetdm_fast.data import ProjectedCapture as ProjectedCapture
    from datasetdm_fast.engines.engine import Engine
    from datasetdm_fast.loading.model import Model


def _torch(model: Model, decoders: Mapping[str, nn.Module], dtype: str, device: str) -> Engine:
    from datasetdm_fast.engines.torch import TorchEngine

    return TorchEngine(model, decoders, dtype=dtype, device=device)


def _fast(model: Model, decoders: Mapping[str, nn.Module], dtype: str, device: str, compile: bool) -> Engine:
    from datasetdm_fast.engines.fast import FastEngine

    return FastEngine(model, decoders, dtype=dtype, device=device, is_compiled=compile)


def _ort(model: Model, decoders: Mapping[str, nn.Module], dtype: str, device: str, **where: str) -> Engine:
    from datasetdm_fast.engines.exported.ort import OrtEngine

    return OrtEngine(model, decoders, dtype=dtype, device=device, **where)


def _trt(model: Model, decoders: Mapping[str, nn.Module], dtype: str, device: str, **where: str) -> Engine:
    from datasetdm_fast.engines.exported.trt import TrtEngine

    return TrtEngine(model, decoders, dtype=dtype, device=device, **where)


ENGINES = {"torch": _torch, "fast": _fast, "ort": _ort, "trt": _trt}


def check_engine(name: str, flavour: str = "auto", provider: str = "auto") -> None:
    """Raises Missing where an engine lacks what it runs on; asked before torch is imported or a model is read, so that
    the answer comes at once.
    """
    if provider != "auto" and name != "ort":
        raise Refused(f"provider: {provider} is one of ONNX Runtime's, and the engine is {name}", "add --engine ort")
    if name == "ort":
        from datasetdm_fast.engines.exported.providers import require_provider

        require_provider(provider)
    if name == "trt":
        from datasetdm_fast.export.tensorrt.flavours import require_gpu

        require_gpu(flavour)


def build_engine(
    name: str,
    model: Model,
    decoders: Mapping[str, nn.Module] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    engines: str = "",
    trt_flavour: str = "auto",
    provider: str = "auto",
    compile: bool = False,
) -> Engine:
    """The engine `name` for a loaded model; "auto" is the fast one. `engines` is the folder of exported stages and
    plans, empty for a cache; `provider` is what ONNX Runtime runs on; `compile` lets torch.compile make the fast
    engine's UNet.
    """
    if name not in KNOWN:
        raise Refused(f"engine: {name!r} is none of {', '.join(KNOWN)}")
    chosen = "fast" if name == "auto" else name
    if chosen not in ENGINES:
        raise Missing(
            f"engine: {chosen} is not part of this installation, which has {', '.join(ENGINES)}",
            "use one of those, or --engine auto",
        )
    if compile and chosen != "fast":
        raise Refused(
            f"--compile: the engine is {chosen}, and only the fast one can be compiled", "Use it with --engine fast."
        )
    where = {
        "trt": {"folder": engines, "flavour": trt_flavour},
        "ort": {"provider": provider},
        "fast": {"compile": compile},
    }
    return ENGINES[chosen](model, decoders or {}, dtype, device, **where.get(chosen, {}))
