"""The commands `spavl data ...`."""

from pathlib import Path
from typing import Annotated

import typer

from spavl_lib.cli.shared import Commands, show

app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", show_default=False)],
) -> None:
    """Convert data between the Hub's layout and the JSON lists and images that the SPA-VL authors'
    code reads. SRC is a folder in either layout, or mini for the data set of this library. The
    conversion loses nothing.

    \b
    Examples:
      spavl data convert data/spa-vl out-json/
      spavl data convert out-json/ out-hub/
    """
    from spavl_lib.data.convert import convert

    show(convert(source, target))


@app.command()
def check(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            show_default=False,
            help="mini, a folder (in the layout of the Hub or of the SPA-VL authors' code), a name "
            "on the Hub, or a file of your own.",
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Model whose tokenizer counts tokens; an empty name: no counts.")
    ] = "embedded",
    max_length: Annotated[
        int, typer.Option(help="Longest allowed sequence in tokens; 0: the model's context.")
    ] = 0,
    source: Annotated[
        str, typer.Option(help="Value of data.source.", show_default="recognised from PATH")
    ] = "",
    image_root: Annotated[
        str, typer.Option(help="Folder that image paths start from.", show_default=False)
    ] = "",
    revision: Annotated[
        str, typer.Option(help="Commit, if PATH is a name on the Hub.", show_default="the newest")
    ] = "",
    extra: Annotated[
        str,
        typer.Option(
            help="File of further pairs, as data.extra_path names it.", show_default=False
        ),
    ] = "",
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=COLUMN",
            help="Column name for a field of data.columns. Repeatable, or separated by commas.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write the whole report to, as JSON.")
    ] = None,
) -> None:
    """Read data as a training would, and describe them. If there are bad rows, list them and exit
    with code 2.

    \b
    Examples:
      spavl data check mini
      spavl data check my/pairs.json --image-root my/images --model llava-hf/llava-1.5-7b-hf
      spavl data check my/pairs.csv --columns prompt=ask,image=photo
    """
    from spavl_lib.data.check import check, table
    from spavl_lib.runs.files import write_json

    processor = None
    if model:
        from spavl_lib.modelling.load import load_counter

        processor, max_length = load_counter(model, max_length)
    report = check(
        path, source=source, image_root=image_root, revision=revision, columns=columns or (),
        extra=extra, model=model, processor=processor, max_length=max_length,
    )  # fmt: skip
    if json_file:
        write_json(json_file, report)
    typer.echo(table(report))
    if report["problems"]:
        raise typer.Exit(2)
