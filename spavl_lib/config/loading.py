"""Read a profile, put overrides on top, and build the config; read a saved config back."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spavl_lib import machine
from spavl_lib.config.presets import ORIGINAL_PRESET, original_preset
from spavl_lib.config.sections import Config, unread_by
from spavl_lib.config.validation import all_keys, build, flatten, input_error, to_plain, unknown_key
from spavl_lib.errors import InputError, nearest

PROFILES = Path(__file__).parent / "profiles"
# Old name -> present name, of a key (KEY) or of one value of a key (KEY=VALUE). Both names of a key
# are in the same section. Profiles and overrides with an old name are refused; in saved configs old
# names are translated.
RENAMED = {
    "data.source=seed_json": "data.source=original",
    "dpo.preset=seed": "dpo.preset=original",
    "ppo.preset=seed": "ppo.preset=original",
    "reward.seed_form": "reward.original_form",
}


# Stem -> path of each profile file of your own that this process has read.
_read_here: dict[str, Path] = {}


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses keys that are not text or that appear twice in one mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        key_texts = [key.value for key, _ in node.value]
        for key, _ in node.value:
            problem = ""
            if key_texts.count(key.value) > 1:
                problem = f"the key {key.value!r} stands twice; keep one"
            elif key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                problem = f"the key {key.value!r} must be text; put it in quotes"
            if problem:
                raise yaml.composer.ComposerError(problem=problem, problem_mark=key.start_mark)
        return node


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(p.stem for p in PROFILES.glob("*.yaml"))


def profile_argument(name: str) -> str:
    """The argument of `--profile` that loads the profile with this name again.

    Of a profile file of your own, a config holds only the stem. The process that read the file
    knows its whole path; other processes get `STEM.yaml`.
    """
    return name if name in profile_names() else str(_read_here.get(name, f"{name}.yaml"))


def load_config(
    profile: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    run_name: str = "",
) -> Config:
    """Read a profile and put overrides on top of it.

    Args:
        profile: Name of a shipped profile, or path of a YAML file. A file with `base: NAME` holds
            only what differs from that profile or file.
        overrides: Dotted key -> value, such as `{"dpo.beta": 0.2}`, or nested sections, such as
            `{"dpo": {"beta": 0.2}}`. Both forms leave the section's other keys as they are. A value
            that is text is parsed by its field's type.
        seed: Random seed that replaces the profile's; None keeps the profile's.
        run_name: Folder of the run under runs/; empty keeps the profile's.

    Returns:
        The resolved config. If no run name is set, the run has the profile's name. Settings of
        plugins are completed by their defaults.

    Raises:
        InputError: The profile is unknown, a key is unknown, a value is wrong, or a setting without
            default is missing; the message lists all problems. Or `$SPAVL_DTYPE` is wrong.
    """
    machine.asked_dtype()  # raises if $SPAVL_DTYPE is wrong
    path = _profile_path(profile)
    page = _with_base(path)
    if path.parent != PROFILES:
        _read_here[path.stem] = path.absolute()
    changes = _flat_overrides(overrides or {})
    named: dict[str, Any] = {} if seed is None else {"seed": seed}
    named |= {"run_name": run_name} if run_name else {}
    for key, value in named.items():
        if str(changes.get(key, value)) != str(value):
            raise InputError(f"{key} is given twice: {value!r}, and {changes[key]!r} in overrides")
    changes |= named
    chosen = flatten(page) | changes
    _refuse_old_names(chosen, str(path))
    for name in ORIGINAL_PRESET:
        if chosen.get(f"{name}.preset") == "original":
            preset = original_preset(name, str(chosen.get("model.adapter")))
            changes = flatten({name: preset}) | changes
    page = _for_source(page, changes.get("data.source"))
    for key, value in changes.items():
        _set(page, key, value)
    source = f"{path} with overrides" if overrides else str(path)  # an error may lie in either
    config = build(Config, {"profile": path.stem, **page}, source=source)
    plugins = {name: to_plain(config.section(name)) for name in config.plugins}
    return dataclasses.replace(config, run_name=config.run_name or config.profile, plugins=plugins)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The config from the plain values that `Config.to_dict` gave; old names are translated."""
    return build(Config, current_names(values), source="config.yaml")


def current_names(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A saved config's nested values, with old names replaced by present ones (see `RENAMED`).

    Args:
        values: A section or a whole config, as saved.
        prefix: Dotted name of the section with a closing dot; empty for the whole config.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"a saved config must be a mapping, got {values!r}")
    renamed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            renamed[name] = current_names(value, f"{prefix}{name}.")
        else:
            key, _, new_value = _present_name(f"{prefix}{name}", value).partition("=")
            renamed[key.removeprefix(prefix) or name] = new_value or value
    return renamed


def _present_name(key: str, value: Any) -> str:
    """The present name of a renamed key, or present KEY=VALUE of a renamed value; else empty."""
    return RENAMED.get(key) or RENAMED.get(f"{key}={value}", "")


def _profile_path(profile: str, folder: Path = Path()) -> Path:
    """The file of a profile.

    Args:
        profile: Name of a shipped profile, or path of a YAML file.
        folder: Folder that a relative path starts from.

    Raises:
        InputError: There is no such profile.
    """
    own = profile.endswith((".yaml", ".yml"))
    path = folder / profile if own else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = profile_names()
        hint = f"{nearest(profile, known)} (known: {', '.join(known)})"
        raise InputError(f"unknown profile {profile!r}{hint}")
    return path


def _with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A profile's values, on top of the values of its `base`. The base may have a base too.

    Args:
        path: The profile's file.
        above: The files that build on it.

    Raises:
        InputError: A file cannot be read, a base is unknown, or profiles build on each other
            in a circle.
    """
    page = _read_profile(path)
    if "base" not in page:
        return page
    name, line = page.pop("base"), (*above, path.resolve())
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: base must name a profile or a YAML file, got {name!r}")
    try:
        base = _profile_path(name, path.parent)
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None
    if base.resolve() in line:
        chain = " -> ".join(p.name for p in (*line, base))
        raise InputError(f"{path}: profiles build on each other: {chain}")
    data = page.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    return _merged(_for_source(_with_base(base, line), source), page)


def _for_source(page: dict[str, Any], source: Any) -> dict[str, Any]:
    """A profile's values for rows from another source: without settings that it does not read.

    Args:
        page: The profile's values.
        source: The source that replaces the profile's; None if none does.
    """
    data = page.get("data")
    if not isinstance(data, dict) or source in (None, data.get("source")):
        return page
    unread = unread_by(str(source))
    return page | {"data": {key: value for key, value in data.items() if key not in unread}}


def _merged(base: dict[str, Any], page: dict[str, Any]) -> dict[str, Any]:
    """Nested values of a profile on top of its base's values; a list replaces the base's list."""
    nested = {
        key: _merged(base[key], value)
        for key, value in page.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | page | nested


def _flat_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides as dotted key -> value.

    Raises:
        InputError: `overrides` is not a mapping, a key is not text, or a key is given both nested
            and dotted.
    """
    if not isinstance(overrides, Mapping):
        raise InputError(
            f"overrides must be a mapping such as {{'dpo.beta': 0.2}}, got {overrides!r}"
        )
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if not isinstance(key, str):
            raise InputError(f"overrides: the key {key!r} must be text, such as 'dpo.beta'")
        part = flatten({key: value})
        if twice := sorted(part.keys() & flat.keys()):
            raise InputError(f"overrides: {', '.join(twice)} is given twice; keep one")
        flat |= part
    return flat


def _read_profile(path: Path) -> dict[str, Any]:
    """The nested values of a profile's file.

    Raises:
        InputError: The file is not YAML, or its top level is not a mapping.
    """
    try:
        page = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(page, dict | None):
        raise InputError(f"{path} must be a mapping, got {type(page).__name__}")
    return page or {}


def _refuse_old_names(flat: Mapping[str, Any], source: str) -> None:
    """Raise one error that lists all old names among dotted keys and values."""
    lines = []
    for key, value in flat.items():
        new_key, _, new_value = _present_name(key, value).partition("=")
        if new_value:
            lines.append(f"{key} = {value!r} is now called {new_value!r}")
        elif new_key:
            lines.append(f"{key} is now called {new_key}")
    if lines:
        raise input_error(lines, source)


def _set(page: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings.

    Every mapping on the way is copied first, because with YAML anchors several sections can be the
    same mapping.
    """
    *parents, last = key.split(".")
    mapping = page
    for depth, part in enumerate(parents, 1):
        inner = mapping.get(part, {})
        if not isinstance(inner, dict):
            name, known = ".".join(parents[:depth]), list(all_keys(Config))
            problem = f"{name} must be a mapping, got {inner!r}"
            raise InputError(unknown_key(key, known) if name in known else problem)
        mapping[part] = dict(inner)
        mapping = mapping[part]
    mapping[last] = value
