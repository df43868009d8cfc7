"""Answers that end leave the batch, and every row says what `generate` has it say."""

import copy

import pytest
import torch
from torch import Tensor

from spavl_lib.generation import compact_decoding as decoding
from spavl_lib.generation.compact_decoding import GrowingLayer, can_decode, decode
from spavl_lib.modelling.speed.shared_prefix import share_prefix
from spavl_lib.trainers.rollout import batch_of, encode_rows, forbidden_token_ids, sample
from tests.helpers import mini_rows, tiny

CPU = torch.device("cpu")
FAMILIES = ("embedded", "llava", "llava_next")


def asked(family: str) -> tuple:
    """Prompts of unequal length, and a model of one's own."""
    model, processor = tiny(family)
    rows = [0, 1, 2, 7, 8, 20, 30, 31, 32]  # some about one picture
    prompts = encode_rows(processor, [mini_rows()[i] for i in rows])
    batch = batch_of(prompts, [[] for _ in prompts], processor.tokenizer.pad_token_id, CPU)
    assert not batch["attention_mask"].all(), "no padding: too easy"
    return copy.deepcopy(model), processor, batch


def ended(rows: list[list[int]], eos: int) -> list[list[int]]:
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(family: str, shared: bool) -> None:
    model, processor, batch = asked(family)
    width, limit = batch["input_ids"].shape[1], 24
    whole = model.generate(**batch, do_sample=False, max_new_tokens=limit, eos_token_id=-1)
    whole = whole[:, width:].tolist()
    # What many say somewhere, so that answers end at different places.
    eos = max(
        {t for row in whole for t in row},
        key=lambda t: len({row.index(t) for row in whole if t in row}),
    )
    expected = ended(whole, eos)
    assert len({len(row) for row in expected}) > 1
    handle = share_prefix(model, strict=True) if shared else None
    assert can_decode(model)
    at_work = []

    def greedy(logits: Tensor, rows: list[int]) -> Tensor:
        at_work.append(len(rows))
        assert logits.shape[0] == len(rows) and logits.dtype == torch.float32
        return logits.argmax(-1)

    said = decode(model, batch, greedy, max_new_tokens=limit, end_ids=[eos])
    assert said == expected
    assert handle is None or handle.stats["shared"] == 1, "the prompts' beginnings, once"
    assert len(at_work) == max(map(len, expected)), "one pass a token, none after the last"
    going = [sum(len(row) > n for row in expected) for n in range(len(at_work))]
    assert going[-1] < 9, "all end together: too easy"
    assert all(g <= n <= g / 0.75 for g, n in zip(going, at_work, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_rows_are_those_of_generate(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, batch = asked(family)
    options = {
        "max_new_tokens": 16, "temperature": 1.5,
        "forbidden_ids": list(forbidden_token_ids(processor)),
        "pad_id": processor.tokenizer.pad_token_id,
    }  # fmt: skip
    seeds = [100 + i for i in range(9)]
    # Tokens of the rows' middles end them, at places of their own.
    first = sample(model, batch, seeds, end_ids=[-1], compact=False, **options)
    eos = first[0][2]
    expected = sample(model, batch, seeds, end_ids=[eos], compact=False, **options)
    assert len(expected[0]) == 3 < max(map(len, expected))
    taken_out, own = [], GrowingLayer.batch_select_indices

    def noted(self: GrowingLayer, indices: Tensor) -> None:
        taken_out.append(len(indices))
        own(self, indices)

    monkeypatch.setattr(GrowingLayer, "batch_select_indices", noted)
    monkeypatch.setattr(decoding, "MIN_ACTIVE", 1.0)  # a row is removed at once
    assert sample(model, batch, seeds, end_ids=[eos], **options) == expected
    assert taken_out and taken_out[0] < 9


def test_rows_taken_out_leave_the_others_alone() -> None:
    torch.manual_seed(0)
    layer, plain = GrowingLayer(), []
    for new in (5, 1, 40, 1):  # beyond the room that was left
        states = torch.randn(2, 4, 2, new, 3)
        plain.append(states)
        keys, values = layer.update(*states)
    whole = torch.cat(plain, 3)
    assert torch.equal(torch.stack([keys, values]), whole)
    assert layer.get_seq_length() == 47
    layer.batch_select_indices(torch.tensor([3, 1]))
    new = torch.randn(2, 2, 2, 1, 3)
    again = torch.stack(layer.update(*new))
    assert torch.equal(again, torch.cat([whole[:, [3, 1]], new], 3))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_other_families_are_left_to_generate(family: str) -> None:
    assert not can_decode(tiny(family)[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.3), ("bad_words_ids", [[5]]), ("num_beams", 4),
        ("min_new_tokens", 1), ("forced_eos_token_id", 0), ("a_setting_of_tomorrow", "on"),
    ],
)  # fmt: skip
def test_a_model_s_own_settings_are_left_to_generate(name: str, value: object) -> None:
    model = copy.deepcopy(tiny("llava")[0])
    setattr(model.generation_config, name, value)
    assert not can_decode(model)


def test_idle_settings_of_a_model_are_no_hindrance() -> None:
    model = copy.deepcopy(tiny("llava")[0])
    model.generation_config.update(
        repetition_penalty=1.0,
        num_beams=1,
        min_length=0,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    assert can_decode(model)
