"""A run folder in, one self-contained HTML page out: `write_report(run_path)`."""

from pathlib import Path


def write_report(run_path: Path | str) -> Path:
    """Write `report.html` into a run folder, from whatever stages it holds.

    Args:
        run_path: The run's folder.

    Returns:
        The page's path.

    Raises:
        InputError: No such folder, or a file in it that cannot be believed (NaN, a rate above 1).
    """
    from spavl_lib.report.build import build_report  # matplotlib and jinja2 only when asked for

    return build_report(Path(run_path))
