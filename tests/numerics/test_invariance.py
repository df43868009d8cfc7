"""What must not change a number: padding, its side, and who else is in the batch."""

import pytest
import torch

from spavl_lib.data.collate import PreferenceCollator, PromptCollator
from tests.helpers import logps_of, mini_rows, spread, tiny

FAMILIES = ("embedded", "llava", "llava_next", "qwen2_5_vl", "idefics3")
TOLERANCE = 1e-4  # nats, over a whole answer


def rows_for(family: str, count: int = 4) -> list[dict]:
    """Rows of unlike lengths; cut short for random models, whose nats a token are many."""
    rows = [dict(r) for r in spread(mini_rows(), count)]
    if family != "embedded":
        for n, r in enumerate(rows):
            r["chosen"], r["rejected"] = r["chosen"][: 9 + 3 * n], r["rejected"][: 20 - 3 * n]
    return rows


def in_double(family: str) -> tuple:
    """The family's model in 64 bit: what differs then is no rounding."""
    model, processor = tiny(family)
    return model.double(), processor


@pytest.fixture(autouse=True)
def _back_to_float():
    yield
    for family in FAMILIES:
        if tiny.cache_info().currsize:
            tiny(family)[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_left_and_right_padding_give_the_same_log_probabilities(family: str) -> None:
    model, processor = in_double(family)
    rows = rows_for(family)
    right, left = (
        logps_of(model, PreferenceCollator(processor, padding_side=side)(rows))
        for side in ("right", "left")
    )
    assert (right - left).abs().max() < TOLERANCE
    assert len(set(right.tolist())) > 4 and (right < -0.1).any()  # rows differ, and are no zeros


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_of_four_is_four_batches_of_one(family: str, side: str) -> None:
    model, processor = in_double(family)
    rows = rows_for(family)
    collate = PreferenceCollator(processor, padding_side=side)
    together = logps_of(model, collate(rows))
    alone = [logps_of(model, collate([r])) for r in rows]
    assert (together[:4] - torch.stack([a[0] for a in alone])).abs().max() < TOLERANCE
    assert (together[4:] - torch.stack([a[1] for a in alone])).abs().max() < TOLERANCE
    turned = logps_of(model, collate(rows[::-1]))
    assert (together[:4] - turned[:4].flip(0)).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["embedded", "llava", "idefics3"])
def test_a_row_without_image_changes_no_other(family: str) -> None:
    model, processor = in_double(family)
    rows = rows_for(family, 3)
    collate = PreferenceCollator(processor)
    before = logps_of(model, collate(rows))
    mixed = [rows[0], rows[1] | {"image": None}, rows[2]]
    after = logps_of(model, collate(mixed))
    same = [0, 2, 3, 5]
    assert (before[same] - after[same]).abs().max() < TOLERANCE
    assert (before[[1, 4]] - after[[1, 4]]).abs().min() > 1e-3


def test_thirteen_pads_more_on_either_side() -> None:
    model, processor = in_double("embedded")
    batch = PreferenceCollator(processor)(rows_for("embedded"))
    plain = logps_of(model, batch)
    values = {"input_ids": processor.tokenizer.pad_token_id}
    for sides in ((13, 0), (0, 13)):
        wider = {
            k: torch.nn.functional.pad(v, sides, value=values.get(k, 0)) if v.ndim == 2 else v
            for k, v in batch.items()
        }
        assert wider["input_ids"].shape[1] == batch["input_ids"].shape[1] + 13
        assert (logps_of(model, wider) - plain).abs().max() < TOLERANCE


def test_generation_and_training_see_the_same_logits() -> None:
    """The next-token distribution after a left-padded prompt is that within the training row."""
    model, processor = in_double("embedded")
    rows = rows_for("embedded")
    prompts, training = PromptCollator(processor)(rows), PreferenceCollator(processor)(rows)

    def logits(batch: dict) -> torch.Tensor:
        inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            return model(**inputs).logits

    at_prompt, at_row = logits(prompts)[:, -1], logits(training)
    for i in range(len(rows)):
        last = int(prompts["attention_mask"][i].sum()) - 1
        for j in (i, i + len(rows)):
            assert (at_prompt[i] - at_row[j, last]).abs().max() < TOLERANCE


def test_cached_decoding_says_what_teacher_forcing_says() -> None:
    """Log-probabilities reported while generating equal those of one forward over the answer."""
    model, processor = in_double("embedded")
    batch = PromptCollator(processor)(rows_for("embedded"))
    batch["pixel_values"] = batch["pixel_values"].double()
    width = batch["input_ids"].shape[1]
    out = model.generate(
        **batch, max_new_tokens=12, min_new_tokens=12, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = out.sequences
    extra = torch.ones(len(ids), ids.shape[1] - width, dtype=torch.long)
    mask = torch.cat([batch["attention_mask"], extra], 1)
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"]
        ).logits
    reported = torch.stack(out.logits, 1).log_softmax(-1)
    forced = logits[:, width - 1 : -1].log_softmax(-1)
    picked = ids[:, width:].unsqueeze(-1)
    difference = reported.gather(-1, picked) - forced.gather(-1, picked)
    assert reported.shape[1] == 12 and difference.abs().max() < 1e-3
