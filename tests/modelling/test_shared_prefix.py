"""Shared prefixes against the plain path: the same numbers, or a word about why not."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spavl_lib.config import ModelConfig
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.heads import ScalarHeadModel
from spavl_lib.modelling.speed.shared_prefix import share_prefix
from spavl_lib.objectives.logps import sequence_logps
from tests.helpers import mini_rows, spread, tiny

FAMILIES = ("embedded", "llava", "llava_next")
TOLERANCE = 1e-5  # nats; norms and rotations stay in 32 bit even in a double model


def model_and_processor(family: str, attention: str = "sdpa") -> tuple:
    """A model of a family's own, in 64 bit: what differs then is no rounding."""
    model, processor = tiny(family)
    model = copy.deepcopy(model).double()
    model.set_attn_implementation({"": attention})
    model.model.language_model.config._attn_implementation = attention
    return model, processor


def rows_of(count: int = 3) -> list[dict]:
    """Pairs of unlike lengths, two further questions of the first image among them."""
    rows = [dict(r) for r in spread(mini_rows(), count)]
    for n, r in enumerate(rows):
        r["chosen"], r["rejected"] = r["chosen"][: 12 + 9 * n], r["rejected"][: 40 - 7 * n]
    return [*rows, rows[0] | {"prompt": "Why?"}, rows[0] | {"prompt": "Why not?", "chosen": "So."}]


def collated(processor: object, rows: list[dict], side: str = "right") -> dict:
    batch = PreferenceCollator(processor, padding_side=side)(rows)
    batch["pixel_values"] = batch["pixel_values"].double()
    return batch


def logps(model: nn.Module, batch: dict) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    logits = model(**inputs, use_cache=False).logits
    logits = logits.double() if logits.dtype == torch.float64 else logits
    return sequence_logps(logits, batch["input_ids"], batch["completion_mask"].bool())


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and len(one) > 10
    for name, gradient in one.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert ((gradient - other[name]).abs().max() / scale) < 1e-4, name


# Under left padding transformers' own eager path gives NaN in 64 bit: nothing to compare with.
KINDS = (("sdpa", "right"), ("sdpa", "left"), ("eager", "right"))


@pytest.mark.parametrize(("attention", "side"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_plain_path(
    family: str, attention: str, side: str
) -> None:
    model, processor = model_and_processor(family, attention)
    model.model.vision_tower.requires_grad_(False)
    batch = collated(processor, rows_of(), side)
    plain = logps(model, batch)
    weights = torch.linspace(-1, 2, len(plain))  # rows must not be told apart by their sum alone
    plain_gradients = gradients(model, (plain * weights).sum())
    handle = share_prefix(model, strict=True, min_shared=4)
    shared = logps(model, batch)
    assert handle.stats["shared"] == 1
    assert handle.stats["packed_tokens"] < 0.75 * handle.stats["rows_tokens"]
    # Left padding counts positions from the padding on: only rotations' rounding differs.
    tolerance = TOLERANCE if side == "right" else 2e-2 if family != "embedded" else 1e-3
    # Sums of hundreds of nats come back to the last places of a 32-bit number.
    torch.testing.assert_close(shared, plain, atol=tolerance, rtol=3e-7)
    assert plain.std() > 1
    if side == "right":
        assert_same_gradients(plain_gradients, gradients(model, (shared * weights).sum()))
    handle.restore()
    assert torch.equal(logps(model, batch), plain)


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(seed: int) -> None:
    """Any lengths, any repetition of images, questions and answers, any padding."""
    chance = torch.Generator().manual_seed(seed)

    def pick(options: list) -> object:
        return options[int(torch.randint(len(options), (1,), generator=chance))]

    model, processor = model_and_processor(pick(["embedded", "llava"]), pick(["sdpa", "eager"]))
    base = spread(mini_rows(), 3)
    words = ["", "No.", "I will not help with that, and here is why.", "Look at the picture."]
    rows = [
        dict(pick(base)) | {"prompt": pick(["Why?", "What is this, and why?"])}
        | {side: pick(words) + pick(words) for side in ("chosen", "rejected")}
        for _ in range(pick([1, 2, 5]))
    ]  # fmt: skip
    if len(rows) > 1 and pick([True, False]):
        rows[-1] |= {"image": None}
    batch = collated(processor, rows, "right")
    extra = int(torch.randint(6, (1,), generator=chance))
    for name in ("input_ids", "attention_mask", "completion_mask"):
        batch[name] = nn.functional.pad(batch[name], (0, extra))
    with torch.no_grad():
        plain = logps(model, batch)
        share_prefix(model, strict=True, min_shared=pick([1, 4, 16]))
        assert (logps(model, batch) - plain).abs().max() < TOLERANCE


def test_an_answer_or_a_question_changes_no_other_branch() -> None:
    model, processor = model_and_processor("embedded")
    share_prefix(model, strict=True, min_shared=4)
    rows = rows_of()
    with torch.no_grad():
        before = logps(model, collated(processor, rows))
        changes = (({"chosen": "Something else altogether."}, [1]), ({"prompt": "Who?"}, [1, 6]))
        for change, moved in changes:
            other = [r | change if i == 1 else r for i, r in enumerate(rows)]
            after = logps(model, collated(processor, other))
            differs = ((after - before).abs() > TOLERANCE).nonzero().flatten().tolist()
            assert differs == moved


def test_equal_words_under_two_images_never_merge() -> None:
    model, processor = model_and_processor("embedded")
    first, second = [dict(r) for r in spread(mini_rows(), 2)]
    rows = [first, first | {"image": second["image"]}]
    batch = collated(processor, rows)
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    with torch.no_grad():
        plain = logps(model, batch)
        handle = share_prefix(model, strict=True)
        shared = logps(model, batch)
        assert (plain - shared).abs().max() < TOLERANCE
        assert (shared[0] - shared[1]).abs() > 1e-3
        # one pixel in one image is enough
        batch["pixel_values"][1:] = batch["pixel_values"][:1]
        merged = logps(model, batch)
        assert merged[0] == merged[1]
        batch["pixel_values"][1, 0, 3, 3] += 0.1
        apart = logps(model, batch)
    assert merged[0] != apart[1] and merged[0] == apart[0]
    assert handle.vision.images_run == 2 + 1 + 2


def test_every_picture_passes_the_tower_once() -> None:
    """Not once a row, and not again for the reference, which gets the same tensor."""
    model, processor = model_and_processor("embedded")
    model.model.vision_tower.requires_grad_(False)
    batch = collated(processor, rows_of())
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len((*args, *kwargs.values())[0])),
        with_kwargs=True,
    )
    logps(model, batch)
    assert seen == [10]
    handle = share_prefix(model, strict=True)
    logps(model, batch)
    with torch.no_grad():
        logps(model, batch)
    assert handle.vision.images_run == 3  # five pairs, three pictures, two passes
    batch["pixel_values"] += 0.0  # in place: may be other pixels now
    logps(model, batch)
    assert handle.vision.images_run == 6
    model.model.vision_tower.requires_grad_(True)
    assert any("vision" in n for n in gradients(model, logps(model, batch).sum()))
    assert handle.vision.images_run == 9


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_gradient_checkpointing_and_adapters(adapter: str) -> None:
    from peft import get_peft_model

    model, processor = model_and_processor("embedded")
    batch = collated(processor, rows_of())
    if adapter == "lora":
        config = ModelConfig(name="embedded", adapter="lora", lora_rank=4, lora_alpha=8)
        torch.manual_seed(1)
        model = get_peft_model(model, lora_config(model, config)).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    model.train()
    plain = gradients(model, logps(model, batch)[:5].sum())
    share_prefix(model, strict=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapter == "lora":
        model.enable_input_require_grads()
        with torch.no_grad(), model.disable_adapter():
            base = logps(model, batch)
        assert (base - logps(model, batch)).abs().min() > 1e-2
    assert_same_gradients(plain, gradients(model, logps(model, batch)[:5].sum()))


def test_a_reward_head_scores_the_same() -> None:
    model, processor = model_and_processor("embedded")
    torch.manual_seed(0)  # of the head: how much of the hidden states' rounding it lets through
    scorer = ScalarHeadModel(model)
    batch = collated(processor, rows_of(), "left")
    batch.pop("completion_mask")
    plain, hidden = scorer(**batch), scorer.hidden_states(**batch)
    handle = share_prefix(scorer, strict=True)
    assert (scorer(**batch) - plain).abs().max() < 2e-5  # left padding: rotations' rounding
    real = batch["attention_mask"].bool()
    assert (scorer.hidden_states(**batch) - hidden)[real].abs().max() < 1e-4
    assert handle.stats["shared"] == 2 and plain.std() > 0


def test_generation_is_untouched_and_sees_every_picture_once() -> None:
    from spavl_lib.data.collate import PromptCollator

    model, processor = tiny("embedded")
    model = copy.deepcopy(model)
    batch = PromptCollator(processor)(rows_of())
    wanted = model.generate(**batch, max_new_tokens=12, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = share_prefix(model, strict=True)
        assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False), wanted)
    assert handle.vision.images_run == 3


def test_a_copy_has_its_own_wrapper() -> None:
    model, processor = model_and_processor("embedded")
    share_prefix(model, strict=True)
    batch = collated(processor, rows_of())
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = logps(model, batch)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert (logps(other, batch) - before).abs().min() > 1e-3
        assert torch.equal(logps(model, batch), before)
    assert share_prefix(other) is not share_prefix(model)
    assert share_prefix(other) is share_prefix(other)


# --- what cannot be shared ----------------------------------------------------------------------


def with_holes(batch: dict, model: nn.Module) -> dict:
    mask = batch["attention_mask"].clone()
    mask[0, 5] = 0
    return {"attention_mask": mask}


def four_axes(batch: dict, model: nn.Module) -> dict:
    """A causal mask of four axes, as a backbone may give."""
    length = batch["input_ids"].shape[1]
    mask = torch.zeros(len(batch["input_ids"]), 1, length, length, dtype=torch.float64)
    return {"attention_mask": mask.masked_fill(torch.ones(length, length).triu(1).bool(), -1e9)}


def biased_scores(batch: dict, model: nn.Module) -> dict:
    mask = four_axes(batch, model)["attention_mask"]
    return {"attention_mask": mask - 0.5}


def several_sequences(batch: dict, model: nn.Module) -> dict:
    """Positions that start anew, without a mask: transformers keeps the two halves apart."""
    half = batch["input_ids"].shape[1] // 2
    return {
        "position_ids": torch.arange(2 * half + 1).remainder(half)[
            None, : batch["input_ids"].shape[1]
        ],
        "attention_mask": None,
    }


def dropout(batch: dict, model: nn.Module) -> dict:
    model.model.language_model.train()
    model.model.train()
    model.model.language_model.layers[0].self_attn.attention_dropout = 1e-12
    return {}


CASES = ((with_holes, "holes"), (biased_scores, "change scores"),
         (several_sequences, "position_ids"), (dropout, "dropout"))  # fmt: skip


@pytest.mark.parametrize(("case", "said"), CASES, ids=[c.__name__ for c, _ in CASES])
@pytest.mark.filterwarnings("ignore:.*dropout.*sdpa.*")
def test_what_cannot_be_shared_runs_plainly_and_is_said_once(case: Callable, said: str) -> None:
    model, processor = model_and_processor("embedded")
    batch = collated(processor, rows_of())
    batch |= case(batch, model)
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"} | {"use_cache": False}
    with torch.no_grad():
        plain = model(**inputs).logits
        handle = share_prefix(model)
        with pytest.warns(UserWarning, match=said):
            assert (model(**inputs).logits - plain).abs().max() < 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)
        assert handle.stats["shared"] == 0
        share_prefix(model, strict=True)
        with pytest.raises(InputError, match=said):
            model(**inputs)


def test_batch_wide_rotations_are_refused() -> None:
    model, _ = model_and_processor("embedded")
    text = model.config.get_text_config()
    text.rope_parameters = dict(text.rope_parameters) | {"rope_type": "dynamic"}
    with pytest.raises(InputError, match="dynamic"):
        share_prefix(model, strict=True)


def test_positions_of_any_steps_are_shared() -> None:
    """Nothing but their differences counts, and those belong to what rows have in common."""
    model, processor = model_and_processor("embedded")
    batch = collated(processor, rows_of())
    steps = torch.arange(batch["input_ids"].shape[1])
    with torch.no_grad():
        usual = logps(model, batch)
        batch["position_ids"] = (2 * steps + (steps > 60))[None]
        plain = logps(model, batch)
        handle = share_prefix(model, strict=True)
        assert (logps(model, batch) - plain).abs().max() < TOLERANCE
        assert handle.stats["shared"] == 1
        # A row with other steps has nothing in common with the rest from there on.
        rows = batch["position_ids"].repeat(len(plain), 1)
        rows[1] = steps
        batch["position_ids"] = rows
        changed = logps(model, batch)
    assert (usual - plain).abs().min() > 1e-2
    assert (changed - plain).abs().max() > 1e-2
    handle.restore()
    with torch.no_grad():
        assert (changed - logps(model, batch)).abs().max() < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_of_four_axes_is_shared(attention: str) -> None:
    model, processor = model_and_processor("embedded", attention)
    batch = collated(processor, rows_of())
    batch |= four_axes(batch, model)
    with torch.no_grad():
        plain = logps(model, batch)
        handle = share_prefix(model, strict=True)
        assert (logps(model, batch) - plain).abs().max() < TOLERANCE
    assert handle.stats["shared"] == 1


def test_ids_with_one_vector_keep_their_own_gradients() -> None:
    """The forward pass is equal, but each id's row of the embedding table has its gradient."""
    model, processor = model_and_processor("embedded")
    batch = collated(processor, [rows_of()[0]] * 2)
    ids = batch["input_ids"]
    place = int((batch["completion_mask"][0] > 0).nonzero()[0])
    one = int(ids[0, place])
    other = next(i for i in range(10, 60) if not (ids == i).any() and i != one)
    ids[1, place] = other
    with torch.no_grad():
        model.get_input_embeddings().weight[other] = model.get_input_embeddings().weight[one]
    weights = torch.tensor([1.0, 3.0, 2.0, 5.0])
    plain = gradients(model, (logps(model, batch) * weights).sum())
    share_prefix(model, strict=True, min_shared=4)
    shared = gradients(model, (logps(model, batch) * weights).sum())
    assert_same_gradients(plain, shared)
    table = plain["model.language_model.embed_tokens.weight"]
    assert table[other].norm() > 1e-3 and (table[other] - table[one]).norm() > 1e-3


def test_a_missing_image_is_the_models_own_error() -> None:
    model, processor = model_and_processor("embedded")
    batch = collated(processor, rows_of())
    batch["pixel_values"] = batch["pixel_values"][:-1]
    share_prefix(model, strict=True)
    with pytest.raises(Exception, match="do not match"):
        logps(model, batch)
