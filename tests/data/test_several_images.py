"""Rows with several images, none, or several turns: each is computed as if it were alone."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spavl_lib.config import DataConfig, GenerationConfig
from spavl_lib.data.check import check
from spavl_lib.data.collate import PreferenceCollator, PromptCollator
from spavl_lib.data.images import picture_of
from spavl_lib.data.lengths import pair_lengths, prompt_lengths
from spavl_lib.data.load import load_preferences, load_prompts, with_images_of
from spavl_lib.data.schema import MORE, TURN, image_cells
from spavl_lib.data.sources.splits import connected
from spavl_lib.errors import InputError
from spavl_lib.evaluation.suite import for_judge
from spavl_lib.generation.generate import generate_batch
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.objectives.logps import sequence_logps
from spavl_lib.trainers.guards import check_batch
from spavl_lib.trainers.kto import ResponseCollator
from spavl_lib.trainers.rollout import batch_of, encode_rows
from tests.helpers import embedded_model, embedded_processor, mini_rows, png

SIDES = {"chosen": "Yes.", "rejected": "No."}
TALK = [
    {"role": "user", "content": "<image><image>What are they?"},
    {"role": "assistant", "content": "Two things."},
    {"role": "user", "content": "Which is red?"},
]
ALL = {"train_rows": 0, "validation_rows": 0, "test_rows": 0}
PATCHES = 64  # image tokens of one image of the embedded model


def mixed_rows() -> list[dict]:
    """Rows of mini with two images, none, one, three and two turns, and two turns without image."""
    one, two, three = (dict(mini_rows()[n]) for n in (0, 3, 400))
    talk = [
        TURN.join(["What is this?", "A thing.", one["prompt"]]),
        TURN.join(["Hi?", "Yes.", "Q?"]),
    ]
    return [
        one | {"id": "two", MORE: [three["image"]]},
        two | {"id": "none", "image": None, MORE: []},
        three | {"id": "one", MORE: None},
        one | {"id": "talk", "prompt": talk[0], MORE: [two["image"], three["image"]]},
        three | {"id": "text talk", "prompt": talk[1], "image": None},
    ]


def logps(model: nn.Module, rows: list[dict], side: str) -> Tensor:
    """Summed log-probabilities (2, rows) of the responses, in nats."""
    batch = PreferenceCollator(embedded_processor(), padding_side=side)(rows)
    mask = batch.pop("completion_mask").bool()
    with torch.no_grad():
        logits = model(**batch).logits
    return sequence_logps(logits, batch["input_ids"], mask).reshape(2, -1)


@pytest.mark.parametrize("share", ["off", "auto"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_mixed_batch_gives_what_each_row_gives_alone(side: str, share: str) -> None:
    rows, plain = mixed_rows(), embedded_model()
    model = copy.deepcopy(plain)
    apply_sharing(model, share)
    alone = torch.cat([logps(plain, [row], side) for row in rows], 1)
    torch.testing.assert_close(logps(model, rows, side), alone, atol=1e-5, rtol=1e-6)
    # Each image matters: without the second one the first row has another log-probability.
    fewer = logps(plain, [rows[0] | {MORE: []}], side)
    assert (fewer[:, 0] - alone[:, 0]).abs().max() > 1e-3


def test_prefixes_of_rows_with_several_images_are_shared() -> None:
    rows, model = mixed_rows(), embedded_model(own=True)
    apply_sharing(model, "require")
    logps(model, [rows[0], rows[3]], "right")
    [handle] = {id(h): h for m in model.modules() if (h := vars(m).get("_shared_prefix"))}.values()
    # Chosen and rejected responses share two images and three images with their questions.
    assert handle.stats["shared"] == 1
    assert handle.stats["rows_tokens"] - handle.stats["packed_tokens"] >= 5 * PATCHES


@pytest.mark.parametrize("collator", [PreferenceCollator, ResponseCollator])
def test_every_image_has_its_tokens_and_its_pixels(collator: type) -> None:
    processor, rows = embedded_processor(), mixed_rows()
    if collator is ResponseCollator:
        rows = [row | {"completion": row["chosen"], "label": True} for row in rows]
    batch, image_id = collator(processor)(rows), embedded_model().config.image_token_id
    repeats = len(batch["input_ids"]) // len(rows)
    expected = torch.tensor([2, 0, 1, 3, 0] * repeats)
    assert ((batch["input_ids"] == image_id).sum(1) == PATCHES * expected).all()
    assert len(batch["pixel_values"]) == expected.sum() == 6 * repeats
    for number, row in enumerate(rows[:4]):
        alone = collator(processor)([row]).get("pixel_values", torch.zeros(0, 3, 64, 64))
        start = int(expected[:number].sum())
        own = batch["pixel_values"][start : start + int(expected[number])]
        assert torch.equal(own, alone[: len(own)]) and len(alone) == repeats * len(own)
    check_batch(batch, rows, processor, image_id)


def test_a_template_that_drops_an_image_is_refused() -> None:
    processor = copy.deepcopy(embedded_processor())
    template = processor.chat_template
    slot = "{{ '<image>\n' }}"
    assert template.count(slot) == 1
    once = slot + "{% break %}"  # only a message's first image gets a slot
    processor.chat_template = template.replace(slot, once)
    PreferenceCollator(processor)(mixed_rows()[1:3])
    with pytest.raises(InputError, match="1 image slots for 2 images"):
        PreferenceCollator(processor)(mixed_rows())


def test_rollouts_keep_the_images_apart() -> None:
    rows, processor = mixed_rows(), embedded_processor()
    prompts = encode_rows(processor, rows)
    assert [len(p.image_keys) for p in prompts] == [2, 0, 1, 3, 0]
    one, three = prompts[0].image_keys
    assert prompts[2].image_keys == (three,) == (prompts[2].image_digest,)
    assert prompts[3].image_keys[::2] == (one, three)
    pad = processor.tokenizer.pad_token_id
    batch = batch_of(prompts, [[] for _ in prompts], pad, torch.device("cpu"))
    expected = PromptCollator(processor)(rows)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.parametrize("cache", ["compact", "dynamic"])
def test_answers_of_a_mixed_batch_are_those_of_each_row_alone(cache: str) -> None:
    rows, processor, model = mixed_rows(), embedded_processor(), embedded_model()
    settings = GenerationConfig(batch_size=5, max_new_tokens=8, cache=cache)
    together = generate_batch(model, processor, PromptCollator(processor)(rows), settings)
    for row, answer in zip(rows, together, strict=True):
        [alone] = generate_batch(model, processor, PromptCollator(processor)([row]), settings)
        assert answer == alone


def test_lengths_are_those_of_the_collator(tmp_path: Path) -> None:
    rows = load_preferences(
        DataConfig(source="datasets", path=str(write(tmp_path)), **ALL), "train"
    )
    processor = embedded_processor()
    for row, (row_id, *sizes) in zip(rows, pair_lengths(processor, rows), strict=True):
        mask = PreferenceCollator(processor)([row])["attention_mask"]
        assert (row_id, sizes) == (row["id"], mask.sum(1).tolist())
    prompts = [PromptCollator(processor)([row])["input_ids"].shape[1] for row in rows]
    assert [size for _, size in prompt_lengths(processor, rows)] == prompts


def write(folder: Path, **changes: object) -> Path:
    """Own rows with two images, one and none, in a file; the pictures a to e beside it."""
    for number, name in enumerate("abcde"):
        (folder / f"{name}.png").write_bytes(png((40 * number, 9, 9)))
    records = [
        {"id": "talk", "prompt": TALK, "images": ["a.png", "b.png"], **SIDES} | changes,
        {"id": "one", "prompt": "What?", "images": ["c.png"], **SIDES},
        {"id": "text", "prompt": "Why?", "images": [], **SIDES},
        {"id": "same", "prompt": "Same?", "images": ["d.png", "d.png"], **SIDES},
        {"id": "linked", "prompt": "Other?", "images": ["b.png"], **SIDES},
        *({"id": f"more {n}", "prompt": f"{n}?", "images": ["e.png"], **SIDES} for n in range(9)),
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (folder / "validation.jsonl").write_text(json.dumps(records[1]), encoding="utf-8")
    return folder


def test_own_rows_have_their_images_in_order(tmp_path: Path) -> None:
    config = DataConfig(source="datasets", path=str(write(tmp_path)), **ALL)
    rows = {row["id"]: row for row in load_preferences(config, "train")}
    paths = {name: [Path(c["path"]).stem for c in image_cells(row)] for name, row in rows.items()}
    assert paths | {"more 0": ["e"]} == paths
    assert [paths[n] for n in ("talk", "one", "text", "same")] == [["a", "b"], ["c"], [], ["d"] * 2]
    assert rows["talk"]["prompt"] == TURN.join(["What are they?", "Two things.", "Which is red?"])
    swapped = with_images_of(load_preferences(config, "train"), [3, *range(1, 14)])
    assert [Path(c["path"]).stem for c in image_cells(swapped[0])] == ["d", "d"]


def test_a_check_reads_every_image(tmp_path: Path) -> None:
    report = check(str(write(tmp_path)), processor=embedded_processor())
    split = report["splits"]["train"]
    assert (split["rows"], split["images"], split["text_only"]) == (14, 5, 1)
    assert split["problem_count"] == 0 and report["shared"]["validation"]["images"] == 1
    (tmp_path / "b.png").write_bytes(b"\x89PNG no picture")
    split = check(str(tmp_path))["splits"]["train"]
    assert any(
        "train.jsonl:1 image: image 2 of the row: unreadable" in p for p in split["problems"]
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": ["a.png"]}, "2 <image> in the text, and 1 images"),
        ({"images": ["a.png", "gone.png"]}, "missing image 'gone.png'"),
        (
            {"prompt": [TALK[0] | {"content": "<image>A?"}, TALK[1],
                        TALK[2] | {"content": "<image>B?"}]},
            "2 images in 2 turns; put all of them into the first turn",
        ),
    ],
)  # fmt: skip
def test_a_row_that_would_lose_an_image_is_named(changes: dict, says: str, tmp_path: Path) -> None:
    config = DataConfig(source="datasets", path=str(write(tmp_path, **changes)), **ALL)
    with pytest.raises(InputError) as error:
        load_preferences(config, "train")
    assert f"train.jsonl:1 image: {says}" in str(error.value)


def test_rows_that_share_one_of_their_images_are_held_out_together(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "validation.jsonl").unlink()
    for seed in range(6):
        config = DataConfig(source="datasets", path=str(folder), held_out_seed=seed, **ALL)
        with pytest.warns(UserWarning, match="held out"):
            sets = [{*load_preferences(config, s)["id"]} for s in ("train", "validation")]
        assert all(sets) and any({"talk", "linked"} <= ids for ids in sets)
    assert connected([["a", "b"], ["c"], ["d", "b"], ["d"]]) == ["d", "c", "d", "d"]


def test_own_prompts_may_have_several_images(tmp_path: Path) -> None:
    write(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"set": "harm", "prompt": "Both?", "images": ["a.png", "b.png"]},
             {"set": "harm", "prompt": "None?"}]  # fmt: skip
    prompts.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    config = DataConfig(source="mini", test_path=str(prompts), **ALL)
    rows = load_prompts(config, "harm")
    assert [len(image_cells(row)) for row in rows] == [2, 0]
    assert picture_of(rows[0]).size == (48, 16) and picture_of(rows[1]) is None
    records = [{"id": row["id"], "prompt": row["prompt"]} for row in rows]
    with pytest.raises(InputError, match="prompts/0 have several images, and a judge is shown one"):
        for_judge(rows, records)
    assert MORE not in for_judge(rows, records[1:])[0]
