"""Shared prefixes in every family: log-probabilities and gradients are those of the plain forward.

By default each family is tried in one case, and the cases differ. `-m slow` tries every family in
every case.
"""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from spavl_lib.errors import InputError
from spavl_lib.modelling.families import family_of
from spavl_lib.modelling.speed import prefix_attention, prefix_batch
from spavl_lib.modelling.speed.prefix_batch import TextBatch
from spavl_lib.modelling.speed.shared_prefix import SharedPrefix, share_prefix
from tests.families.tiny import BUILDERS, batch_of, build, words

pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED: tuple[str, ...] = ()
SHARING = [name for name in BUILDERS if name not in REFUSED]
CASES = list(
    itertools.product(
        ("sdpa", "eager"), ("lora", "full"), ("right", "left"), ("", "non-reentrant", "reentrant")
    )
)
TOLERANCE = 1e-5  # nats, and the relative error of the whole gradient, in fp32
# The first case of each list has the number 0, and so on: neighbours differ in every dimension.
ONE_CASE_EACH = [(name, CASES[7 * i % len(CASES)]) for i, name in enumerate(SHARING)]
EVERY_CASE = [
    (name, case) for name in SHARING for case in CASES if (name, case) not in ONE_CASE_EACH
]


def rows_of(other_question: int = 7) -> list[tuple[int, list[int], list[int]]]:
    """Seven rows over three images: two questions about the first image, and responses that begin
    alike.

    Args:
        other_question: Length of the second question in tokens. The first one has 9 tokens.
    """
    why, what, start = words(1, 9), words(2, other_question), words(5, 3)
    return [
        (0, why, start + words(3, 8)), (0, what, words(4, 6)), (1, why, words(6, 9)),
        (0, why, start + words(7, 11)), (0, what, words(8, 10)), (1, why, words(9, 5)),
        (2, what, words(9, 5)),
    ]  # fmt: skip


def token_logps(model: nn.Module, batch: dict, responses: Tensor) -> Tensor:
    """Log-probabilities (rows, length - 1) of the response tokens, and 0 elsewhere."""
    logits = model(**{k: v.clone() for k, v in batch.items()}, use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])
    return logps[..., 0] * responses[:, 1:]


def measure(model: nn.Module, batch: dict, responses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradients of a sum in which every token has its own weight."""
    model.zero_grad(set_to_none=True)
    logps = token_logps(model, batch, responses)
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(5))
    (logps * weights).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def adapted(model: nn.Module) -> nn.Module:
    """LoRA on the text model's linear layers; the projector trains."""
    parts = [family_of(model).part_of(f"{name}.weight") for name, _ in model.named_modules()]
    targets = [
        name
        for (name, module), part in zip(model.named_modules(), parts, strict=True)
        if isinstance(module, nn.Linear) and part == "language" and "expert" not in name
    ]
    family = family_of(model)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            chance = torch.Generator().manual_seed(1)
            nn.init.normal_(parameter, std=0.05, generator=chance)
        if family.part_of(name) == "projector":
            parameter.requires_grad_(True)
    return model


def differences(
    name: str, case: tuple[str, str, str, str], rows: list | None = None
) -> tuple[float, float, SharedPrefix]:
    """How far sharing is from the plain forward.

    Args:
        name: Name of the tiny model.
        case: Attention, adapter, side of the padding, and kind of checkpointing.
        rows: Rows of the batch; None for those of `rows_of`.

    Returns:
        The largest difference of a log-probability in nats, the relative error of the whole
        gradient, and the wrapper.
    """
    attention, adapter, side, checkpointing = case
    tiny = build(name, attention)
    batch, responses = batch_of(tiny, rows or rows_of(), side)
    model = (adapted(tiny.model) if adapter == "lora" else tiny.model).train()
    if checkpointing:
        reentrant = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
        model.enable_input_require_grads()
    plain, plain_gradients = measure(model, batch, responses)
    handle = share_prefix(model, strict=True, min_shared=4)
    shared, gradients = measure(model, batch, responses)
    handle.restore()
    assert plain.std() > 1 and gradients.keys() == plain_gradients.keys()
    one, other = (
        torch.cat([g.flatten() for g in x.values()]) for x in (plain_gradients, gradients)
    )
    return float((plain - shared).abs().max()), float((one - other).norm() / one.norm()), handle


def check(name: str, case: tuple[str, str, str, str]) -> None:
    logp, gradient, handle = differences(name, case)
    print(f"{name} {case}: log-probability {logp:.1e}, gradient {gradient:.1e}, {handle.stats}")
    assert handle.stats["shared"] == 1
    assert handle.stats["packed_tokens"] < 0.75 * handle.stats["rows_tokens"]
    assert logp < TOLERANCE and gradient < TOLERANCE


@pytest.mark.parametrize(("name", "case"), ONE_CASE_EACH, ids=SHARING)
def test_a_family_is_equal_to_the_plain_forward(name: str, case: tuple) -> None:
    check(name, case)


def test_the_default_cases_meet_every_choice() -> None:
    tried = [case for _, case in ONE_CASE_EACH]
    for dimension in range(4):
        assert {case[dimension] for case in tried} == {case[dimension] for case in CASES}


# --- does the comparison notice what is taken away? ---------------------------------------------

PLAIN_CASE = ("sdpa", "lora", "right", "")
NOTICED = 1e-3  # nats; what is right stays below 1e-5


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
def test_causal_masks_in_place_of_the_given_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextBatch, "given_mask", lambda *_: None)
    assert differences(name, PLAIN_CASE)[0] > NOTICED


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_cut_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The questions have one length, so that their image tokens see the same places."""
    rows = rows_of(other_question=9)
    logp, _, handle = differences(name, PLAIN_CASE, rows)
    whole = handle.stats["packed_tokens"]
    assert logp < TOLERANCE
    monkeypatch.setattr(prefix_batch, "close_blocks", lambda keys, reach: keys)
    logp, _, handle = differences(name, PLAIN_CASE, rows)
    assert logp > NOTICED and handle.stats["packed_tokens"] < whole


@pytest.mark.parametrize("name", ["llava_sliding"])
def test_no_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = prefix_attention._causal
    monkeypatch.setattr(
        prefix_attention, "_causal", lambda segment, window, *rest: causal(segment, None, *rest)
    )
    assert differences(name, PLAIN_CASE)[0] > NOTICED


@pytest.mark.parametrize("name", ["llava"])
def test_a_hash_that_is_always_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, because the embeddings themselves are compared; without that, it would show."""
    zeros = lambda values: torch.zeros(values.shape[:-1], dtype=torch.int64)  # noqa: E731
    monkeypatch.setattr(prefix_batch, "hash_rows", zeros)
    with pytest.raises(InputError, match="two different tokens have the same hash"):
        differences(name, PLAIN_CASE)
    monkeypatch.setattr(prefix_batch, "equal_rows", lambda *_: True)
    assert differences(name, PLAIN_CASE)[0] > NOTICED


# --- every case ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), EVERY_CASE, ids=lambda x: "-".join(x) if x else None)
def test_every_family_in_every_case(name: str, case: tuple) -> None:
    check(name, case)
