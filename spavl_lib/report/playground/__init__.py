"""The playground: one HTML page that runs the small models of a run in the reader's browser."""

from pathlib import Path


def write_playground(run_path: Path | str, output: Path | str | None = None) -> Path:
    """Write a page that holds the run's models, and computes their answers without a network.

    Args:
        run_path: The run's folder.
        output: The page; None for `playground.html` in the run's folder.

    Returns:
        The path of the page.

    Raises:
        InputError: The run has no trained model, its model cannot run in a browser, or the folder
            of `output` does not exist.
    """
    from spavl_lib.report.playground.build import build_playground  # imports torch and jinja2

    return build_playground(Path(run_path), None if output is None else Path(output))
