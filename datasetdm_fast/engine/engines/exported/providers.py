"""Which ONNX Runtime or OpenVINO is installed and what it can run on, checked before torch is imported."""

from importlib.util import find_spec

from datasetdm_fast.config import PROVIDERS
from datasetdm_fast.errors import Missing, Refused, check_choice

NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


def require_provider(provider: str) -> None:
    """Raises Missing where ONNX Runtime or the provider is not installed; "auto" needs the CPU's alone."""
    check_choice("provider", provider, PROVIDERS)
    _require("ort", "onnxruntime")
    installed = installed_providers()
    if provider != "auto" and NAMES[provider] not in installed:
        import onnxruntime

        raise Missing(
            f"provider: {provider} is not in the installed onnxruntime {onnxruntime.__version__}, which has "
            f"{', '.join(name for name in NAMES if NAMES[name] in installed)}",
            "Use one of those, or install 'datasetdm-fast[ort-gpu]' in its place.",
        )


def require_openvino(streams: int) -> None:
    """Raises Missing where OpenVINO is not installed."""
    if streams < 0:
        raise Refused(f"--streams: {streams} is less than 0", "0 chooses their number by the batch.")
    _require("openvino", "openvino")


def _require(engine: str, library: str) -> None:
    for module in (library, "onnx"):
        if find_spec(module) is None:
            raise Missing(
                f"engine: {engine} needs the library {module}, which is not installed",
                f"Install it with: pip install 'datasetdm-fast[{engine}]', or choose another --engine.",
            )


def installed_providers() -> list[str]:
    """ONNX Runtime's own names of its providers."""
    import onnxruntime

    return onnxruntime.get_available_providers()
