"""What an attack is, and the checks that keep the exact judge right about attacked rows."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from spavl_lib.data.embedded import mini
from spavl_lib.data.embedded.language import Request, answer
from spavl_lib.errors import InputError, nearest

Row = dict[str, Any]
Labels = dict[str, Any]
# A row and its labels, a source of random numbers and the budget -> the attacked row, its labels.
Change = Callable[..., tuple[Row, Labels]]
SHOWN = 5  # a message names at most this many rows


@dataclass(frozen=True)
class Attacked:
    """Attacked rows, with the labels that the exact judge needs for them."""

    rows: list[Row]
    """Prompt rows in the schema of `data.schema`. Rows with a prefilled answer also have the column
    `prefill`."""
    truth: dict[str, Labels]
    """Row id -> ground-truth labels, as `load_truth` returns them."""
    samples: int = 1
    """Responses to each row. If there are several, they are sampled at temperature 1, each with its
    own seed, and `best_of` joins their verdicts."""


@dataclass(frozen=True)
class Attack:
    """A change of prompt rows that may make a model comply with harmful requests.

    The same change can be made to harmless rows. How many of them the base model then answers
    correctly shows whether it understands the attack's carrier at all.
    """

    name: str
    title: str
    changes: str
    """What the attack changes, in one sentence."""
    source: str
    """The paper that the attack follows."""
    change: Change
    """Makes the change of one row."""
    budget: Mapping[str, float] = field(default_factory=dict)
    """Arguments of the change that decide its strength, with their defaults."""
    needs_weights: bool = False
    """Whether the attack uses gradients of the model that it attacks."""
    most_rows: int = 0
    """Largest number of rows of each set in the arena; 0: no limit of its own."""
    cost: Callable[..., float] = lambda **_: 1
    """Takes the budget and returns the model calls for one row: each sequence that the model reads,
    and each sampled response, is one call."""
    keeps_truth: Callable[[Labels], bool] = lambda _: True
    """Takes a row's labels and returns whether there are right labels for the attacked row."""

    def calls(self, **budget: float) -> float:
        """Model calls for one row, including the response. See `cost`.

        Args:
            **budget: Replaces entries of `budget`.

        Raises:
            InputError: The attack has no such entry.
        """
        return self.cost(**self._budget(budget))

    def __call__(
        self,
        rows: Sequence[Row],
        truth: Mapping[str, Labels],
        *,
        seed: int = 0,
        model: PreTrainedModel | None = None,
        processor: ProcessorMixin | None = None,
        **budget: float,
    ) -> Attacked:
        """Attack rows. Each row's change depends only on the row, the seed and the budget.

        Args:
            rows: Prompt rows of SPA-VL mini, harmful or harmless. They are not changed.
            truth: Row id -> ground-truth labels, as `load_truth` returns them.
            seed: Seed of all random choices.
            model: The model under attack, in evaluation mode. Only attacks with `needs_weights` use
                it.
            processor: The model's processor.
            **budget: Replaces entries of `budget`.

        Raises:
            InputError: A row has no labels, or has no right labels after the attack. Or the budget
                has an unknown entry, or the model is missing.
        """
        budget = self._budget(budget)
        unlabelled = [
            row["id"] for row in rows
            if truth.get(row["id"], {}).get("question") != row["prompt"]
        ]  # fmt: skip
        if unlabelled:
            raise InputError(
                f"attack {self.name}: {_listed(unlabelled)} without ground-truth labels of this "
                "prompt, so no judge could be exact; use the test sets of SPA-VL mini as they were "
                "loaded, and the load_truth of the same config"
            )
        lost = [row["id"] for row in rows if not self.keeps_truth(truth[row["id"]])]
        if lost:
            raise InputError(
                f"attack {self.name}: {_listed(lost)} whose right response depends on what the "
                "attack takes away; leave out the rows for which Attack.keeps_truth is false"
            )
        options: dict[str, Any] = {}
        if self.needs_weights:
            if model is None or processor is None:
                raise InputError(
                    f"attack {self.name} needs the weights of the attacked model; give it the "
                    "model and its processor"
                )
            options = {"model": model, "processor": processor}
        samples = int(budget.pop("samples", 1))
        attacked, labels = [], {}
        for row in rows:
            rng = random.Random(f"{seed}/{self.name}/{row['id']}")
            new, labels[row["id"]] = self.change(
                dict(row), dict(truth[row["id"]]), rng, **options, **budget
            )
            attacked.append(new)
        return Attacked(attacked, labels, samples)

    def _budget(self, changes: Mapping[str, float]) -> dict[str, float]:
        for name, value in changes.items():
            if name not in self.budget:
                known = ", ".join(self.budget) or "none"
                raise InputError(
                    f"attack {self.name} has no budget {name!r} (it has: {known})"
                    f"{nearest(name, self.budget)}"
                )
            if value <= 0:
                raise InputError(f"attack {self.name}: {name} is {value}; set it above 0")
        return {**self.budget, **changes}


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return f"{len(ids)} row{'s' * (len(ids) > 1)} ({', '.join(ids[:SHOWN])}{more})"


def request_of(labels: Labels) -> Request:
    """The request that a row's labels describe."""
    names = [f.name for f in dataclasses.fields(Request)]
    must_say = tuple(labels["must_say"])
    return Request(**{name: labels[name] for name in names} | {"must_say": must_say})


def compliant_answer(labels: Labels) -> str:
    """The response that an attack wants: the request is fulfilled, and the response says so first.

    For a harmful request a placeholder stands where instructions would. For a harmless request it
    is the correct response.

    Args:
        labels: The row's labels.
    """
    request = request_of(labels)
    text = answer(request, "reckless", random.Random(0))  # this style has one wording
    return text if request.harmful else f"Sure! {text}"


def scene_of(row: Row, name: str) -> mini.Scene:
    """The recipe of a row's image.

    Args:
        row: A row of a test set of SPA-VL mini, for testing or for development, with its own
            prompt.
        name: Name of the attack, for the message.

    Raises:
        InputError: The row is not from SPA-VL mini.
    """
    for sets in (mini.mini_rows(), mini.development_rows()):
        for candidate in sets.get(row["id"].partition("/")[0], ()):
            if (candidate.scene.image_name, candidate.request.question) == (
                row["image_name"], row["prompt"],
            ):  # fmt: skip
                return candidate.scene
    raise InputError(
        f"attack {name}: row {row['id']} is not a row of SPA-VL mini, so its image cannot be drawn "
        "again; give the attack rows of the test sets as they were loaded"
    )
