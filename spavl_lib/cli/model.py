"""The commands `spavl model ...`."""

from pathlib import Path
from typing import Annotated

import typer

from spavl_lib.cli.shared import Commands, show

app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)


@app.command(name="import")
def import_model(
    source: Annotated[Path, typer.Argument(metavar="SRC", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", show_default=False)],
    tower: Annotated[
        Path | None, typer.Option(help="Folder of the CLIP vision tower, if SRC does not hold it.")
    ] = None,
) -> None:
    """Convert a checkpoint of the LLaVA authors so that transformers and spavl can load it."""
    from spavl_lib.modelling.llava_original import import_llava

    show(import_llava(source, target, tower))
    typer.echo(f"done: --set model.name={target}")


@app.command(name="export")
def export_model(
    stage: Annotated[
        Path,
        typer.Argument(
            metavar="STAGE", help="Stage folder, such as runs/paper/dpo.", show_default=False
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", show_default=False)],
    form: Annotated[
        str, typer.Option(help="merged: one model; vllm: a base and an adapter that vLLM serves.")
    ] = "merged",
    check: Annotated[
        bool,
        typer.Option(
            help="Load the export in a new process and compare it with the trained model."
        ),
    ] = True,
) -> None:
    """Export a trained policy, with its model card, in a form that other tools can load."""
    from spavl_lib.modelling.export import export

    show(export(stage, target, form, check=check))
