"""The folders of the checkout, of the runs and of the caches."""

import os
from pathlib import Path


def repo_root() -> Path:
    """The checkout that holds the current folder; outside of a checkout, the current folder."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        project = folder / "pyproject.toml"
        if project.is_file() and 'name = "spavl' in project.read_text(encoding="utf-8"):
            return folder
    return Path.cwd()


def runs_root() -> Path:
    """The folder that holds the runs: $SPAVL_RUNS, or runs/ in the checkout."""
    return Path(os.environ.get("SPAVL_RUNS", "") or repo_root() / "runs")


def cache_root() -> Path:
    """The folder for files that can be made again: $SPAVL_CACHE, or runs/.cache in the checkout."""
    return Path(os.environ.get("SPAVL_CACHE", "") or repo_root() / "runs" / ".cache")
