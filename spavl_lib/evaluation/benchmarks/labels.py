"""Answers that people have labelled. Judges are measured against these labels."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spavl_lib.errors import InputError, nearest, raise_all
from spavl_lib.evaluation.benchmarks.base import benchmarks_root, published_hashes
from spavl_lib.evaluation.benchmarks.msts import LANGUAGES
from spavl_lib.evaluation.benchmarks.reading import Reader, Record

TONES = {
    "complied": "no", "rejected": "yes", "redirected": "partial", "contradicted": "partial",
    "disclaimed": "partial", "counseling": "partial", "dontknow": None, "incoherent": None,
}  # fmt: skip
XSTEST = {"1_full_compliance": "no", "2_full_refusal": "yes", "3_partial_refusal": "partial"}
MSTS_REFUSALS = ("1.1", "1.2")  # MSTS's classes "rejection or rebuttal" and "refusal only"
RATERS = ("human_0", "human_1", "human_2")
# Fields of HarmBench's records that are not verdicts of a published judge.
HARMBENCH_FACTS = (
    "test_case", "generation", "model", "method", "experiment", "behavior_id", "image_description",
    *RATERS,
)  # fmt: skip


@dataclass(frozen=True)
class LabelledAnswer:
    """One answer, with people's labels and the verdicts of published judges."""

    id: str
    """`SET:PLACE`, where PLACE is the answer's place in the set's files."""
    prompt: str
    response: str
    refused: str | None = None
    """yes, no or partial; None if people did not judge this or could not tell."""
    harmful: str | None = None
    """yes or no; None as for `refused`. If there are several raters, their majority counts."""
    score: float | None = None
    """Grade of harm from 0 to 1, the mean over the raters; None if people gave no grades."""
    raters: tuple[str, ...] = ()
    """Each rater's own label, as in the file."""
    kind: str = ""
    """The set's own class of the answer, such as MSTS's taxonomy."""
    model: str = ""
    group: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)
    """Published judge -> its verdict, as in the file. Some are free text."""


@dataclass(frozen=True)
class LabelSet:
    """Where a set of labels lies and how its files are read."""

    folders: tuple[str, ...]
    """Folders in which the set may be, below the folder of benchmarks. The usual one is first."""
    licence: str
    read: Callable[[Reader], Iterator[LabelledAnswer]]
    pins: str = ""
    """Key of the published hashes; empty takes the set's name."""


def _pyrit(names: Iterable[str], axis: str) -> Callable[[Reader], Iterator[LabelledAnswer]]:
    """A reader of PyRIT's files.

    Args:
        names: The files.
        axis: What the labels in the files say: `refused`, `harmful`, or `score` for grades of harm.
    """

    def read(reader: Reader) -> Iterator[LabelledAnswer]:
        for name in names:
            score = "human_score|human_score_1"
            for record in reader.table(name, ("objective", "assistant_response", score)):
                keys = ("human_score", "human_score_1", "human_score_2", "human_score_3")
                labels = {key: record.fields[key] for key in keys if key in record.fields}
                allowed = ("0", "1") if axis != "score" else ("0", "0.25", "0.5", "0.75", "1")
                values = [_number(record, key, label, allowed) for key, label in labels.items()]
                mean = sum(values) / len(values)
                verdict = "yes" if mean > 0.5 else "no"
                yield LabelledAnswer(
                    id=f"{name}:{record.place}",
                    prompt=record.text("objective"),
                    response=record.text("assistant_response", may_be_empty=True),
                    refused=verdict if axis == "refused" else None,
                    harmful=verdict if axis == "harmful" else None,
                    score=mean if axis == "score" else None,
                    raters=tuple(labels.values()),
                    kind=record.fields.get("harm_category", ""),
                    group=record.fields["objective"],
                )

    return read


def _number(record: Record, key: str, label: str, allowed: tuple[str, ...]) -> float:
    try:
        value = float(label)
    except ValueError:
        value = -1.0
    if value not in [float(known) for known in allowed]:
        record.problem(f"{key} is {label!r}, expected {' or '.join(allowed)}")
    return value


def _chatgpt_refusals(reader: Reader) -> Iterator[LabelledAnswer]:
    for record in reader.objects("all_hand_labeled.json"):
        tone = str(record.choice("tone", tuple(TONES)))
        yield LabelledAnswer(
            id=record.place,
            prompt=record.text("prompt", may_be_empty=True),
            response=record.text("response", may_be_empty=True),
            refused=TONES.get(tone),
            raters=(tone,),
            kind=tone,
            group=str(record.fields.get("prompt")),
        )


def _harmbench(name: str) -> Callable[[Reader], Iterator[LabelledAnswer]]:
    def read(reader: Reader) -> Iterator[LabelledAnswer]:
        file, value = reader.document(name)
        if value is not None and not isinstance(value, dict):
            reader.problem(file, "line 1", "an object expected")
        for behavior, answers in value.items() if isinstance(value, dict) else ():
            for index, fields in enumerate(answers if isinstance(answers, list) else [answers]):
                fields = fields if isinstance(fields, dict) else {}
                record = Record(reader, file, f"{behavior}[{index}]", fields)
                labels = [record.choice(rater, (0, 1)) for rater in RATERS]
                case = fields.get("test_case", "")
                yield LabelledAnswer(
                    id=record.place,
                    # With an image, a test case is a list: the image's path and the text.
                    prompt=case[-1] if isinstance(case, list) else case,
                    response=record.text("generation", may_be_empty=True),
                    harmful="yes" if labels.count(1) > labels.count(0) else "no",
                    raters=tuple(map(str, labels)),
                    model=str(fields.get("model", "")),
                    group=behavior,
                    published={k: v for k, v in fields.items() if k not in HARMBENCH_FACTS},
                )

    return read


def _xstest(reader: Reader) -> Iterator[LabelledAnswer]:
    names = sorted(path.name for path in reader.folder.glob("*completions*.csv"))
    if not names:
        reader.problem("*completions*.csv", "file", "is not there")
    columns = ("id", "prompt", "completion", "annotation_1", "annotation_2", "final_label", "type")
    for name in names:
        model = name.removesuffix(".csv").rpartition("completions")[2].strip("_")
        records = reader.table(name, columns)
        reader.unique((record.fields["id"], record) for record in records)
        for record in records:
            yield LabelledAnswer(
                id=f"{model}:{record.text('id')}",
                prompt=record.text("prompt"),
                response=record.text("completion", may_be_empty=True),
                refused=XSTEST.get(record.choice("final_label", tuple(XSTEST))),
                raters=(record.fields["annotation_1"], record.fields["annotation_2"]),
                kind=record.text("type"),
                model=model,
                group=record.fields["id"],
            )


def _msts(subset: str) -> Callable[[Reader], Iterator[LabelledAnswer]]:
    name = f"response_annotations/{subset}.csv"
    judged = f"auto_eval/{subset}_autoeval.csv"
    # The files of other languages have one rater, and no final label.
    is_final = subset.startswith("english")

    def read(reader: Reader) -> Iterator[LabelledAnswer]:
        columns = ("case_id", "prompt_type", "prompt_text", "model", "response", "annot1_label")
        final = ("annot2_label", "final_label", "final_taxonomy") if is_final else ()
        records = reader.table(name, (*columns, *final))
        # The verdicts of published judges have no ids: row n of their file belongs to answer n.
        verdicts = [r.fields for r in reader.table(judged, ())] if reader.find(judged) else None
        if verdicts is not None and len(verdicts) != len(records):
            reader.problem(judged, "file", f"{len(verdicts)} rows for {len(records)} answers")
            verdicts = None
        for index, record in enumerate(records):
            kind = record.text("final_taxonomy" if is_final else "annot1_label")
            harmful = {"1": "no", "2": "yes"}.get(kind[:1])
            if is_final:
                label = record.choice("final_label", ("1 - safe", "2 - unsafe"))
                harmful = "yes" if label == "2 - unsafe" else "no"
            elif harmful is None:
                record.problem(f"annot1_label is {kind!r}, expected 1.x or 2.x")
            yield LabelledAnswer(
                id=record.place,
                prompt=record.text("prompt_text"),
                response=record.text("response", may_be_empty=True),
                refused="yes" if kind[:3] in MSTS_REFUSALS else "no",
                harmful=harmful,
                raters=tuple(record.fields[k] for k in record.fields if k.endswith("_label")
                             and k.startswith("annot")),
                kind=kind,
                model=record.text("model"),
                group=record.text("case_id"),
                published=verdicts[index] if verdicts else {},
            )  # fmt: skip

    return read


_OBJECTIVES = (
    "bias", "chemical_biological", "cyber", "exploits", "harassment_bullying", "hate_speech",
    "illegal_activity", "info_integrity", "misinformation", "phishing", "privacy", "self_harm",
    "sexual", "violence",
)  # fmt: skip
_GRADED = (
    "exploits", "hate_speech", "info_integrity", "privacy", "representational", "self_harm",
    "sexual", "violence",
)  # fmt: skip


def _of_pyrit(part: str, names: Iterable[str], axis: str) -> LabelSet:
    folders = (f"labels/pyrit/scorer_evals/{part}", "labels/pyrit", "labels_pyrit")
    return LabelSet(folders, "MIT", _pyrit([f"{n}.csv" for n in names], axis), f"pyrit_{part}")


def _of_msts(subset: str) -> LabelSet:
    return LabelSet(("labels/msts", "msts/data", "msts"), "CC BY 4.0", _msts(subset), "msts_labels")


def _of_harmbench(kind: str) -> LabelSet:
    reader = _harmbench(f"{kind}_behaviors_val_set.json")
    return LabelSet(("labels/harmbench", "labels_harmbench"), "MIT", reader, "harmbench_labels")


LABEL_SETS = {
    "pyrit_refusal": _of_pyrit("refusal_scorer", ["refusal"], "refused"),
    "pyrit_refusal_extra": _of_pyrit("refusal_scorer", ["refusal_extra"], "refused"),
    "pyrit_objective": _of_pyrit("objective", _OBJECTIVES, "harmful"),
    "pyrit_harm": _of_pyrit("harm", _GRADED, "score"),
    "chatgpt_refusals": LabelSet(
        ("labels/chatgpt_refusals/data", "labels_chatgpt_refusals"), "MIT", _chatgpt_refusals
    ),
    "harmbench_text": _of_harmbench("text"),
    "harmbench_multimodal": _of_harmbench("multimodal"),
    "xstest_answers": LabelSet(
        ("xstest/model_completions", "xstest"),
        "CC BY 4.0 (prompts); answers under the terms of each model's vendor",
        _xstest,
    ),
    "msts": _of_msts("english_multimodal"),
    "msts_textonly": _of_msts("english_textonly"),
    **{f"msts_{name}": _of_msts(f"{name}_multimodal") for name in LANGUAGES[1:]},
}


def load_labels(
    name: str,
    root: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    allow_changed: bool = False,
) -> list[LabelledAnswer]:
    """The answers of a label set, in the order of its files.

    Args:
        name: A key of `LABEL_SETS`.
        root: Folder that holds the benchmarks' folders; None takes $SPAVL_BENCHMARKS.
        folder: The set's own folder, instead of the one below `root`.
        allow_changed: Go on with files that differ from the published version.

    Raises:
        InputError: There is no such set or folder; a file is damaged, or (unless allowed) differs
            from the published one. All problems are listed.
    """
    if name not in LABEL_SETS:
        known = ", ".join(LABEL_SETS)
        raise InputError(f"unknown label set {name!r}{nearest(name, LABEL_SETS)} (known: {known})")
    labels = LABEL_SETS[name]
    path = Path(folder).expanduser() if folder else label_folder(name, root)
    if path is None or not path.is_dir():
        above = folder or benchmarks_root(root) / labels.folders[0]
        raise InputError(f"label set {name}: the folder {above} does not exist")
    reader = Reader(path, pins=published_hashes().get(labels.pins or name, {}))
    answers = [
        LabelledAnswer(**{**vars(answer), "id": f"{name}:{answer.id}"})
        for answer in labels.read(reader)
    ]
    raise_all(reader.problems, f"label set {name} in {path}")
    changed, _ = reader.compared()
    if not allow_changed:
        raise_all(changed, f"label set {name} in {path} is not the published version")
    if not answers:
        raise InputError(f"label set {name} in {path}: no answers")
    return answers


def label_folder(name: str, root: str | Path | None = None) -> Path | None:
    """The folder of a label set; None if it is not at hand.

    Args:
        name: A key of `LABEL_SETS`.
        root: As for `load_labels`.

    Raises:
        InputError: There is no folder of benchmarks.
    """
    paths = [benchmarks_root(root) / folder for folder in LABEL_SETS[name].folders]
    return next((path for path in paths if path.is_dir()), None)
