"""One class a task: from a decoder's raw tensors to labels, and how such a decoder is taught."""

from datasetdm_fast.tasks import depth, instance, open_vocabulary, pose, semantic

TASKS = {
    "semantic": semantic.SemanticTask(),
    "instance": instance.InstanceTask(),
    "depth": depth.DepthTask(),
    "pose": pose.PoseTask(),
    "open-vocabulary": open_vocabulary.OpenVocabularyTask(),
}
