"""Tables of classes that a setting chooses by name. Other packages can add classes.

A package declares each class that it adds as an entry point. To add a data source, its
pyproject.toml says:

    [project.entry-points."spavl.sources"]
    forum = "package.module:ForumSource"
"""

import importlib.metadata
from collections.abc import Callable
from typing import Generic, TypeVar

from spavl_lib.errors import InputError, nearest

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Classes by name: registered in this process, or named by entry points of other packages.

    Args:
        kind: What the classes are, such as "data source", for error messages.
        group: Group of entry points that other packages use.
        setting: The setting that chooses a class, for error messages.
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
            registered = self.known.get(name, cls)
            # If a notebook's cell runs twice, the new version of a class replaces the old one.
            if registered.__module__ != cls.__module__ or (
                registered.__qualname__ != cls.__qualname__
            ):
                raise InputError(f"{self.kind} {name!r} exists already; choose another name")
            self.known[name] = cls
            return cls

        return decorate

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {entry.name: entry for entry in importlib.metadata.entry_points(group=self.group)}

    def names(self) -> list[str]:
        """All names, including those that other packages add."""
        return sorted({*self.known, *self._entry_points()})

    def load_all(self) -> None:
        """Load every class that another package adds.

        Raises:
            InputError: A class cannot be loaded.
        """
        for name in self._entry_points():
            self.find(name)

    def find(self, name: str) -> T:
        """The class with this name.

        Raises:
            InputError: No class has this name, or the class cannot be loaded.
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
            if name not in self.known:  # a decorated class has registered itself while it loaded
                self.register(name)(cls)
        if name not in self.known:
            known = self.names()
            raise InputError(
                f"{self.setting}: unknown {self.kind} {name!r}{nearest(name, known)} "
                f"(known: {', '.join(known)})"
            )
        return self.known[name]
