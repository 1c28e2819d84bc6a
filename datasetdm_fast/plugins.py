"""Engines and readers of other packages, found by their entry points and loaded when their name is asked for."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from datasetdm_fast.errors import Missing

GROUP = "datasetdm_fast."


class Registry(dict):
    """What this package has by name, and behind it what installed packages register under one kind.

    Names of other packages are told by `names` and by `in`; their code runs when an entry is read. Ours come first
    where both have one name.
    """

    def __init__(self, kind: str, own: Mapping[str, Any], wanted: type | None = None):
        super().__init__(own)
        self.kind, self.wanted = kind, wanted
        self.others: dict[str, EntryPoint] = {
            found.name: found for found in entry_points(group=GROUP + kind) if found.name not in own
        }

    @property
    def names(self) -> tuple[str, ...]:
        return *(name for name in self if name not in self.others), *sorted(self.others)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.others

    def __missing__(self, name: str) -> Any:
        if name not in self.others:
            raise KeyError(name)
        found = self.others[name]
        package = found.dist.name if found.dist else found.value
        where = f"{self.kind}: {name!r} of the package {package}"
        try:
            loaded = found.load()
        except Exception as error:  # code of others fails in any way
            told = (str(error).splitlines() or [""])[0]
            raise Missing(
                f"{where} does not load ({type(error).__name__}: {told})", "Update that package, or remove it."
            ) from error
        if self.wanted and not isinstance(loaded, self.wanted):
            raise Missing(
                f"{where} is a {type(loaded).__name__}, expected a {self.wanted.__name__}",
                "Update that package, or remove it.",
            )
        self[name] = loaded
        return loaded
