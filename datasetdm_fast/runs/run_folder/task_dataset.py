"""A run as a map-style data set of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from datasetdm_fast.engine.labels.label_files import image_tensor, label_tensors, stack
from datasetdm_fast.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

Transform = Callable[[Any, Any], Any]  # image and label -> what the data set gives


@dataclass(frozen=True)
class TaskDataset(Dataset[Any]):
    """Pairs of image and label as torch tensors; with `collate`, a torch DataLoader batches every kind of them.

    Image [3, H, W] float32, 0..1. Label: semantic and open-vocabulary [H, W] int64; depth [H, W] float32 metres;
    instance a dict with masks [N, H, W] bool, boxes [N, 4] float32 (left, top, right, bottom), labels [N] int64, scores
    [N]; pose a dict with keypoints [P, J, 3] (x, y, visibility) and scores [P]. Classes have the numbers of
    `Run.classes`. Of several tasks, a dict of their labels.
    """

    run: Any  # a Run
    task: str | tuple[str, ...]
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.run)

    def __getitem__(self, position: int | str | slice) -> Any:
        """The pair at a position or of an id; of a slice, the data set of these samples."""
        if isinstance(position, slice):
            return replace(self, run=self.run[position])
        sample = self.run[position]
        image = image_tensor(sample.image)
        labels = {task: _tensors(sample, task) for task in ((self.task,) if isinstance(self.task, str) else self.task)}
        label = labels[self.task] if isinstance(self.task, str) else labels
        return (image, label) if self.transform is None else self.transform(image, label)

    @staticmethod
    def collate(pairs: Sequence[Any]) -> Any:
        """A batch: what has one shape in all pairs is stacked, what has not, such as the masks of instances, is a list
        of one a pair; to be given to a DataLoader as `collate_fn`.
        """
        return stack(pairs)


def _tensors(sample: Any, task: str) -> Tensor | dict[str, Tensor]:
    label = sample.label(task)
    if label is None:
        raise Refused(f"{sample.folder}: sample {sample.id} has no label {task!r}", "Leave it out with Run.where.")
    return label_tensors(task, label, sample.document["labels"][task])
