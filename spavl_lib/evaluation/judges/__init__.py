"""Judges: a judge takes records with a response and returns a verdict for each.

A verdict says what the response does (`refused`, `complied`, `other`) and, if the judge can tell,
whether the response is unsafe or helpful. If the reply of a judge model cannot be read, `unsafe` or
`helpful` is None and `unjudged` holds the reply. Such a row is counted separately, never as safe.

To add a judge, decorate a function that makes the judge, and set `evaluation.judge=words`:

    @register_judge("words")
    def make(settings: EvaluationConfig, truth: dict[str, dict]) -> Judge: ...

If the function is in a separate package, the pyproject.toml of this package names it as an entry
point: `words = "package.module:make"` below `[project.entry-points."spavl.judges"]`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spavl_lib.config import EvaluationConfig
from spavl_lib.config.registry import entry_points
from spavl_lib.errors import InputError, nearest
from spavl_lib.evaluation.judges.exact import ExactJudge, ExactPairJudge
from spavl_lib.evaluation.judges.phrases import PhraseJudge

__all__ = [
    "JUDGES", "ExactJudge", "ExactPairJudge", "Judge", "PhraseJudge", "check_judge", "judge_all",
    "judge_names", "make_judge", "register_judge",
]  # fmt: skip
ENTRY_POINTS = "spavl.judges"
VERDICT_KEYS = {"verdict", "harmful", "unsafe", "helpful"}


class Judge(Protocol):
    """Anything that judges responses. A judge with a method `many` gets all records at once."""

    name: str
    """The judge's name in metrics.json, including its model and version."""

    def __call__(self, record: dict) -> dict:
        """The verdict of one record: `verdict`, `harmful`, `unsafe` and `helpful`."""


Factory = Callable[[EvaluationConfig, dict[str, dict]], Judge]


@dataclass(frozen=True)
class JudgeSpec:
    """How to make a judge, and what the judge needs."""

    factory: Factory
    """Takes the settings and the ground-truth labels (row id -> facts), and returns the judge."""
    needs: tuple[str, ...] = ()
    """Settings of `evaluation` that must not be empty."""
    needs_truth: bool = False
    """Whether the judge works only for rows that have ground-truth labels."""
    check: Callable[[EvaluationConfig], object] | None = None
    """Raises `InputError` for settings that cannot work, and loads nothing large."""


JUDGES: dict[str, JudgeSpec] = {}


def register_judge(
    name: str,
    *,
    needs: Iterable[str] = (),
    needs_truth: bool = False,
    check: Callable[[EvaluationConfig], object] | None = None,
) -> Callable[[Factory], Factory]:
    """Register the decorated function as the factory of a judge.

    Args:
        name: Value of `evaluation.judge` that chooses this judge.
        needs: Settings of `evaluation` that must not be empty, such as `judge_model`.
        needs_truth: Whether the judge works only for rows that have ground-truth labels.
        check: Called with the settings before anything is trained; raises `InputError` if they
            cannot work.

    Raises:
        InputError: Another factory has this name.
    """

    def decorate(factory: Factory) -> Factory:
        known = JUDGES.get(name)
        # The same function may be registered again, for example if a notebook cell is run twice.
        if known and _path_of(known.factory) != _path_of(factory):
            raise InputError(f"judge {name!r} exists already; give the new judge another name")
        JUDGES[name] = JudgeSpec(factory, tuple(needs), needs_truth, check)
        return factory

    return decorate


def _path_of(factory: Factory) -> tuple[str, str]:
    return factory.__module__, factory.__qualname__


@register_judge("exact", needs_truth=True)
def _exact(settings: EvaluationConfig, truth: dict[str, dict]) -> Judge:
    return ExactJudge(truth)


@register_judge("phrases")
def _phrases(settings: EvaluationConfig, truth: dict[str, dict]) -> Judge:
    return PhraseJudge(settings.judge_phrases)


def _check_guard(settings: EvaluationConfig) -> None:
    path = settings.judge_model
    if path.startswith(("/", "./", "../", "~")) and not Path(path).is_dir():
        raise InputError(f"evaluation.judge_model {path!r}: no such folder")


def _check_endpoint(settings: EvaluationConfig) -> object:
    from spavl_lib.evaluation.judges.endpoint import Client

    return Client(settings.judge_url, settings.judge_model)


@register_judge("guard", needs=["judge_model"], check=_check_guard)
def _guard(settings: EvaluationConfig, truth: dict[str, dict]) -> Judge:
    from spavl_lib.evaluation.judges.guard import GuardJudge

    return GuardJudge(settings)


@register_judge("endpoint", needs=["judge_model", "judge_url"], check=_check_endpoint)
def _endpoint(settings: EvaluationConfig, truth: dict[str, dict]) -> Judge:
    from spavl_lib.evaluation.judges.endpoint import EndpointJudge

    return EndpointJudge(settings)


def judge_names() -> list[str]:
    """Names of all judges, those of other packages included."""
    return sorted({*JUDGES, *entry_points(ENTRY_POINTS)})


def _find(name: str) -> JudgeSpec:
    entry = entry_points(ENTRY_POINTS).get(name)
    if name not in JUDGES and entry:
        try:
            factory = entry.load()
        except Exception as error:
            raise InputError(
                f"evaluation.judge: cannot load judge {name!r} from {entry.value}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if name not in JUDGES:  # a decorated function has registered itself
            register_judge(name)(factory)
    if name not in JUDGES:
        known = judge_names()
        raise InputError(
            f"evaluation.judge: unknown judge {name!r}{nearest(name, known)} "
            f"(known: {', '.join(known)})"
        )
    return JUDGES[name]


def check_judge(settings: EvaluationConfig, truth: Mapping | None = None) -> None:
    """Check before any training that the configured judge exists and has what it needs.

    Args:
        settings: The config's section `evaluation`.
        truth: Ground-truth labels, as row id -> facts; empty if the data have none. None skips the
            check that a judge gets the labels it needs.

    Raises:
        InputError: The judge is unknown, or a setting or the labels that it needs are missing.
    """
    _checked(settings.judge, settings, truth)


def _checked(name: str, settings: EvaluationConfig, truth: Mapping | None) -> JudgeSpec:
    spec = _find(name)
    for field in spec.needs:
        if not getattr(settings, field):
            raise InputError(f"evaluation.judge: {name} needs evaluation.{field}")
    if spec.needs_truth and truth is not None and not truth:
        raise InputError(
            f"evaluation.judge: {name} knows only SPA-VL mini; use phrases, guard or endpoint"
        )
    if spec.check:
        spec.check(settings)
    return spec


def make_judge(
    name: str, truth: dict[str, dict], settings: EvaluationConfig | None = None
) -> Judge:
    """Make the judge of a name.

    Args:
        name: Name of a registered judge, such as exact, phrases, guard or endpoint.
        truth: Ground-truth labels, as row id -> facts; empty if the data have none.
        settings: The config's section `evaluation`; None uses the defaults.

    Raises:
        InputError: As in `check_judge`, or the judge cannot be made.
    """
    settings = settings or EvaluationConfig()
    judge = _checked(name, settings, truth).factory(settings, truth)
    if not isinstance(getattr(judge, "name", None), str):
        raise InputError(f"judge {name!r} has no `name`; metrics.json needs one")
    return judge


def judge_all(judge: Judge, records: Iterable[dict]) -> list[dict]:
    """Every record with its verdict, and without its image.

    Raises:
        InputError: A verdict lacks one of its keys.
    """
    records = list(records)
    many = getattr(judge, "many", None)
    verdicts = many(records) if many else [judge(record) for record in records]
    for verdict in verdicts:
        if missing := VERDICT_KEYS - verdict.keys():
            raise InputError(f"{judge}: a verdict lacks {', '.join(sorted(missing))}")
    return [
        {k: v for k, v in record.items() if k != "image"} | verdict
        for record, verdict in zip(records, verdicts, strict=True)
    ]
