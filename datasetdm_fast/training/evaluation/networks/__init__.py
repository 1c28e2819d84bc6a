"""Networks of the library transformers as students, one a file; nothing is imported before a student is chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from datasetdm_fast.plugins import Registry

if TYPE_CHECKING:
    from datasetdm_fast.training.evaluation.networks.network import StudentNetwork

BUILT_IN = "small"  # the net of evaluation/student.py
OWN_NETWORKS = {  # name -> module that ends with its NETWORK
    "segformer": "datasetdm_fast.training.evaluation.networks.segformer",
    "deeplabv3plus": "datasetdm_fast.training.evaluation.networks.deeplabv3plus",
    "mask2former": "datasetdm_fast.training.evaluation.networks.mask2former",
    "glpn": "datasetdm_fast.training.evaluation.networks.glpn",
    "vitpose": "datasetdm_fast.training.evaluation.networks.vitpose",
}
NETWORKS = Registry("students", OWN_NETWORKS)  # of other packages, the records themselves
STUDENTS = (BUILT_IN, *NETWORKS.names)
MULTIPLE = 32  # pixels that the sides of their images are a number of times


def open_network(name: str) -> StudentNetwork:
    from datasetdm_fast.training.evaluation.networks.network import StudentNetwork

    found = NETWORKS[name]
    return import_module(found).NETWORK if isinstance(found, str) else NETWORKS.check_type(name, found, StudentNetwork)
