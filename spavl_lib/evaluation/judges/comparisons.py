"""Grades and comparisons by a model behind an endpoint.

The SPA-VL paper (arXiv 2406.12030, appendix F) judges not only whether an answer is safe. A model
also grades an answer from 1 to 10, or says which of two answers is better. The judges here ask the
paper's questions, with prompts of our own.
"""

from spavl_lib.evaluation.judges import rubric
from spavl_lib.evaluation.judges.endpoint import Client, EndpointJudge, Unanswered, with_image
from spavl_lib.evaluation.verdicts import Axis, Verdict

BETTER = ("first", "second", "tie", "neither")


class EndpointGradeJudge(EndpointJudge):
    """Grades responses from 1 to 10, with the model behind an endpoint. The grade is the verdict's
    `score`; the verdict answers no other question."""

    axes: tuple[Axis, ...] = ()
    scale = (1, 10)
    form = "grade"
    follows_rules = False
    canaries = False  # no right grade is known for the canaries

    def messages(self, record: dict) -> list[dict]:
        """The turns that ask for a grade of one record. They hold the record's `reference`, if it
        has one."""
        return rubric.grade_messages(
            record["prompt"], record["response"], record.get("reference", "")
        )

    def read(self, record: dict, reply: str) -> Verdict:
        """The grade in a reply.

        Args:
            record: The record that was graded.
            reply: The model's text.
        """
        grade = rubric.read_value(reply, "grade")
        is_grade = isinstance(grade, int) and not isinstance(grade, bool)
        text = str(grade) if is_grade else grade
        if text not in rubric.GRADES:
            return rubric.unread(reply)
        return Verdict(score=float(text), raw=reply)


class EndpointPairJudge:
    """Says which of two responses is better, with the model behind an endpoint."""

    def __init__(self, client: Client, needs_images: bool = False):
        self.client, self.needs_images = client, needs_images
        self.name = f"endpoint-pairs:{client.model}"

    def __call__(
        self, record: dict, first: str, second: str, rule: str = "preferred"
    ) -> str | None:
        """Compare two responses to one prompt.

        Args:
            record: Holds the `prompt`, and the `image` if it has one.
            first: One response.
            second: The other response.
            rule: Key of `rubric.PAIR_RULES`. The rule says which response is better.

        Returns:
            `first`, `second` or `tie`. The rule `helpful` also allows `neither`: the responses are
            not both harmless. None if there is no reply, or if the reply holds no such word.
        """
        messages = rubric.pair_messages(record["prompt"], first, second, rule)
        if self.needs_images:
            messages = with_image(messages, record)
        try:
            reply = self.client(messages)
        except Unanswered:
            return None
        return rubric.read_verdict(reply, "better", BETTER if rule == "helpful" else BETTER[:3])
