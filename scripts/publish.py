"""Copy a finished demo into `reports/`, where a code host shows it to readers who run nothing.

    make publish                          # the demo, notebooks 03b, 07, 08, the studies, and this
    python scripts/publish.py             # this alone, from runs/demo
    python scripts/publish.py --prose     # only take over changed sentences; needs no run
    python scripts/publish.py --check     # are the published notebooks those of notebooks/?

Writes `reports/notebooks/`, the executed notebooks without progress bars and without paths of this
machine; `reports/demo/`, metrics and figures; `reports/notebooks/code.json`, the hash of every
notebook's code cells; and the tables of README.md and docs/results.md that stand between markers.
If a notebook has changed since, `--check` names it and ends with 1. Nothing is committed.
"""

import argparse
import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from matplotlib.figure import Figure

from spavl_lib import plotting
from spavl_lib.data.images import decode
from spavl_lib.data.load import load_prompts
from spavl_lib.evaluation.numbers import METRICS, model_title, percent
from spavl_lib.evaluation.rates import Rate
from spavl_lib.notebook.execute import stage_of
from spavl_lib.notebook.status import code_sha256
from spavl_lib.notebook.studies import read_study
from spavl_lib.report.table import render_harmless_table, render_result_table
from spavl_lib.runs.files import read_json, read_jsonl, write_json
from spavl_lib.runs.stage import recorded_config

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS, REPORTS = REPO / "notebooks", REPO / "reports"
CODE = REPORTS / "notebooks/code.json"
FIGURES = ("rates.png", "safety_helpfulness.png", "harmless_refused.png")  # of the evaluation
LARGEST_MIB = 12
TWINS = 90  # index of the pair for the front page: the same words over a padlock and over an egg
WIDGETS = "application/vnd.jupyter.widget-view+json"


def code_of(page: nbformat.NotebookNode) -> str:
    """Hash of a notebook's code cells, without the cell that papermill injects."""
    return code_sha256(
        cell.source for cell in page.cells if cell.cell_type == "code" and not _is_injected(cell)
    )


def _is_injected(cell: nbformat.NotebookNode) -> bool:
    return "injected-parameters" in cell.metadata.get("tags", [])


def code_of_notebooks() -> dict[str, str]:
    """Name of every notebook -> hash of its code cells."""
    return {
        path.name: code_of(nbformat.read(path, 4)) for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    }


def stale() -> list[str]:
    """Names of the notebooks whose published copy is missing, or has other code or sentences."""
    published = read_json(CODE) if CODE.is_file() else {}
    return [
        name
        for name, digest in code_of_notebooks().items()
        if published.get(name) != digest
        or not (CODE.parent / name).is_file()
        or not _same_prose(name)
    ]


def _same_prose(name: str) -> bool:
    page, current = (nbformat.read(folder / name, 4) for folder in (CODE.parent, NOTEBOOKS))
    before = [cell.source for cell in _prose(page)]
    return take_prose(page, current) and before == [cell.source for cell in _prose(page)]


def take_prose(page: nbformat.NotebookNode, source: nbformat.NotebookNode) -> bool:
    """Take the sentences of a notebook into an executed copy, whose outputs stay.

    Args:
        page: The copy, to lie in `reports/notebooks`; changed in place.
        source: The notebook, from `notebooks/`.

    Returns:
        Whether both have the same text and code cells in the same order. Otherwise nothing is
        changed.
    """
    kinds = [
        [cell.cell_type for cell in cells if not _is_injected(cell)]
        for cells in (page.cells, source.cells)
    ]
    if kinds[0] != kinds[1]:
        return False
    for cell, current in zip(_prose(page), _prose(source), strict=True):
        # The copy lies one folder deeper.
        cell.source = current.source.replace("](../", "](../../")
        cell.source = cell.source.replace("](solutions/", "](../../notebooks/solutions/")
    return True


def publish_prose() -> None:
    """Take changed sentences into the published notebooks whose code has not changed."""
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        path = CODE.parent / notebook.name
        if not path.is_file():
            print(f"{path.name} is not published yet: run make publish")
            continue
        page, source = nbformat.read(path, 4), nbformat.read(notebook, 4)
        if code_of(page) == code_of(source) and take_prose(page, source):
            nbformat.write(page, path)
        else:
            print(f"{path.name} has other cells than its published copy: run make publish")


def cleaned(page: nbformat.NotebookNode, roots: Sequence[Path] = ()) -> nbformat.NotebookNode:
    """A notebook without widgets, and without metadata of its execution.

    Args:
        page: The executed notebook; changed in place.
        roots: Folders of this machine. In the text of outputs, paths below them become relative.
    """
    page.metadata = {k: v for k, v in page.metadata.items() if k in ("kernelspec", "language_info")}
    for cell in page.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_shown(output)]
        for output in cell.get("outputs", ()):
            for texts, key in ((output, "text"), (output.get("data", {}), "text/plain")):
                for root in roots:
                    if key in texts:
                        texts[key] = texts[key].replace(f"{root}/", "")
    return page


def _prose(page: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in page.cells if cell.cell_type == "markdown"]


def _is_shown(output: nbformat.NotebookNode) -> bool:
    """Whether an output says something to a reader: no widget, no line of a progress bar."""
    if output.output_type == "stream":
        return output.name == "stdout"
    return WIDGETS not in output.get("data", {})


def executed_page(notebook: Path, run: Path, root: Path) -> nbformat.NotebookNode:
    """A notebook as a run executed it, in the form that is published.

    Args:
        notebook: The notebook.
        run: The run's folder.
        root: The checkout that holds the run.
    """
    executed = run / stage_of(notebook) / "executed.ipynb"
    if not executed.is_file():
        sys.exit(f"{executed} does not exist: execute {notebook.name} first")
    page, source = nbformat.read(executed, 4), nbformat.read(notebook, 4)
    if code_of(page) != code_of(source):
        sys.exit(f"{executed} has other code than {notebook.name}: execute the notebook again")
    if not take_prose(page, source):
        sys.exit(f"{executed} has other text cells than {notebook.name}: execute it again")
    return cleaned(page, (root, REPO))


def publish_one(run: Path, name: str) -> None:
    """Copy one notebook of a run; the others stay.

    Args:
        run: The run's folder.
        name: Name of the notebook, without `.ipynb`.
    """
    notebook = NOTEBOOKS / f"{name}.ipynb"
    page = executed_page(notebook, run, run.resolve().parents[1])
    nbformat.write(page, CODE.parent / notebook.name)
    hashes = read_json(CODE) | {notebook.name: code_of_notebooks()[notebook.name]}
    write_json(CODE, dict(sorted(hashes.items())))


def publish(run: Path) -> None:
    """Copy notebooks, metrics and figures of a run.

    Args:
        run: The run's folder.
    """
    folder, root = REPORTS / "demo", run.resolve().parents[1]
    if (profile := read_json(run / "metrics.json")["profile"]) != "demo":
        sys.exit(f"{run} is a run of the profile {profile}; only demo is published")
    for made in (folder, CODE.parent):
        made.mkdir(parents=True, exist_ok=True)
    pages = {
        notebook.name: executed_page(notebook, run, root)
        for notebook in sorted(NOTEBOOKS.glob("*.ipynb"))
    }
    for outdated in CODE.parent.glob("*.ipynb"):
        outdated.unlink()
    for name, page in pages.items():
        nbformat.write(page, CODE.parent / name)
    write_json(CODE, code_of_notebooks())
    shutil.copy(run / "metrics.json", folder)
    shutil.copy(run / "scaling/summary.json", folder / "scaling.json")
    for name in FIGURES:
        shutil.copy(run / "evaluation/figures" / name, folder)
    plotting.save_figure(twins(run), folder / "twins.png")
    for page, tables in TABLES.items():
        write_tables(REPO / page, {name: table() for name, table in tables.items()})
    size = sum(path.stat().st_size for path in REPORTS.rglob("*") if path.is_file()) / 2**20
    print(f"{REPORTS}: {size:.1f} MiB")
    if size > LARGEST_MIB:
        sys.exit(f"reports/ may have {LARGEST_MIB} MiB at most")


def results() -> str:
    """The demo's rates, as README shows them."""
    return f"```\n{render_result_table(REPORTS / 'demo/metrics.json')}\n```"


def harmless() -> str:
    """Refused harmless requests, as README shows them."""
    return f"```\n{render_harmless_table(REPORTS / 'demo/metrics.json')}\n```"


def unseen() -> str:
    """The demo's rates over drawings that no model was trained on, as README shows them."""
    metrics = read_json(REPORTS / "demo/metrics.json")
    of_unseen = {name: cells["held_out_drawings"] for name, cells in metrics["models"].items()}
    return f"```\n{render_result_table(metrics | {'models': of_unseen})}\n```"


def _over_known_drawings(model: str) -> dict:
    """Refused harmless requests of the demo's model, without those over unseen drawings."""
    refused = read_json(REPORTS / "demo/metrics.json")["models"][model]["harmless_refused"]
    sets = [refused[name] for name in ("help", "look_alikes", "twins")]
    rate = Rate.of(*(sum(counted[key] for counted in sets) for key in ("k", "n")))
    return {"harmless_refused": rate and rate.to_dict()}


def of_study(name: str) -> str:
    """A published study as a table. Trainings of a study but `seeds` saw no unseen drawings."""
    study = read_study(name)
    if name == "seeds":
        rows = {
            f"{model_title(model)}, seed {seed}": rates
            for seed, part in study.items()
            for model, rates in part["rates"].items()
        }
    else:
        rows = {title: part["rates"] for title, part in study.items()}
    if name == "kl":
        rows |= {title: part["rates"] for title, part in read_study("rloo").items()}
        rows["as in the demo"] |= _over_known_drawings("ppo")
    drawings = "with" if name == "seeds" else "without"
    keys = {metric.key: metric.title for metric in METRICS}
    keys["harmless_refused"] = f"Harmless refused, {drawings} unseen drawings"
    lines = [["", *keys.values()], ["---"] * (1 + len(keys))]
    for title, rates in rows.items():
        lines.append([title, *(_counts(Rate.from_dict(rates.get(key))) for key in keys)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _counts(rate: Rate | None) -> str:
    return "–" if rate is None else f"{percent(rate)} ({rate.counts})".replace("\u00a0", " ")


# Page -> marker -> what stands between `<!-- marker -->` and `<!-- /marker -->`.
TABLES = {
    "README.md": {"results": results, "harmless": harmless, "unseen": unseen},
    "docs/results.md": {
        name: functools.partial(of_study, name) for name in ("seeds", "beta", "kl")
    },
}


def write_tables(page: Path, tables: dict[str, str]) -> None:
    """Write tables between a page's markers."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            sys.exit(f"{page} must hold {start} and {end} once each")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{table}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def twins(run: Path) -> Figure:
    """A figure of one twin pair, with every model's answers below the images."""
    rows = load_prompts(recorded_config(run / "evaluation").data, "twins")
    models = read_json(run / "inference/summary.json")["models"]
    said = {
        name: {
            row["id"]: row["response"] for row in read_jsonl(run / f"inference/{name}/twins.jsonl")
        }
        for name in models
    }
    pair = [rows[i] for i in (TWINS, TWINS + 1)]
    captions = [
        "\n".join(
            [f"“{row['prompt']}”", *(f"{model_title(n)}: {said[n][row['id']]}" for n in models)]
        )
        for row in pair
    ]
    return plotting.plot_image_grid([decode(row["image"]) for row in pair], captions, columns=2)


def main() -> None:
    """Publish, or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, default=REPO / "runs/demo", help="the run's folder")
    parser.add_argument("--prose", action="store_true", help="only take over changed sentences")
    parser.add_argument("--only", default="", help="publish one notebook, such as 08_laboratory")
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    asked = parser.parse_args()
    if asked.prose:
        publish_prose()
    if asked.check:
        if names := stale():
            sys.exit(f"changed since they were published: {', '.join(names)}; run make publish")
    elif asked.only:
        publish_one(asked.run, asked.only)
    elif not asked.prose:
        publish(asked.run)


if __name__ == "__main__":
    main()
