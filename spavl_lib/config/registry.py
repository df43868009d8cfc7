"""Tables of classes that a setting chooses by name. Other packages can add classes.

A package declares each class that it adds as an entry point. To add a data source, its
pyproject.toml says:

    [project.entry-points."spavl.sources"]
    forum = "package.module:ForumSource"
"""

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Generic, TypeVar

from spavl_lib.errors import InputError, nearest

T = TypeVar("T", bound=type)


def entry_points(group: str) -> dict[str, EntryPoint]:
    """Name -> entry point of a group. It is cached until a folder of `sys.path` changes."""
    places = []
    for place in sys.path:
        with contextlib.suppress(OSError):
            places.append((place, Path(place).stat().st_mtime_ns))
    return _entry_points_in(group, tuple(places))


@functools.lru_cache(maxsize=32)
def _entry_points_in(group: str, places: tuple) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=group)}


class Registry(Generic[T]):
    """Classes by name: those registered in this process, and those that other packages add.

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

    def names(self) -> list[str]:
        """All names, including those that other packages add."""
        return sorted({*self.known, *entry_points(self.group)})

    def load_all(self) -> None:
        """Load every class that another package adds.

        Raises:
            InputError: A class cannot be loaded.
        """
        for name in entry_points(self.group):
            self.find(name)

    def find(self, name: str) -> T:
        """The class with this name.

        Raises:
            InputError: No class has this name, or the class cannot be loaded.
        """
        entry = None if name in self.known else entry_points(self.group).get(name)
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
