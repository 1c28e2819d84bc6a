"""What DatasetDM keeps in globals of its modules: the model of a script, its last features, and how it is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from datasetdm_fast.config import PROFILES
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import PRESETS, load_model
from datasetdm_fast.engine.loading.model import NETWORKS, Model

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.engines.engine import Engine

PARTS = ("tokenizer", *NETWORKS)  # folders of a model that scripts name one by one


class EnoughImages(BaseException):
    """Ends a script that would make more images than it was asked for; no `except Exception` of it may catch this."""


@dataclass(frozen=True)
class ScriptSettings:
    """How the networks of a script are run, whatever it says itself."""

    model: str = ""  # in place of the folder that the script names
    engine: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    profile: str = PROFILES[0]
    steps: int = 0  # sampling steps, 0: those of the script
    limit: int = 0  # images, 0: all


@dataclass
class ScriptSession:
    """The state of one script."""

    settings: ScriptSettings = field(default_factory=ScriptSettings)
    folder: str = ""  # of the model that was named first
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    images: int = 0

    def open(self, folder: str, subfolder: str = "") -> ScriptSession:
        """This session with the model of a folder, or of the folder that holds the part that is named."""
        path = Path(folder)
        is_part = not subfolder and path.name in PARTS
        self.folder = self.folder or (folder if folder in PRESETS else str(path.parent if is_part else path))
        return self

    @cached_property
    def model(self) -> Model:
        return load_model(self.settings.model or self.folder)

    @cached_property
    def engine(self) -> Engine:
        settings = self.settings
        return build_engine(settings.engine, self.model, dtype=settings.dtype, device=settings.device)

    @property
    def has_model(self) -> bool:
        return bool(self.settings.model or self.folder)

    def check(self) -> None:
        """Ends the script where it has made enough images."""
        if self.settings.limit and self.images >= self.settings.limit:
            raise EnoughImages

    def begin(self, count: int) -> None:
        """Counts images that are begun."""
        self.check()
        self.images += count

    def written(self, path: str) -> None:
        """Counts a JPEG file that a script without a model writes, as an image that is begun."""
        if not self.has_model and Path(path).suffix in (".jpg", ".jpeg"):
            self.begin(1)


SESSIONS = [ScriptSession()]


def current() -> ScriptSession:
    return SESSIONS[-1]


@contextmanager
def opened(settings: ScriptSettings) -> Iterator[ScriptSession]:
    """Within the block these settings hold; nothing of it is left afterwards."""
    SESSIONS.append(ScriptSession(settings))
    try:
        yield SESSIONS[-1]
    finally:
        SESSIONS.pop()
