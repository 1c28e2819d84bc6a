"""Samples one by one, from a generator of prompts that never ends; those with doubtful labels are left out."""

from itertools import count, islice

from datasetdm_fast import Pipeline


def prompts():
    for number in count():
        yield f"a {('red', 'blue', 'green')[number % 3]} ball on a table"


pipe = Pipeline.from_pretrained("demo")
for sample in islice(pipe.stream(prompts(), seed=0, steps=10, tasks=("semantic",)), 6):
    if sample.trust.is_trusted:
        print(sample.id, sample.prompt, sample.semantic.labels.shape)
