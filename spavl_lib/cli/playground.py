"""The command `spavl playground`."""

from pathlib import Path
from typing import Annotated

import typer

from spavl_lib.cli.shared import run_path

app = typer.Typer(rich_markup_mode=None)


@app.command()
def playground(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(help="The page to write.", show_default="playground.html in the run's folder"),
    ] = None,
) -> None:
    """Write one HTML page on which the run's models answer in the reader's browser.

    The page holds the base model, every model that the run trained, the reward model, and example
    pictures. It computes the answers itself: it needs no server, no network and no installation.
    Only small models such as the embedded one can run in a browser; other runs are refused.

    \b
    Example:
      spavl playground demo
      spavl playground demo --output demo.html
    """
    from spavl_lib.report.playground import write_playground

    page = write_playground(run_path(run), output)
    typer.echo(f"done: {page} ({page.stat().st_size / 1e6:.1f} MB; open it in a browser)")
