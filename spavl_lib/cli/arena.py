"""The commands `spavl arena ...`."""

from pathlib import Path
from typing import Annotated

import typer

from spavl_lib.cli.shared import Commands

app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)

# Options of several commands.
Methods = Annotated[str, typer.Option(help="Methods, separated by commas.", show_default="all")]
Profile = Annotated[str, typer.Option("--profile", "-p", help="demo or smoke.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes at a time.")]
Minutes = Annotated[float, typer.Option(help="Start no new training after this many minutes.")]


@app.callback()
def _arena() -> None:
    """Measure methods of alignment against attacks, on the embedded world."""


@app.command()
def run(
    methods: Methods = "",
    attacks: Annotated[
        str,
        typer.Option(
            help="Attacks, separated by commas; `none` measures without one.", show_default="all"
        ),
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    profile: Profile = "demo",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the cells.", show_default="benchmarks/results/laboratory"),
    ] = None,
    workers: Workers = 2,
    minutes: Minutes = 100,
    rows: Annotated[
        int, typer.Option(min=0, help="Rows of each set under an attack; 0: all.")
    ] = 106,
) -> None:
    """Fill the table of methods and attacks; what is complete is kept.

    \b
    Examples:
      spavl arena run --methods base,dpo --attacks none,one_word --out mine
      spavl arena run --seeds 0,1,2
    """
    from spavl_lib.arena.run import run_arena

    path = run_arena(
        methods, attacks, [int(seed) for seed in seeds.split(",")], profile=profile, output=out,
        workers=workers, minutes=minutes, rows=rows,
    )  # fmt: skip
    typer.echo(f"wrote {path}")


@app.command()
def choose(
    methods: Methods = "",
    profile: Profile = "demo",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the trials and of the cells.",
            show_default="benchmarks/results/laboratory",
        ),
    ] = None,
    workers: Workers = 2,
    minutes: Minutes = 100,
) -> None:
    """Choose one setting of each method on mini's development rows, of three values each.

    \b
    Example:
      spavl arena choose --methods dpo,kto --out mine
    """
    from spavl_lib.arena.run import choose_settings

    chosen = choose_settings(methods, profile=profile, output=out, workers=workers, minutes=minutes)
    for name, value in chosen.items():
        typer.echo(f"{name:14} {value}")


@app.command()
def page(
    table: Annotated[
        Path | None,
        typer.Option(help="The table.", show_default="benchmarks/results/laboratory.json"),
    ] = None,
    cells: Annotated[
        Path | None,
        typer.Option(help="Folder of the cells.", show_default="laboratory/ beside the table"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The page.", show_default="laboratory.html beside the table")
    ] = None,
) -> None:
    """Write a page on which a reader sorts and filters the table and opens answers.

    \b
    Examples:
      spavl arena page
      spavl arena page --table mine/laboratory.json --cells mine --output mine/page.html
    """
    from spavl_lib.arena.run import CELLS, TABLE
    from spavl_lib.arena.table import read_cells, read_table
    from spavl_lib.report.laboratory import FILE, write_laboratory
    from spavl_lib.runs.paths import repo_root

    table = table or repo_root() / Path(CELLS).parent / TABLE
    found = read_cells(cells or table.parent / Path(CELLS).name)
    typer.echo(f"wrote {write_laboratory(read_table(table), found, output or table.parent / FILE)}")


@app.command(name="list")
def list_all() -> None:
    """List the methods and the attacks."""
    from spavl_lib.arena.methods import methods
    from spavl_lib.evaluation.attacks import ATTACKS

    for method in methods().values():
        typer.echo(f"{method.name:14} {method.title}: {method.source}")
    typer.echo("")
    for attack in ATTACKS.values():
        typer.echo(f"{attack.name:20} {attack.changes}")
