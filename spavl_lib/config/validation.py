"""`section`, the decorator of settings classes: one `InputError` lists all wrong values."""

import contextlib
import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pydantic
import pydantic.dataclasses
from pydantic import ValidationInfo

from spavl_lib.errors import InputError, nearest

T = TypeVar("T")
_RULES = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@typing.dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
def section(name: str = "") -> Callable[[type[T]], type[T]]:
    """Make a class a frozen, keyword-only dataclass whose values pydantic validates.

    Text such as "0.2", "true" or "[1, 2]" is parsed by the field's type. Construction and
    `dataclasses.replace` report all problems in one `InputError`. A class may have a method
    `contradictions`, which yields one sentence for each set of values that contradict each other.

    Args:
        name: Dotted name of the section. Error messages put it before the field's name.
    """

    def decorate(cls: Any) -> Any:
        dataclass_params = cls.__dict__.get("__dataclass_params__")
        if dataclass_params:  # a plugin's plain dataclass: derive from it, and leave it unchanged
            cls = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__})
        cls._parse = pydantic.field_validator("*", mode="before")(classmethod(_parse))
        if hasattr(cls, "contradictions"):
            cls._refuse_contradictions = pydantic.model_validator(mode="after")(
                _refuse_contradictions
            )
        checked: Any = pydantic.dataclasses.dataclass(
            cls,
            frozen=not dataclass_params or dataclass_params.frozen,
            kw_only=True,
            config=_RULES,
        )
        checked_init = checked.__init__

        @functools.wraps(checked_init)
        def __init__(self: Any, **values: Any) -> None:
            with _as_input_error(checked, name and f"{name}."):
                checked_init(self, **values)

        checked.__init__ = __init__
        return checked

    return decorate


def build(cls: type[T], values: Any, *, prefix: str = "", source: str = "") -> T:
    """An instance of a settings class from plain nested values.

    Args:
        cls: Class made with `section`.
        values: Field name -> value; the value of a nested section is a mapping.
        prefix: Dotted name of the section with a closing dot; empty for the whole config.
        source: File that the values come from, for the error message.

    Raises:
        InputError: Keys are unknown or missing, or values are wrong; the message lists all of them.
    """
    with _as_input_error(cls, prefix, source):
        return pydantic.TypeAdapter(cls).validate_python(values)


def to_plain(settings: Any) -> dict[str, Any]:
    """Settings as nested dicts, lists, text and numbers, ready for YAML and JSON."""
    return pydantic.TypeAdapter(type(settings)).dump_python(settings, mode="json")


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """One dict with dotted keys: `{"dpo": {"beta": 1}}` becomes `{"dpo.beta": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def all_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a class, including those of nested sections."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from all_keys(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def defaults(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> plain default of all settings with a default, also those in sections."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            flat |= defaults(field.type, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            value = field.default
            flat[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def input_error(lines: list[str], source: str = "") -> InputError:
    """One error whose message lists all problems.

    Args:
        lines: One sentence per problem.
        source: File or object with the problems; empty if the sentences name it.
    """
    if len(lines) == 1:
        return InputError(f"{source}: {lines[0]}" if source else lines[0])
    heading = f"{source or 'settings'}: {len(lines)} problems"
    return InputError("\n  ".join([heading, *lines]))


def unknown_key(key: str, known: list[str]) -> str:
    """The message for an unknown key. Suggests a key with the same last part, or a similar key."""
    same_last = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f"; did you mean {same_last[0]!r}?" if same_last else nearest(key, known)
    return f"unknown key {key!r}" + (hint or f" (known: {', '.join(known)})")


def _parse(cls: Any, value: Any, info: ValidationInfo) -> Any:
    """Parse text by the field's type, more strictly than pydantic.

    pydantic would also accept 1 or "yes" as a boolean, and true as a number.
    """
    field_type = cls.__pydantic_fields__[info.field_name].annotation
    if type(None) in (options := typing.get_args(field_type)):  # such as `float | None`
        if isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        field_type = options[0]
    is_tuple = typing.get_origin(field_type) is tuple
    if isinstance(value, str) and is_tuple:
        return [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
    if isinstance(value, str) and field_type is bool:
        value = {"true": True, "false": False}.get(value.lower(), value)
    if field_type is bool and not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    item_type = typing.get_args(field_type)[0] if is_tuple else field_type
    # `PositiveInt` is an annotated type with the origin int.
    if getattr(item_type, "__origin__", item_type) in (int, float):
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, bool) for v in values):
            raise ValueError(f"expected a number, got {value!r}")
    return value


def _refuse_contradictions(self: Any) -> Any:
    """Raise one error that lists all contradictions between a section's values."""
    if sentences := list(self.contradictions()):
        raise ValueError(*sentences)
    return self


@contextlib.contextmanager
def _as_input_error(cls: type, prefix: str, source: str = "") -> Iterator[None]:
    """Turn pydantic's error inside the block into an `InputError` with a line for each problem."""
    try:
        yield
    except pydantic.ValidationError as error:
        raise input_error(_lines(error, cls, prefix), source) from None


def _lines(error: pydantic.ValidationError, cls: type, prefix: str) -> list[str]:
    """One line for each problem in pydantic's error, and one for all missing keys."""
    missing, lines = [], []
    for problem in error.errors(include_url=False):
        # For an item of a list, `loc` ends in a number. The number is left out, because the message
        # shows the item itself.
        key = prefix + ".".join(part for part in problem["loc"] if isinstance(part, str))
        kind, value = problem["type"], problem["input"]
        requirement = problem["msg"].replace("Input should be ", "must be ", 1)
        if kind.startswith("missing"):
            missing.append(key)
        elif kind == "unexpected_keyword_argument":
            known = list(all_keys(cls, prefix))
            lines += [unknown_key(name, known) for name in flatten({key: value}) or [key]]
        elif kind == "value_error":
            place = f"{key.rstrip('.')}: " if key else ""
            lines += [f"{place}{text}" for text in problem["ctx"]["error"].args]
        elif kind == "dataclass_type":
            lines.append(f"{key} must be a mapping, got {value!r}")
        elif kind == "literal_error":
            allowed = re.findall(r"'([^']*)'", requirement)
            lines.append(f"{key} {requirement}, got {value!r}{nearest(str(value), allowed)}")
        else:
            lines.append(f"{key} {requirement.partition(', ')[0]}, got {value!r}")
    if missing:
        lines.insert(0, f"missing {', '.join(missing)}: set a value, there is no default")
    return lines
