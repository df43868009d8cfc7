"""The commands `spavl records ...`."""

from pathlib import Path
from typing import Annotated

import typer

from spavl_lib.cli.shared import Commands

app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[
    str, typer.Argument(help="Number or folder of a record, such as 002.", show_default=False)
]
Folder = Annotated[
    Path | None, typer.Option(help="Folder of the records.", show_default="records/")
]


@app.callback()
def _records() -> None:
    """The fastest ways to a safe and helpful model: list them, verify them, enter one."""


@app.command(name="list")
def list_all(folder: Folder = None) -> None:
    """Print the leaderboard."""
    from spavl_lib.arena.records.files import records_root
    from spavl_lib.arena.records.leaderboard import leaderboard

    typer.echo(leaderboard(folder or records_root()))


@app.command(name="try")
def try_out(
    name: Name,
    folder: Folder = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
) -> None:
    """Train a record once and measure it on the development rows, to choose its settings.

    Nothing is written. The limits are means of three seeds on the test rows, so leave some room.
    """
    from spavl_lib.arena.records.verify import try_record

    counts, seconds = try_record(name, folder, seed=seed)
    for kind, count in counts.items():
        typer.echo(f"{kind:16} {count['k']:4} of {count['n']:4}  {count['k'] / count['n']:.1%}")
    typer.echo(f"{seconds} CPU-seconds")


@app.command()
def verify(
    name: Name,
    folder: Folder = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write what is measured, as `spavl records run` does.")
    ] = False,
) -> None:
    """Train record 001 and a record in turn for three seeds, and compare with its metrics.json.

    The exit code is 1 if a number does not come again or a threshold is not met. A record with a
    patch.diff runs the code of its patch: read it first.
    """
    from spavl_lib.arena.records.verify import run_record, verify_record

    found = run_record(name, folder) if write else verify_record(name, folder)
    rates, ratio = found.metrics["rates"], found.metrics["ratio"]
    for note in found.notes:
        typer.echo(f"differs: {note}")
    for problem in found.problems:
        typer.echo(f"FAILED: {problem}")
    shown = ", ".join(f"{kind} {rate:.1%}" for kind, rate in rates.items())
    typer.echo(f"{shown}; {ratio} of the CPU time of record 001")
    if found.problems:
        raise typer.Exit(1)
    typer.echo("written" if write else "verified")


@app.command()
def run(name: Name, folder: Folder = None) -> None:
    """Measure a record, and write its metrics.json, its log.txt and the leaderboard."""
    verify(name, folder, write=True)
