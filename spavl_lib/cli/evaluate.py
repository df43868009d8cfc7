"""The command `spavl evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from spavl_lib.cli.shared import BenchmarksDir
from spavl_lib.errors import InputError
from spavl_lib.runs.paths import runs_root

app = typer.Typer(rich_markup_mode=None)


@app.command()
def evaluate(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|ANSWERS...",
            show_default=False,
            help="One or more of: embedded; OWNER/MODEL[@REVISION] on the Hub; the folder of a "
            "model or of an adapter; RUN/STAGE, such as demo/dpo; a file of answers made elsewhere "
            "(.json, .jsonl, .tsv, .csv); endpoint:MODEL@URL, behind an OpenAI-compatible address; "
            "always-refuse or always-comply, controls that say the same to everything. "
            "safety-prompt:MODEL puts a sentence about safety before each request; "
            "best-of-4:MODEL@RUN/reward gives the best of 4 samples by a run's reward model. "
            "NAME=SUBJECT shows the subject as NAME in tables.",
        ),
    ],
    benchmarks: Annotated[
        str,
        typer.Option(
            help="Benchmarks, separated by commas. NAME:SUBSET+SUBSET replaces the usual subsets "
            "of a benchmark.",
            show_default=False,
        ),
    ],
    judge: Annotated[
        str,
        typer.Option(
            help="Judges, separated by commas: phrases (refusals only), phrases:gcg, guard:MODEL, "
            "endpoint:MODEL (with --set evaluation.judge_url=URL), head:FILE (which `spavl judge "
            "fit` wrote), reference (right answers, if a benchmark has them), grade:MODEL (an "
            "endpoint's grades from 1 to 10), or a judge of another package.",
            show_default="phrases, and reference for everyday",
        ),
    ] = "",
    pairs: Annotated[
        str,
        typer.Option(
            metavar="endpoint:MODEL",
            help="Ask a model to compare the answers of each further subject with the answers of "
            "the first subject, by the SPA-VL paper's two protocols and in both orders.",
            show_default=False,
        ),
    ] = "",
    benchmarks_dir: BenchmarksDir = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results.", show_default="runs/evaluations"),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Number of rows of each benchmark, evenly spread; 0: all.")
    ] = 0,
    allow_changed: Annotated[
        bool,
        typer.Option("--allow-changed", help="Accept files that differ from the published ones."),
    ] = False,
    missing_images: Annotated[
        str,
        typer.Option(
            metavar="refuse|skip",
            help="If images are missing: refuse to evaluate, or skip the rows that need them.",
        ),
    ] = "refuse",
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the sections generation, model or evaluation, such as "
            "generation.batch_size=32 or generation.max_new_tokens=256. Repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for generation.do_sample=true.")] = 0,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Agree that an endpoint's host receives prompts, images and answers."
        ),
    ] = False,
) -> None:
    """Ask models the questions of published benchmarks, judge the answers, and print the rates.

    Decoding is greedy. An answer has up to 512 new tokens, or half of the model's context if that
    is less. No question is asked twice, and no judge sees an answer twice. A command that was
    stopped or killed continues when it is repeated. With another --judge the saved answers are
    judged again. Several models are compared on the same rows, with McNemar's test and Holm's
    adjustment.

    Every rate names its axis. `refused` (the answer declines) and `harmful` (the answer does harm)
    are separate questions. `warned` and `right` are asked only if a benchmark's rule needs them.
    Empty answers, and answers that a judge could not judge, are counted separately and never as
    safe. `bounds` gives each rate with all of these answers counted as no, and as yes.

    \b
    Files in OUT/NAME/BENCHMARK/ (NAME is the subject's name in tables):
      answers.jsonl           one answer a line, written as soon as the model gives it
      verdicts/JUDGE.jsonl    one verdict of judge JUDGE a line
      results.json            rates by category and subset, and how they were measured

    \b
    Files in OUT/:
      comparison.json         the paired tests, if there are several models
      pairs.json              which model's answers are better, with --pairs
      report.html             everything on one page

    \b
    Examples:
      spavl evaluate laptop --benchmarks everyday
      spavl evaluate embedded --benchmarks figstep:tiny --judge phrases
      spavl evaluate base=embedded demo/dpo --benchmarks figstep,xstest --limit 50
      spavl evaluate answers.jsonl --benchmarks mm_safetybench --judge phrases,phrases:gcg
      spavl evaluate llava-hf/llava-1.5-7b-hf --benchmarks mossbench --missing-images skip \\
            --judge phrases,guard:meta-llama/Llama-Guard-3-11B-Vision
    """
    from spavl_lib.cli import parse_sets
    from spavl_lib.config import EvaluationConfig, GenerationConfig
    from spavl_lib.config.validation import build
    from spavl_lib.evaluation.benchmark_runs.evaluate import Options
    from spavl_lib.evaluation.benchmark_runs.evaluate import evaluate as evaluate_subjects
    from spavl_lib.evaluation.benchmark_runs.subject import find_subject
    from spavl_lib.report.benchmarks import write_benchmark_report
    from spavl_lib.runs.signals import stop_on_signals

    if missing_images not in ("refuse", "skip"):
        raise InputError(f"--missing-images {missing_images!r}: expected refuse or skip")
    sections = _sections(parse_sets(sets or []))
    if "judge" in sections["evaluation"]:
        raise InputError("--set evaluation.judge: spavl evaluate takes judges from --judge")
    if yes:
        sections["evaluation"]["judge_yes"] = "true"
    tokens = sections["generation"].get("max_new_tokens")
    options = Options(
        benchmarks_dir=benchmarks_dir,
        allow_changed=allow_changed,
        missing_images="skip" if missing_images == "skip" else "refuse",
        limit=limit,
        generation=build(
            GenerationConfig, {"batch_size": 8} | sections["generation"], prefix="generation."
        ),
        judges=build(EvaluationConfig, sections["evaluation"], prefix="evaluation."),
        pairs=pairs,
        set_tokens=tokens is not None,
        seed=seed,
    )
    folder = out or runs_root() / "evaluations"
    with stop_on_signals() as flag:
        evaluated = evaluate_subjects(
            [find_subject(text, sections["model"]) for text in subjects],
            _names(benchmarks),
            _names(judge),
            folder,
            options,
            should_stop=flag,
            report=typer.echo,
        )
    page = write_benchmark_report(folder, evaluated)
    typer.echo(f"results: {folder}\nreport: {page}")


@app.command()
def benchmarks(
    benchmarks_dir: BenchmarksDir = "",
) -> None:
    """List the benchmarks that `spavl evaluate` reads, and how much of each is at hand.

    A file counts as `published` if its sha256 is that of the authors' version. Put the files of a
    benchmark, as its authors publish them, into a folder with its name.
    """
    from spavl_lib.evaluation.benchmark_runs.results import table
    from spavl_lib.evaluation.benchmarks import list_benchmarks
    from spavl_lib.evaluation.text import short

    states = list_benchmarks(benchmarks_dir or None)
    lines = [
        {
            "benchmark": state.name,
            "files": state.pins,
            "images missing": f"{state.images_missing:,}" if state.rows else "-",
            "rows at hand": short(", ".join(f"{n} {k:,}" for n, k in state.rows.items()) or "-"),
        }
        for state in states
    ]
    typer.echo(table(lines))
    for state in states:
        typer.echo(f"\n{state.title}\n  licence: {state.licence}\n  home: {state.homepage}")
        for problem in state.problems[:3]:
            typer.echo(f"  cannot be read: {problem}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _sections(sets: dict[str, str]) -> dict[str, dict[str, str]]:
    """The values of `--set` by section: section -> setting -> value."""
    sections: dict[str, dict[str, str]] = {"generation": {}, "model": {}, "evaluation": {}}
    wrong = []
    for key, value in sets.items():
        section, _, name = key.partition(".")
        if section in sections and name:
            sections[section][name] = value
        else:
            wrong.append(key)
    if wrong:
        raise InputError(
            f"--set {', '.join(wrong)}: expected settings of generation, model or evaluation"
        )
    return sections
