"""Why a test may be skipped: conftest.py turns a skip for any other reason into a failure."""

import os

import pytest

IS_LONG = bool(os.environ.get("DATASETDM_LONG_TESTS"))
long_test = pytest.mark.skipif(not IS_LONG, reason="the long form only")

# reason, as far as it is the same everywhere -> where it holds
REASONS = {
    "no CUDA device": "machines without a GPU; the same tests run where there is one",
    "the extension was built without CUDA": "the same, where there is no CUDA compiler either",
    "this PyTorch is built with CUDA": "gradients on simulated GPUs need PyTorch's build for CPUs",
    "this machine has a GPU": "what is said where there is no GPU, on machines with one",
    "a GPU is there": "the same",
    "a CUDA device is there": "the same",
    "this ONNX Runtime has the CUDA provider": "the same",
    "the loopback device is down, and may not be brought up": "sandboxes without any network",
    "root may look anywhere, and this namespace knows nobody else": "containers with one user",
    "no compiler with AddressSanitizer": "machines without one",
    "the fault library is preloaded as Linux does it": "other systems than Linux",
    "memory is read from /proc": "the same",
    "descriptors are listed in /proc": "the same",
    "only Linux keeps a process to some of the cores": "the same",
    "other systems keep the port of a server that has ended": "the same",
    "this Linux has no huge pages": "other systems than Linux, and Linux where they are switched off",
    "pyarrow is not installed": "platforms without it",
    "Playwright is not installed": "until `make consumers` installs the libraries of our users",
    "Chromium is not installed": "machines without that browser",
    "Ray Serve is not installed": "until somebody installs ray[serve]",
    "moto and s3fs are not installed": "until `make consumers` installs them",
    "mosaicml-streaming is not installed": "until somebody installs it with torchvision, as its import needs",
    "peft is not installed": "until `make consumers` installs it, without its torch",
    "ray is not installed": "platforms without Ray",
    "uvicorn is not installed": "environments without the extra `serve`",
    "triton is not installed; pip install 'datasetdm-fast[triton]'": "platforms without Triton",
    "OpenVINO is not installed": "platforms without OpenVINO",
    "this CPU has no instructions for bf16": "where OpenVINO and oneDNN have no bf16 to compute in",
    "this CPU multiplies no tiles of bf16": "CPUs without AMX, and systems that do not lend it",
    "could not import 'onnx'": "environments without the extra `ort`",
    "could not import 'shtab'": "environments without the extra `completion`",
    "TensorRT-RTX is not installed": "platforms without it",
    "TensorRT cannot run here": "GPUs that the installed TensorRT does not know",
    "kernels run in the interpreter where there is no GPU": "block sizes are measured on a GPU only",
    "DATASETDM_UPSTREAM does not name a checkout of showlab/DatasetDM": "a comparison with code that is not ours",
    "DATASET_DIFFUSION_UPSTREAM does not name a checkout of VinAIResearch/Dataset-Diffusion": "the same",
    "the demo model is not trained yet": "checkouts without the demo model",
    "this folder is no checkout of git": "an unpacked source distribution",
    "the long form only": "`make soak` runs it",
    "a measurement; set DATASETDM_LONG_TESTS=1": "`make soak` leaves it out, as it needs a quiet machine",
    "takes a minute and 6 GB; set DATASETDM_LONG_TESTS=1": "the same",
}


def is_listed(reason: str) -> bool:
    """Whether a test may be skipped for this reason, as pytest reports it."""
    return reason.removeprefix("Skipped: ").startswith(tuple(REASONS))
