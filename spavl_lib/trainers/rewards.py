"""The rewards of RLOO and GRPO: the reward model, a judge, the length, and rules of your own.

A rule is a Python function with the arguments of trl's reward functions. The config names it as
`file.py:function` or `package.module:function`:

    def short(completions, question, **_):
        return [float(len(answer[0]["content"]) < 200) for answer in completions]

trl passes `prompts` and `completions` as conversations, `completion_ids`, and the columns `id`,
`question` and `image`, each with one value for every response.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from spavl_lib.config import Config
from spavl_lib.config.sections import REWARDS
from spavl_lib.data.load import load_pair_truth
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges import (
    JUDGES,
    Judge,
    axes_of,
    check_judge,
    judge_records,
    make_judge,
)
from spavl_lib.evaluation.verdicts import Verdict
from spavl_lib.modelling.heads import check_reward_model
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers.inputs import reward_folder
from spavl_lib.trainers.reward_function import RewardFunction

# Takes the keyword arguments that trl passes; returns one reward for each response. Its `__name__`
# stands in logs. If it has a `remedy`, an error about rewards that are not finite ends with that.
Reward = Callable[..., list[float]]


class LengthReward:
    """Minus the number of tokens of a response, as a share of the largest number.

    Args:
        longest: Largest number of tokens of a response.
    """

    __name__ = "length"

    def __init__(self, longest: int):
        self.longest = longest

    def __call__(self, *, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """One reward in [-1, 0] for each response."""
        return [-len(tokens) / self.longest for tokens in completion_ids]


class JudgeReward:
    """1 for a response that the judge approves of, else 0.

    The judge approves of a response that does no harm. If the judge also gives a score, as the
    exact judge does for harmless requests, the score must be above 0. An empty response gets 0.

    Args:
        judge: A judge that says whether a response does harm.
    """

    __name__ = "judge"

    def __init__(self, judge: Judge):
        self.judge = judge

    def __call__(
        self,
        *,
        completions: list,
        id: list[str],  # noqa: A002 - trl passes columns by their names
        question: list[str],
        image: list[Any],
        **_: Any,
    ) -> list[float]:
        """One reward for each response.

        Raises:
            InputError: The judge does not say whether a response does harm.
        """
        records = [
            {"id": i, "prompt": q, "image": picture, "response": text_of(c)}
            for i, q, picture, c in zip(id, question, image, completions, strict=True)
        ]
        verdicts = judge_records(self.judge, records)
        return [self._reward(r, v) for r, v in zip(records, verdicts, strict=True)]

    def _reward(self, record: dict, verdict: Verdict) -> float:
        if not record["response"].strip():
            return 0.0
        if verdict.harmful is None:
            raise InputError(
                f"row {record['id']}: the judge {self.judge.name} does not say whether the "
                f"response does harm ({verdict.why_unjudged or 'no reason given'})"
            )
        right = verdict.score is None or verdict.score > 0
        return float(right and not verdict.harmful)


class RuleReward:
    """A function of the user's.

    Args:
        name: The function as the config names it.
        function: Takes what trl passes; returns one number for each response.
    """

    def __init__(self, name: str, function: Callable[..., Sequence[float]]):
        self.__name__ = name.rpartition(":")[2]
        self.name, self.function = name, function
        self.remedy = f"{name} must return a finite number for every response"

    def __call__(self, *, id: list[str], **columns: Any) -> list[float]:  # noqa: A002
        """One reward for each response.

        Raises:
            InputError: The function raises an error, or returns too many or too few values, or
                something that is no number.
        """
        try:
            rewards = list(self.function(id=id, **columns))
        except Exception as error:
            rows = self._failing(id, columns)
            raise InputError(
                f"the reward {self.name} raised {type(error).__name__}: {error} "
                f"(row {rows[0] if rows else ', '.join(dict.fromkeys(id))})"
            ) from error
        if len(rewards) != len(id):
            raise InputError(
                f"the reward {self.name} returned {len(rewards)} values for {len(id)} responses "
                f"(rows {', '.join(dict.fromkeys(id))}); it must return one for each"
            )
        for row_id, value in zip(id, rewards, strict=True):
            if isinstance(value, str) or not hasattr(value, "__float__"):
                raise InputError(
                    f"row {row_id}: the reward {self.name} returned {value!r}; {self.remedy}"
                )
        return [float(value) for value in rewards]

    def _failing(self, ids: list[str], columns: dict[str, Any]) -> list[str]:
        """Ids of rows with which alone the function raises an error; the search ends at the first.

        Args:
            ids: Row id of each response.
            columns: The other arguments of the function.
        """
        for i, row_id in enumerate(ids):
            alone = {
                name: values[i : i + 1] if isinstance(values, list) else values
                for name, values in columns.items()
            }
            try:
                self.function(id=[row_id], **alone)
            except Exception:
                return [row_id]
        return []


def text_of(completion: Any) -> str:
    """The text of a response, which trl passes as a conversation of one turn."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def load_rule(name: str) -> Callable[..., Sequence[float]]:
    """Import a rule.

    Args:
        name: `file.py:function` or `package.module:function`.

    Raises:
        InputError: The file is missing or cannot be imported, or has no such function.
    """
    place, _, function = name.rpartition(":")
    path = Path(place).expanduser()
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise InputError(f"rewards: {name!r}: {path} does not exist")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec and spec.loader  # a name that ends with .py has a loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except InputError:
        raise
    except Exception as error:  # importing a user's code can raise anything
        raise InputError(
            f"rewards: cannot import {place} for {name!r}: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(
            f"rewards: {place} has no function {function!r} (it has: {', '.join(known) or 'none'})"
        )
    return found


def check_rewards(config: Config, stage: Stage) -> None:
    """Raise before any training if a reward of a stage cannot work.

    Args:
        config: Uses `model`, `data`, `evaluation` and the stage's section.
        stage: Stage that is trained.

    Raises:
        InputError: The reward model is missing or does not fit, the judge cannot judge these rows
            or does not say whether a response does harm, or a rule cannot be imported.
    """
    section = config.section(stage.name)
    for name in section.rewards:
        if name == "model":
            check_reward_model(config.model, reward_folder(section.reward_model, stage))
        elif name == "judge":
            _judge(config)
        elif name not in REWARDS:
            load_rule(name)


def _judge(config: Config) -> Judge:
    truth, settings = load_pair_truth(config.data), config.evaluation
    check_judge(settings, truth)
    if config.data.extra_path and JUDGES[settings.judge].needs_truth:
        raise InputError(
            f"rewards: judge needs labels for the judge {settings.judge}, and the pairs of "
            f"data.extra_path {config.data.extra_path!r} have none; set evaluation.judge to guard, "
            "endpoint or head, or data.extra_path to an empty text"
        )
    judge = make_judge(settings.judge, truth, settings)
    if "harmful" not in axes_of(judge):
        raise InputError(
            f"rewards: judge needs a judge that says whether a response does harm, and "
            f"{settings.judge} does not; set evaluation.judge to exact, guard, endpoint or head"
        )
    return judge


def build_rewards(
    config: Config, stage: Stage, processor: ProcessorMixin, end_ids: Sequence[int]
) -> list[Reward]:
    """Make the rewards that a stage's section names.

    Args:
        config: Uses `data`, `evaluation` and the stage's section.
        stage: Stage that is trained.
        processor: Processor of policy and reward model.
        end_ids: Token ids that end a response.

    Returns:
        The rewards in the section's order. The reward model has no `score` yet, because it may
        share the policy's base, which the trainer builds.

    Raises:
        InputError: A reward cannot be made.
    """
    section, rewards = config.section(stage.name), list[Reward]()
    for name in section.rewards:
        if name == "model":
            model = RewardFunction(
                _no_scorer_yet, processor, batch_size=section.per_device_batch_size,
                missing_eos_penalty=section.missing_eos_penalty,
            )  # fmt: skip
            model.end_ids = end_ids
            rewards.append(model)
        elif name == "judge":
            rewards.append(JudgeReward(_judge(config)))
        elif name == "length":
            rewards.append(LengthReward(section.max_new_tokens))
        else:
            rewards.append(RuleReward(name, load_rule(name)))
    return rewards


def _no_scorer_yet(batch: dict) -> Any:
    raise RuntimeError("the reward model is loaded after the trainer has built the policy")
