"""From a decoder's raw tensors to labels: `postprocess(raw, config, size)` gives one annotation per image, sides in
pixels.
"""

from datasetdm_fast.tasks import depth, instance, open_vocabulary, pose, semantic

TASKS = {
    "semantic": semantic,
    "instance": instance,
    "depth": depth,
    "pose": pose,
    "open-vocabulary": open_vocabulary,
}
