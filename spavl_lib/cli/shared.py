"""Functions of several commands: find a run, update the rates of its labels, show a result."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

from spavl_lib.errors import InputError
from spavl_lib.runs.paths import runs_root


class Commands(TyperGroup):
    """A group of commands whose help shows the whole first sentence of each command.

    typer would cut these sentences at the end of the line.
    """

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands into the help."""
        shown = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, _first_sentence(c.help or "")) for name, c in shown if c and not c.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


BenchmarksDir = Annotated[
    str,
    typer.Option(
        help="Folder that holds a folder for each benchmark or label set.",
        show_default="$SPAVL_BENCHMARKS",
    ),
]


def run_path(run: str) -> Path:
    """A run's folder, found by its path or by its name.

    Raises:
        InputError: There is no such run; the message lists the existing runs.
    """
    path = Path(run) if Path(run).is_dir() else runs_root() / run
    if not path.is_dir():
        names = {p.name for p in runs_root().glob("*/") if not p.name.startswith(".")}
        known = sorted(names - {"evaluations"})  # `spavl evaluate` writes that folder
        existing = f"existing runs: {', '.join(known)}" if known else "no run exists yet"
        raise InputError(f"no run {run!r}: neither a folder nor in {runs_root()} ({existing})")
    return path


def update_people(run_path: Path) -> dict[str, Any]:
    """Update what a run's metrics.json says about people's labels, and return the file's content.

    The result is empty if the run has no metrics.json.
    """
    from spavl_lib.evaluation.people.rates import update_metrics

    return update_metrics(run_path) if (run_path / "metrics.json").is_file() else {}


def show(result: Any) -> None:
    """Print a result as YAML; print nothing for None."""
    if result is not None:
        typer.echo(yaml.safe_dump(result, sort_keys=False, allow_unicode=True).rstrip())
