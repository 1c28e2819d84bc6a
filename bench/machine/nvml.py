"""What NVIDIA's driver says of a GPU: version, clocks, power and the energy it has used."""

import ctypes
from ctypes import byref, c_char_p, c_uint, c_ulonglong, c_void_p, create_string_buffer

LIBRARY = "libnvidia-ml.so.1"
GRAPHICS, MEMORY = 0, 2  # nvmlClockType_t
GPU_SENSOR = 0


class Nvml:
    """One GPU by its UUID; every figure is None where the driver does not give it."""

    def __init__(self, uuid: str, library: str = LIBRARY):
        try:
            self._library = ctypes.CDLL(library)
        except OSError:
            self._library = None
        self._handle = c_void_p()
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        wanted = c_char_p(name.encode()), byref(self._handle)
        if self._library and (self._library.nvmlInit_v2() or self._library.nvmlDeviceGetHandleByUUID(*wanted)):
            self._library = None

    def _number(self, function: str, kind: type, *arguments: object) -> int | None:
        value = kind()
        if self._library is None or getattr(self._library, function)(self._handle, *arguments, byref(value)):
            return None
        return value.value

    @property
    def driver(self) -> str | None:
        text = create_string_buffer(96)
        if self._library is None or self._library.nvmlSystemGetDriverVersion(text, c_uint(len(text))):
            return None
        return text.value.decode()

    @property
    def joules(self) -> float | None:
        """Energy used since the driver was loaded."""
        millijoules = self._number("nvmlDeviceGetTotalEnergyConsumption", c_ulonglong)
        return None if millijoules is None else millijoules / 1000

    @property
    def watts(self) -> float | None:
        """Power drawn at present."""
        milliwatts = self._number("nvmlDeviceGetPowerUsage", c_uint)
        return None if milliwatts is None else milliwatts / 1000

    @property
    def memory_used(self) -> int | None:
        """Bytes of its memory that all processes hold."""
        found = (c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
        if self._library is None or self._library.nvmlDeviceGetMemoryInfo(self._handle, byref(found)):
            return None
        return found[2]

    def state(self) -> dict[str, int | None]:
        """Clocks in MHz, power limit in watts, temperature in degrees Celsius."""
        limit = self._number("nvmlDeviceGetEnforcedPowerLimit", c_uint)
        return {
            "graphics_mhz": self._number("nvmlDeviceGetClockInfo", c_uint, GRAPHICS),
            "graphics_most_mhz": self._number("nvmlDeviceGetMaxClockInfo", c_uint, GRAPHICS),
            "memory_mhz": self._number("nvmlDeviceGetClockInfo", c_uint, MEMORY),
            "power_limit_w": None if limit is None else limit // 1000,
            "temperature_c": self._number("nvmlDeviceGetTemperature", c_uint, GPU_SENSOR),
        }
