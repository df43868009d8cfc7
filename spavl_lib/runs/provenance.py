"""What a result depends on besides its inputs: code, versions, machine and torch's settings."""

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
LONGEST_LINE = 1000  # characters of a line of `source.diff`
# An interrupted stage resumes only with the same major versions of these packages.
GUARDED = ("torch", "transformers", "trl", "peft")


GIT_TIMEOUT_S = 120


def canonical_sha256(value: Any) -> str:
    """Hex digest of a JSON value; the order of keys does not change it."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def environment(root: Path) -> dict:
    """Commit, code, versions, packages and machine of this process, and settings of determinism.

    Args:
        root: The checkout in which git is called.
    """
    commit = _git(root, "rev-parse", "HEAD")
    # `status` comes first: it notes in git's index which files are unchanged. Without that, each
    # call would read the notebooks of a fresh clone again, through a slow filter.
    status = _git(root, "status", "--porcelain") if commit else ""
    diff = _git(root, "diff", "HEAD") if status else ""
    return {
        "git_commit": commit or None,
        "git_dirty": bool(status) if commit and status is not None else None,
        "git_diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "code_sha256": code_sha256(),
        "versions": versions(),
        "packages": installed(),
        "machine": machine(),
        "determinism": determinism(),
    }


def git_diff(root: Path) -> str:
    """Uncommitted changes of the checkout, as a patch for readers.

    Lines over `LONGEST_LINE` characters are shortened: a notebook that was run and saved holds
    figures in such lines. The manifest has the hash of the whole patch.
    """
    lines = (_git(root, "diff", "HEAD") or "").split("\n")
    return "\n".join(
        line if len(line) <= LONGEST_LINE else f"{line[:80]} [... {len(line):,} characters]"
        for line in lines
    )


def _git(root: Path, *args: str) -> str | None:
    """What a git command prints; None if it fails or takes longer than `GIT_TIMEOUT_S`."""
    try:
        completed = subprocess.run(
            ["git", *args],
            cwd=root, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip()


def code_sha256() -> str:
    """Hash of the library's Python files and profiles, committed or not."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for kind in ("*.py", "*.yaml") for p in folder.rglob(kind)):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def library_version() -> str:
    """The version of this library, with the commit of its checkout if it runs from one."""
    try:
        number = importlib.metadata.version("spavl-workbook")
    except importlib.metadata.PackageNotFoundError:
        number = "not installed"
    root = Path(__file__).parents[2]
    commit = _git(root, "rev-parse", "--short=10", "HEAD") if (root / ".git").exists() else ""
    changed = ", changed" if commit and _git(root, "status", "--porcelain") else ""
    return f"{number} (commit {commit}{changed})" if commit else number


def versions() -> dict[str, str]:
    """Versions of Python and of each package on which results depend."""
    version_of = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version_of[name] = importlib.metadata.version(name)
    return version_of


def installed() -> dict[str, str]:
    """Name -> version of every installed package."""
    packages: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        # The name of the metadata folder holds name and version. Reading the metadata would take a
        # second.
        folder = getattr(package, "_path", "")
        name, _, version = Path(str(folder)).stem.partition("-")
        if name and version:
            packages.setdefault(name.lower().replace("_", "-"), version.removesuffix(".dist"))
    return dict(sorted(packages.items()))


def majors(named: dict[str, str]) -> dict[str, str]:
    """Major versions of the packages of `GUARDED`, which a resumed stage must not change.

    Args:
        named: Package -> version.
    """
    return {f"versions.{n}": named[n].split(".")[0] for n in GUARDED if n in named}


def machine() -> dict[str, Any]:
    """Processor and number of threads; if there is a GPU, also its name and libraries."""
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
    """Name and feature flags of the processor; empty if the system does not name them."""
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
