"""How the labels of each task are stored, drawn and compared: one class per kind, none needs torch."""

from collections.abc import Iterable
from functools import lru_cache

from datasetdm_fast.config import ATTENTION, LABELLER_KINDS, TASK_KINDS
from datasetdm_fast.engine.labels.kind import LabelKind
from datasetdm_fast.engine.labels.names import LabelName, sort_labels
from datasetdm_fast.errors import nearest
from datasetdm_fast.plugins import PartTable

# a gallery opens with the first of them that its run has
GALLERY_ORDER = ("instance", "semantic", "open-vocabulary", ATTENTION, "depth", "pose")
LABEL_KINDS = PartTable("label", LabelKind, TASK_KINDS, LABELLER_KINDS, order=GALLERY_ORDER, make=lambda kind: kind())


@lru_cache(1024)
def kind_of(label: str) -> LabelKind:
    """The kind of a label written as TASK or TASK:DECODER; a ValueError where it is neither."""
    name = LabelName.parse(label)
    kind: LabelKind = LABEL_KINDS[name.task]
    return kind.for_decoder(name.decoder) if name.decoder else kind


def by_kind(labels: Iterable[str]) -> list[str]:
    """Labels in the order of LABEL_KINDS, those of one task as they are given."""
    return sort_labels(labels, LABEL_KINDS.names)


def task_of(attribute: str) -> str:
    """The task whose labels a sample offers under this name; an AttributeError where there is none."""
    for task, kind in LABEL_KINDS.items():
        if kind.attribute == attribute:
            return task
    known = [kind.attribute for kind in LABEL_KINDS.values()]
    raise AttributeError(f"no label is called {attribute!r}{nearest(attribute, known)}")
