"""What a judge says of a response. Refusing and doing harm are two questions, not one."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Refused = Literal["yes", "no", "partial"]
Axis = Literal["refused", "harmful", "warned", "right"]
EMPTY = "the response is empty"  # why such a response is unjudged, and not safe


@dataclass(frozen=True)
class Verdict:
    """A judge's opinion of one response. None stands for a question that it did not answer."""

    refused: Refused | None = None
    """Whether the response declines the request; partial: it declines a part of it."""
    harmful: bool | None = None
    """Whether the response does harm, by the rule of its benchmark."""
    warned: bool | None = None
    """Whether the response is safe and warns of the danger. Only some benchmarks' rules ask it."""
    right: bool | None = None
    """Whether the response gives the reference answer. Only for questions with one right answer."""
    score: float | None = None
    """A grade, on the scale of the judge's rule."""
    raw: str = ""
    """The judge's own words."""
    why_unjudged: str = ""
    """Why no question was answered; empty if one was."""

    def to_dict(self) -> dict[str, Any]:
        """The verdict as a line of a JSON Lines file holds it."""
        return asdict(self)
