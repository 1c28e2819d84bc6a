"""One record a task: from a decoder's raw tensors to labels, and how such a decoder is taught."""

from datasetdm_fast.tasks import depth, instance, open_vocabulary, pose, semantic

TASKS = {
    "semantic": semantic.TASK,
    "instance": instance.TASK,
    "depth": depth.TASK,
    "pose": pose.TASK,
    "open-vocabulary": open_vocabulary.TASK,
}
