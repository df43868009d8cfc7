"""Sampling: the softmax's own distribution, each row by itself, cut at the first EOS."""

from types import SimpleNamespace

import pytest
import torch

from spavl_lib.trainers import rollout
from spavl_lib.trainers.rollout import (
    Prompt,
    Rollout,
    SeededSampling,
    batch_of,
    encode_rows,
    sample,
    seed_from,
)
from tests.helpers import embedded_model, embedded_processor, mini_rows, spread

CPU = torch.device("cpu")


def test_prompts_end_and_answers_begin_in_one_column() -> None:
    prompts = [Prompt("a", "", [1, 2, 3], {}, {}), Prompt("b", "", [4], {}, {})]
    batch = batch_of(prompts, [[5], [6, 7]], 0, CPU)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 5, 0], [0, 0, 4, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch_of(prompts, [[], []], 0, CPU)["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    rolled = Rollout(prompts, [[5], [6, 7]], ["", ""], [True, True])
    assert rolled.mask.tolist() == [[True, False], [True, True]]


def test_token_types_of_prompts_stand_before_zeros_for_answers() -> None:
    prompts = [
        Prompt("a", "", [1, 2, 3], {"token_type_ids": [0, 1, 0]}, {}),
        Prompt("b", "", [4], {"token_type_ids": [1]}, {}),
    ]
    batch = batch_of(prompts, [[5], [6, 7]], 0, CPU)
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]


def test_noise_gives_the_softmax_and_never_the_forbidden() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 3.0])
    count = 4000
    sampler = SeededSampling(list(range(count)), 2.0, [3], CPU)
    drawn = sampler(torch.zeros(count, 1, dtype=torch.long), logits.repeat(count, 1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / count
    expected = torch.softmax(torch.tensor([1.0, 0.5, 0.0]), 0)
    assert shares[3] == 0
    # Three standard errors of a share near one half.
    torch.testing.assert_close(shares[:3], expected, atol=0.024, rtol=0)


def test_an_answer_is_the_same_alone_and_among_others() -> None:
    processor, model = embedded_processor(), embedded_model()
    tokenizer = processor.tokenizer
    prompts = encode_rows(processor, spread(mini_rows(), 4))
    seeds = [seed_from(0, n) for n in range(4)]
    options = {
        "max_new_tokens": 12, "temperature": 1.0, "forbidden_ids": [tokenizer.bos_token_id],
        "end_ids": [tokenizer.eos_token_id], "pad_id": tokenizer.pad_token_id,
    }  # fmt: skip

    def said(rows: list[int]) -> list[list[int]]:
        batch = batch_of([prompts[i] for i in rows], [[] for _ in rows], 0, CPU)
        return sample(model, batch, [seeds[i] for i in rows], **options)

    together = said([0, 1, 2, 3])
    assert [said([i])[0] for i in range(4)] == together
    assert said([3, 1]) == [together[3], together[1]]
    other = sample(model, batch_of([prompts[0]], [[]], 0, CPU), [seed_from(1, 0)], **options)
    assert other[0] != together[0]


def test_answers_are_cut_after_the_first_eos_even_where_it_pads() -> None:
    out = torch.tensor([[9, 9, 5, 2, 2, 2], [9, 9, 2, 2, 2, 2], [9, 9, 5, 6, 7, 8]])
    scripted = SimpleNamespace(generate=lambda **_: out)
    batch = {"input_ids": torch.zeros(3, 2, dtype=torch.long)}
    answers = sample(
        scripted, batch, [1, 2, 3], max_new_tokens=4, temperature=1.0, forbidden_ids=[],
        end_ids=[2], pad_id=2, compact=False,
    )  # fmt: skip
    assert answers == [[5, 2], [2], [5, 6, 7, 8]]


def test_the_seeds_alone_draw_and_ended_rows_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}
    scripted = SimpleNamespace(
        generate=lambda **given: seen.update(given) or torch.tensor([[9, 2]])
    )
    batch = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
    options = {
        "max_new_tokens": 4, "temperature": 1.0, "forbidden_ids": [], "end_ids": [2, 3],
        "pad_id": 0,
    }  # fmt: skip
    assert sample(scripted, batch, [1], compact=False, **options) == [[2]]
    assert seen["do_sample"] is False  # a second draw would undo the first one's seed
    assert (seen["max_new_tokens"], seen["eos_token_id"], seen["pad_token_id"]) == (4, [2, 3], 0)
    monkeypatch.setattr(rollout, "can_decode", lambda model: True)
    monkeypatch.setattr(rollout, "decode", lambda *_, **__: [["compact"]])
    assert sample(scripted, batch, [1], **options) == [["compact"]]
