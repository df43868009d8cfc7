"""Lengths of rows in tokens, rows that a model cannot take, and parts of the collator by hand."""

import copy
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers.processors import TemplateProcessing

from spavl_lib.data.collate import PreferenceCollator, PromptCollator, stack_vision
from spavl_lib.data.fingerprint import row_digests
from spavl_lib.data.images import decode_images
from spavl_lib.data.lengths import Limit, pair_lengths, without_unfit_rows
from spavl_lib.data.schema import PREFERENCE_COLUMNS, TURN, features
from spavl_lib.data.templates import (
    completion_ids,
    encode_prompts,
    neutralise,
    prompt_ids,
    special_tokens,
)
from spavl_lib.errors import InputError
from spavl_lib.trainers.guards import check_batch
from spavl_lib.trainers.inputs import limit_of, load_rows
from tests.helpers import (
    embedded_processor,
    hub_rows,
    mini_rows,
    png,
    smoke,
    tiny,
    write_hub_folder,
)

SLOTS = 64  # image tokens of the embedded model


def mini_table(*rows: dict) -> Dataset:
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
    rows = mini_table(pair(), pair("Why?", chosen="Because of it."), pair("And now?", image=False))
    lengths = list(pair_lengths(embedded_processor(), rows))
    assert [row_id for row_id, *_ in lengths] == ["r/0", "r/1", "r/2"]
    assert [(chosen, rejected) for _, chosen, rejected in lengths] == collated(rows)
    assert all(type(size) is int for _, *sizes in lengths for size in sizes)
    assert lengths[0][1] - lengths[2][1] > SLOTS / 2


def test_rows_that_cannot_be_too_long_are_left_out() -> None:
    processor = embedded_processor()
    rows = mini_table(pair(), pair(chosen="Una señal."), pair(rejected="Ça va."), pair("Señor?"))
    assert [row_id for row_id, *_ in pair_lengths(processor, rows, skip_below=10_000)] == [
        "r/1", "r/2", "r/3",
    ]  # fmt: skip
    assert len(list(pair_lengths(processor, rows, skip_below=0))) == 4
    assert len(list(pair_lengths(processor, rows, skip_below=5))) == 4


def test_the_limit_itself_is_no_fault() -> None:
    rows, processor = mini_table(pair(chosen="A cat on a mat, and a dog.")), embedded_processor()
    [(chosen, rejected)] = collated(rows)
    assert chosen > rejected
    assert len(without_unfit_rows(processor, rows, Limit("dpo", 0, chosen), "error")) == 1
    with pytest.raises(InputError, match=f"1 answers are longer than {chosen - 1} .* r/0 chosen"):
        without_unfit_rows(processor, rows, Limit("dpo", 0, chosen - 1), "error")


def test_a_prompt_leaves_room_for_the_response_to_the_last_token() -> None:
    rows, processor = mini_table(pair(), pair("Why?", image=False)), embedded_processor()
    size = len(encode_prompts(processor, ["What?"], decode_images(rows)[:1]).ids[0])
    limits = [Limit("ppo", size + 10, sides=(), max_new_tokens=n) for n in (10, 11)]
    assert len(without_unfit_rows(processor, rows, limits[0], "error")) == 2
    with pytest.raises(InputError, match=rf"1 prompts leave no room for 11 .* r/0: {size} tokens"):
        without_unfit_rows(processor, rows, limits[1], "error")


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
    rows = mini_table(
        pair(chosen="A cat on a mat, and a dog."), pair("A longer question, is it not?")
    )
    batch = PreferenceCollator(tiny("qwen2_5_vl")[1])(list(rows))
    padded = batch["attention_mask"] == 0
    assert padded.any() and not batch["mm_token_type_ids"][padded].any()
    assert (
        batch["mm_token_type_ids"].sum()
        == (batch["input_ids"] == tiny("qwen2_5_vl")[1].image_token_id).sum()
    )


# --- rows that a model cannot take ----


def picture(width: int, height: int, orientation: int = 1) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG", exif=exif)
    return {"bytes": buffer.getvalue(), "path": None}


def table(*rows: dict) -> Dataset:
    empty = dict.fromkeys(PREFERENCE_COLUMNS, "") | {"image": None, "prompt": "Why?"}
    full = [empty | {"id": f"r/{n}", "chosen": "Yes.", "rejected": "No."} | r
            for n, r in enumerate(rows)]  # fmt: skip
    columns = {c: [r[c] for r in full] for c in PREFERENCE_COLUMNS}
    return Dataset.from_dict(columns, features=features(PREFERENCE_COLUMNS))


ROWS = table(
    {"image": picture(60, 60)},
    {"image": picture(300, 90), "chosen": "Because it is\nso."},
    {"image": picture(300, 90, orientation=6)},
    {"prompt": f"Why?{TURN}So.{TURN}And then?"},
    {"image": picture(400, 400), "rejected": "\n\nNo, é."},
)


@pytest.mark.parametrize("family", ["embedded", "llava_next", "qwen2_5_vl"])
def test_lengths_are_those_of_the_batch(family: str) -> None:
    """Also where a picture's size decides how many tokens it takes."""
    processor = embedded_processor() if family == "embedded" else tiny(family)[1]
    found = [lengths for _, *lengths in pair_lengths(processor, ROWS)]
    batch = PreferenceCollator(processor)(list(ROWS))
    sizes = batch["attention_mask"].sum(1).tolist()
    assert found == [list(pair) for pair in zip(sizes[:5], sizes[5:], strict=True)]
    for n, row in enumerate(ROWS):
        longest = max(found[n])
        for limit, fits in ((longest, True), (longest - 1, False)):
            options = processor, table(row), Limit("dpo", 4096, limit), "error"
            if fits:
                assert len(without_unfit_rows(*options)) == 1
            else:
                with pytest.raises(InputError, match=f"longer than {limit} tokens"):
                    without_unfit_rows(*options)


@pytest.mark.parametrize("family", ["embedded", "qwen2_5_vl"])
def test_a_prompt_must_leave_room(family: str) -> None:
    processor = embedded_processor() if family == "embedded" else tiny(family)[1]
    size = PromptCollator(processor)([ROWS[1]])["attention_mask"].sum().item()
    limit = Limit("rloo", size + 7, 0, (), 7)
    assert len(without_unfit_rows(processor, table(ROWS[1]), limit, "error")) == 1
    limit = Limit("rloo", size + 6, 0, (), 7)
    with pytest.raises(InputError, match=rf"7 new tokens.*lower rloo\.max_new_.*r/1: {size} tok"):
        without_unfit_rows(processor, table(ROWS[1]), limit, "error")


def test_prompts_of_a_test_set_are_refused_and_never_left_out() -> None:
    limit = Limit("generation", 100, sides=(), max_new_tokens=95)
    with pytest.raises(InputError, match=r"lower generation\.max_new_tokens, or remove") as caught:
        without_unfit_rows(embedded_processor(), ROWS, limit, "error")
    assert "on_bad_rows" not in str(caught.value)


# --- what to do about it ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["reward", "dpo", "ppo"])
@pytest.mark.parametrize(
    ("context", "max_length", "says"),
    [
        (4096, 80, "raise {}.max_length up to the model's context of 4096"),
        (80, 0, "longer than 80 tokens, the model's context,"),
        (80, 80, "longer than 80 tokens, the model's context,"),
        (80, 9000, "longer than 80 tokens, the model's context,"),
        (0, 80, "raise {}.max_length,"),
    ],
)
def test_advice_names_the_section_and_never_leads_past_the_context(
    stage: str, context: int, max_length: int, says: str
) -> None:
    limit = Limit(stage, context, max_length, max_new_tokens=4 * (stage == "ppo"))
    with pytest.raises(InputError) as caught:
        without_unfit_rows(embedded_processor(), table({"chosen": "word " * 90}), limit, "error")
    message = str(caught.value)
    assert says.format(stage) in message and "r/0 chosen: " in message
    assert (f"raise {stage}" in message) == ("raise" in says)
    assert ("set ppo.sft_coef to 0" in message) == (stage == "ppo")
    assert message.count("max_length") == ("raise" in says)


def test_limits_are_those_of_the_stage() -> None:
    overrides = {
        "reward": {"max_length": 201}, "dpo": {"max_length": 202}, "rloo": {"max_new_tokens": 14},
        "ppo": {"max_length": 203, "max_new_tokens": 13},
    }  # fmt: skip
    config = smoke({f"{s}.{k}": v for s, part in overrides.items() for k, v in part.items()})
    both = ("chosen", "rejected")
    assert limit_of(config, "reward") == Limit("reward", 512, 201, both)
    assert limit_of(config, "dpo") == Limit("dpo", 512, 202, both)
    assert limit_of(config, "ppo") == Limit("ppo", 512, 203, ("chosen",), 13)
    assert limit_of(config, "rloo") == Limit("rloo", 512, 0, (), 14)
    assert limit_of(smoke({"ppo.sft_coef": 0.0}), "ppo").sides == ()
    assert limit_of(smoke({"dpo.max_length": 9000}), "dpo").longest == 512


def test_rows_that_do_not_fit_are_left_out_if_that_is_asked_for() -> None:
    rows = table({}, {"chosen": "word " * 90}, {"prompt": "word " * 90}, {"rejected": "no " * 90})
    processor = embedded_processor()
    with pytest.warns(UserWarning, match=r"3 of 4 rows skipped: 4 answers .*r/1 chosen") as caught:
        left = without_unfit_rows(processor, rows, Limit("dpo", 100), "skip")
    assert left["id"] == ["r/0"] and len(caught) == 1
    with pytest.warns(UserWarning, match="2 of 4 rows skipped"):  # a rejected answer is not learnt
        left = without_unfit_rows(processor, rows, Limit("ppo", 100, 0, ("chosen",), 5), "skip")
    assert left["id"] == ["r/0", "r/3"]
    with pytest.raises(InputError, match="longer than 5 tokens"):  # no row is left
        without_unfit_rows(processor, rows, Limit("dpo", 5), "skip")


@pytest.mark.parametrize(
    ("stage", "long", "kept"),
    [
        ("reward", "chosen", 3), ("reward", "rejected", 3), ("dpo", "rejected", 3),
        ("ppo", "chosen", 3), ("ppo", "rejected", 4), ("ppo", "question", 3),
        ("rloo", "question", 3), ("rloo", "chosen", 4),
    ],
)  # fmt: skip
def test_every_trainer_skips_what_it_cannot_take(
    stage: str, long: str, kept: int, tmp_path: Path
) -> None:
    """Held-out rows too, which are scored when the training is over."""
    train, held_out = ([dict(r) for r in hub_rows(s, 4)] for s in ("train", "validation"))
    train[2][long] = held_out[1][long] = "word " * 600
    folder = write_hub_folder(tmp_path / "rows", train, held_out)
    data = {"data.source": "hub_layout", "data.path": str(folder), "data.on_bad_rows": "skip"}
    skipping = smoke(data, run_name="r")
    noted: dict = {}
    place = SimpleNamespace(name=stage, config=skipping, note=lambda **found: noted.update(found))
    splits = ("train", "validation")
    if kept < 4:
        with pytest.warns(UserWarning, match="1 of 4 rows skipped"):
            loaded = load_rows(skipping, place, embedded_processor(), *splits)
    else:
        loaded = load_rows(skipping, place, embedded_processor(), *splits)
    assert [len(rows) for rows in loaded] == [kept, kept]
    assert noted["data"]["train"] == row_digests(loaded[0])  # those that are trained on
    strict = smoke(data | {"data.on_bad_rows": "error"}, run_name="r")
    if kept < 4:
        with pytest.raises(InputError, match=r"train/2"):
            load_rows(strict, place, embedded_processor(), *splits)


# --- answers after their prompts ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["embedded", "llava", "qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("start", ["\n", "\n\n", " \n", "\t", "\r\n", "\u00a0", "\u2028"])
def test_white_space_before_an_answer_changes_nothing(family: str, start: str) -> None:
    processor = embedded_processor() if family == "embedded" else tiny(family)[1]
    assert completion_ids(processor, "Why?", f"{start}Yes, so.") == completion_ids(
        processor, "Why?", "Yes, so."
    )
    rows = list(table({"chosen": f"{start}Yes, so."}))
    check_batch(PreferenceCollator(processor)(rows), rows, processor, None)


def test_an_answer_that_cannot_be_told_apart_is_found_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A template that ends in an opening bracket, which some answers close at once."""
    from spavl_lib.data import lengths

    def joining(_: object, prompt: str, word: str, **options: object) -> list[int]:
        if word.startswith("]"):
            raise InputError("the tokenizer joins the end of the prompt with the answer")
        return [1]

    monkeypatch.setattr(lengths, "completion_ids", joining)
    rows = table({}, {"chosen": "] odd"}, {"rejected": "\n] odd"}, {"rejected": "a ] b"})
    processor = embedded_processor()
    with pytest.raises(InputError) as caught:
        without_unfit_rows(processor, rows, Limit("dpo", 512), "error")
    assert "2 answers cannot be tokenised" in str(caught.value)
    assert "r/1 chosen: the tokenizer joins" in str(caught.value)
    assert "r/2 rejected: the tokenizer joins" in str(caught.value)
    with pytest.warns(UserWarning, match="2 of 4 rows skipped"):
        left = without_unfit_rows(processor, rows, Limit("dpo", 512), "skip")
    assert left["id"] == ["r/0", "r/3"]
