"""The report: `write_report(run_path)` turns a run folder into one self-contained HTML page."""

from pathlib import Path


def write_report(run_path: Path | str) -> Path:
    """Write `report.html` into a run folder. The page names the stages that have not run.

    Args:
        run_path: The run's folder.

    Returns:
        The path of the page.

    Raises:
        InputError: The folder does not exist, or its metrics.json is not JSON or holds an
            impossible number.
    """
    from spavl_lib.report.build import build_report  # imports matplotlib and jinja2

    return build_report(Path(run_path))
