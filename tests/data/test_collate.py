"""Rows to tensors: BOS, EOS, image slots, masks, padding, on the embedded and other processors."""

import copy
import tracemalloc
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from spavl_lib.data.collate import PreferenceCollator, PromptCollator, pad_rows
from spavl_lib.data.images import png_bytes
from spavl_lib.data.schema import TURN
from spavl_lib.data.templates import completion_ids, encode_prompts, neutralise, render
from spavl_lib.errors import InputError
from spavl_lib.trainers.guards import check_batch
from tests.helpers import embedded_processor, mini_rows, png, spread, tiny

FAMILIES = ("embedded", "llava", "llava_next", "qwen2_5_vl", "idefics3")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def row(
    prompt: str = "What is this?", chosen: str = "A cat.", rejected: str = "No.", **more
) -> dict:
    """A preference row over a red picture."""
    base = {"id": "r/0", "image_name": "a.png", "image": {"bytes": png(), "path": None}}
    return base | {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def kept(batch: dict, index: int) -> list[int]:
    """A row's ids without padding."""
    return batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist()


def scored(batch: dict, index: int) -> list[int]:
    """A row's ids under the completion mask."""
    return batch["input_ids"][index][batch["completion_mask"][index].bool()].tolist()


# --- the text -----------------------------------------------------------------------------------


def test_the_prompt_is_vicunas_letter_by_letter() -> None:
    processor = embedded_processor()
    expected = f"<s>{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"
    assert render(processor, "What is this?") == expected
    assert render(processor, "What is this?", "A cat.") == f"{expected} A cat.</s>"
    assert render(processor, "What is this?", image=False) == expected.replace("<image>\n", "")


def test_the_whole_batch_tensor_by_tensor() -> None:
    """Two rows, one without image, as ids worked out from the tokenizer alone."""
    processor = embedded_processor()
    tokenizer = processor.tokenizer
    rows = [row(), row("Why?", "Because of it.", "I can't help.", image=None, id="r/1")]
    slots = [4] * 64
    assert tokenizer.convert_tokens_to_ids("<image>") == 4

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    heads = [
        [0, *ids(f"{SYSTEM} USER: "), *slots, *ids("\nWhat is this? ASSISTANT:")],
        [0, *ids(f"{SYSTEM} USER: Why? ASSISTANT:")],
    ]
    tails = [[*ids(t), 1] for t in (" A cat.", " Because of it.", " No.", " I can't help.")]
    sequences = [h + t for h, t in zip(heads + heads, tails, strict=True)]
    width = max(map(len, sequences))
    spare = [width - len(s) for s in sequences]
    expected = {
        "input_ids": [s + [3] * n for s, n in zip(sequences, spare, strict=True)],
        "attention_mask": [[1] * len(s) + [0] * n for s, n in zip(sequences, spare, strict=True)],
        "completion_mask": [
            [0] * len(h) + [1] * len(t) + [0] * n
            for h, t, n in zip(heads + heads, tails, spare, strict=True)
        ],
    }
    batch = PreferenceCollator(processor)(rows)
    assert set(batch) == {*expected, "pixel_values"}
    for name, values in expected.items():
        assert batch[name].tolist() == values, name
    pixels = batch["pixel_values"]
    assert pixels.shape == (2, 3, 64, 64)  # one image, once for each half
    assert torch.equal(pixels[0], pixels[1])
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    for channel, value in enumerate((200, 30, 30)):  # the picture's middle is its red
        number = (value / 255 - mean[channel]) / std[channel]
        assert abs(pixels[0, channel, 32, 32].item() - number) < 1e-3


def test_left_padding_moves_every_tensor_alike() -> None:
    rows = [row(), row("A much longer question about this picture?", "Yes, it is so.", "No.")]
    right = PreferenceCollator(embedded_processor())(rows)
    left = PreferenceCollator(embedded_processor(), padding_side="left")(rows)
    for i in range(4):
        count = int(right["attention_mask"][i].sum())
        assert count < right["input_ids"].shape[1] or i == int(
            right["attention_mask"].sum(1).argmax()
        )
        for name in ("input_ids", "attention_mask", "completion_mask"):
            assert left[name][i, -count:].tolist() == right[name][i, :count].tolist()
            outside = left[name][i, : left[name].shape[1] - count].tolist()
            assert outside == [3 if name == "input_ids" else 0] * len(outside)


def test_pad_rows() -> None:
    assert pad_rows([[5, 6], [7]], 0, "right").tolist() == [[5, 6], [7, 0]]
    assert pad_rows([[5, 6], [7]], 9, "left").tolist() == [[5, 6], [9, 7]]


# --- what every family must give ----------------------------------------------------------------


def family_rows(count: int = 6) -> list[dict]:
    return spread(mini_rows(), count)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_bos_one_eos_and_a_mask_over_answer_and_eos(family: str) -> None:
    _, processor = tiny(family)
    rows = family_rows()
    batch = PreferenceCollator(processor)(rows)
    check_batch(batch, rows, processor, _image_token_id(processor))
    tokenizer = processor.tokenizer
    answers = [r["chosen"] for r in rows] + [r["rejected"] for r in rows]  # chosen first
    for i, answer in enumerate(answers):
        ids, tail = kept(batch, i), scored(batch, i)
        assert tail == ids[-len(tail) :]  # the mask is the end of the row
        assert tail[-1] == tokenizer.eos_token_id and tail.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(tail[:-1]).strip() == answer
        if tokenizer.bos_token_id is not None:
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1


def _image_token_id(processor: object) -> int:
    return processor.tokenizer.convert_tokens_to_ids(processor.image_token)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_are_as_many_as_the_processor_makes(family: str) -> None:
    """Counted against the processor's own expansion, over pictures of several shapes."""
    _, processor = tiny(family)
    shapes = [(64, 64), (96, 40), (40, 96), (128, 128)]
    rows = [row(image=png_bytes_of(size), id=f"r/{n}") for n, size in enumerate(shapes)]
    batch = PreferenceCollator(processor)(rows)
    token = _image_token_id(processor)
    for i, size in enumerate(shapes + shapes):
        image = Image.new("RGB", size)
        alone = processor(images=[image], text=[render(processor, "What is this?")],
                          add_special_tokens=False)  # fmt: skip
        expected = sum(ids == token for ids in alone["input_ids"][0])
        assert kept(batch, i).count(token) == expected > 0


def png_bytes_of(size: tuple[int, int]) -> dict:
    return {"bytes": png_bytes(Image.new("RGB", size, (10, 200, 10))), "path": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_generation_begins_the_row_in_training(family: str) -> None:
    _, processor = tiny(family)
    rows = family_rows()
    training, prompts = PreferenceCollator(processor)(rows), PromptCollator(processor)(rows)
    assert prompts["attention_mask"][:, -1].all()  # left-padded
    for i in range(len(rows)):
        head = kept(prompts, i)
        for j in (i, i + len(rows)):
            assert kept(training, j)[: len(head)] == head
            assert kept(training, j)[len(head) :] == scored(training, j)
    assert set(training) - {"completion_mask"} == set(prompts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefilled_answer_stands_where_training_has_the_response(family: str) -> None:
    _, processor = tiny(family)
    rows = [row | {"chosen": "To make this,", "rejected": "No."} for row in family_rows(3)]
    prefilled = [row | {"prefill": row["chosen"]} for row in rows[:2]] + rows[2:]
    training, plain = PreferenceCollator(processor)(rows), PromptCollator(processor)(rows)
    prompts = PromptCollator(processor)(prefilled)
    for i in range(2):
        assert len(kept(prompts, i)) > len(kept(plain, i))
        assert kept(prompts, i) == kept(training, i)[:-1]  # without the end token
    assert kept(prompts, 2) == kept(plain, 2)
    for name, tensor in prompts.items():
        if name.endswith("token_type_ids"):
            assert tensor.shape == prompts["input_ids"].shape
            assert tensor.sum() == plain[name].sum()  # the answer's tokens have type 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_a_row_or_an_image_a_sequence(family: str) -> None:
    """What the model is given beside ids must fit them: per token, or per image."""
    model, processor = tiny(family)
    batch = PreferenceCollator(processor)(family_rows(3))
    assert batch["input_ids"].shape[0] == 6
    for name, value in batch.items():
        if value.ndim == 2 and not value.is_floating_point() and name not in (
            "image_grid_thw", "image_sizes"
        ):  # fmt: skip
            assert value.shape == batch["input_ids"].shape, name
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[:2] == batch["input_ids"].shape and torch.isfinite(logits).all()


def test_a_stock_template_without_bos_and_eos_still_gets_both() -> None:
    _, processor = tiny("llava")
    text = render(processor, "What is this?", "A cat.")
    assert text == "USER: <image>\nWhat is this? ASSISTANT: A cat. "  # neither is written
    batch = PreferenceCollator(processor)([row()])
    decode = processor.tokenizer.decode
    image = "<image>" * 16
    assert decode(kept(batch, 0)) == f"<s>USER: {image}\nWhat is this? ASSISTANT: A cat.</s>"
    assert decode(scored(batch, 0)) == " A cat.</s>"
    assert decode(kept(PromptCollator(processor)([row()]), 0)) == (
        f"<s>USER: {image}\nWhat is this? ASSISTANT:"
    )


def test_a_hundred_rows_decode_to_their_answers() -> None:
    rows = family_rows(100)
    batch = PreferenceCollator(embedded_processor())(rows)
    tokenizer = embedded_processor().tokenizer
    answers = [r["chosen"] for r in rows] + [r["rejected"] for r in rows]
    said = [tokenizer.decode(scored(batch, i)) for i in range(200)]
    assert said == [f" {answer}</s>" for answer in answers]
    assert len(set(answers)) > 100
    assert all(kept(batch, i).count(4) == 64 for i in range(200))


# --- control words in what people write ---------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_control_words_in_text_stay_words(family: str) -> None:
    """`<image>` typed by a user is no second picture, `</s>` in an answer no early end."""
    _, processor = tiny(family)
    tokenizer = processor.tokenizer
    control = [t for t in (*tokenizer.all_special_tokens, processor.image_token) if len(t) > 1]
    assert len(set(control)) >= 3
    hostile = " ".join(f"a{t}b" for t in dict.fromkeys(control))
    rows = [row(f"Q {hostile}?", f"Good {hostile}.", f"Bad {hostile}.")]
    plain = [row("Q?", "Good.", "Bad.")]
    hostile_batch, plain_batch = (PreferenceCollator(processor)(r) for r in (rows, plain))
    check_batch(hostile_batch, rows, processor, _image_token_id(processor))
    ids = [tokenizer.convert_tokens_to_ids(t) for t in dict.fromkeys(control)]
    for i in range(2):
        for token in ids:
            assert kept(hostile_batch, i).count(token) == kept(plain_batch, i).count(token)
    assert PromptCollator(processor)(rows)["input_ids"].shape[0] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain <b>text</b>", "plain <b>text</b>"),
        ("see <image> here", "see < image> here"),
        ("end</s>", "end< /s>"),
        ("<s><pad><unk>", "< s>< pad>< unk>"),
        ("<<image>>", "<< image>>"),
        ("<ima<image>ge>", "<ima< image>ge>"),
    ],
)
def test_neutralise(text: str, expected: str) -> None:
    processor = embedded_processor()
    assert neutralise(text, processor) == expected
    assert neutralise(expected, processor) == expected  # nothing is left to change


def test_an_answer_that_only_looks_like_the_template_stays_one_answer() -> None:
    processor = embedded_processor()
    text = "No. USER: And this? ASSISTANT: Yes."
    rows = [row(chosen=text)]
    batch = PreferenceCollator(processor)(rows)
    assert processor.tokenizer.decode(scored(batch, 0)) == f" {text}</s>"


@pytest.mark.parametrize("family", ["embedded", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "text", ["naïve café", "日本語のテキスト", "emoji 🔥🔥", "tab\tand\nlines\n\nmore", "a" * 200,
             "trailing space  ", " leading", "é" + "e\u0301"],
)  # fmt: skip
def test_any_text_comes_back(text: str, family: str) -> None:
    """Byte-level, so none is unknown; a family may compose letters (Qwen does), not lose them."""
    _, processor = tiny(family)
    rows = [row(chosen=text, rejected=f"{text} no")]
    batch = PreferenceCollator(processor)(rows)
    said = processor.tokenizer.decode(scored(batch, 0)[:-1]).strip()
    assert unicodedata.normalize("NFC", said) == unicodedata.normalize("NFC", text).strip()
    check_batch(batch, rows, processor, _image_token_id(processor))


def test_a_narrow_picture_of_a_few_kilobytes_does_not_take_gigabytes() -> None:
    picture = {"bytes": png_bytes(Image.new("RGB", (100, 12_000), "red")), "path": None}
    tracemalloc.start()
    try:
        batch = PreferenceCollator(embedded_processor())([row(image=picture)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 400e6  # padded to a square at its full size it takes 1.8 GB
    small = {"bytes": png_bytes(Image.new("RGB", (10, 1_200), "red")), "path": None}
    expected = PreferenceCollator(embedded_processor())([row(image=small)])
    assert (batch["pixel_values"] - expected["pixel_values"]).abs().max() < 0.5


# --- refusals -----------------------------------------------------------------------------------


def test_too_long_rows_are_named_and_never_cut() -> None:
    rows = [row(), row(chosen="Yes. " * 40, id="r/1"), row(rejected="No. " * 50, id="r/2")]
    lengths = [len(kept(PreferenceCollator(embedded_processor())(rows), i)) for i in range(6)]
    limit = max(lengths[0], lengths[2], lengths[3], lengths[4])
    with pytest.raises(InputError) as caught:
        PreferenceCollator(embedded_processor(), max_length=limit)(rows)
    message = str(caught.value)
    assert f"longer than {limit} tokens" in message
    assert f"r/1 chosen: {lengths[1]} tokens" in message
    assert f"r/2 rejected: {lengths[5]} tokens" in message
    assert message.count(" tokens") == 3 and "r/0" not in message
    longest = PreferenceCollator(embedded_processor(), max_length=max(lengths))(rows)
    assert longest["input_ids"].shape[1] == max(lengths)


def test_bad_images_are_named_by_row() -> None:
    rows = [
        row(),
        row(image={"bytes": b"no", "path": None}, id="r/1", image_name="b.png"),
        row(image={"bytes": png()[:40], "path": None}, id="r/2", image_name="c.png"),
    ]
    for collate in (PreferenceCollator, PromptCollator):
        with pytest.raises(InputError, match=r"row r/1 \(b.png\).*row r/2 \(c.png\)"):
            collate(embedded_processor())(rows)


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    processor = copy.deepcopy(embedded_processor())
    processor.chat_template = (
        "{% if add_generation_prompt %}Q{% else %}R{% endif %}"
        "{{ messages[0]['content'][1]['text'] }}"
    )
    with pytest.raises(InputError, match="writes a prompt differently"):
        completion_ids(processor, "What?", "That.")


# --- pictures -----------------------------------------------------------------------------------


def test_a_wide_picture_is_padded_with_the_mean_colour_and_not_cropped() -> None:
    """64 x 32: green and blue ends stay, and above and below lies the processor's mean."""
    processor = embedded_processor()
    picture = np.zeros((32, 64, 3), dtype=np.uint8)
    picture[:, :8], picture[:, 8:-8], picture[:, -8:] = (0, 255, 0), (255, 0, 0), (0, 0, 255)
    mean = np.array(processor.image_processor.image_mean)
    std = np.array(processor.image_processor.image_std)
    for turned in (False, True):
        pixels = np.ascontiguousarray(picture.transpose(1, 0, 2) if turned else picture)
        cell = {"bytes": png_bytes(Image.fromarray(pixels)), "path": None}
        batch = PreferenceCollator(processor)([row(image=cell)])
        seen = batch["pixel_values"][0].permute(1, 2, 0).numpy() * std + mean
        seen = seen.transpose(1, 0, 2) if turned else seen
        assert seen.shape == (64, 64, 3)
        assert np.abs(seen[32, 2] - (0, 1, 0)).max() < 0.02  # one end
        assert np.abs(seen[32, 61] - (0, 0, 1)).max() < 0.02  # the other
        assert np.abs(seen[32, 32] - (1, 0, 0)).max() < 0.02
        for y in (0, 12, 51, 63):  # 16 lines above and below
            assert np.abs(seen[y] - mean).max() < 0.01, y
            assert np.abs(batch["pixel_values"][0].numpy()[:, y if not turned else 32,
                          32 if not turned else y]).max() < 0.03  # fmt: skip


def test_collating_leaves_the_rows_as_they_were() -> None:
    """A look at the first rows must not change the set."""
    rows = family_rows(3)
    before = [repr(r) for r in rows]
    collate = PreferenceCollator(embedded_processor())
    first, second = collate(rows), collate(rows)
    assert [repr(r) for r in rows] == before
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_prompts_without_any_image() -> None:
    processor = embedded_processor()
    encoded = encode_prompts(processor, ["Why?", "And so?"], [None, None])
    assert encoded.vision == {} and encoded.token_types == {}
    assert all(4 not in i and i[0] == 0 and i.count(0) == 1 for i in encoded.ids)


def test_a_broken_batch_is_caught_by_the_first_check() -> None:
    """Each silent fault, made on purpose, must fail the check of the first batch."""
    processor, rows = embedded_processor(), family_rows(2)

    def broken(change) -> dict:
        batch = PreferenceCollator(processor)(rows)
        change(batch)
        return batch

    def shift(batch: dict) -> None:
        batch["completion_mask"] = torch.roll(batch["completion_mask"], -1, 1)

    def drop_eos(batch: dict) -> None:
        for mask in batch["completion_mask"]:
            mask[mask.nonzero()[-1]] = 0

    def double_bos(batch: dict) -> None:
        batch["input_ids"][:, 1] = 0

    def no_image(batch: dict) -> None:
        batch["input_ids"][batch["input_ids"] == 4] = 5

    def swap(batch: dict) -> None:
        for name in ("input_ids", "attention_mask", "completion_mask"):
            batch[name] = batch[name].roll(len(rows), 0)

    check_batch(broken(lambda b: None), rows, processor, 4)
    for change in (shift, drop_eos, double_bos, no_image, swap):
        with pytest.raises(AssertionError):
            check_batch(broken(change), rows, processor, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_written_as_turns_with_one_picture_before_the_first(family: str) -> None:
    _, processor = tiny(family)
    talk = TURN.join(["What is this?", "A cat.", "And its colour?"])
    text = render(processor, talk, "Red.")
    places = [text.index(part) for part in ("What is this?", "A cat.", "And its colour?", "Red.")]
    assert places == sorted(places) and TURN not in text
    batch = PreferenceCollator(processor)([row(talk), row("What is this?")])
    token = _image_token_id(processor)
    assert kept(batch, 0).count(token) == kept(batch, 1).count(token) > 0
    assert text.index(getattr(processor, "image_token", "<image>")) < places[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_covers_all_of_the_assistants_turns(family: str, side: str) -> None:
    _, processor = tiny(family)
    talk = TURN.join(["What is this?", "A cat.", "And its colour?", "Red, I think.", "Is it old?"])
    rows = [row(talk), row("What is this?")]
    batch = PreferenceCollator(processor, padding_side=side, all_turns=True)(rows)
    token = _image_token_id(processor)
    check_batch(batch, rows, processor, token, all_turns=True)
    plain = PreferenceCollator(processor, padding_side=side)(rows)
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    more = (batch["completion_mask"] - plain["completion_mask"]).bool()
    assert more[[0, 2]].any() and not more[[1, 3]].any()
    said = processor.tokenizer.decode(batch["input_ids"][0][more[0]], skip_special_tokens=True)
    assert "".join(said.split()) == "Acat.Red,Ithink."
    with pytest.raises(AssertionError, match="the mask covers 1 turns, expected 3"):
        check_batch(plain, rows, processor, token, all_turns=True)
    with pytest.raises(AssertionError, match="the mask covers 3 turns, expected 1"):
        check_batch(batch, rows, processor, token)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    processor = copy.deepcopy(tiny("llava")[1])
    written = "{{ message['role'].upper() + ': '}}"
    template, past = processor.chat_template, "message['role'] == 'assistant' and not loop.last"
    assert written in template
    processor.chat_template = template.replace(
        written, f"{written}{{% if {past} %}}{{{{ 'past, ' }}}}{{% endif %}}"
    )
    rows = [row(TURN.join(["What is this?", "A cat.", "And its colour?"]))]
    with pytest.raises(InputError, match=r"row .*: the chat template writes turn 2 differently"):
        PreferenceCollator(processor, all_turns=True)(rows)
    PreferenceCollator(processor, all_turns=True)([row("What is this?")])


def test_a_conversation_is_vicunas_letter_by_letter() -> None:
    text = render(embedded_processor(), TURN.join(["First?", "One.", "Then?"]), "Two.")
    head = f"<s>{SYSTEM} USER: <image>\nFirst? ASSISTANT: One.</s>"
    assert text == f"{head}USER: Then? ASSISTANT: Two.</s>"
