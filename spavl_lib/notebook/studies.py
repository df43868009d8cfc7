"""Studies of the demo: trainings that take too long for a notebook, whose results are published.

`python scripts/publish.py` trains them and writes `reports/demo/studies.json`. Notebooks read the
results from there. In the profile `smoke`, notebooks train two short versions themselves instead.
"""

from typing import Any

from spavl_lib.runs.files import read_json
from spavl_lib.runs.paths import repo_root

PUBLISHED = "reports/demo/studies.json"


def read_study(name: str) -> dict[str, Any]:
    """A published study of the demo.

    Args:
        name: `beta`, `seeds`, `kl` or `rloo`.

    Returns:
        Name of each training -> `rates` (key -> rate; in `seeds` model -> key -> rate), and for
        `kl` the logged curves `steps`, `kl` and `scores`.
        Empty if the file is not at hand, as in an installed package.
    """
    path = repo_root() / PUBLISHED
    return read_json(path).get(name, {}) if path.is_file() else {}
