"""What the machine can do at most, measured in the same run as everything else."""

from bench.machine import limits
from bench.rows import layers
from bench.rows.measurement import BenchRun, Measurement, Rows
from datasetdm_fast.engine.engines.device import half_of


def rows(run: BenchRun) -> Rows:
    """The limits; no layer of the model may be faster than the machine is said to be."""
    seconds = 0.15 if run.setting.quick else 0.6
    found = limits.measure(run.setting.device, seconds)
    for name, known in found["tflops"].items():
        if name == "bf16" and run.setting.device.type == "cpu" and not half_of(run.setting.device):
            continue  # emulated: layers of full size take minutes, and none is faster than the products
        found["tflops"][name] = max(known, round(layers.fastest(run.setting, name, seconds) / 1e12, 3))
    return [found]


MEASUREMENT = Measurement("limits", "Peak rates of this machine", rows)
