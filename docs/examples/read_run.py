"""A finished run folder: samples, labels and scores, read when they are asked for."""

from datasetdm_fast import open_run

run = open_run("runs/demo")
print(len(run), "samples of", ", ".join(run.classes))
balls = run.where(classes=("ball",))
for sample in balls:
    print(sample.id, sample.prompt, sample.semantic.labels.shape, len(sample.instances.masks))
