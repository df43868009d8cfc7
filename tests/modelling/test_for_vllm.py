"""Names, ranks and copies for vLLM, by the rules that its model classes have."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from spavl_lib.errors import InputError
from spavl_lib.modelling.for_vllm import (
    INDEX,
    RANKS,
    copy_for_vllm,
    has_vllm_names,
    max_lora_rank,
    rename_for_vllm,
)
from spavl_lib.modelling.llava_original import hub_name
from tests.families import models
from tests.helpers import embedded_model, files_of

# What vLLM's LLaVA classes replace at the beginning of a name before they look for the parameter.
MAPPED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def read_by_vllm(folder: Path) -> set[str]:
    """The names of all tensors in a folder, as vLLM's LLaVA class looks for them."""
    names = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    for start, other in MAPPED.items():
        names = {other + n.removeprefix(start) if n.startswith(start) else n for n in names}
    return names


def wanted_by_vllm(model: PreTrainedModel) -> set[str]:
    """The names of LLaVA's parameters in vLLM, which are those of the Hub's files."""
    return {hub_name(name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("shard", ["50GB", "1MB"])
def test_the_tensors_of_llava_get_vllms_names_and_keep_their_values(
    shard: str, tmp_path: Path
) -> None:
    model = embedded_model()
    model.save_pretrained(tmp_path / "old", max_shard_size=shard)
    assert (tmp_path / "old" / INDEX).is_file() == (shard == "1MB")
    before = files_of(tmp_path / "old")
    assert not has_vllm_names(tmp_path / "old")
    assert read_by_vllm(tmp_path / "old") != wanted_by_vllm(model)
    copy_for_vllm(tmp_path / "old", tmp_path / "new")
    assert has_vllm_names(tmp_path / "new") and files_of(tmp_path / "old") == before
    assert read_by_vllm(tmp_path / "new") == wanted_by_vllm(model)
    if shard == "1MB":
        index = json.loads((tmp_path / "new" / INDEX).read_text())["weight_map"]
        assert all(name in load_file(tmp_path / "new" / file) for name, file in index.items())
    after = files_of(tmp_path / "new")
    rename_for_vllm(tmp_path / "new")
    assert files_of(tmp_path / "new") == after
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "new", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "gemma3", "qwen2_5_vl"])
def test_transformers_reads_other_families_too_after_the_renaming(
    family: str, tmp_path: Path
) -> None:
    """CLIP's and SigLIP's towers have the additional level in vLLM; Qwen's has not."""
    folder = getattr(models, family)(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    before = files_of(folder)
    rename_for_vllm(folder)
    assert (files_of(folder) == before) == family.startswith("qwen")
    names = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    inner = [n for n in names if "vision_tower." in n and "vision_tower.vision_model." not in n]
    assert not inner
    again = AutoModelForImageTextToText.from_pretrained(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_allowed_rank_is_the_smallest_that_holds_the_adapter() -> None:
    for rank in range(1, RANKS[-1] + 1):
        allowed = max_lora_rank(rank)
        assert allowed in RANKS and allowed >= rank
        assert not any(rank <= other < allowed for other in RANKS)
    with pytest.raises(InputError, match="up to rank 512, but this one has rank 513"):
        max_lora_rank(513)
