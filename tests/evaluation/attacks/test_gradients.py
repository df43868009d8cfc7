"""Attacks with the model's gradients: they raise their objective, within their budget."""

import random

import numpy as np
import pytest
import torch

from spavl_lib.data.images import decode
from spavl_lib.data.load import load_prompts, load_truth
from spavl_lib.data.templates import encode_prompts
from spavl_lib.errors import InputError
from spavl_lib.evaluation.attacks import ATTACKS, gradients
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from tests.helpers import embedded_model, embedded_processor, smoke, tiny

CONFIG = smoke({"data.test_rows": 0}).data
TRUTH = load_truth(CONFIG)
ROWS = [load_prompts(CONFIG, "harm")[2], load_prompts(CONFIG, "help")[2]]
BUDGET = {
    "adversarial_suffix": {"steps": 4, "candidates": 8, "length": 5},
    "adversarial_picture": {"steps": 4, "epsilon": 8},
}


def attacked(name: str, **budget: float) -> list[dict]:
    model, processor = embedded_model(), embedded_processor()
    options = {"model": model, "processor": processor, **BUDGET[name], **budget}
    return ATTACKS[name](ROWS, TRUTH, **options).rows


def objective(row: dict) -> float:
    return gradients.target_logp(embedded_model(), embedded_processor(), row, TRUTH[row["id"]])


def suffix_of(old: dict, new: dict) -> list[int]:
    """The tokens that were appended to a prompt."""
    assert new["prompt"].startswith(f"{old['prompt']} ")
    text = new["prompt"].removeprefix(old["prompt"])
    return embedded_processor().tokenizer.encode(text, add_special_tokens=False)


def test_a_suffix_raises_the_objective_and_is_read_as_it_was_written() -> None:
    tokenizer = embedded_processor().tokenizer
    words = gradients.words_of(tokenizer)
    for old, new in zip(ROWS, attacked("adversarial_suffix"), strict=True):
        rng = random.Random(f"0/adversarial_suffix/{old['id']}")
        first = [rng.choice(words) for _ in range(5)]
        start = old | {"prompt": old["prompt"] + tokenizer.decode(first)}
        assert suffix_of(old, start) == first
        assert objective(new) > objective(start)
        suffix = suffix_of(old, new)
        assert len(suffix) == 5 and set(suffix) <= set(words) and suffix != first
        plain, longer = (
            encode_prompts(embedded_processor(), [row["prompt"]], [decode(row["image"])]).ids[0]
            for row in (old, new)
        )
        assert len(longer) == len(plain) + 5


def test_no_word_of_a_suffix_takes_a_request_back() -> None:
    tokenizer = embedded_processor().tokenizer
    words = {tokenizer.decode([token]) for token in gradients.words_of(tokenizer)}
    assert len(words) > 500 and {" picture", " story"} <= words
    assert all(word.strip().isalpha() and word[0] == " " for word in words)
    assert not words & {" no", " not", " won", " stop", " without"}


def test_the_gradient_is_the_slope_of_the_objective() -> None:
    model, processor = embedded_model(), embedded_processor()
    row = ROWS[0]
    ids, vision, target = gradients._encoded(processor, row, TRUTH[row["id"]])
    start, length = len(ids) - 8, 3
    _, slopes = gradients._suffix_gradient(model, processor, ids, start, length, vision, target)
    table = model.get_input_embeddings()
    assert slopes.shape == (length, table.weight.shape[0])
    for place in range(length):
        token = int(slopes[place].abs().argmax())  # the steepest, which rounding hides least
        ends = []
        for step in (0.02, -0.02):

            def shifted(
                _module: object, _inputs: object, output: torch.Tensor,
                step: float = step, place: int = place, token: int = token,
            ) -> torch.Tensor:  # fmt: skip
                output = output.clone()
                output[:, start + place] += step * table.weight[token]
                return output

            hook = table.register_forward_hook(shifted)
            with torch.no_grad():
                ends.append(gradients._logps(model, processor, [ids], vision, target).item())
            hook.remove()
        slope = (ends[0] - ends[1]) / 0.04
        assert slope == pytest.approx(slopes[place, token].item(), rel=0.05)
        assert abs(slope) > 1e-3


def test_a_picture_raises_the_objective_and_stays_near() -> None:
    processor = embedded_processor()
    for epsilon in (8, 2):
        found = attacked("adversarial_picture", epsilon=epsilon)
        for old, new in zip(ROWS, found, strict=True):
            assert objective(new) > objective(old)
            seen, changed = (
                encode_prompts(processor, ["x"], [decode(row["image"])]).vision["pixel_values"]
                for row in (old, new)
            )
            std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
            change = ((changed - seen) * std * 255).abs()
            assert 0.9 < change.max() <= epsilon + 0.01
            assert np.asarray(decode(new["image"])).shape == (64, 64, 3)


@pytest.mark.parametrize("name", BUDGET)
def test_the_cost_counts_every_sequence(name: str) -> None:
    model, read = embedded_model(), []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    attacked(name)
    hook.remove()
    # The response itself is generated later.
    assert sum(read) == len(ROWS) * (ATTACKS[name].calls(**BUDGET[name]) - 1)
    assert ATTACKS[name].calls(steps=8) > ATTACKS[name].calls(steps=4)


def test_shared_prefixes_find_the_same_suffix() -> None:
    model = embedded_model(own=True)
    assert apply_sharing(model, "auto")
    found = ATTACKS["adversarial_suffix"](
        ROWS, TRUTH, model=model, processor=embedded_processor(), **BUDGET["adversarial_suffix"]
    )
    assert found.rows == attacked("adversarial_suffix")


def test_pictures_in_patches_are_refused() -> None:
    model, processor = tiny("qwen2_5_vl")
    with pytest.raises(InputError, match="adversarial_picture needs a model with one normalised"):
        ATTACKS["adversarial_picture"](ROWS[:1], TRUTH, model=model, processor=processor)


def test_tokenizers_without_words_are_refused() -> None:
    model, processor = tiny("llava")  # each of its tokens is a byte
    with pytest.raises(InputError, match="no tokens for whole words"):
        ATTACKS["adversarial_suffix"](ROWS[:1], TRUTH, model=model, processor=processor)
