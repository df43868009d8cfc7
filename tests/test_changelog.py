"""The changelog says whether numbers stay comparable, and is held to it."""

import hashlib
import re
from pathlib import Path

REPO = Path(__file__).parents[1]
TEXT = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
# What the numbers of a run depend on: recorded trainings, the demo's settings, the embedded world.
WATCHED = (
    "tests/golden/*.json",
    "spavl_lib/config/profiles/demo.yaml",
    "spavl_lib/data/embedded/assets/**/*",
)


def fingerprint() -> str:
    """The first 16 digits of a hash over the watched files."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in WATCHED for p in REPO.glob(pattern) if p.is_file()}):
        digest.update(f"{path.relative_to(REPO)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def test_the_newest_entry_knows_what_numbers_depend_on() -> None:
    newest = TEXT.split("\n## ")[1]
    found = re.search(r"Fingerprint: `(\w+)`", newest)
    assert found and found[1] == fingerprint(), (
        "what numbers depend on has changed: say in the newest entry of CHANGELOG.md whether "
        f"numbers stay comparable, and write Fingerprint: `{fingerprint()}`"
    )


def test_every_entry_says_whether_numbers_are_comparable() -> None:
    for entry in TEXT.split("\n## ")[1:]:
        assert re.search(r"Numbers: (\*\*not comparable\*\*|comparable)\.", entry), entry[:40]
