"""Build the static site: README, docs, executed notebooks, API pages, and a run's report.

    python scripts/site.py                    # with runs/demo, if it is there
    python scripts/site.py --run runs/mine    # with the report of this run

The page that `spavl arena page` writes becomes part of the site, if it is there.

Writes `site/`. Open `site/index.html` from disk, or serve the folder; it fetches nothing from a
network. The build fetches KaTeX and a search helper with npm, once, into `build/npm`.
`mkdocs.yml` holds the settings.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import MkDocsException
from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parents[1]
PAGES, NPM, ASSETS = REPO / "build/site", REPO / "build/npm", "docs/assets"
# Package -> version, and the files taken from it -> where they go below `docs/assets`.
PACKAGES = {
    "katex": (
        "0.19.1",
        {"dist/katex.min.css": "katex", "dist/katex.min.js": "katex", "dist/fonts": "katex/fonts"}
        | {"dist/contrib/auto-render.min.js": "katex", "LICENSE": "katex"},
    ),
    "iframe-worker": ("1.0.4", {"shim/index.js": "iframe-worker.js"}),
}
LABORATORY = REPO / "benchmarks/results/laboratory.html"  # written by `spavl arena page`
TOP_PAGES = ("README.md", "GLOSSARY.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]*`|\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", re.S)
# Of a notebook's page: scripts and styles of JupyterLab's own theme, prompts, and second copies.
NOT_SHOWN = (
    "script, style, link, .celltoolbar, .zeroclipboard-container, .clipboard-copy-txt, "
    ".jp-Collapser, .jp-InputPrompt, .jp-OutputPrompt, .anchor-link"
)


def site_path(path: Path) -> Path:
    """Where a file of the repository is on the site, relative to the site's root."""
    relative = path.relative_to(REPO)
    if relative.is_relative_to("reports/notebooks"):
        relative = "notebooks" / relative.relative_to("reports/notebooks")
    return relative


def linked(text: str, page: Path, add: Callable[[Path], None], *, built: bool = False) -> str:
    """Markdown in which every link leads to a file of the site; the others become plain text.

    Args:
        text: The Markdown.
        page: The file of the repository that holds it.
        add: Is told every file that a link leads to.
        built: Whether links name built pages (`.html`), as mkdocs does not see them in notebooks.
    """

    def replacement(match: re.Match) -> str:
        label, target = match[1], match[2]
        if label is None or target.startswith("#") or re.match(r"[a-z]+:", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        # A published copy of a notebook may hold the links of the notebook itself.
        places = [folder / path for folder in (page.parent, REPO / site_path(page).parent)]
        places += [place / "README.md" for place in places]
        file = next((place.resolve() for place in places if place.is_file()), None)
        if not (file and file.is_relative_to(REPO)):
            return label
        add(file)
        path = os.path.relpath(site_path(file), site_path(page).parent)
        path = re.sub(r"\.(md|ipynb)$", ".html", path) if built else path
        return f"[{label}]({path}{mark}{anchor})"

    return CODE_OR_LINK.sub(replacement, text)


def gather(files: list[Path]) -> None:
    """Copy files, and those that they link to, into the folder that mkdocs reads."""
    queue, done = list(files), set()
    while queue:
        file = queue.pop()
        place = PAGES / site_path(file)
        if place in done:
            continue
        done.add(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            # A comment that stands right above a table would make it plain text.
            text = re.sub(r"^<!--.*?-->$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
            place.write_text(linked(text, file, queue.append), encoding="utf-8")
        elif file.suffix == ".ipynb":
            executed = REPO / "reports" / site_path(file)
            file = executed if executed.is_file() else file
            notebook = nbformat.read(file, 4)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = linked(cell.source, file, queue.append, built=True)
            nbformat.write(notebook, place)
        else:
            shutil.copy(file, place)


def title_of(notebook: Path) -> str:
    """A notebook's number and first heading."""
    [cell] = nbformat.read(notebook, 4).cells[:1]
    return f"{notebook.stem.split('_')[0]} {cell.source.partition(chr(10))[0].lstrip('# ')}"


def write_api() -> list:
    """Write a page for every folder of the library; returns the pages' part of the navigation."""
    library, folder = REPO / "spavl_lib", PAGES / "api"
    folder.mkdir(parents=True)
    lines, nav = ["# API", ""], [{"Overview": "api/index.md"}]
    table = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    purpose = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, flags=re.M))
    for init in sorted(library.glob("*/__init__.py")):
        name = init.parent.name
        lines.append(f"- [spavl_lib.{name}]({name}.md): {purpose[name]}")
        page = f"# spavl_lib.{name}\n\n::: spavl_lib.{name}\n"
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
        nav.append({name: f"api/{name}.md"})
    modules = sorted(path.stem for path in library.glob("[!_]*.py"))
    lines += [
        f"\n## {name}\n\n::: spavl_lib.{name}\n    options: {{heading_level: 3}}"
        for name in modules
    ]
    (folder / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return nav


def fetch_packages() -> None:
    """Copy KaTeX and the search helper into the pages, from the cache or else from npm."""
    for name, (version, files) in PACKAGES.items():
        folder = NPM / f"{name}-{version}"
        package = folder / "node_modules" / name
        if not package.is_dir():
            quiet = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--silent")
            command = ["npm", "install", *quiet, "--prefix", str(folder), f"{name}@{version}"]
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"npm cannot install {name} ({error}): no formulas, or no search from disk")
                continue
        for source, target in files.items():
            source, place = package / source, PAGES / ASSETS / target
            if source.is_dir():
                shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.ttf", "*.woff"))
            else:
                place = place if place.suffix else place / source.name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
    (PAGES / ASSETS / "iframe-worker.js").touch()  # else the theme would fetch it


def on_page_content(html: str, page: Page, **_: object) -> str:
    """mkdocs' hook: a notebook in the site's own style, without JupyterLab's scripts and styles."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html.replace("<th></th>", "<td></td>")
    soup = BeautifulSoup(html, "html.parser")
    for tag in soup.select(NOT_SHOWN):
        tag.decompose()
    for tag in soup.select("[tabindex]"):
        del tag["tabindex"]
    for code in soup.select(".highlight-ipynb"):
        code["class"] = ["highlight"]
        lines = soup.new_tag("code")
        lines.extend(list(code.pre.contents))
        code.pre.append(lines)
    for wide in soup.select(".jp-OutputArea-output:has(pre, table)"):
        wide["tabindex"] = "0"  # the arrow keys scroll it
        wide["class"].append("wide")
    for frame in soup.select("table.dataframe, .dataframe tr"):
        frame.attrs.clear()  # the theme styles tables without attributes
    for corner in soup.select("th:empty"):
        corner.name = "td"
    for image in soup.select(".jp-OutputArea img"):
        image["alt"] = "Figure drawn by the code above"
    return str(soup)


def build_site(run: Path | None = None, site: Path = REPO / "site") -> Path:
    """Build the site.

    Args:
        run: A run's folder, whose `report.html` and `playground.html` become part of the site.
        site: The folder to write; what it held is deleted.

    Returns:
        The site's folder.
    """
    shutil.rmtree(PAGES, ignore_errors=True)
    top = [REPO / name for name in TOP_PAGES if (REPO / name).is_file()]
    guides = sorted((REPO / "docs").glob("*.md"))
    notebooks = sorted((REPO / "notebooks").glob("*.ipynb"))
    solutions = sorted((REPO / "notebooks").glob("*/*.ipynb"))
    gather([*top, *guides, *notebooks, *solutions, *(REPO / ASSETS).iterdir()])
    fetch_packages()
    pages = [{title_of(path): str(path.relative_to(REPO))} for path in notebooks]
    if solutions:
        pages.append({"Solutions": [{title_of(p): str(p.relative_to(REPO))} for p in solutions]})
    nav = [{"Home": "README.md"}, {"Notebooks": pages}]
    nav.append({"Guides": [str(path.relative_to(REPO)) for path in [*guides, *top[1:]]]})
    nav.append({"API": write_api()})
    shown = [run / f"{name}.html" for name in ("report", "playground")] if run else []
    if shown := [path for path in shown if path.is_file()]:
        (PAGES / "run").mkdir()
        for path in shown:
            shutil.copy(path, PAGES / "run")
        nav.append({"A run": [{path.stem.capitalize(): f"run/{path.name}"} for path in shown]})
    if LABORATORY.is_file():
        (PAGES / "laboratory").mkdir()
        shutil.copy(LABORATORY, PAGES / "laboratory")
        nav.append({"Laboratory": f"laboratory/{LABORATORY.name}"})
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    config = load_config(str(REPO / "mkdocs.yml"), nav=nav, site_dir=str(site))
    config.plugins.run_event("startup", command="build", dirty=False)
    build(config)
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 2**20
    print(f"{site}: {size:.1f} MiB")
    return site


def main() -> None:
    """Build."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, help="the run's folder; runs/demo if that is there")
    run = parser.parse_args().run
    demo = REPO / "runs/demo"
    try:
        build_site(run or (demo if demo.is_dir() else None))
    except MkDocsException as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
