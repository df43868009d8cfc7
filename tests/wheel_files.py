"""Tiny wheels, made in the test: of any package, and of those that hold prompts."""

import csv
import dataclasses
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from spavl_lib.evaluation.benchmarks import packages
from spavl_lib.runs.files import sha256_file


def write_wheel(folder: Path, requirement: str, files: Mapping[str, bytes]) -> Path:
    """Write a wheel that pip accepts.

    Args:
        folder: Takes the wheel.
        requirement: Name and version, such as `pyrit==1.1.0`.
        files: Place in the wheel -> content.

    Returns:
        The wheel.
    """
    name, version = requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        "Requires-Dist: a-package-that-is-nowhere\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for place, content in files.items():
            archive.writestr(place, content)
        for place, text in info.items():
            archive.writestr(f"{stem}.dist-info/{place}", text)
    return path


def pin_prompts(
    folder: Path, sets: Mapping[str, Mapping[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Make tiny wheels the pinned ones.

    Args:
        folder: Takes the folder of wheels.
        sets: Benchmark -> file in its folder -> content. `goals.csv` is packed as PyRIT's YAML.
        monkeypatch: Takes everything back.

    Returns:
        The folder of wheels.
    """
    wheels, pinned = folder / "wheels", dict[str, packages.Package]()
    for name, package in packages.PACKAGES.items():
        contents = {member: sets[name][file] for file, member in package.files.items()}
        if "goals.csv" in package.files:
            [(member, table)] = contents.items()
            rows = csv.DictReader(io.StringIO(table.decode(), newline=""))
            seeds = [{"value": row["goal"], "data_type": "text"} for row in rows]
            contents = {member: yaml.safe_dump({"seeds": seeds}).encode()}
        module = next(iter(contents)).partition("/")[0]
        others = {f"{module}/__init__.py": b"raise RuntimeError", f"{module}/hashes.pkl": b"\x80."}
        wheel = write_wheel(wheels, package.requirement, contents | others)
        pinned[name] = dataclasses.replace(package, wheel=sha256_file(wheel))
    monkeypatch.setattr(packages, "PACKAGES", pinned)
    return wheels
