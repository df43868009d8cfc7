"""The commands `spavl judge ...`."""

from pathlib import Path
from typing import Annotated

import typer

from spavl_lib.cli.shared import BenchmarksDir, Commands, run_path, update_people

app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _judge() -> None:
    """Measure judges against people's labels, or fit one."""


@app.command()
def card(
    name: Annotated[
        str,
        typer.Argument(
            show_default=False,
            help="phrases, guard, endpoint, a judge of another package, or published (the "
            "verdicts that the authors of the label sets published).",
        ),
    ],
    sets: Annotated[
        str,
        typer.Option(
            help="Label sets, separated by commas.", show_default="all whose folder exists"
        ),
    ] = "",
    phrases: Annotated[
        str, typer.Option(help="List of refusal phrases, phrases-v1 or gcg, for phrases.")
    ] = "phrases-v1",
    model: Annotated[
        str, typer.Option(help="Model for guard or endpoint.", show_default=False)
    ] = "",
    revision: Annotated[
        str, typer.Option(help="Commit of the guard model on the Hub.", show_default="the newest")
    ] = "",
    url: Annotated[
        str,
        typer.Option(help="Address of an endpoint, such as http://localhost:8000/v1."),
    ] = "",
    budget: Annotated[
        int, typer.Option(min=0, help="Largest number of requests to the endpoint; 0: no limit.")
    ] = 0,
    yes: Annotated[
        bool, typer.Option("--yes", help="Agree that the endpoint's host receives the answers.")
    ] = False,
    benchmarks_dir: BenchmarksDir = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write the card to.", show_default="reports/judge_cards"),
    ] = None,
) -> None:
    """Run a judge over answers that people have labelled, and write a card about the agreement.

    The card holds counts and ids, but no text of a label set.

    \b
    Examples:
      spavl judge card phrases
      spavl judge card guard --model allenai/wildguard --sets harmbench_multimodal,msts
      spavl judge card endpoint --model NAME --url http://localhost:8000/v1 --budget 5000
    """
    from spavl_lib.config import EvaluationConfig
    from spavl_lib.config.validation import build
    from spavl_lib.evaluation import cards

    settings = {
        "judge": name, "judge_phrases": phrases, "judge_model": model, "judge_revision": revision,
        "judge_url": url, "judge_budget": budget, "judge_yes": yes,
    }  # fmt: skip
    chosen = [part.strip() for part in sets.split(",") if part.strip()]
    if name == "published":
        written = cards.published_card(chosen, root=benchmarks_dir or None)
    else:
        config = build(EvaluationConfig, settings, prefix="evaluation.")
        written = cards.judge_card(config, chosen, root=benchmarks_dir or None)
    typer.echo(cards.card_table(written))
    typer.echo(f"done: {cards.write_card(written, out)}")


@app.command()
def fit(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
) -> None:
    """Fit the home head, a small judge, on people's labels of a run.

    The run's corrected rates then use the head. `spavl label RUN --n MORE` then draws answers about
    which the head is least certain. This command needs the package's extra judge-head.

    \b
    Example:
      spavl judge fit demo
    """
    from spavl_lib.evaluation.head import Encoder
    from spavl_lib.evaluation.people.fit import fit_run, render_fit
    from spavl_lib.evaluation.people.table import render_people_table

    path = run_path(run)
    typer.echo(render_fit(fit_run(path, Encoder())))
    typer.echo(render_people_table(update_people(path)))
