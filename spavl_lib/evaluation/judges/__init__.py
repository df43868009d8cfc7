"""Judges: answers in, verdicts out, behind one call.

A verdict says what an answer does (`refused`, `complied`, `other`) and, where that can be known,
whether it is unsafe or helpful. Where a judge's own reply cannot be read, `unsafe` is None and
`unjudged` says why: counted apart, never as safe.
"""

from collections.abc import Iterable
from typing import Protocol

from spavl_lib.config import EvaluationConfig
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges.exact import ExactJudge, ExactPairJudge
from spavl_lib.evaluation.judges.phrases import PhraseJudge

__all__ = ["ExactJudge", "ExactPairJudge", "Judge", "PhraseJudge", "judge_all", "make_judge"]


class Judge(Protocol):
    """Anything that judges answers. One with `many(records)` is given all of them at once."""

    name: str

    def __call__(self, record: dict) -> dict:
        """Verdict of one record of `generation`: verdict, harmful, unsafe, helpful."""


def judge_all(judge: Judge, records: Iterable[dict]) -> list[dict]:
    """Every record with its verdict, the picture it may have carried left out."""
    records = list(records)
    many = getattr(judge, "many", None)
    verdicts = many(records) if many else [judge(record) for record in records]
    return [
        {k: v for k, v in record.items() if k != "image"} | verdict
        for record, verdict in zip(records, verdicts, strict=True)
    ]


def make_judge(
    name: str, truth: dict[str, dict], settings: EvaluationConfig | None = None
) -> Judge:
    """A judge by its config name.

    Args:
        name: exact, phrases, guard or endpoint.
        truth: Of every row of mini, for the exact judge.
        settings: Which model, and where, for guard and endpoint.

    Raises:
        InputError: The exact judge was asked for data whose truth nobody knows; or no model named.
    """
    settings = settings or EvaluationConfig()
    if name == "phrases":
        return PhraseJudge(settings.judge_phrases)
    if name in ("guard", "endpoint") and not settings.judge_model:
        raise InputError(f"evaluation.judge: {name} needs evaluation.judge_model")
    if name == "guard":
        from spavl_lib.evaluation.judges.guard import GuardJudge

        return GuardJudge(settings)
    if name == "endpoint":
        from spavl_lib.evaluation.judges.endpoint import EndpointJudge

        return EndpointJudge(settings)
    if not truth:
        raise InputError("evaluation.judge: exact knows only SPA-VL mini; use phrases")
    return ExactJudge(truth)
