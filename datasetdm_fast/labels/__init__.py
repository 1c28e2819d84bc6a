"""How the labels of each task lie in files, look in pictures and are compared: one class a kind, none needs torch."""

from datasetdm_fast.labels import depth, instance, open_vocabulary, pose, semantic

LABEL_KINDS = {  # task -> kind; a gallery opens with the first of them that its run has
    "instance": instance.InstanceKind(),
    "semantic": semantic.SemanticKind(),
    "open-vocabulary": open_vocabulary.OpenVocabularyKind(),
    "depth": depth.DepthKind(),
    "pose": pose.PoseKind(),
}


def task_of(attribute: str) -> str:
    """The task whose labels a sample offers under this name; an AttributeError where there is none."""
    for task, kind in LABEL_KINDS.items():
        if kind.attribute == attribute:
            return task
    raise AttributeError(f"no label is called {attribute!r}")
