"""The tower's outputs kept over a rollout, alone and under shared prefixes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, PixtralVisionConfig

from spavl_lib.modelling.families import tower_of
from spavl_lib.modelling.speed.shared_prefix import share_prefix
from spavl_lib.modelling.speed.tower_cache import TowerCache
from spavl_lib.trainers.ppo_batches import micro_batches
from spavl_lib.trainers.rollout import batch_of, encode_rows, forbidden_token_ids, sample
from tests.helpers import mini_rows, tiny

CPU = torch.device("cpu")


def asked(family: str) -> tuple:
    """Seven prompts about three pictures, and a model of one's own."""
    model, processor = tiny(family)
    prompts = encode_rows(processor, [mini_rows()[i] for i in range(7)])
    assert len({p.image_digest for p in prompts}) == 3
    return copy.deepcopy(model), processor, prompts


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", ["embedded", "llava", "llava_next"])
@torch.no_grad()
def test_a_picture_passes_the_tower_once_whoever_asks(family: str, shared: bool) -> None:
    model, processor, prompts = asked(family)
    answers = [[40 + i, 50] for i in range(7)]
    batch = batch_of(prompts, answers, processor.tokenizer.pad_token_id, CPU)
    plain = model(**batch).logits[:, -3:]
    tower, runs = tower_of(model), []
    own = tower.forward
    tower.forward = lambda pixels, *a, **k: runs.append(len(pixels)) or own(pixels, *a, **k)
    if shared:
        share_prefix(model, strict=True)
    outside = tower.forward
    cache = TowerCache(model, [tower])
    with cache.rollout():
        for rows in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 0], [3]):
            part = [prompts[i] for i in rows], [answers[i] for i in rows]
            inputs = batch_of(*part, processor.tokenizer.pad_token_id, CPU)
            with cache.rows([prompts[i].image_digest for i in rows], inputs):
                logits = model(**inputs).logits[:, -3:]
            torch.testing.assert_close(logits, plain[rows], atol=2e-4, rtol=2e-4)
    assert len(runs) == 1 and cache.misses == 3
    assert tower.forward == outside, "what stood there before comes back"


@pytest.mark.parametrize("family", ["embedded", "llava", "llava_next"])
def test_generation_prefills_what_prompts_have_in_common_once(family: str) -> None:
    model, processor, prompts = asked(family)
    tokenizer = processor.tokenizer
    batch = batch_of(prompts, [[] for _ in prompts], tokenizer.pad_token_id, CPU)
    options = {
        "max_new_tokens": 10, "temperature": 1.0,
        "forbidden_ids": list(forbidden_token_ids(processor)),
        "end_ids": [tokenizer.eos_token_id], "pad_id": tokenizer.pad_token_id,
    }  # fmt: skip
    plain = sample(model, batch, list(range(7)), **options)
    handle = share_prefix(model, strict=True)
    assert sample(model, batch, list(range(7)), **options) == plain
    assert handle.stats["shared"] == 1
    assert handle.stats["packed_tokens"] < handle.stats["rows_tokens"]


def test_a_tower_that_lays_images_into_one_row_is_run_each_time() -> None:
    """Pixtral's, which LLaVA's class may hold."""
    config = LlavaConfig(vision_config=PixtralVisionConfig())
    model = SimpleNamespace(config=config, model_type="llava")
    assert not TowerCache(model, []).works
    config.vision_config = CLIPVisionConfig()
    assert TowerCache(model, []).works


def test_questions_about_a_picture_come_in_one_batch() -> None:
    lengths, pictures = [5, 9, 7, 3, 8], ["a", "b", "a", "", "b"]
    assert micro_batches(lengths, pictures, 2) == [[1, 4], [2, 0], [3]]
    alone = micro_batches(lengths, ["", "", "", "", ""], 2)
    assert alone == [[1, 4], [2, 0], [3]]
    assert micro_batches([5, 9, 7], ["a", "b", "a"], 3) == [[1, 2, 0]]
    assert micro_batches([5, 9, 7, 8], ["a", "b", "a", "b"], 2) == [[1, 3], [2, 0]]
    assert micro_batches([9, 5, 7, 8], ["a", "a", "b", "b"], 2) == [[0, 1], [3, 2]]
