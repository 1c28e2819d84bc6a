"""What the machine can do at most, measured in the same run as everything else."""

from bench.machine import limits
from bench.rows.measurement import Measurement

MEASUREMENT = Measurement(
    "limits",
    "Peak rates of this machine",
    lambda run: [limits.measure(run.setting.device, 0.15 if run.setting.quick else 0.6)],
)
