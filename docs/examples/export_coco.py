"""A run as COCO, read back by pycocotools."""

import sys

from pycocotools.coco import COCO

from datasetdm_fast import convert

if convert.main(["runs/demo", "--to", "coco", "--out", "runs/demo-coco"]):
    sys.exit("the run could not be converted")
coco = COCO("runs/demo-coco/coco/annotations/instances_train2017.json")
for number in coco.getAnnIds()[:3]:
    (annotation,) = coco.loadAnns([number])
    print(annotation["bbox"], coco.annToMask(annotation).sum(), "pixels")
