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
from spavl_lib.modelling.families import FAMILIES, family_of
from spavl_lib.modelling.speed import prefix_attention, prefix_batch, shared_prefix
from spavl_lib.modelling.speed.prefix_batch import TextBatch
from spavl_lib.modelling.speed.shared_prefix import SharedPrefix, share_prefix
from tests.conftest import REPO
from tests.families.tiny import BUILDERS, IMAGE, REFUSED, batch_of, build, words

pytestmark = pytest.mark.filterwarnings("ignore")

SHARING = [name for name in BUILDERS if name not in REFUSED]
CASES = list(
    itertools.product(
        ("sdpa", "eager"), ("lora", "full"), ("right", "left"), ("", "non-reentrant", "reentrant")
    )
)
TOLERANCE = 1e-5  # nats, and the relative error of the whole gradient, in fp32
# Gemma 4 rounds more coarsely. In fp64 its log-probabilities differ by at most 4e-6 nats.
TOLERANCES = {"gemma4": 3e-5, "gemma4_causal": 3e-5}
ONE_CASE_EACH = [(name, CASES[7 * i % len(CASES)]) for i, name in enumerate(SHARING)]
EVERY_CASE = [
    (name, case) for name in SHARING for case in CASES if (name, case) not in ONE_CASE_EACH
]


# Images that a batch holds for each image of a row, if not one.
PIECES = {"internvl": 2, "idefics2": 2, "idefics3": 2, "smolvlm": 2}


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
    tolerance = TOLERANCES.get(name, TOLERANCE)
    assert logp < tolerance and gradient < tolerance


@pytest.mark.parametrize(("name", "case"), ONE_CASE_EACH, ids=SHARING)
def test_a_family_is_equal_to_the_plain_forward(name: str, case: tuple) -> None:
    check(name, case)


@pytest.mark.parametrize(("name", "case"), ONE_CASE_EACH, ids=SHARING)
def test_long_rows_without_a_common_prefix_are_packed(
    name: str, case: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        (0, words(1, 9), words(3, 8)), (1, words(2, 7), words(4, 6)), (2, words(8, 9), words(6, 12))
    ]  # fmt: skip
    assert differences(name, case, rows)[2].stats["shared"] == 0  # too short to be worth it
    monkeypatch.setattr(shared_prefix, "LONG_ROWS", 1)
    logp, gradient, handle = differences(name, case, rows)
    assert handle.stats["shared"] == 1
    assert handle.stats["packed_tokens"] == handle.stats["rows_tokens"]
    tolerance = TOLERANCES.get(name, TOLERANCE)
    assert logp < tolerance and gradient < tolerance


def test_the_default_cases_meet_every_choice() -> None:
    tried = [case for _, case in ONE_CASE_EACH]
    for dimension in range(4):
        assert {case[dimension] for case in tried} == {case[dimension] for case in CASES}


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3", "gemma3"])
def test_a_row_without_an_image(name: str) -> None:
    """Idefics fills such a row up with an image of zeros."""
    tiny = build(name)
    batch, responses = batch_of(tiny, rows_of(), "right")
    others, missing = batch_of(tiny, rows_of()[1:], "right")[0], batch["input_ids"][0] == IMAGE
    batch["input_ids"][0, missing] = torch.tensor(words(20, int(missing.sum())))
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in batch:
            batch[key][0] = 0
    for key in batch.keys() - {"input_ids", "attention_mask", tiny.types}:
        if name == "idefics3":
            batch[key][0] = 0
        else:
            batch[key] = others[key]
    with torch.no_grad():
        plain = token_logps(tiny.model, batch, responses)
        handle = share_prefix(tiny.model, strict=True, min_shared=4)
        shared = token_logps(tiny.model, batch, responses)
    assert (shared - plain).abs().max() < TOLERANCE
    assert handle.stats["shared"] == 1
    assert handle.vision.images_run == 3 * PIECES.get(name, 1)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_under_autocast(name: str) -> None:
    """Half precision rounds, but nothing else differs, and prefixes are shared."""
    tiny = build(name)
    batch, responses = batch_of(tiny, rows_of(), "left")
    with torch.no_grad():
        exact = token_logps(tiny.model, batch, responses)
        with torch.autocast("cpu", torch.bfloat16):
            plain = token_logps(tiny.model, batch, responses)
            handle = share_prefix(tiny.model, strict=True, min_shared=4)
            shared = token_logps(tiny.model, batch, responses)
    assert handle.stats["shared"] == 1
    assert (shared - exact).norm() < 1.5 * (plain - exact).norm() < 0.1 * exact.norm()


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


@pytest.mark.parametrize("name", ["llava_sliding", "qwen2_5_vl_sliding"])
def test_no_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = prefix_attention._causal
    monkeypatch.setattr(
        prefix_attention, "_causal", lambda segment, window, *rest: causal(segment, None, *rest)
    )
    assert differences(name, PLAIN_CASE)[0] > NOTICED


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_features_of_deeper_layers_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = TextBatch.packed

    def without(*args: object) -> dict:
        arguments = packed(*args)
        deep = "deepstack_visual_embeds"
        return arguments | {deep: [torch.zeros_like(x) for x in arguments[deep]]}

    monkeypatch.setattr(TextBatch, "packed", without)
    assert differences(name, PLAIN_CASE)[0] > NOTICED


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_hash_that_is_always_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, because the embeddings themselves are compared; without that, it would show."""
    zeros = lambda values: torch.zeros(values.shape[:-1], dtype=torch.int64)  # noqa: E731
    monkeypatch.setattr(prefix_batch, "hash_rows", zeros)
    with pytest.raises(InputError, match="two different tokens have the same hash"):
        differences(name, PLAIN_CASE)
    monkeypatch.setattr(prefix_batch, "equal_rows", lambda *_: True)
    assert differences(name, PLAIN_CASE)[0] > NOTICED


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARING)
def test_an_image_passes_the_tower_once(name: str) -> None:
    """Not once for each row, and not again for the reference, which gets the same tensor."""
    tiny = build(name)
    batch, responses = batch_of(tiny, rows_of(), "right")
    model = adapted(tiny.model).train()
    handle = share_prefix(model, strict=True, min_shared=4)
    pieces = 3 * PIECES.get(name, 1)

    def logps() -> Tensor:
        logits = model(**batch, use_cache=False).logits
        return logits[:, :-1].log_softmax(-1)[responses[:, 1:].bool()]

    first = logps()
    assert handle.vision.images_run == pieces
    first.square().mean().backward()
    with torch.no_grad():
        assert torch.equal(logps(), first)
        assert handle.vision.images_run == pieces
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
        moved = logps()
        assert handle.vision.images_run == pieces, "the tower is still the same"
        for parameter in handle.vision.tower.parameters():
            parameter.mul_(1.0 + (parameter.ndim > 1))
        changed = logps()
    assert handle.vision.images_run == 2 * pieces
    handle.restore()
    with torch.no_grad():
        assert (changed - logps()).abs().max() < NOTICED / 5  # larger weights, larger rounding
    assert min((moved - first).abs().max(), (changed - moved).abs().max()) > NOTICED


# --- generation ---------------------------------------------------------------------------------

# Gemma 4 cuts hidden states inside its text model, so that its prompts are computed in full.
PLAIN_PREFILL = ("gemma4", "gemma4_causal")
GENERATING = [name for name in SHARING if name != "paligemma2"]  # its "sdpa" case needs eager
BY_DEFAULT = ("llava_sliding", "qwen3_vl", "gemma3", "idefics3", "internvl", "gemma4")


@pytest.mark.parametrize(
    "name",
    [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in GENERATING],
)
def test_generation_says_the_same(name: str) -> None:
    tiny = build(name)
    model = tiny.model.eval()
    rows = [(image, question, []) for image, question, _ in rows_of()]
    batch, _ = batch_of(tiny, rows, "left")
    options = {
        "max_new_tokens": 6, "do_sample": False, "output_logits": True, "pad_token_id": 0,
        "eos_token_id": None, "return_dict_in_generate": True,
    }  # fmt: skip

    def generate() -> tuple[Tensor, Tensor]:
        out = model.generate(**{k: v.clone() for k, v in batch.items()}, **options)
        return out.sequences, torch.stack(out.logits)

    plain, plain_logits = generate()
    handle = share_prefix(model, min_shared=4)
    shared, logits = generate()
    assert torch.equal(shared, plain)
    assert (logits - plain_logits).abs().max() < TOLERANCE
    assert handle.stats["shared"] == (name not in PLAIN_PREFILL)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [("qwen3_5", "layers of kind linear_attention keep one state"), ("mllama", "cross attention")],
)
def test_families_that_cannot_share_say_why(name: str, said: str) -> None:
    model = build(name).model
    before = vars(model.model).keys() | {model.config.get_text_config()._attn_implementation}
    with pytest.warns(UserWarning, match=f"prefixes are not shared: .*{said}"):
        assert share_prefix(model) is None
    with pytest.raises(InputError, match=f"model.share_prefix = require, but .*{said}"):
        share_prefix(model, strict=True)
    after = vars(model.model).keys() | {model.config.get_text_config()._attn_implementation}
    assert after == before


def test_a_family_or_text_model_without_a_test_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("internvl").model
    monkeypatch.setattr(shared_prefix, "TEXT_MODELS", ("llama",))
    with pytest.raises(InputError, match="no test has shown that the text model qwen2 gives equal"):
        share_prefix(model, strict=True)
    monkeypatch.delitem(FAMILIES.known, "internvl")
    with pytest.raises(InputError, match="no test has shown that internvl gives equal"):
        share_prefix(model, strict=True)


def test_flash_attention_is_refused_once() -> None:
    model = build("qwen2_5_vl").model
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.warns(UserWarning, match="flash_attention_2") as caught:
        assert share_prefix(model) is None
    assert len(caught) == 1 and "forward" not in vars(model.model.language_model)


ARGUMENTS = (
    ("qwen3_vl_moe", {"output_router_logits": True}, "output_router_logits is set"),
    ("gemma4_causal", {"logits_to_keep": 3}, "logits_to_keep is given"),
    ("llava", {"position_bias": torch.zeros(1)}, "position_bias is given"),
    ("llava", {"input_ids": torch.zeros(2, 9, dtype=torch.long), "inputs_embeds": None},
     "token ids instead of embeddings"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "said"), ARGUMENTS, ids=lambda x: str(x)[:20])
def test_arguments_that_cannot_be_packed(name: str, arguments: dict, said: str) -> None:
    """The text model's own forward would run, so that `strict` is what shows the reason."""
    model = build(name).model
    handle = share_prefix(model, strict=True)
    handle.ids = torch.zeros(2, 9, dtype=torch.long)
    with pytest.raises(InputError, match=said):
        handle.text(**{"inputs_embeds": torch.randn(2, 9, 64)} | arguments)


def test_embeddings_without_ids_are_refused() -> None:
    model = build("llava").model
    share_prefix(model, strict=True)
    with pytest.raises(InputError, match="embeddings instead of token ids"):
        model(inputs_embeds=torch.randn(2, 9, 64))


def test_no_mask_is_not_always_causal() -> None:
    """PaliGemma's layers see the future if no mask is given."""
    tiny = build("paligemma")
    batch, _ = batch_of(tiny, rows_of()[:1] * 2, "right")
    share_prefix(tiny.model, strict=True)
    with torch.no_grad(), pytest.raises(InputError, match="not causal by itself"):
        tiny.model(**{k: v for k, v in batch.items() if k != "token_type_ids"}, use_cache=False)


# --- the page -----------------------------------------------------------------------------------


def test_the_docs_list_the_families_that_share() -> None:
    page = (REPO / "docs/families.md").read_text(encoding="utf-8")
    listed = page.partition("## Shared prefixes")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in listed.splitlines() if line.startswith("| ")][1:]
    named = [name.strip(" `") for row in rows for name in row.split(",")]
    sharing = [name for name, family in FAMILIES.known.items() if family.shares_prefixes]
    assert sorted(named) == sorted(sharing)
    tried = {build(name).model.config.model_type for name in SHARING}
    assert tried == set(sharing)


# --- every case ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), EVERY_CASE, ids=str)
def test_every_family_in_every_case(name: str, case: tuple) -> None:
    check(name, case)
