"""Machine code that does not say what was compiled. ptxas of CUDA 12.8, which Triton 3.6 and 3.7 bring, takes some
addresses of shared memory from the wrong register, and the tensor cores of an H100 then multiply what lies elsewhere:
without an error, or with an illegal access. That of CUDA 12.9 does not.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

# The tensor cores are given a descriptor: an address in its lower half, and constants in its upper one. Both are sums,
# of an address and of zero; where one register stands for both, it holds neither.
LOWER = re.compile(r"\bUIADD3 UR\d+, (UP\d), (UR\d+), 0x[0-9a-f]+, URZ")
UPPER = re.compile(r"\bUIADD3\.X UR\d+, (UR\d+), -?0x[0-9a-f]+, URZ, (UP\d)")
WRITTEN = re.compile(r"\bU[A-Z0-9]+\S* (UR\d+),")


def spoilt(code: str) -> list[str]:
    """The instructions of a disassembled kernel that make such a descriptor."""
    lower: dict[str, str] = {}  # carry -> the register that was added to
    found = []
    for line in code.splitlines():
        if (end := UPPER.search(line)) and lower.get(end[2]) == end[1]:
            found.append(end[0])
        if written := WRITTEN.search(line):
            lower = {carry: register for carry, register in lower.items() if register != written[1]}
        if begin := LOWER.search(line):
            lower[begin[1]] = begin[2]
    return found


def spoilt_of(made: Any) -> int:
    """How many of them Triton's compiled kernel has."""
    return len(spoilt(asked("nvdisasm", made, "-c"))) if "wgmma" in made.asm["ptx"] else 0


def asked(tool: str, made: Any, *flags: str) -> str:
    """What one of the tools that come with Triton says of a kernel's machine code."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *flags, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
