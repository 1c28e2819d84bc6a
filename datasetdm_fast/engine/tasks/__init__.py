"""One class per task: how a decoder's raw tensors become labels, and how such a decoder is trained."""

from datasetdm_fast.config import TASK_KINDS
from datasetdm_fast.engine.tasks.task import Task
from datasetdm_fast.plugins import PartTable

TASKS = PartTable("task", Task, TASK_KINDS, make=lambda task: task())
