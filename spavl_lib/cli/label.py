"""The command `spavl label`."""

import subprocess
import sys
from typing import Annotated

import typer

from spavl_lib.cli.shared import run_path, update_people

app = typer.Typer(rich_markup_mode=None)


@app.command()
def label(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
    n: Annotated[
        int,
        typer.Option(
            "--n",
            help="Number of answers to label, over all models and sets together. A larger number "
            "adds to those drawn before.",
        ),
    ] = 200,
    rater: Annotated[str, typer.Option(help="Your name in the run's files.")] = "rater1",
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--sets",
            metavar="SET",
            help="Test set to draw from. Repeatable.",
            show_default="harm and look_alikes, or all if the run has neither",
        ),
    ] = None,
    opens: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the notebook in JupyterLab.")
    ] = True,
) -> None:
    """Label answers of a run by hand, to correct the rates of the run's judge.

    The answers are drawn once, at random within each model, test set and verdict. All raters label
    the same answers. The command writes a notebook and opens it. Each label is saved at once; the
    same command continues the labelling later.

    \b
    Examples:
      spavl label demo --n 200
      spavl label demo --rater ann --no-open
    """
    from spavl_lib.evaluation.people.table import render_people_table
    from spavl_lib.notebook.label_panel import write_label_notebook

    path = run_path(run)
    notebook = write_label_notebook(path, rater, n, tuple(sets) if sets else None)
    typer.echo(f"notebook: {notebook}")
    if opens:
        # This call returns when the user stops JupyterLab, whose exit code says nothing of labels.
        subprocess.run([sys.executable, "-m", "jupyterlab", str(notebook)], check=False)
        typer.echo(render_people_table(update_people(path)))
