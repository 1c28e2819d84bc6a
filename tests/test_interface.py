"""The stable interface: every name, signature and field of it stands in tests/golden/interface.json, so that none
changes unannounced. `python tests/test_interface.py` writes the file anew.
"""

import inspect
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast import Pipeline, Run, data, open_run, stages
from datasetdm_fast.engine import engines
from datasetdm_fast.engine.engines import Engine
from datasetdm_fast.engine.pipeline import DiffusionOutput, Output
from datasetdm_fast.engine.tasks.labeller import Labeller, LabellerInput
from datasetdm_fast.kernels import OPS

RECORDED = Path(__file__).parent / "golden" / "interface.json"
NOUNS = ("Request", "Batch", "Capture", "ProjectedCapture", "AttentionSums", "SemanticMap", "Instances", "DepthMap")
NOUNS += ("Keypoints", "Annotation", "Trust", "Sample", "Quarantined")


def signature(function: Any) -> str:
    """Parameters with their defaults, annotations left out."""
    found = inspect.signature(function)
    bare = [one.replace(annotation=one.empty) for one in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


def members(kind: type) -> dict[str, str]:
    """Public methods and properties of a class and, of a record, its fields."""
    told = {field.name: "field" for field in fields(kind)} if is_dataclass(kind) else {}
    if not told:
        told["()"] = signature(kind.__init__) if kind is not Engine else ""
    bases = [base for base in kind.__mro__[1:] if base.__module__ == data.__name__]
    for name, value in [pair for owner in (*bases, kind) for pair in vars(owner).items()]:
        if name.startswith("_") and name not in ("__call__", "__getitem__", "__len__", "__iter__"):
            continue
        if callable(value) or isinstance(value, (classmethod, staticmethod)):
            told[name] = signature(getattr(value, "__func__", value))
        elif name not in told:
            told[name] = "property"
    return told


def interface() -> dict[str, Any]:
    found: dict[str, Any] = {
        "open_run": signature(open_run),
        "engines.build_engine": signature(engines.build_engine),
        "stages.LEVELS": list(stages.LEVELS),
        "stages.STAGES": sorted(stages.STAGES),
    }
    for kind in (Pipeline, Output, DiffusionOutput, Run):
        found[kind.__name__] = members(kind)
    found["engines.Engine"] = members(Engine)
    found["engines.Engine"] |= {name: "attribute" for name in sorted(Engine.__annotations__)}
    found |= {f"data.{name}": members(kind) for name in NOUNS if is_dataclass(kind := getattr(data, name))}
    found["stages.Level"] = members(stages.Level)
    for kind in (Labeller, LabellerInput):
        found[f"tasks.labeller.{kind.__name__}"] = members(kind)
    found["tasks.labeller.Labeller"] |= {name: "attribute" for name in sorted(Labeller.__annotations__)}
    found["kernels.OPS"] = {name: signature(operation.reference) for name, operation in sorted(OPS.items())}
    return found


def test_no_name_or_signature_changes_unannounced():
    recorded, now = json.loads(RECORDED.read_text(encoding="utf-8")), interface()
    assert now == recorded, (
        "a name or signature of the stable interface differs: keep the old one for one minor release with a "
        "DeprecationWarning, say so in docs/library.md, and run `python tests/test_interface.py`"
    )


def test_a_changed_signature_is_noticed(monkeypatch):
    monkeypatch.setattr(Pipeline, "features", lambda self, picture: None)
    assert interface()["Pipeline"] != json.loads(RECORDED.read_text(encoding="utf-8"))["Pipeline"]


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(interface(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
