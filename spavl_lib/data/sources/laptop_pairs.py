"""The pairs of the profile `laptop`, for which the value `laptop` of `data.extra_path` stands.

They lie in a folder of the cache. `trainers/laptop_pairs.py` makes the folder.
"""

from pathlib import Path

from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.errors import InputError
from spavl_lib.runs.cached import fault_of, sources_of
from spavl_lib.runs.files import sha256_file
from spavl_lib.runs.paths import cache_root
from spavl_lib.runs.provenance import canonical_sha256

NAME = "laptop"
COMMAND = "spavl fetch laptop"
FORM = "2"  # raise it when other pairs are made from the same inputs
HARMLESS, REFUSALS, QUESTIONS, PLAIN = (
    ASSETS / "laptop" / name
    for name in ("harmless.yaml", "refusals.yaml", "everyday.jsonl", "plain.jsonl")
)


def pairs_folder() -> Path:
    """The folder in the cache."""
    return cache_root() / "laptop-pairs"


def own_sources() -> dict[str, str]:
    """What this version of the package makes the pairs from: its own prompts, and their form."""
    files = (HARMLESS, REFUSALS, QUESTIONS, PLAIN)
    return {"prompts": canonical_sha256({p.name: sha256_file(p) for p in files}), "form": FORM}


def pairs_file() -> Path:
    """The file of the pairs.

    Raises:
        InputError: The pairs were not made, were made by another version, or are damaged.
    """
    if fault := fault_of(pairs_folder(), own_sources(), hashes=True):
        raise _not_ready(fault)
    return pairs_folder() / "pairs.jsonl"


def check_model(hashes: dict[str, str]) -> None:
    """Check that a model's own replies are the rejected responses of the pairs.

    Args:
        hashes: File name -> sha256 of the model `laptop`, as `modelling.load.model_hashes` returns
            them.

    Raises:
        InputError: The pairs are missing, or the replies are those of another version of the model.
    """
    if fault := fault_of(pairs_folder(), own_sources()):
        raise _not_ready(fault)
    if sources_of(pairs_folder()).get("model") != canonical_sha256(hashes):
        raise _not_ready("their replies are those of another version of the model")


def _not_ready(fault: str) -> InputError:
    return InputError(
        f"data.extra_path = {NAME!r}: the pairs are not ready ({fault}); run `{COMMAND}`"
    )
