"""One class per task: how a decoder's raw tensors become labels, and how such a decoder is trained."""

from datasetdm_fast.config import TASK_KINDS
from datasetdm_fast.engine.tasks import depth, instance, open_vocabulary, pose, semantic
from datasetdm_fast.engine.tasks.task import Task
from datasetdm_fast.plugins import PartTable

OWN_TASKS = {
    "semantic": semantic.SemanticTask(),
    "instance": instance.InstanceTask(),
    "depth": depth.DepthTask(),
    "pose": pose.PoseTask(),
    "open-vocabulary": open_vocabulary.OpenVocabularyTask(),
}
TASKS = PartTable(OWN_TASKS, "task", Task, TASK_KINDS, make=lambda task: task())
