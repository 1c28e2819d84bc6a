"""Data sets out, one writer a file; the index files of a run folder, each rebuilt from the ledger alone."""

from __future__ import annotations

from datasetdm_fast.run_folder.indexes import card, coco, samples

# name -> (the task it needs, "" = always; chunks of its bytes from run.json and the ledger)
INDEXES = {
    "samples.jsonl": ("", samples.lines),
    "instances.json": ("instance", coco.instances),
    "keypoints.json": ("pose", coco.keypoints),
    "README.md": ("", card.text),
}
