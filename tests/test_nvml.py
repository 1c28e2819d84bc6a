"""What NVML says is read as it is said, from a library that stands in for the driver's."""

import os
import subprocess

import pytest

from bench.machine.nvml import Nvml

SOURCE = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) { *handle = (void *)1; return strcmp(uuid, "GPU-1234"); }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "570.1", length); return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj) { *mj = 12345678901ULL; return 0; }
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz) { *mhz = kind == 0 ? 1755 : 3201; return 0; }
int nvmlDeviceGetMaxClockInfo(void *device, int kind, unsigned *mhz) { *mhz = 1980; return 0; }
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *mw) { *mw = 700000; return 0; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *c) { return 3; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SOURCE)
    subprocess.run(
        [os.environ.get("CC", "cc"), "-shared", "-fPIC", folder / "nvml.c", "-o", folder / "libnvml.so"], check=True
    )
    return str(folder / "libnvml.so")


@pytest.mark.parametrize("uuid", ["1234", "GPU-1234"])
def test_figures_of_a_gpu(library, uuid):
    gpu = Nvml(uuid, library)
    assert gpu.driver == "570.1" and gpu.joules == pytest.approx(12345678.901)
    assert gpu.state() == {
        "graphics_mhz": 1755,
        "graphics_most_mhz": 1980,
        "memory_mhz": 3201,
        "power_limit_w": 700,
        "temperature_c": None,
    }


@pytest.mark.parametrize("name", ["9999", "1234"])
def test_without_driver_or_gpu_there_are_no_figures(library, name, tmp_path):
    gpu = Nvml(name, library if name == "9999" else str(tmp_path / "no.so"))
    assert gpu.driver is None and gpu.joules is None and set(gpu.state().values()) == {None}
