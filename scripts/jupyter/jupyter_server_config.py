"""Read by `make lab`: git takes a saved notebook as unchanged if only its outputs are new."""

import subprocess
from pathlib import Path


def refresh(os_path: str, model: dict, **_: object) -> None:
    """Let git note the new size of a saved notebook, if nothing that git would keep has changed.

    The filter that `make setup` sets hides outputs from git. But a file of another size counts as
    changed, whatever the filter makes of it, until the file is added again.

    Args:
        os_path: The saved file.
        model: What was saved; `type` is `notebook`, `file` or `directory`.
    """
    if model["type"] == "notebook":
        path = Path(os_path)
        unchanged = 'git diff --quiet -- "$0" && git add --update -- "$0"'
        subprocess.Popen(
            ["sh", "-c", unchanged, path.name],
            cwd=path.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


c.FileContentsManager.post_save_hook = refresh  # noqa: F821 (Jupyter defines `c`)
