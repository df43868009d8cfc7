"""What a result depends on besides its inputs: code, versions, machine and precision."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch transformers trl peft accelerate bitsandbytes datasets papermill numpy pillow "
    "safetensors"
).split()
# Across a major version of these nothing is promised to go on as it began.
GUARDED = ("torch", "transformers", "trl", "peft")


def canonical_sha256(value: Any) -> str:
    """Hex digest of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def environment(root: Path) -> dict:
    """Commit, code, versions, machine and precision of this process.

    Args:
        root: The checkout, for git.
    """
    commit = _git(root, "rev-parse", "HEAD")
    diff = _git(root, "diff", "HEAD") if commit else ""
    return {
        "git_commit": commit or None,
        "git_dirty": bool(_git(root, "status", "--porcelain")) if commit else None,
        "git_diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "code_sha256": code_sha256(),
        "versions": versions(),
        "packages": installed(),
        "machine": machine(),
        "determinism": determinism(),
    }


def git_diff(root: Path) -> str:
    """Uncommitted changes of the checkout, as a patch."""
    return _git(root, "diff", "HEAD")


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def code_sha256() -> str:
    """Hash of the library's Python files and profiles, committed or not."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for kind in ("*.py", "*.yaml") for p in folder.rglob(kind)):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Version of Python and of each package that numbers depend on."""
    named = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            named[name] = importlib.metadata.version(name)
    return named


def installed() -> dict[str, str]:
    """Name -> version of every installed package, from the names of the metadata folders."""
    packages: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        # Reading the metadata itself would take a second.
        folder = getattr(package, "_path", "")
        name, _, version = Path(str(folder)).stem.partition("-")
        if name and version:
            packages.setdefault(name.lower().replace("_", "-"), version.removesuffix(".dist"))
    return dict(sorted(packages.items()))


def majors(named: dict[str, str]) -> dict[str, str]:
    """Major versions of the packages that may not change when a run is resumed."""
    return {f"versions.{n}": named[n].split(".")[0] for n in GUARDED if n in named}


def machine() -> dict[str, Any]:
    """Processor, threads, and the GPU with its libraries, if there is one."""
    import torch

    name, flags = _processor()
    facts = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": name,
        "cpu_flags_sha256": hashlib.sha256(flags.encode()).hexdigest()[:16] if flags else None,
        "num_threads": torch.get_num_threads(),
        "gpu": None,
        "cuda": torch.version.cuda,
        "cudnn": None,
        "driver": None,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["driver"] = _driver()
    return facts


def _processor() -> tuple[str, str]:
    """Name and feature flags of the processor, where the system tells them."""
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields.get("model name") or platform.processor() or "", fields.get("flags", "")


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text(encoding="utf-8").splitlines()[0] if path.is_file() else None


def determinism() -> dict[str, Any]:
    """The settings that decide whether equal inputs give bit-identical results."""
    import torch

    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "float32_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
