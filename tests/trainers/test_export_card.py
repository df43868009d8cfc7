"""The model card of a training: a title that can be read, and names instead of keys."""

from spavl_lib.config import load_config
from spavl_lib.trainers.export_card import model_card
from tests.helpers import smoke


def card(stage: str, results: dict, **options: str) -> str:
    return model_card(
        smoke(), stage, tags=(), source="", facts=["9 pairs"], table="held-out pairs",
        results=results, **options,
    )  # fmt: skip


def test_the_title_is_a_phrase() -> None:
    assert "\n# The embedded demonstration model, aligned with DPO\n" in card("dpo", {})
    reward = card("reward", {}, title="Reward model over")
    assert "\n# Reward model over the embedded demonstration model\n" in reward


def test_a_card_over_the_laptop_names_a_base_that_the_hub_knows() -> None:
    config = load_config("laptop")
    text = model_card(
        config, "dpo", tags=(), source="", facts=[], table="held-out pairs", results={}
    )
    assert "\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in text
    assert "\n# The model laptop, aligned with DPO\n" in text


def test_results_have_names() -> None:
    text = card("dpo", {"eval_rewards/accuracies": 0.9, "mean score": 2.5})
    assert "| share of pairs ranked correctly | 0.9 |" in text and "| mean score | 2.5 |" in text
    assert "eval_" not in text
