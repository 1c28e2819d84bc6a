"""What a label of a run is called: its task, and the name of its decoder where that is given."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from datasetdm_fast.config import LABELS, UNDECODED
from datasetdm_fast.errors import Refused, nearest

DECODER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True)
class LabelName:
    """A task and the name of its decoder's folder; without the latter, the label of the task's own decoder."""

    task: str
    decoder: str = ""

    @classmethod
    def parse(cls, text: str) -> "LabelName":
        """The name that flags, run.json and the ledger write as TASK or TASK:DECODER; a ValueError for another text.

        >>> LabelName.parse("semantic:cityscapes").stem
        'semantic.cityscapes'
        """
        task, colon, decoder = text.partition(":")
        if task not in LABELS:
            raise ValueError(f"not one of {', '.join(LABELS)}")
        if colon and task in UNDECODED:
            raise ValueError(f"labels of the labeller {task} have no decoder")
        if colon and not DECODER_NAME.fullmatch(decoder):
            raise ValueError("the name of a decoder has up to 63 letters, digits, - or _")
        return cls(task, decoder)

    @classmethod
    def of_stem(cls, stem: str) -> "LabelName":
        return cls.parse(stem.replace(".", ":", 1))

    def __str__(self) -> str:
        return f"{self.task}:{self.decoder}" if self.decoder else self.task

    @property
    def stem(self) -> str:
        """The name inside a file's name, where some systems allow no colon."""
        return file_stem(self.task, self.decoder)


def file_stem(stem: str, decoder: str) -> str:
    """What a file or folder is called that belongs to a label, `stem` being its name for the task's own decoder."""
    return f"{stem}.{decoder}" if decoder else stem


def tasks_of(labels: Iterable[str]) -> tuple[str, ...]:
    """The tasks of labels, each once."""
    return tuple(dict.fromkeys(map(task_of_label, labels)))


def task_of_label(label: str) -> str:
    """The task of a label that is known to be one."""
    return label.partition(":")[0]


def check_label(label: str) -> None:
    """Refuses what is no label, such as one that is misspelt."""
    if not isinstance(label, str) or task_of_label(label) not in LABELS:
        alike = nearest(label, LABELS) if isinstance(label, str) else ""
        raise Refused(f"{label!r} is no label{alike}", f"Choose from {', '.join(LABELS)}.")


def by_task(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their tasks, those of one task as they are given."""
    return sorted(labels, key=lambda label: LABELS.index(task_of_label(label)))
