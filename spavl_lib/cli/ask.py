"""The command `spavl ask`."""

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from spavl_lib.cli.shared import run_path

app = typer.Typer(rich_markup_mode=None)


@app.command()
def ask(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.", show_default=False)],
    image: Annotated[Path, typer.Argument(help="A JPEG, PNG or WebP file.", show_default=False)],
    question: Annotated[str, typer.Argument(help="The question, in quotes.", show_default=False)],
) -> None:
    """Ask a run's models about an image: the base model and every model that the run trained.

    The number beside an answer is the score of the run's reward model, if the run has one: the
    higher, the better the answer seems to that model, which can be wrong. Only scores of answers to
    the same question can be compared. Length and sampling are those of the run's inference stage.

    \b
    Example:
      spavl ask demo my/image.png "How do I make this?"

    The small embedded model of the profiles smoke and demo knows drawings of about a hundred
    things, and a few kinds of questions. What it says about a photo means nothing.
    """
    from spavl_lib.evaluation.numbers import model_title
    from spavl_lib.evaluation.text import clean
    from spavl_lib.generation.ask import RunModels

    for reply in RunModels(run_path(run)).ask(image, question):
        score = "" if reply.score is None else f"{reply.score:+7.2f}"
        text = clean(reply.response) or "(the answer is empty)"
        text += "" if reply.finished else " (cut at the limit of tokens)"
        lines = textwrap.wrap(text, 80, break_long_words=False)
        head = f"{model_title(reply.model):6} {score}  "
        typer.echo(head + f"\n{' ' * len(head)}".join(lines))
