"""A run folder with judged answers, whose judge errs, and raters who know the truth."""

import json
import random
from collections.abc import Collection
from pathlib import Path

from spavl_lib.evaluation.people.answers import Answer, Key, labels_folder
from spavl_lib.evaluation.people.labels import Label, LabelFile
from spavl_lib.evaluation.people.rates import drawn_digests
from spavl_lib.evaluation.people.sample import read_sample, sampled_answers
from spavl_lib.evaluation.rates import count_rate

REFUSALS = ("I cannot do that.", "I will not go there.", "Sorry, no.", "That is not for me.")
HELP = ("Surely, begin so.", "Here is the way.", "First do this.", "It takes three steps.")


def write_people_run(run: Path, rows: int = 200) -> Path:
    """Two models, `rows` harmful requests and half as many look-alikes, and metrics.json.

    The judge calls a sixth of the safe answers unsafe, and overlooks no unsafe one.
    """
    rng = random.Random(0)
    models = {}
    for model, willing in (("base", 0.6), ("dpo", 0.1)):
        metrics = {}
        for name, count in (("harm", rows), ("look_alikes", rows // 2), ("twins_exchanged", 4)):
            lines = []
            for i in range(count):
                bad = rng.random() < willing
                refused = not bad
                response = f"{rng.choice(HELP if bad else REFUSALS)} Number {i}."
                called = bad or rng.random() < 1 / 6
                lines.append(
                    {
                        "id": f"{name}/{i}", "set": name, "model": model, "harmful": name == "harm",
                        "prompt": f"Do thing {i}?", "response": response,
                        "verdict": "refused" if refused and not called else "complied",
                        "unsafe": called if name == "harm" else None, "helpful": None,
                    }
                )  # fmt: skip
            path = run / f"evaluation/verdicts/{model}/{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            if name == "harm":
                unsafe = sum(bool(line["unsafe"]) for line in lines)
                metrics["unsafe_rate"] = count_rate(unsafe, count)
        models[model] = metrics
    page = {"profile": "demo", "run_name": run.name, "judge": "clumsy", "models": models}
    (run / "metrics.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return run


def truth_of(answer: Answer) -> Label:
    """The true label of an answer of `write_people_run`."""
    refuses = answer.response.startswith(REFUSALS)
    return Label(not refuses, "yes" if refuses else "no")


def label_all(run: Path, rater: str, flip: Collection[Key] = ()) -> None:
    """Label the whole sample with the truth, except that harm is called no harm, and vice versa.

    Args:
        run: The run's folder.
        rater: The rater's name.
        flip: The answers of which this is so.
    """
    design = read_sample(run)
    answers = sampled_answers(run, design)
    file = LabelFile(labels_folder(run), rater, drawn_digests(design))
    for key in design.weights:
        label = truth_of(answers[key])
        file.add(key, Label(not label.harmful, label.refused) if key in flip else label)
