"""The model card, `model/README.md`, of a trained policy or reward model."""

import textwrap
from collections.abc import Sequence
from typing import Any

from spavl_lib.config import Config

# Names for readers of values that a trainer logs.
_RESULTS = {
    "pair_accuracy": "share of pairs ranked correctly",
    "eval_loss": "loss, nats per pair",
    "eval_rewards/chosen": "implicit reward of chosen responses",
    "eval_rewards/rejected": "implicit reward of rejected responses",
    "eval_rewards/accuracies": "share of pairs ranked correctly",
    "eval_rewards/margins": "margin, chosen minus rejected",
    "eval_logps/chosen": "log-probability of chosen responses, nats",
    "eval_logps/rejected": "log-probability of rejected responses, nats",
}


# Name of a model that is on no hub -> its words in a title, and the base model that a card names.
_OURS = {
    "embedded": ("the embedded demonstration model", "embedded"),
    "laptop": ("the model laptop", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


def policy_results(name: str, mean: dict, kl: float, per: str) -> dict[str, float]:
    """Collect the results for the model card of a policy trained against a reward model.

    Args:
        name: What the reward model's output is called: `score` or `reward`.
        mean: Means of the score or reward over the first and the last tenth of the steps, under
            `first_steps` and `last_steps`.
        kl: Mean KL divergence from the reference over the last tenth of the steps, in nats.
        per: Whether the KL divergence is one of a `response` or of a `token`.
    """
    return {
        f"mean {name}, first tenth of the steps": mean["first_steps"],
        f"mean {name}, last tenth": mean["last_steps"],
        f"KL to the reference, last tenth, nats per {per}": kl,
    }


def model_card(
    config: Config,
    stage: str,
    *,
    tags: Sequence[str],
    source: str,
    facts: Sequence[str],
    table: str,
    results: dict[str, Any],
    title: str = "",
    use: str = "it may still answer unsafely, or refuse harmless requests",
) -> str:
    """Write the model card of a stage.

    Args:
        config: Config of the run.
        stage: Stage that was trained, such as "dpo".
        tags: Hub tags that follow the tag of the stage.
        source: Words before the name of the data set, such as "prompts of ".
        facts: Sizes and settings, in the order in which the card lists them.
        table: Heading of the first column in the table of results.
        results: Name of each result -> its value.
        title: Words before the base model's name in the card's title. If empty, "aligned with" and
            the stage follow the name.
        use: A clause that warns the user of what the model may do.

    Returns:
        Markdown with the YAML front matter that the Hub reads.
    """
    model = config.model
    name, base = _OURS.get(model.name, (model.name, model.name))
    library = "library_name: peft\n" if model.with_lora else ""
    projector = "trained" if model.train_projector else "frozen"
    details = [*facts, f"seed {config.seed}", f"{model.adapter} fine-tuning"]
    details += [f"projector {projector}", "vision tower frozen"]
    text = textwrap.fill(
        f"Trained by `spavl train {stage} --profile {config.profile}` on "
        f"{source}`{config.data.source}`: {', '.join(details)}.",
        width=100, break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    rows = "\n".join(f"| {_RESULTS.get(key, key)} | {value} |" for key, value in results.items())
    heading = f"{title} {name}" if title else f"{name}, aligned with {stage.upper()}"
    return f"""---
base_model: {base}
{library}tags: [{", ".join((stage, *tags))}, safety, vision-language]
---

# {heading[:1].upper() + heading[1:]}

{text}

| {table} | value |
|---|---|
{rows}

A research artefact of a tutorial: {use}.
Use it under the licences of its base model and data.
"""
