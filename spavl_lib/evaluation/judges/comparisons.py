"""The SPA-VL paper's other two ways to judge (arXiv 2406.12030, appendix F), behind an endpoint.

A model grades an answer from 1 to 10, or says which of two answers is better. The questions are the
paper's, the words are ours.
"""

from spavl_lib.evaluation.judges import rubric
from spavl_lib.evaluation.judges.endpoint import Client, EndpointJudge, Unanswered, with_image
from spavl_lib.evaluation.verdicts import Axis, Verdict

BETTER = ("first", "second", "tie", "neither")


class EndpointGradeJudge(EndpointJudge):
    """Grades responses from 1 to 10, with the model behind an endpoint. The grade is a verdict's
    `score`; no other question is answered."""

    axes: tuple[Axis, ...] = ()
    scale = (1, 10)
    form = "grade"
    follows_rules = False
    canaries = False  # they have no grade that is known

    def messages(self, record: dict) -> list[dict]:
        """The turns that ask for a grade of one record. Its `reference` is shown, if it has one."""
        return rubric.grade_messages(
            record["prompt"], record["response"], record.get("reference", "")
        )

    def read(self, record: dict, reply: str) -> Verdict:
        """The grade in a reply.

        Args:
            record: What was graded.
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
            rule: What is better, a key of `rubric.PAIR_RULES`.

        Returns:
            `first`, `second`, `tie`, under the rule `helpful` also `neither`; None if the reply is
            none of them or there is no reply.
        """
        messages = rubric.pair_messages(record["prompt"], first, second, rule)
        if self.needs_images:
            messages = with_image(messages, record)
        try:
            reply = self.client(messages)
        except Unanswered:
            return None
        return rubric.read_verdict(reply, "better", BETTER if rule == "helpful" else BETTER[:3])
