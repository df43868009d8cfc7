"""A run's pages and the site: narrow and wide, light and dark, opened from disk."""

from pathlib import Path

import pytest

from tests.helpers import load_script

pytestmark = pytest.mark.e2e
FITS = (Path(__file__).parent / "fits.js").read_text(encoding="utf-8")
LOADED = "() => document.fonts.ready.then(() => true)"


@pytest.fixture(scope="session")
def site(smoke_run: Path, tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="install the extra site")
    return load_script("site").build_site(smoke_run, tmp_path_factory.mktemp("pages") / "site")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "name", ["report", "playground", "index", "notebooks/04_dpo", "api/objectives"]
)
def test_a_page_fits_is_accessible_and_alone(
    name: str, scheme: str, browser, smoke_run: Path, request, out: Path
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    of_run = name in ("report", "playground")
    folder = smoke_run if of_run else request.getfixturevalue("site")
    path = folder / f"{name}.html"
    if name == "playground" and not path.is_file():
        pytest.skip("there is no command `spavl playground` that made the page")
    page = browser.new_page(color_scheme=scheme)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    if name == "playground":
        page.get_by_text("Answered in").wait_for(timeout=120_000)
    for width in (380, 800, 1400):
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate(LOADED)
        page.screenshot(path=out / f"{path.stem}-{width}-{scheme}.png", full_page=True)
        wide = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], width
        assert page.evaluate(FITS) == [], width
        found = axe.run(page, options={"preload": False}).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in found] == [], width
    allowed = path.as_uri() if of_run else folder.as_uri()
    assert [a for a in asked if not a.startswith((allowed, "data:", "blob:"))] == []
    assert errors == []
    page.close()


def test_search_and_formulas_work_from_disk(site: Path, browser) -> None:
    page = browser.new_page()
    page.goto((site / "notebooks/04_dpo.html").as_uri())
    page.locator(".katex-display .mfrac").first.wait_for()
    page.locator(".md-search__input").fill("look-alikes")
    page.locator(".md-search-result__item", has_text="look-alike").first.wait_for()
    page.close()
