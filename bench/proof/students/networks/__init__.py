"""Networks of the library transformers as students, one a file; nothing is imported before a student is chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.proof.students.networks.network import StudentNetwork

BUILT_IN = "small"  # the net of students/student.py
NETWORKS = ("segformer", "deeplabv3plus", "mask2former", "glpn", "vitpose")  # modules that end with their NETWORK
STUDENTS = (BUILT_IN, *NETWORKS)
MULTIPLE = 32  # pixels that the sides of their images are a multiple of


def open_network(name: str) -> StudentNetwork:
    return import_module(f"{__name__}.{name}").NETWORK
