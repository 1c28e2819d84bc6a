"""A package of another name adds an engine, a reader, a sampler, a task, a labeller and a format through its
entry points; what is broken is named.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import tiny_pipelines
from PIL import Image
from rendered import document, rendered
from skips import IS_LONG

from datasetdm_fast import cli, merge, open_run
from datasetdm_fast.config import TASK_KINDS, EngineKind
from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap
from datasetdm_fast.engine.backbones import OWN_PIPELINES, PIPELINES
from datasetdm_fast.engine.tasks import labeller
from datasetdm_fast.engine.tasks.labeller import check_label
from datasetdm_fast.errors import Missing
from datasetdm_fast.plugins import PartTable, Registry
from datasetdm_fast.runs.exporting import conversion
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.jobs.job import packages_of
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.document import check_document
from datasetdm_fast.runs.run_folder.folder import RunFolder

EXTENDING = Path(__file__).parent / "extending" / "datasetdm_fast"
CODE = """
from dataclasses import replace
from datasetdm_fast.config import EngineKind, TaskKind
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.training.readers.demo import DemoWorld
from datasetdm_fast.engine.sampling.ddim import ddim
from datasetdm_fast.engine.sampling.schedule import Sampler

class Slow(TorchEngine):
    name = "slow"

class Torn(TorchEngine):
    def denoise(self, latents, timestep, text):
        return super().denoise(latents, timestep, {}["context"])

class Short(TorchEngine):
    def denoise(self, latents, timestep, text):
        return super().denoise(latents, timestep, text)[:1]

def coarse(scheduler, alphas, steps, prediction, profile):
    return ddim(scheduler, alphas, steps, prediction, profile)

def uneven(scheduler, alphas, steps, prediction, profile):
    return [1, 2, 3], ddim(scheduler, alphas, steps, prediction, profile)[1]

COARSE, UNEVEN = Sampler(coarse, memory=0), Sampler(uneven, memory=0)
SLOW = EngineKind("foreign_things:Slow")
SHORT = EngineKind("foreign_things:Short")
FLAGGED = EngineKind("foreign_things:Slow", {"licence": ("--licence: the engine is {engine}", "Drop it.")})
TEARS = EngineKind("foreign_things:Torn")
LOST = EngineKind("foreign_nothing:Slow")
PICKY = EngineKind("foreign_things:Slow", {"provider": None}, requirement=("foreign_things:refuse", "provider"))

def refuse(provider):
    from datasetdm_fast.errors import Missing
    raise Missing("picky: no licence here", "Buy one.")

def scenes(path, split, size, tasks):
    return DemoWorld.read(path.name, split, size, tasks)

def pages(path, split, size, tasks):
    return {}["page"]

def rows(path, split, size, tasks):
    return [1, 2]

EDGES = TaskKind("edges_label:EdgesKind", "edges_task:EdgesTask", "edges_meter:Edges")
TORN = TaskKind("edges_label:EdgesKind", "edges_task:None", "edges_meter:Edges")
MIXED = TaskKind("edges_label:EdgesKind", "edges_meter:Edges", "edges_task:EdgesTask")
"""
WRITER = """
from datasetdm_fast.runs.exporting.mmseg import MmsegFormat

class Listing(MmsegFormat):
    needs = (("semantic",), ("bright",))

    def shared_files(self, plan, samples):
        return {"list.txt": [b"one"]}

class Leaving(Listing):
    def convert_sample(self, sample, plan):
        return {"../../left.txt": b""}, {}

class Torn(Listing):
    def convert_sample(self, sample, plan):
        return {}["context"]

class Repeated(Listing):
    def convert_sample(self, sample, plan):
        return {"list.txt": b""}, {}

class Text(Listing):
    def shared_files(self, plan, samples):
        return {"list.txt": "one"}

class Flat(Listing):
    needs = ("semantic",)

LISTING, LEAVING, TORN, REPEATED, TEXT, FLAT = Listing(), Leaving(), Torn(), Repeated(), Text(), Flat()

class BrightListing(Listing):
    needs = (("bright",),)

BRIGHT_LISTING = BrightListing()
"""
LABELLER = """
from dataclasses import replace
import numpy as np
from datasetdm_fast.config import LabellerKind
from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap
from datasetdm_fast.engine.labels import GalleryLayer
from datasetdm_fast.engine.labels.semantic import SemanticKind
from datasetdm_fast.engine.tasks.labeller import Labeller

class BrightKind(SemanticKind):
    attribute, title, contents = "bright", "Bright pixels", "`bright/ID.png`: 1 = bright"
    roles = ("bright", "bright_confidence")
    layers = (GalleryLayer("bright", "Bright", "map", role="bright"),)

class Bright(Labeller):
    classes = ("dark", "bright")
    reads_capture = True

    def label(self, given):
        assert len(given.requests) == given.capture.batch == len(given.latents)
        grey = given.images.float().mean(3).cpu() / 255
        return [SemanticMap((one > 0.5).byte().numpy(), one.numpy(), self.classes) for one in grey]

class Words(Bright):
    reads_capture, asks_words = False, True

    def label(self, given):
        assert given.words == (("ball",),) and given.classes == ("cube", "ball")
        classes = ("background", *given.classes)
        return [SemanticMap((one[..., 0] > 0).byte().cpu().numpy() * 2, one[..., 0].numpy(), classes)
                for one in given.images]

class Halves(Bright):
    classes = ("left", "right")

    def label(self, given):
        masks = np.zeros((2, *given.images.shape[1:3]), bool)
        masks[0, :, :9] = masks[1, :, 9:] = True
        return [Instances(masks, np.arange(2), np.ones(2, np.float32), self.classes) for _ in given.images]

class Heads(Bright):
    joints, limbs = ("nose", "left eye"), ((0, 1),)

    def label(self, given):
        points, seen = np.array([[[9, 9, 1], [12, 9, 1]]], np.float32), np.full((1, 2), 2)
        return [Keypoints(points, seen, np.ones(1, np.float32), self.joints, self.limbs) for _ in given.images]

class Small(Bright):
    def label(self, given):
        return [replace(label, labels=label.labels[:9]) for label in super().label(given)]

class Deep(Bright):
    def label(self, given):
        return [DepthMap(label.confidence, 1.0) for label in super().label(given)]

class Mute(Bright):
    def label(self, given):
        return []

BRIGHT = LabellerKind("foreign_labeller:BrightKind", "foreign_labeller:Bright")
WORDS = LabellerKind("datasetdm_fast.engine.labels.semantic:OpenVocabularyKind", "foreign_labeller:Words")
HALVES = LabellerKind("datasetdm_fast.engine.labels.instance:InstanceKind", "foreign_labeller:Halves")
JOINTS = LabellerKind("datasetdm_fast.engine.labels.pose:PoseKind", "foreign_labeller:Halves")
HEADS = LabellerKind("datasetdm_fast.engine.labels.pose:PoseKind", "foreign_labeller:Heads")
SMALL = LabellerKind("foreign_labeller:BrightKind", "foreign_labeller:Small")
DEEP = LabellerKind("foreign_labeller:BrightKind", "foreign_labeller:Deep")
MUTE = LabellerKind("foreign_labeller:BrightKind", "foreign_labeller:Mute")
HOLLOW = LabellerKind("foreign_labeller:BrightKind", "foreign_labeller:None")
"""
SLOPES = """
from datasetdm_fast.config import TaskKind
from datasetdm_fast.engine.labels.depth import DepthKind
from datasetdm_fast.engine.tasks.depth import DepthTask

class SlopesKind(DepthKind):
    attribute, title, contents, roles = "slopes", "Slopes", "`slopes/ID.png`", ("slopes",)

class SlopesTask(DepthTask):
    pass

SLOPES = TaskKind(
    "foreign_slopes:SlopesKind", "foreign_slopes:SlopesTask", "datasetdm_fast.training.evaluation.metrics:Depth"
)
"""
FAMILY = """
from dataclasses import replace
from functools import partial
from diffusers import SD3Transformer2DModel
from datasetdm_fast.engine.backbones import Part
from datasetdm_fast.engine.backbones.sd3 import SD3
from datasetdm_fast.engine.backbones.sd3_reference import SD3Reference

class Network(SD3Transformer2DModel):
    pass

class Bare(SD3Reference):
    network = property(lambda self: partial(self.model.modules["transformer"]))

class Mute:
    pass

def narrow(configs, size, halves):
    low, *levels = SD3.levels(configs, size, halves)
    return replace(low, heads=(1,) * len(low.heads)), *levels

OWN = Part("denoiser", ("foreign_family:Network", "diffusers:SD3Transformer2DModel"))
MINE = replace(SD3, name="mine", title="My model", fast=None, network_plan="", has_text_maps=False)
MINE = replace(MINE, parts={**SD3.parts, "transformer": OWN})
LOST = replace(MINE, reference="datasetdm_fast.engine.backbones.sd3_reference:SD3Referense")
MUTE = replace(MINE, reference="foreign_family:Mute")
BARE = replace(MINE, reference="foreign_family:Bare")
FEW = replace(MINE, levels=lambda *given: SD3.levels(*given)[1:])
SHORT = replace(MINE, levels=lambda configs: ())
NARROW = replace(MINE, levels=narrow)
OTHER = 1
"""
POINTS = """[datasetdm_fast.backbones]
MinePipeline = foreign_family:MINE
OtherPipeline = foreign_family:OTHER
NonePipeline = foreign_family:NONE
LostPipeline = foreign_family:LOST
MutePipeline = foreign_family:MUTE
BarePipeline = foreign_family:BARE
FewPipeline = foreign_family:FEW
ShortPipeline = foreign_family:SHORT
NarrowPipeline = foreign_family:NARROW
TextPipeline = foreign_part:TEXT

[datasetdm_fast.engines]
slow = foreign_things:SLOW
short = foreign_things:SHORT
flagged = foreign_things:FLAGGED
tears = foreign_things:TEARS
torn = foreign_things:NOTHING
wrong = foreign_things:scenes
lost = foreign_things:LOST
picky = foreign_things:PICKY
ends = foreign_end:ENGINE
torch = foreign_things:NOTHING

[datasetdm_fast.readers]
scenes = foreign_things:scenes
pages = foreign_things:pages
rows = foreign_things:rows

[datasetdm_fast.samplers]
coarse = foreign_things:COARSE
uneven = foreign_things:UNEVEN
wrong-sampler = foreign_things:scenes
ddim = foreign_things:NOTHING

[datasetdm_fast.tasks]
edges = foreign_things:EDGES
bad-edges = foreign_things:TORN
mixed-edges = foreign_things:MIXED
slopes = foreign_slopes:SLOPES

[datasetdm_fast.labellers]
bright = foreign_labeller:BRIGHT
words = foreign_labeller:WORDS
halves = foreign_labeller:HALVES
joints = foreign_labeller:JOINTS
heads = foreign_labeller:HEADS
small = foreign_labeller:SMALL
deep = foreign_labeller:DEEP
mute = foreign_labeller:MUTE
hollow = foreign_labeller:HOLLOW
faint = foreign_labeller:FAINT
semantic = foreign_labeller:FAINT

[datasetdm_fast.writers]
listing = foreign_writer:LISTING
bright-listing = foreign_writer:BRIGHT_LISTING
wrong-listing = foreign_things:scenes
leaving = foreign_writer:LEAVING
torn = foreign_writer:TORN
repeated = foreign_writer:REPEATED
text = foreign_writer:TEXT
flat = foreign_writer:FLAT
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    modules = {
        "end": "raise SystemExit('too old')",
        "family": FAMILY,
        "part": "from foreign_family import Part\nTEXT = Part('vae', 'diffusers:AutoencoderKL')",
        "things": CODE,
        "slopes": SLOPES,
        "writer": WRITER,
        "labeller": LABELLER,
    }
    for name, code in ((f"foreign_{name}", code) for name, code in modules.items()):
        (folder / f"{name}.py").write_text(code)
    for room, name in (("engine/labels", "label"), ("engine/tasks", "task"), ("training/evaluation", "meter")):
        code = (EXTENDING / room / "edges.py").read_text()
        (folder / f"edges_{name}.py").write_text(code.replace("datasetdm_fast.engine.labels.edges", "edges_label"))
    (folder / "foreign_things-1.0.dist-info").mkdir()
    (folder / "foreign_things-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: foreign-things\nVersion: 1.0\n"
    )
    (folder / "foreign_things-1.0.dist-info" / "entry_points.txt").write_text(POINTS)
    return folder


def test_code_of_others_is_loaded_when_it_is_asked_for(installed, monkeypatch):
    monkeypatch.syspath_prepend(str(installed))
    registry = Registry("engines", {"torch": 1}, EngineKind)
    assert registry.names == ("torch", "ends", "flagged", "lost", "picky", "short", "slow", "tears", "torn", "wrong")
    assert list(registry) == ["torch"]
    assert "slow" in registry and "none" not in registry and "foreign_things" not in sys.modules
    assert registry["torch"] == 1 and registry["slow"].engine == "foreign_things:Slow"
    ends = r"'ends' of the package foreign-things does not load \(SystemExit: too old\)"
    torn = "'torn' of the package foreign-things does not load"
    for name, message in (("torn", torn), ("wrong", "is a function"), ("ends", ends)):
        with pytest.raises(Missing, match=message):
            registry[name]
    with pytest.raises(KeyError):
        registry["none"]
    sys.modules.pop("foreign_things")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (5, "TypeError: 'int' object is not iterable"),
        ([b"a", None, b"b"], "TypeError: a chunk is a NoneType, expected"),
    ],
)
def test_a_file_of_another_package_that_is_not_bytes_is_named_and_not_cut_off(content, cause, monkeypatch):
    monkeypatch.setitem(
        conversion.EXPORT_FORMATS.others, "listing", SimpleNamespace(dist=SimpleNamespace(name="foreign"))
    )
    with pytest.raises(Missing, match=f"'listing' of the package foreign fails on its file a.txt .{cause}"):
        list(conversion._read_chunks("listing", "a.txt", content))


def test_a_run_names_the_package_of_a_task_that_is_not_installed(installed, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(installed))
    with monkeypatch.context() as here:
        here.setattr(TASK_KINDS, "others", Registry("tasks", {}).others)
        told = packages_of(["semantic", "edges:fine", "edges"])
    assert told == {"edges:fine": "foreign-things 1.0", "edges": "foreign-things 1.0"}
    for name in ("one", "two"):
        sample = rendered(len(name) + ord(name[0]), 32)
        with RunFolder(tmp_path / name, document(1, 32) | {"packages": told}) as folder:
            folder.add([replace(sample, request=replace(sample.request, index=0))], {})
            finish_run(folder)
    joined = tmp_path / "joined"
    assert merge.main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(joined), "--quiet"]) == 0
    for run in (tmp_path / "one", joined):
        described = json.loads((run / "run.json").read_text())
        for part in ("decoders", "labels"):
            described[part]["edges"] = described[part]["semantic"]
        described["config"]["task"].append("edges")
        (run / "run.json").write_text(json.dumps(described))
        with pytest.raises(Missing, match="'edges' is made by the package 'foreign-things 1.0', which is not"):
            open_run(run)


def test_a_label_that_only_a_decoder_names_is_of_another_package_and_one_that_nothing_names_is_unknown():
    described = document(1, 32)
    described["config"]["task"] = ["edges"]
    with pytest.raises(ValueError, match="config.task names 'edges'"):
        check_document(described)
    described["decoders"]["edges"] = described["decoders"]["semantic"]
    with pytest.raises(Missing, match="'edges' is made by another package, which is not installed"):
        check_document(described)


MAP = SemanticMap(np.zeros((4, 6), np.uint8), np.zeros((4, 6), np.float32), ("dark", "bright"))
THING = Instances(np.zeros((1, 4, 6), bool), np.zeros(1, int), np.ones(1, np.float32), MAP.classes)
PERSON = Keypoints(np.zeros((1, 2, 3)), np.zeros((1, 2), int), np.ones(1), ("nose", "left eye"))


@pytest.mark.parametrize(
    ("label", "wrong"),
    [
        (MAP, None),
        (replace(MAP, labels=np.full((4, 6), 255)), None),
        (THING, None),
        (replace(THING, masks=THING.masks[:0], class_ids=THING.class_ids[:0], scores=THING.scores[:0]), None),
        (PERSON, None),
        (DepthMap(np.ones((4, 6)), 1.0), None),
        ((MAP.labels, MAP.confidence), "a tuple is none of SemanticMap, "),
        (replace(MAP, labels=MAP.labels[:2]), "labels: an array of shape [2, 6], expected [4, 6]"),
        (replace(MAP, labels=MAP.confidence), "labels: an array of float32, expected integers"),
        (replace(MAP, confidence=None), "confidence: a NoneType, expected an array of numbers"),
        (replace(MAP, labels=MAP.labels + 2), "the class 2 is none of 0 to 1"),
        (replace(MAP, classes=("a", "b")), "classes: a, b, expected dark, bright"),
        (replace(THING, scores=np.ones(2)), "scores: an array of shape [2], expected [1]"),
        (replace(THING, class_ids=np.full(1, 255)), "the class 255 is none of 0 to 1"),
        (replace(PERSON, points=np.zeros((1, 2, 2))), "points: an array of shape [1, 2, 2], expected [P, 2, 3]"),
        (replace(PERSON, joints=("nose", "tail")), "joints: nose, tail, expected nose, left eye"),
        (DepthMap(np.ones((4, 6, 1)), 1.0), "metres: an array of shape [4, 6, 1], expected [4, 6]"),
    ],
)
def test_a_label_that_does_not_fit_its_image_or_its_table_is_named(label, wrong):
    table = {"classes": ["dark", "bright"], "joints": ["nose", "left eye"]}
    if wrong is None:
        check_label(label, (4, 6), table)
        return
    with pytest.raises(ValueError) as stop:
        check_label(label, (4, 6), table)
    assert wrong in str(stop.value)


def test_a_labeller_answers_for_every_image_by_the_table_of_its_run(monkeypatch):
    asked, answers = [], [MAP, MAP]

    def table(*given):
        asked.append(given)
        return {"classes": list(MAP.classes)}

    own = SimpleNamespace(label=lambda batch: answers)
    monkeypatch.setattr(labeller, "open_labeller", lambda name, device: own)
    monkeypatch.setattr(labeller, "kind_of", lambda name: SimpleNamespace(table=table))
    images = np.zeros((2, 4, 6, 3), np.uint8)
    batch = labeller.LabellerInput((None, None), ((), ()), MAP.classes, images, latents=None, capture=None)
    assert labeller.labels_of("own", "cpu", batch) == answers and asked == [(own, 6, MAP.classes)]
    answers.pop()
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        labeller.labels_of("own", "cpu", batch)


# One process for all: what each line ends with and says, then the length of a data set, and what was never loaded.
COMMANDS = """
import contextlib, io, json, sys
from datasetdm_fast import cli
from datasetdm_fast.command_line.probes import PROBES
from datasetdm_fast.runs.agreement.verify import EXACT
from datasetdm_fast.errors import Missing
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.engine.tasks import TASKS
found = []
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        code = cli.main(line)
    found.append((code, said.getvalue()))
    if len(found) == 1:
        assert "foreign_labeller" not in sys.modules
is_late = not {"edges_task", "edges_label"} & {*sys.modules}
said = []
asking = (
    lambda: TASKS["bad-edges"],
    lambda: TASKS["mixed-edges"],
    lambda: METRICS["mixed-edges"],
)
for ask in asking:
    try:
        ask()
    except Missing as stop:
        said.append(stop.cause)
told = []
for name in ("slow", "torn"):
    exec(PROBES[f"engine {name}"], {"report": lambda **values: told.append(values)})
parts = LABEL_KINDS["edges"].title, TASKS["edges"].requirement, METRICS["edges"].figure, EXACT["free edges"][0] >= 0
print(json.dumps([*found, len(open_data("scenes:/x/3", 64)), is_late, parts, said, told]))
"""


def write_labelled(folder: Path, labels: str) -> None:
    """Two pictures for folder:, with depth maps in millimetres or with masks."""
    for part in ("images", labels):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("background\nball\n")
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "images" / name)
        pixels = np.full((64, 64), 2000, np.uint16) if labels == "depth" else np.ones((64, 64), np.uint8)
        Image.fromarray(pixels).save(folder / labels / name)


def test_commands_run_them_by_name(installed, tmp_path):
    paths = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    few = "--size 64 --threads 1 --quiet".split()
    run = ["generate", "--model", "tiny", "--steps", "2", "--number", "1", "--prompts", "ball", *few]
    teach = "train --data demo:2 --steps 1 --batch-size 1 --draws 1 --folds no --out".split()
    lines = [
        ([*run, "--task", "semantic", "--out", "torn", "--engine", "torn"], 3, "'torn' of the package foreign-things"),
        (
            [*run, "--task", "semantic", "--out", "none", "--engine", "lost"],
            3,
            "'lost' of the package foreign-things does",
        ),
        ([*run, "--task", "semantic", "--out", "none", "--engine", "picky"], 3, "picky: no licence here"),
        ("evaluate --decoder demo --task semantic --data pages:x".split(), 3, "'pages' of the package foreign-things"),
        ("train --data rows:x --dry-run".split(), 3, "foreign-things is a list, expected a LabelledSource"),
        ([*run, "--task", "semantic", "--out", "run", "--engine", "slow"], 0, ""),
        (
            [*run, "--task", "semantic", "--out", "fails", "--engine", "tears"],
            3,
            "foreign_things.Torn.denoise of the package foreign-things 1.0 fails (KeyError: 'context')\nUpdate that",
        ),
        (
            [*run, "--task", "semantic", "--out", "short", "--engine", "short"],
            1,
            "this is a bug of ours, or of the package foreign-things 1.0, the report is",
        ),
        (
            [*run, "--task", "semantic", "--out", "none", "--engine", "flagged"],
            3,
            "foreign-things does not load (ValueError: there is no flag for its option 'licence')",
        ),
        ([*run, "--task", "semantic", "--out", "coarse", "--sampler", "coarse"], 0, ""),
        ([*run, "--task", "semantic", "--out", "ddim", "--sampler", "ddim"], 0, ""),
        (
            [*run, "--task", "semantic", "--out", "none", "--sampler", "uneven"],
            3,
            "samplers: 'uneven' of the package foreign-things fails (ValueError: 3 timesteps for 2 updates)",
        ),
        ([*run, "--out", "none", "--sampler", "wrong-sampler"], 3, "is a function, expected a Sampler"),
        ([*run, "--task", "semantic", "--out", "slo", "--engine", "slo"], 2, "did you mean slow?"),
        ([*run, "--labeller", "decoder,bright", "--task", "semantic", "--out", "both"], 0, ""),
        ([*run, "--labeller", "words", "--classes", "cube,ball", "--out", "words"], 0, ""),
        ("vary words --domain night --out varied --quiet".split(), 0, ""),
        (["audit", "both"], 0, ""),
        (["label", "both/images", "--labeller", "bright", "--model", "tiny", "--out", "seen", *few], 0, ""),
        (["label", "both/images", "--labeller", "bright", "--tiles", "--out", "none"], 2, "bright needs the whole"),
        (["label", "both/images", "--task", "slopes", "--tiles", "--out", "none"], 2, "slopes needs the whole"),
        ("train --data folder:measured --task slopes --dry-run --out none".split(), 0, ""),
        ("train --data folder:painted --task slopes --dry-run --out none".split(), 2, "no ground truth for slopes"),
        ([*run, "--labeller", "mute", "--out", "mute"], 3, "fails on a batch (ValueError: 0 labels for 1 images)"),
        ([*run, "--labeller", "small", "--out", "small"], 3, "labels: an array of shape [9, 64], expected [64, 64])"),
        ([*run, "--labeller", "deep", "--out", "deep"], 3, "foreign-things cannot store a label (AttributeError: "),
        ([*run, "--labeller", "hollow", "--out", "none"], 3, "'hollow' of the package foreign-things does not load"),
        ([*run, "--labeller", "joints", "--out", "none"], 3, "does not say what its labels are (AttributeError: "),
        ([*run, "--labeller", "faint", "--out", "none"], 3, "'faint' of the package foreign-things does not load"),
        ([*run, "--labeller", "brigth", "--out", "none"], 2, "did you mean bright?"),
        ([*run, "--labeller", "words", "--out", "none"], 2, "no class words were given"),
        (["convert", "run", "--to", "listing", "--out", "out", "--quiet"], 0, ""),
        (["convert", "both", "--to", "bright-listing", "--out", "bright", "--quiet"], 0, ""),
        (["convert", "run", "--to", "bright-listing", "--out", "none"], 2, "there are some for semantic"),
        (["convert", "seen", "--to", "mmseg", "--out", "maps", "--quiet"], 0, ""),
        (["convert", "seen", "--to", "yolo-seg", "--out", "none"], 2, "there are some for bright, semantic"),
        ([*run, "--labeller", "halves,heads", "--out", "halves"], 0, ""),
        (["convert", "halves", "--to", "yolo-seg,yolo-pose", "--quiet"], 0, ""),
        *(
            (["convert", "run", "--to", name, "--out", f"to-{name}"], 3, f"of the package foreign-things{said}")
            for name, said in (
                ("leaving", " fails on sample 00000000 (ValueError: '../../left.txt' leads out of its folder)"),
                ("torn", " fails on sample 00000000 (KeyError: 'context')"),
                ("repeated", " 1.0 writes repeated/list.txt more than once"),
                ("text", " fails on its file list.txt (TypeError: a chunk is a str, expected bytes)"),
                ("flat", " does not load (TypeError: needs is ('semantic',), expected groups of tasks such as "),
            )
        ),
        (
            ["convert", "run", "--to", "wrong-listing", "--out", "none"],
            3,
            "'wrong-listing' of the package foreign-things",
        ),
    ]
    edges = [  # the long form alone teaches a decoder of the foreign task
        ([*teach, "decoder", "--task", "edges", *few], 0, ""),
        ("generate --decoder decoder --task edges --steps 2 --number 1 --out edges".split() + few, 0, ""),
        ("evaluate --decoder decoder --task edges --data demo:1@100 --bootstrap 0 --quiet".split(), 0, "f1"),
        (["audit", "edges"], 0, ""),
    ]
    lines += edges if IS_LONG else []
    write_labelled(tmp_path / "measured", "depth")
    write_labelled(tmp_path / "painted", "masks")
    program = ["-c", COMMANDS, json.dumps([line for line, _, _ in lines])]
    ended = forked.run(program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    assert ended.returncode == 0, ended.stderr
    *found, count, is_late, parts, (bad, *mixed), (slow, torn) = json.loads(ended.stdout)
    for (code, says), (line, ended_with, said) in zip(found, lines, strict=True):
        assert ended_with == code and said in says, (line, says)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["engine"]["engine"] == "slow" and count == 3
    both, seen, words = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("both", "seen", "words"))
    coarse, ddim = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("coarse", "ddim"))
    assert coarse["sampling"].pop("sampler_package") == "foreign-things 1.0"
    assert coarse["sampling"] == {**ddim["sampling"], "sampler": "coarse"}
    assert "sampler is that of the package `foreign-things 1.0`" in (tmp_path / "coarse" / "README.md").read_text()
    images = [(tmp_path / name / "images" / "00000000.png").read_bytes() for name in ("coarse", "ddim")]
    assert images[0] == images[1]
    assert both["config"]["task"] == ["semantic", "bright"] and seen["config"]["task"] == ["bright"]
    assert both["sampling"]["labellers"] == {"bright": "foreign-things 1.0"} and seen["sampling"]["calls"] == 1
    assert both["labels"]["bright"]["classes"] == ["dark", "bright"] and words["decoders"] == {}
    assert "made by the package `foreign-things 1.0`" in (tmp_path / "both" / "README.md").read_text()
    # of the same pixels; the maps of classes have the numbers of each run
    first, second = (tmp_path / name / "bright_confidence" / "00000000.png" for name in ("both", "seen"))
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "out" / "listing" / "list.txt").read_bytes() == b"one"
    assert not (tmp_path / "left.txt").exists()
    assert (tmp_path / "bright" / "bright-listing" / "list.txt").is_file()
    assert "'bright'" in (tmp_path / "maps" / "mmseg" / "dataset.py").read_text()
    yolo = tmp_path / "halves" / "exports" / "yolo-seg"
    assert "right" in (yolo / "data.yaml").read_text()
    assert [line[0] for text in (yolo / "labels").rglob("*.txt") for line in text.read_text().splitlines()] == [
        "0",
        "1",
    ]
    (people,) = (yolo.parent / "yolo-pose" / "labels").rglob("*.txt")
    assert len(people.read_text().splitlines()) == 1
    assert (tmp_path / "edges" / "edges" / "00000000.png").is_file() == IS_LONG and not (tmp_path / "none").exists()
    assert is_late or IS_LONG
    assert parts == ["Edges", "an edge between two classes", "f1", True]
    assert slow["runs"] and "'torn' of the package foreign-things does not load" in torn["cause"]
    assert "'bad-edges' of the package foreign-things does not load" in bad
    for place, kind, told in zip(("edges_meter:Edges", "edges_task:EdgesTask"), ("Task", "Meter"), mixed, strict=True):
        assert f"foreign-things does not load (TypeError: {place} is no subclass of {kind})" in told
    for read in (open_run, audit):  # here, where the package is not installed
        with pytest.raises(Missing, match="'bright' is made by the package 'foreign-things 1.0', which is not"):
            read(tmp_path / "both")


def test_a_family_of_another_package_is_opened_by_its_pipeline(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setattr(PIPELINES, "others", Registry("backbones", OWN_PIPELINES).others)
    folder = tiny_pipelines.save(tmp_path / "model", "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    line = f"--engine torch --decoder random --prompts ball --steps 1 --number 1 --size {tiny_pipelines.SIZE} --quiet"

    def generate(pipeline: str) -> tuple[int, str]:
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
        code = cli.main(["generate", "--model", str(folder), "--out", str(tmp_path / pipeline), *line.split()])
        return code, capsys.readouterr().err

    assert generate("MinePipeline")[0] == 0
    run = tmp_path / "MinePipeline"
    assert json.loads((run / "run.json").read_text())["model"]["package"] == "foreign-things 1.0"
    assert "family is that of the package `foreign-things 1.0`" in (run / "README.md").read_text()
    does_not_load = "of the package foreign-things does not load"
    for pipeline, words in {
        "OtherPipeline": "'OtherPipeline' of the package foreign-things is a int, expected a Backbone",
        "NonePipeline": f"'NonePipeline' {does_not_load} (AttributeError: ",
        "LostPipeline": f"'LostPipeline' {does_not_load} (AttributeError: ",
        "MutePipeline": f"{does_not_load} (TypeError: foreign_family:Mute has no capturing, decode, ",
        "TextPipeline": f"{does_not_load} (TypeError: classes of a Part are 'diffusers:AutoencoderKL', ",
        "BarePipeline": "foreign_family.Bare.attentions of the package foreign-things 1.0 fails (AttributeError: ",
        "FewPipeline": "of the package foreign-things fails (TypeError: its levels are (Level(name='mid'",
        "ShortPipeline": "'ShortPipeline' of the package foreign-things fails (TypeError: ",
        "NarrowPipeline": "My model of the package foreign-things 1.0 captures [",
    }.items():
        code, said = generate(pipeline)
        assert code == 3 and words in said, (pipeline, code, said)


def test_parts_may_be_listed_while_another_thread_loads_one():
    class Slow(dict):
        def __contains__(self, name):
            table._loaded.setdefault("late", object())  # as the other thread does
            return super().__contains__(name)

    table = PartTable("label", object, Registry("tasks", {}))
    table.builtin, table._loaded = Slow(), {"early": object(), "second": object()}
    assert list(table) == ["early", "second"]
    assert list(table) == ["early", "second", "late"]
