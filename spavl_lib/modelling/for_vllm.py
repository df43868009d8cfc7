"""What vLLM asks of a model's folder: the names of the tensors, and a rank that it allows.

transformers 5 keeps the layers of a CLIP or SigLIP tower directly under `vision_tower`, and saves a
model that was built from a config under these names. vLLM, and the files on the Hub, have one more
level: `vision_tower.vision_model`. transformers reads both.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from spavl_lib.errors import InputError
from spavl_lib.runs.files import read_json, write_json

# Model types of the towers that have the additional level.
TOWERS = ("clip_vision_model", "siglip_vision_model")
_FLAT = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")
INDEX = "model.safetensors.index.json"
# The values that vLLM 0.32 accepts for max_lora_rank (vllm/config/lora.py).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_name(name: str, tower: str) -> str:
    """The name under which vLLM reads a tensor.

    Args:
        name: Name of the tensor in a file of transformers, or of a parameter in memory.
        tower: `model_type` of the config of the vision tower; empty if there is none.
    """
    return _FLAT.sub(r"\1vision_model.", name) if tower in TOWERS else name


def max_lora_rank(rank: int) -> int:
    """The smallest `max_lora_rank` that vLLM allows for an adapter of this rank.

    Raises:
        InputError: vLLM allows no rank as large as this.
    """
    allowed = [value for value in RANKS if value >= rank]
    if not allowed:
        raise InputError(
            f"vLLM adds adapters up to rank {RANKS[-1]}, but this one has rank {rank}; export it "
            "with --form merged"
        )
    return allowed[0]


def has_vllm_names(folder: Path) -> bool:
    """Whether all tensors in a model's folder have the names under which vLLM reads them."""
    rename = _renaming(folder)
    return all(rename(n) == n for p in folder.glob("*.safetensors") for n in _header(p)[0])


def rename_for_vllm(folder: Path) -> None:
    """Give the tensors in a model's folder the names under which vLLM reads them.

    Only the names are written again; the values are copied byte by byte.

    Args:
        folder: Holds config.json and safetensors, with or without an index of several files.
    """
    if has_vllm_names(folder):
        return
    rename = _renaming(folder)
    for path in sorted(folder.glob("*.safetensors")):
        header, start = _header(path)
        new = json.dumps({rename(name): value for name, value in header.items()}).encode()
        new += b" " * (-len(new) % 8)  # the values begin at a multiple of 8 bytes
        temporary = path.with_name(f".{path.name}.tmp")
        with path.open("rb") as old, temporary.open("wb") as target:
            old.seek(start)
            target.write(len(new).to_bytes(8, "little") + new)
            shutil.copyfileobj(old, target, 2**24)
        temporary.replace(path)
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
        write_json(folder / INDEX, index)


def copy_for_vllm(folder: Path, target: Path) -> None:
    """Copy a model's folder to `target`, with the names under which vLLM reads the tensors.

    `target` appears in one step, so an interrupted copy is not taken for a whole one.

    Args:
        folder: The model's folder.
        target: The new folder. If it exists, it is replaced.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    for path in (temporary, target):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file():
            shutil.copyfile(path, temporary / path.name)
    rename_for_vllm(temporary)
    temporary.rename(target)


def _renaming(folder: Path) -> Callable[[str], str]:
    vision = read_json(folder / "config.json").get("vision_config") or {}
    tower = vision.get("model_type", "")
    return lambda name: vllm_name(name, tower)


def _header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file (name -> type, shape and place), and where it ends."""
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        return json.loads(handle.read(size)), 8 + size
