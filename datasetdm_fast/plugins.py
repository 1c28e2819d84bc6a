"""What other packages add, found by their entry points and loaded when its name is asked for."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from datasetdm_fast.errors import Missing

GROUP = "datasetdm_fast."


def named(place: str) -> Any:
    """What a module:name stands for."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


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
        self[name] = loaded = self.checked(name, self.loaded(name, self.others[name].load), self.wanted)
        return loaded

    def _where(self, name: str) -> str:
        found = self.others[name]
        return f"{self.kind}: {name!r} of the package {found.dist.name if found.dist else found.value}"

    def loaded(self, name: str, load: Callable[[], Any]) -> Any:
        """What `load` returns for the entry of another package; a Missing that names the package where it fails."""
        try:
            return load()
        except Exception as error:  # code of others fails in any way
            told = (str(error).splitlines() or [""])[0]
            raise Missing(
                f"{self._where(name)} does not load ({type(error).__name__}: {told})",
                "Update that package, or remove it.",
            ) from error

    def checked(self, name: str, loaded: Any, wanted: type | None) -> Any:
        """The entry of another package where it is of the type that is wanted; entries of ours are not checked."""
        if name in self.others and wanted and not isinstance(loaded, wanted):
            raise Missing(
                f"{self._where(name)} is a {type(loaded).__name__}, expected a {wanted.__name__}",
                "Update that package, or remove it.",
            )
        return loaded


class PartTable(dict):
    """One part of every task by its name: ours, and behind them those of the tasks that packages register."""

    def __init__(self, own: Mapping[str, Any], tasks: Registry, part: str, make: Callable[[Any], Any] = lambda it: it):
        """`part` is the field of the tasks' records that says where it is, `make` what becomes of the object there."""
        super().__init__(own)
        self.tasks, self.part, self.make = tasks, part, make

    @property
    def names(self) -> tuple[str, ...]:
        return *(name for name in self if name not in self.tasks.others), *sorted(self.tasks.others)

    def __missing__(self, name: str) -> Any:
        if name not in self.tasks.others:
            raise KeyError(name)
        place = getattr(self.tasks[name], self.part)
        self[name] = made = self.tasks.loaded(name, lambda: self.make(named(place)))
        return made
