"""Where the checkout, the runs and the caches are."""

import os
from pathlib import Path


def repo_root() -> Path:
    """The checkout this process works in, or the current folder outside of one."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        project = folder / "pyproject.toml"
        if project.is_file() and 'name = "spavl' in project.read_text(encoding="utf-8"):
            return folder
    return Path.cwd()


def runs_root() -> Path:
    """Where runs go: $SPAVL_RUNS, or runs/ in the checkout."""
    return Path(os.environ.get("SPAVL_RUNS", "") or repo_root() / "runs")


def cache_root() -> Path:
    """Where built data sets are kept: $SPAVL_CACHE, or runs/.cache."""
    return Path(os.environ.get("SPAVL_CACHE", "") or repo_root() / "runs" / ".cache")
