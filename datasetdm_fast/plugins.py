"""Extensions from other packages, found by their entry points and loaded when they are selected."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from traceback import walk_tb
from typing import Any

from datasetdm_fast.errors import REFUSALS, Missing

GROUP = "datasetdm_fast."


def named(place: str) -> Any:
    """The object that module:name refers to."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def extending_packages() -> dict[str, EntryPoint]:
    """An entry of each package with extensions, by the name of the module that it is imported as."""
    packages: dict[str, EntryPoint] = {}
    for group in (group for group in entry_points().groups if group.startswith(GROUP)):
        packages |= {found.value.partition(":")[0].partition(".")[0]: found for found in entry_points(group=group)}
    packages.pop("datasetdm_fast", None)
    return packages


def loaded_packages() -> list[str]:
    """Names and versions of the packages whose extensions have been loaded, which are those that were selected."""
    return sorted({package_of(found) for module, found in extending_packages().items() if module in sys.modules})


def place_in_package(error: BaseException) -> str:
    """The function of an extension's package in which an error was raised or passed on, empty where there is none."""
    packages, place = extending_packages(), ""
    for frame, _ in walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        if (found := packages.get(module.partition(".")[0])) is not None:
            place = f"{module}.{frame.f_code.co_qualname} of the package {package_of(found)}"
    return place


def package_of(found: EntryPoint) -> str:
    """Name and version of the package that registers an entry."""
    return f"{found.dist.name} {found.dist.version}" if found.dist else found.value


class Registry(dict):
    """The entries of this package by name, followed by those that installed packages register under one kind.

    `names` and `in` know the names of other packages; their code runs when an entry is read. Ours take precedence
    if both use the same name.
    """

    def __init__(self, kind: str, own: Mapping[str, Any], wanted: type | None = None, taken: Collection[str] = ()):
        """Entries of other packages must be of type `wanted`; names in `taken` are reserved for ours."""
        super().__init__(own)
        self.kind, self.wanted = kind, wanted
        self.others: dict[str, EntryPoint] = {
            found.name: found for found in entry_points(group=GROUP + kind) if found.name not in {*own, *taken}
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

    def package(self, name: str) -> str:
        """Name and version of the package that registers an entry."""
        return package_of(self.others[name])

    def loaded(self, name: str, load: Callable[[], Any], failure: str = "does not load") -> Any:
        """The result of `load` for the entry of another package; if it fails, a Missing that names the package."""
        try:
            return load()
        except tuple(REFUSALS.values()):  # it says what to do, or uses code of ours that does
            raise
        except (Exception, SystemExit) as error:  # code of others fails in any way
            raise self.failed(name, error, failure) from error

    def failed(self, name: str, error: BaseException, failure: str) -> Missing:
        """What is said where code of another package has raised an error."""
        told = (str(error).splitlines() or [""])[0]
        return Missing(
            f"{self._where(name)} {failure} ({type(error).__name__}: {told})", "Update that package, or remove it."
        )

    def checked(self, name: str, loaded: Any, wanted: type | None) -> Any:
        """The entry of another package, which must be of type `wanted`; our entries are not checked."""
        if name in self.others and wanted and not isinstance(loaded, wanted):
            raise Missing(
                f"{self._where(name)} is a {type(loaded).__name__}, expected a {wanted.__name__}",
                "Update that package, or remove it.",
            )
        return loaded


class PartTable(dict):
    """One part of every label by its name: ours, followed by those that other packages register."""

    def __init__(
        self,
        own: Mapping[str, Any],
        part: str,
        wanted: type,
        *registries: Registry,
        make: Callable[[Any], Any] = lambda it: it,
    ):
        """`part` is the field of an entry that gives the module:name of a subclass of `wanted`, which `make`
        converts.
        """
        super().__init__(own)
        self.part, self.wanted, self.make = part, wanted, make
        self.others = {name: registry for registry in registries for name in registry.others}

    @property
    def names(self) -> tuple[str, ...]:
        return *(name for name in self if name not in self.others), *sorted(self.others)

    def run(self, name: str, call: Callable[[], Any], failure: str) -> Any:
        """The result of `call`, which uses a part; if that of another package fails, a Missing names the package."""
        return self.others[name].loaded(name, call, failure) if name in self.others else call()

    def __missing__(self, name: str) -> Any:
        registry = self.others[name]
        place = getattr(registry[name], self.part)

        def made() -> Any:
            found = named(place)
            if not (isinstance(found, type) and issubclass(found, self.wanted)):
                raise TypeError(f"{place} is no subclass of {self.wanted.__name__}")
            return self.make(found)

        self[name] = part = registry.loaded(name, made)
        return part
