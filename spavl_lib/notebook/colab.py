"""Google Colab: settings for each GPU, runs on Drive, and a message if a restart is needed.

On Colab, the second code cell of each notebook installs the package with its pinned dependencies
and calls `set_up`. Elsewhere the cell does nothing.
"""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from spavl_lib.errors import InputError
from spavl_lib.machine import device_kind, gpus
from spavl_lib.runs.text import say

DRIVE = Path("/content/drive/MyDrive")
# Modules that Colab's kernel loads before the first cell runs.
LOADED_EARLY = {"numpy": "numpy", "pandas": "pandas", "PIL": "pillow", "pyarrow": "pyarrow"}
# On every GPU, the product of batch size and accumulation steps is the same as in the profile, so
# the number of optimizer steps is the same too.
SETTINGS: dict[str, dict[str, Any]] = {
    "t4": {},
    "l4": {
        "dpo.per_device_batch_size": 2, "dpo.gradient_accumulation_steps": 4,
        "reward.per_device_batch_size": 2, "reward.gradient_accumulation_steps": 16,
        "generation.batch_size": 16,
    },
    "a100": {
        "model.adapter": "lora", "dpo.per_device_batch_size": 4,
        "dpo.gradient_accumulation_steps": 2, "reward.per_device_batch_size": 4,
        "reward.gradient_accumulation_steps": 8, "generation.batch_size": 32,
    },
}  # fmt: skip


def on_colab() -> bool:
    """Whether this is Google Colab."""
    return "COLAB_RELEASE_TAG" in os.environ


def set_up(profile: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """On Colab, choose settings for the GPU and the runs folder, and print both.

    Args:
        profile: The notebook's profile. Only the profile `colab` has settings for each GPU.
        overrides: The notebook's overrides; they take precedence over the chosen settings.

    Returns:
        The overrides that the notebook should use. Outside of Colab these are the given ones.

    Raises:
        InputError: A module in memory has another version than the installed one, so the runtime
            needs a restart; or the profile is `colab` and there is no GPU.
    """
    if not on_colab():
        return overrides
    _check_loaded()
    # This import uses numpy and other packages, so it must follow the check of their versions.
    from spavl_lib.notebook.session import check_parameters

    check_parameters(profile=profile, overrides=overrides)
    if DRIVE.is_dir():
        os.environ.setdefault("SPAVL_RUNS", str(DRIVE / "spavl-runs"))
        say(f"runs      {os.environ['SPAVL_RUNS']}: after a disconnect run the same cells again")
    else:
        say("runs      lost when this machine goes; to keep them, mount Drive first (folder icon)")
    if profile != "colab":
        return overrides
    if not gpus():
        raise InputError(
            "profile colab needs a GPU: Runtime > Change runtime type > T4; without one, "
            'profile = "demo" runs the whole story on the CPU'
        )
    kind = device_kind()
    chosen = SETTINGS["a100" if kind not in SETTINGS else kind]
    say(f"GPU       {gpus()[0][0]}: " + (", ".join(f"{k}={v}" for k, v in chosen.items()) or kind))
    return chosen | (overrides or {})


def _check_loaded() -> None:
    stale = []
    for module, package in LOADED_EARLY.items():
        loaded = getattr(sys.modules.get(module), "__version__", None)
        installed = importlib.metadata.version(package)
        if loaded is not None and loaded != installed:
            stale.append(f"{package} {loaded} in memory, {installed} installed")
    if stale:
        raise InputError(
            f"restart the runtime (Runtime > Restart session) and run again: {'; '.join(stale)}"
        )
