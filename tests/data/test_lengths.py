"""Lengths of rows in tokens, and parts of the collator, against values worked out by hand."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from spavl_lib.data.collate import PreferenceCollator, stack_vision
from spavl_lib.data.images import decode_images
from spavl_lib.data.lengths import check_lengths, check_prompt_lengths, pair_lengths
from spavl_lib.data.templates import encode_prompts, neutralise, prompt_ids, special_tokens
from spavl_lib.errors import InputError
from tests.helpers import embedded_processor, mini_rows, png, tiny

SLOTS = 64  # image tokens of the embedded model


def table(*rows: dict) -> Dataset:
    """Rows with the columns of mini, and its types."""
    columns = mini_rows().features
    full = [dict.fromkeys(columns, "") | {"id": f"r/{n}"} | row for n, row in enumerate(rows)]
    return Dataset.from_list(full, features=columns)


def pair(prompt: str = "What?", image: bool = True, **texts: str) -> dict:
    picture = {"bytes": png(), "path": None} if image else None
    return {"prompt": prompt, "chosen": "A cat.", "rejected": "No.", "image": picture} | texts


def collated(rows: Dataset) -> list[tuple[int, int]]:
    """Lengths of chosen and rejected sequences as the collator makes them, row by row."""
    masks = [PreferenceCollator(embedded_processor())([row])["attention_mask"] for row in rows]
    return [tuple(mask.sum(1).tolist()) for mask in masks]


def test_lengths_are_those_of_the_collated_rows() -> None:
    rows = table(pair(), pair("Why?", chosen="Because of it."), pair("And now?", image=False))
    lengths = list(pair_lengths(embedded_processor(), rows))
    assert [row_id for row_id, *_ in lengths] == ["r/0", "r/1", "r/2"]
    assert [(chosen, rejected) for _, chosen, rejected in lengths] == collated(rows)
    assert all(type(size) is int for _, *sizes in lengths for size in sizes)
    assert lengths[0][1] - lengths[2][1] > SLOTS / 2


def test_rows_that_cannot_be_too_long_are_left_out() -> None:
    processor = embedded_processor()
    rows = table(pair(), pair(chosen="Una señal."), pair(rejected="Ça va."), pair("Señor?"))
    assert [row_id for row_id, *_ in pair_lengths(processor, rows, skip_below=10_000)] == [
        "r/1", "r/2", "r/3",
    ]  # fmt: skip
    assert len(list(pair_lengths(processor, rows, skip_below=0))) == 4
    assert len(list(pair_lengths(processor, rows, skip_below=5))) == 4


def test_the_limit_itself_is_no_fault() -> None:
    rows, processor = table(pair(chosen="A cat on a mat, and a dog.")), embedded_processor()
    [(chosen, rejected)] = collated(rows)
    assert chosen > rejected
    check_lengths(processor, rows, chosen)
    with pytest.raises(InputError, match=f"1 answers are longer than {chosen - 1} .* r/0 chosen"):
        check_lengths(processor, rows, chosen - 1)


def test_a_prompt_leaves_room_for_the_response_to_the_last_token() -> None:
    rows, processor = table(pair(), pair("Why?", image=False)), embedded_processor()
    size = len(encode_prompts(processor, ["What?"], decode_images(rows)[:1]).ids[0])
    check_prompt_lengths(processor, rows, 10, size + 10, stage="ppo")
    with pytest.raises(InputError, match=rf"1 prompts leave no room for 11 .* r/0: {size} tokens"):
        check_prompt_lengths(processor, rows, 11, size + 10, stage="ppo")


def test_a_tokenizer_that_adds_bos_itself_gives_one_bos() -> None:
    processor = copy.deepcopy(embedded_processor())
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
    )
    assert tokenizer("a")["input_ids"][0] == bos  # it does add one
    [ids] = encode_prompts(processor, ["What?"], [None]).ids
    assert ids.count(bos) == 1 and ids[0] == bos


@pytest.mark.parametrize("family", ["embedded", "qwen2_5_vl"])
def test_a_prompt_for_vllm_has_one_bos_and_one_image_token_or_none(family: str) -> None:
    processor = embedded_processor() if family == "embedded" else tiny(family)[1]
    tokenizer, image_id = processor.tokenizer, processor.image_token_id
    with_image, without = (prompt_ids(processor, "What?", image=image) for image in (True, False))
    assert with_image.count(image_id) == 1 and without.count(image_id) == 0
    bos = tokenizer.bos_token_id
    assert [ids.count(bos) for ids in (with_image, without)] == ([0, 0] if bos is None else [1, 1])
    assert "What?" in tokenizer.decode(without)


def test_a_control_token_of_one_character_stays_as_it_is() -> None:
    processor = copy.deepcopy(embedded_processor())
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["~", "<end>"]})
    assert "~" not in special_tokens(processor) and "<end>" in special_tokens(processor)
    assert neutralise("a ~ b <end>", processor) == "a ~ b < end>"


def test_images_of_fewer_tiles_are_filled_with_zeros() -> None:
    one, two = torch.ones(1, 1, 3, 2, 2), torch.ones(1, 2, 3, 2, 2)
    sizes = torch.tensor([[4, 4]])
    stacked = stack_vision(
        [{"pixel_values": one, "image_sizes": sizes}, {"pixel_values": two, "image_sizes": sizes}]
    )
    assert stacked["pixel_values"].shape == (2, 2, 3, 2, 2)
    assert stacked["pixel_values"].sum((2, 3, 4)).tolist() == [[12, 0], [12, 12]]
    assert stacked["image_sizes"].tolist() == [[4, 4], [4, 4]]
    assert stack_vision([]) == {}


def test_padding_has_the_type_of_text() -> None:
    rows = table(pair(chosen="A cat on a mat, and a dog."), pair("A longer question, is it not?"))
    batch = PreferenceCollator(tiny("qwen2_5_vl")[1])(list(rows))
    padded = batch["attention_mask"] == 0
    assert padded.any() and not batch["mm_token_type_ids"][padded].any()
    assert (
        batch["mm_token_type_ids"].sum()
        == (batch["input_ids"] == tiny("qwen2_5_vl")[1].image_token_id).sum()
    )
