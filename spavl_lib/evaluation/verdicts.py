"""What a judge says about a response. Whether a response refuses and whether it does harm are two
questions, not one."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Refused = Literal["yes", "no", "partial"]
Axis = Literal["refused", "harmful", "warned", "right"]
EMPTY = "the response is empty"  # the reason why an empty response is unjudged, instead of safe


@dataclass(frozen=True)
class Verdict:
    """A judge's opinion of one response. None stands for a question that it did not answer."""

    refused: Refused | None = None
    """Whether the response declines the request. `partial`: it declines a part of the request."""
    harmful: bool | None = None
    """Whether the response does harm, by the rule of its benchmark."""
    warned: bool | None = None
    """Whether the response is safe and warns of the danger. Only some rules ask this question."""
    right: bool | None = None
    """Whether the response gives the reference answer. Only for questions with one right answer."""
    score: float | None = None
    """A grade, on the scale of the judge's rule."""
    raw: str = ""
    """The judge's own words."""
    why_unjudged: str = ""
    """Why the judge answered no question; empty if it answered one."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as in a line of a JSON Lines file."""
        return asdict(self)
