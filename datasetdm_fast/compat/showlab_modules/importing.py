"""What a script gets for its imports: our names, then the checkout's own files, then libraries or their stand-ins."""

from __future__ import annotations

import builtins
import tokenize
from collections.abc import Callable, Mapping, Sequence
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

from datasetdm_fast.errors import Missing

Behind = Callable[[], ModuleType | None]  # the module that has what a stand-in lacks


class LackedName:
    """A name of a library that is not installed: a script may import it, and ends where it uses it."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, name: str) -> LackedName:
        if name.startswith("__"):
            raise AttributeError(name)
        return LackedName(f"{self.name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        library = self.name.partition(".")[0]
        raise Missing(f"{self.name}: the script needs {library}, which is not installed", f"Install {library}.")


class StandInModule(ModuleType):
    """A module of given names, and behind them those of the module that it stands before, if any."""

    def __init__(self, name: str, values: Mapping[str, Any], behind: Behind | None = None, *, is_library: bool = False):
        super().__init__(name)
        self.__dict__.update(values)
        self.__dict__.update(_behind=behind, _is_library=is_library)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._behind is not None and (module := self._behind()) is not None:
            return getattr(module, name)
        if self._is_library:
            return LackedName(f"{self.__name__}.{name}")
        raise AttributeError(f"{self.__name__}.{name} is none of the names that compat.showlab has")


class ScriptImports:
    """The imports of one script and of the files of its checkout; no other code's imports change."""

    def __init__(self, modules: Mapping[str, StandInModule], folders: Sequence[Path]):
        self.modules, self.folders = dict(modules), tuple(folders)
        self.own: dict[str, ModuleType] = {}  # files of the checkout by their names as modules
        for name, module in modules.items():
            if module._behind is None and not module._is_library:
                module.__dict__["_behind"] = lambda name=name: self.file(name)

    def globals_of(self, name: str, path: Path) -> dict[str, Any]:
        """Globals of a file whose imports go this way."""
        return {"__name__": name, "__file__": str(path), "__builtins__": {**vars(builtins), "__import__": self}}

    def __call__(
        self, name: str, scope: Any = None, local: Any = None, wanted: Sequence[str] | None = (), level: int = 0
    ) -> ModuleType:
        full = resolve_name("." * level + name, scope["__package__"]) if level else name
        top = full.partition(".")[0]
        found = self.module(full)
        if found is None:
            stand_in = self.modules.get(top)
            if stand_in is not None and not stand_in._is_library:
                raise ImportError(f"{full} is none of the modules that compat.showlab has")
            library = __import__(full, scope, local, wanted, 0)
            return library if wanted or stand_in is None else stand_in
        for each in wanted or ():
            if each != "*" and not hasattr(found, each):
                self.module(f"{full}.{each}")
        return found if wanted else self.module(top) or found

    def module(self, name: str) -> ModuleType | None:
        """The module of a name that is ours, the checkout's or a stand-in; None for one of an installed library."""
        if name in self.modules:
            return self.modules[name]
        top = name.partition(".")[0]
        if top in self.modules and self.modules[top]._is_library and self.modules[top]._behind is None:
            self.modules[name] = StandInModule(name, {}, is_library=True)
            self._join(name, self.modules[name])
            return self.modules[name]
        return self.file(name)

    def file(self, name: str) -> ModuleType | None:
        """The checkout's own file of a module, run once."""
        if name in self.own:
            return self.own[name]
        place = Path(*name.split("."))
        for path in (folder / end for folder in self.folders for end in (place / "__init__.py", f"{place}.py")):
            if path.is_file():
                return self._ran(name, path)
        return None

    def _ran(self, name: str, path: Path) -> ModuleType:
        module = self.own[name] = ModuleType(name)
        is_package = path.name == "__init__.py"
        module.__dict__.update(self.globals_of(name, path))
        module.__package__ = name if is_package else name.rpartition(".")[0]
        with tokenize.open(path) as file:
            code = compile(file.read(), str(path), "exec")
        try:
            exec(code, module.__dict__)
        except BaseException:
            del self.own[name]
            raise
        self._join(name, module)
        return module

    def _join(self, name: str, module: ModuleType) -> None:
        """Makes a module known to the package that holds it."""
        holder, _, last = name.rpartition(".")
        if holder and (package := self.module(holder)) is not None:
            package.__dict__.setdefault(last, module)
