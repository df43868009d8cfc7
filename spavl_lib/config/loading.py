"""Read a profile, put overrides on top, and build the config; read a saved config back."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spavl_lib import machine
from spavl_lib.config.presets import ORIGINAL_LEARNING_RATE, ORIGINAL_PRESET
from spavl_lib.config.sections import Config
from spavl_lib.config.validation import all_keys, build, flatten, input_error, to_plain, unknown_key
from spavl_lib.errors import InputError, nearest

PROFILES = Path(__file__).parent / "profiles"
# Old name -> name today, of a key or of one value of a key (KEY=VALUE); the section stays the same.
# Profiles and overrides with an old name are refused; saved configs are translated.
RENAMED = {
    "data.source=seed_json": "data.source=original",
    "dpo.preset=seed": "dpo.preset=original",
    "ppo.preset=seed": "ppo.preset=original",
    "reward.seed_form": "reward.original_form",
}


class _Loader(yaml.SafeLoader):
    """Reads YAML in which every key is text and stands only once in its mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            problem = ""
            if names.count(key.value) > 1:
                problem = f"the key {key.value!r} stands twice; keep one"
            elif key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                problem = f"the key {key.value!r} must be text; put it in quotes"
            if problem:
                raise yaml.composer.ComposerError(problem=problem, problem_mark=key.start_mark)
        return node


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(p.stem for p in PROFILES.glob("*.yaml"))


def load_config(
    profile: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    run_name: str = "",
) -> Config:
    """Read a profile and put overrides on top of it.

    Args:
        profile: Name of a shipped profile, or path of a YAML file.
        overrides: Dotted key -> value, such as `{"dpo.beta": 0.2}`, or nested sections, such as
            `{"dpo": {"beta": 0.2}}`; both leave the section's other keys alone. Text is parsed by
            the field's type.
        seed: Random seed that replaces the profile's.
        run_name: Folder of the run under runs/.

    Returns:
        The resolved config, with a run name and the settings of plugins filled in.

    Raises:
        InputError: The profile is unknown, or there are unknown keys, wrong values or missing
            scale; lists all of them. Or `$SPAVL_DTYPE` is no precision.
    """
    machine.asked_dtype()
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = profile_names()
        hint = f"{nearest(profile, known)} (known: {', '.join(known)})"
        raise InputError(f"unknown profile {profile!r}{hint}")
    page = _read_profile(path)
    changes = flatten(overrides or {})
    changes |= {} if seed is None else {"seed": seed}
    changes |= {"run_name": run_name} if run_name else {}
    chosen = flatten(page) | changes
    _refuse_old_names(chosen, str(path))
    for name, preset in ORIGINAL_PRESET.items():
        if chosen.get(f"{name}.preset") == "original":
            rates = ORIGINAL_LEARNING_RATE[name]
            rate = rates.get(str(chosen.get("model.adapter")), rates["full"])
            changes = flatten({name: preset | {"learning_rate": rate}}) | changes
    for key, value in changes.items():
        _set(page, key, value)
    config = build(Config, {"profile": path.stem, **page}, source=str(path))
    plugins = {name: to_plain(config.section(name)) for name in config.plugins}
    return dataclasses.replace(config, run_name=config.run_name or config.profile, plugins=plugins)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The config saved in a record, from its `to_dict` form; old names are translated."""
    return build(Config, current_names(values), source="config.yaml")


def current_names(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A saved config's nested values under today's names (see `RENAMED`).

    Args:
        values: A section or a whole config, as saved.
        prefix: Dotted name of the section with a closing dot; empty for the whole config.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"a saved config must be a mapping, got {values!r}")
    record: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            record[name] = current_names(value, f"{prefix}{name}.")
        else:
            key, _, new_value = _today(f"{prefix}{name}", value).partition("=")
            record[key.removeprefix(prefix) or name] = new_value or value
    return record


def _today(key: str, value: Any) -> str:
    """The new name of a key, or new KEY=VALUE; empty if nothing was renamed."""
    return RENAMED.get(key) or RENAMED.get(f"{key}={value}", "")


def _read_profile(path: Path) -> dict[str, Any]:
    try:
        page = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(page, dict | None):
        raise InputError(f"{path} must be a mapping, got {type(page).__name__}")
    return page or {}


def _refuse_old_names(flat: Mapping[str, Any], source: str) -> None:
    lines = []
    for key, value in flat.items():
        new_key, _, new_value = _today(key, value).partition("=")
        if new_value:
            lines.append(f"{key} = {value!r} is now called {new_value!r}")
        elif new_key:
            lines.append(f"{key} is now called {new_key}")
    if lines:
        raise input_error(lines, source)


def _set(page: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a mapping that YAML anchors share between sections is copied first."""
    *parents, last = key.split(".")
    for depth, part in enumerate(parents, 1):
        inner = page.get(part, {})
        if not isinstance(inner, dict):
            name, known = ".".join(parents[:depth]), list(all_keys(Config))
            problem = f"{name} must be a mapping, got {inner!r}"
            raise InputError(unknown_key(key, known) if name in known else problem)
        page[part] = dict(inner)
        page = page[part]
    page[last] = value
