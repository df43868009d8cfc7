"""Tables of things that a setting chooses by name, and that other packages can extend.

A package names what it adds as an entry point. Its pyproject.toml says, for a data source:

    [project.entry-points."spavl.sources"]
    forum = "package.module:ForumSource"
"""

import importlib.metadata
from collections.abc import Callable
from typing import Generic, TypeVar

from spavl_lib.errors import InputError, nearest

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Classes by name: those registered here, and those that other packages' entry points name.

    Args:
        kind: What the classes are, for error messages.
        group: Group of entry points that adds to them.
        setting: The setting that chooses one, for error messages.
    """

    def __init__(self, kind: str, group: str, setting: str):
        self.kind, self.group, self.setting = kind, group, setting
        self.known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers a class under a name.

        Raises:
            InputError: Another class has this name.
        """

        def decorate(cls: T) -> T:
            other = self.known.get(name, cls)
            # The same class again, as when a notebook's cell is run twice, replaces the first.
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise InputError(f"{self.kind} {name!r} exists already; choose another name")
            self.known[name] = cls
            return cls

        return decorate

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {entry.name: entry for entry in importlib.metadata.entry_points(group=self.group)}

    def names(self) -> list[str]:
        """All names, those of other packages included."""
        return sorted({*self.known, *self._entry_points()})

    def load_all(self) -> None:
        """Load the classes of all other packages.

        Raises:
            InputError: One of them cannot be loaded.
        """
        for name in self._entry_points():
            self.find(name)

    def find(self, name: str) -> T:
        """The class of a name.

        Raises:
            InputError: There is none, or it cannot be loaded.
        """
        entry = None if name in self.known else self._entry_points().get(name)
        if entry:
            try:
                cls = entry.load()
            except Exception as error:  # importing another package's code can raise anything
                raise InputError(
                    f"{self.setting}: cannot load {self.kind} {name!r} from {entry.value}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            if name not in self.known:  # unless the class is decorated
                self.register(name)(cls)
        if name not in self.known:
            known = self.names()
            raise InputError(
                f"{self.setting}: unknown {self.kind} {name!r}{nearest(name, known)} "
                f"(known: {', '.join(known)})"
            )
        return self.known[name]
