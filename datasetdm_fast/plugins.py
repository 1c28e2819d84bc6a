"""Extensions from other packages, found by their entry points and loaded when they are selected."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from traceback import walk_tb
from typing import Any

from datasetdm_fast.errors import Missing, Stop

GROUP = "datasetdm_fast."


def load_place(place: str) -> Any:
    """The object that module:name refers to."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def extending_packages() -> dict[str, EntryPoint]:
    """An entry of each package with extensions, by the name of the module that it is imported as."""
    packages: dict[str, EntryPoint] = {}
    for group in (group for group in entry_points().groups if group.startswith(GROUP)):
        packages |= {entry.value.partition(":")[0].partition(".")[0]: entry for entry in entry_points(group=group)}
    packages.pop("datasetdm_fast", None)
    return packages


def loaded_packages() -> list[str]:
    """Names and versions of the packages whose extensions have been loaded, which are those that were selected."""
    return sorted({package_of(entry) for module, entry in extending_packages().items() if module in sys.modules})


def place_in_package(error: BaseException) -> str:
    """The function of an extension's package in which an error was raised or passed on, empty where there is none; one
    that a class of the package inherits from ours is the package's, too.
    """
    packages, place = extending_packages(), ""
    for frame, _ in walk_tb(error.__traceback__):
        kind, code = type(frame.f_locals.get("self")), frame.f_code
        owners = {
            str(kind.__module__): f"{kind.__qualname__}.{code.co_name}",
            str(frame.f_globals.get("__name__", "")): code.co_qualname,
        }
        for module, function in owners.items():
            if (entry := packages.get(module.partition(".")[0])) is not None:
                place = f"{module}.{function} of the package {package_of(entry)}"
    return place


def package_of(entry: EntryPoint) -> str:
    """Name and version of the package that registers an entry."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


class Registry(dict[str, Any]):
    """The entries of this package by name, followed by those that installed packages register under one kind.

    `names` and `in` know the names of other packages; their code runs when an entry is read. Ours take precedence
    if both use the same name.
    """

    def __init__(
        self, kind: str, builtin: Mapping[str, Any], required: type | None = None, reserved: Collection[str] = ()
    ):
        """Entries of other packages must be of type `required`, and have no name that is `reserved` for ours."""
        super().__init__(builtin)
        self.kind, self.required = kind, required
        self.others: dict[str, EntryPoint] = {
            entry.name: entry for entry in entry_points(group=GROUP + kind) if entry.name not in {*builtin, *reserved}
        }

    @property
    def names(self) -> tuple[str, ...]:
        return *(name for name in self if name not in self.others), *sorted(self.others)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.others

    def __missing__(self, name: str) -> Any:
        if name not in self.others:
            raise KeyError(name)
        self[name] = entry = self.check_type(name, self.guard(name, self.others[name].load), self.required)
        return entry

    def _where(self, name: str) -> str:
        entry = self.others[name]
        return f"{self.kind}: {name!r} of the package {entry.dist.name if entry.dist else entry.value}"

    def package(self, name: str) -> str:
        """Name and version of the package that registers an entry."""
        return package_of(self.others[name])

    def guard(self, name: str, call: Callable[[], Any], failure: str = "does not load") -> Any:
        """The result of `call`, which runs code of an entry; if another package's fails, a Missing names that."""
        if name not in self.others:
            return call()
        try:
            return call()
        except Stop:  # its message already has a remedy
            raise
        except (Exception, SystemExit) as error:  # code of others fails in any way
            raise self.failure(name, error, failure) from error

    def failure(self, name: str, error: BaseException, failure: str) -> Missing:
        """The error for a user whose package has raised `error`."""
        message = (str(error).splitlines() or [""])[0]
        return Missing(
            f"{self._where(name)} {failure} ({type(error).__name__}: {message})", "Update that package, or remove it."
        )

    def check_type(self, name: str, entry: Any, required: type | None) -> Any:
        """The entry of another package, which must be of type `required`; our entries are not checked."""
        if name in self.others and required and not isinstance(entry, required):
            raise Missing(
                f"{self._where(name)} is a {type(entry).__name__}, expected a {required.__name__}",
                "Update that package, or remove it.",
            )
        return entry


class PartTable(Mapping[str, Any]):
    """One part of the entries of some registries by name: a class that is named there and imported on first use.

    Parts of other packages are among `names`; iteration skips them until they are loaded.
    """

    def __init__(
        self,
        field: str,
        required: type,
        *registries: Registry,
        order: Sequence[str] = (),
        make: Callable[[Any], Any] = lambda part: part,
    ):
        """`field` of an entry gives the module:name of a subclass of `required`, which `make` converts. `order` is
        that of our names, by default that of the registries.
        """
        self.field, self.required, self.make = field, required, make
        builtin = {
            name: registry
            for registry in registries
            for name, entry in registry.items()
            if entry and name not in registry.others
        }
        self.builtin = {name: builtin[name] for name in sorted(builtin, key=[*order, *builtin].index)}
        self.others = {name: registry for registry in registries for name in registry.others}
        self._loaded: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return *self.builtin, *sorted(self.others)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Iterator[str]:
        loaded = tuple(self._loaded)  # at once, as another thread may be loading one
        return iter([*self.builtin, *(name for name in loaded if name not in self.builtin)])

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            registry = self.builtin.get(name) or self.others[name]
            entry = registry[name]
            self._loaded[name] = registry.guard(name, lambda: self._load(entry))
        return self._loaded[name]

    def _load(self, entry: Any) -> Any:
        place = getattr(entry, self.field)
        part = load_place(place)
        if not (isinstance(part, type) and issubclass(part, self.required)):
            raise TypeError(f"{place} is no subclass of {self.required.__name__}")
        return self.make(part)

    def guard(self, name: str, call: Callable[[], Any], failure: str) -> Any:
        """The result of `call`, which uses a part; if that of another package fails, a Missing names the package."""
        return self.others[name].guard(name, call, failure) if name in self.others else call()
