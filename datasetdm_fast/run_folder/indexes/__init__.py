"""Data sets out, one writer a file; the index files of a run folder, each rebuilt from the ledger alone."""

from functools import partial

from datasetdm_fast.labels import LABEL_KINDS
from datasetdm_fast.run_folder.indexes import card, coco, samples

# name -> (the task it needs, "" = always; chunks of its bytes from run.json and the ledger)
INDEXES = {
    "samples.jsonl": ("", samples.lines),
    "README.md": ("", card.text),
    **{kind.coco_file: (task, partial(coco.document, task)) for task, kind in LABEL_KINDS.items() if kind.coco_file},
}
