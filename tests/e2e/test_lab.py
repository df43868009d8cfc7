"""Every notebook in JupyterLab, as a reader runs it: `smoke` typed in, Run All, outputs, saved."""

import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import REPO, git

pytestmark = pytest.mark.e2e
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
CELLS = """() => {
  const panel = jupyterapp.shell.currentWidget;
  return [...panel.content.widgets].filter((cell) => cell.model.type === "code").map((cell) => ({
    source: cell.model.sharedModel.getSource(),
    done: cell.model.executionCount !== null,
    outputs: cell.model.outputs.toJSON(),
    text: cell.node.innerText,
    widgets: [...cell.node.querySelectorAll(".jupyter-widgets")].some((w) => w.offsetHeight),
    cut: [...cell.node.querySelectorAll(".jupyter-button")]
      .filter((b) => b.scrollWidth > b.clientWidth).map((b) => b.innerText),
  }));
}"""
FINISHED = f"""() => {{
  const cells = ({CELLS})().filter((cell) => cell.source.trim());
  const failed = cells.some((cell) => cell.outputs.some((o) => o.output_type === "error"));
  const {{ kernel }} = jupyterapp.shell.currentWidget.sessionContext.session;
  return failed || (kernel.status === "idle" && cells.every((cell) => cell.done));
}}"""
READY = """() => {
  const widget = window.jupyterapp?.shell.currentWidget;
  return widget?.sessionContext?.session?.kernel?.status === "idle";
}"""
SAVED = "() => !jupyterapp.shell.currentWidget.context.model.dirty"
TO_TOP = """() => {
  const scroller = jupyterapp.shell.currentWidget.node.querySelector(".jp-WindowedPanel-outer");
  scroller.scrollTop = 0;
  return scroller.scrollHeight;
}"""


def set_profile(page, before: str, after: str) -> None:
    """Double-click the profile's name in the parameters cell, and type another."""
    line = page.locator(".jp-Notebook .cm-line", has_text="profile: str").first
    line.get_by_text(f'"{before}"').dblclick()
    page.keyboard.type(after)
    line.get_by_text(f'"{after}"').wait_for()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_all(path: Path, lab: str, browser, checkout: Path, out: Path) -> None:
    url, token = lab.split()
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    outside, errors = [], []
    page.on("request", lambda request: outside.append(request.url))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{url}/lab/tree/notebooks/{path.name}?reset&token={token}")
    page.wait_for_function(READY, timeout=60_000)
    set_profile(page, "demo", "smoke")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(FINISHED, timeout=600_000)

    cells = page.evaluate(CELLS)
    page.set_viewport_size({"width": 1400, "height": min(page.evaluate(TO_TOP) + 150, 16_000)})
    page.screenshot(path=out / f"{path.stem}.png")
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [o["evalue"] for o in outputs if o["output_type"] == "error"] == []
    assert [o for o in outputs if "image/png" in o.get("data", {})]
    for cell in cells:
        assert not re.search("Error displaying|Loading widget", cell["text"]), cell["source"]
        assert cell["cut"] == []
        assert cell["widgets"] or "_panel(" not in cell["source"], cell["source"]
    assert errors == []
    addresses = {urlsplit(address) for address in outside}
    assert {a.hostname for a in addresses if a.scheme not in ("data", "blob")} == {"127.0.0.1"}

    # Saved with its outputs, the notebook is unchanged to git.
    set_profile(page, "smoke", "demo")
    page.keyboard.press("Control+s")
    page.wait_for_function(SAVED)
    assert "image/png" in (checkout / "notebooks" / path.name).read_text(encoding="utf-8")
    deadline = time.monotonic() + 30
    while (changed := git("status", "--porcelain", cwd=checkout)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert changed == ""
    header = {"Authorization": f"token {token}"}
    for kernel in page.request.get(f"{url}/api/kernels", headers=header).json():
        page.request.delete(f"{url}/api/kernels/{kernel['id']}", headers=header)
    page.close()


def test_lab_starts_in_the_notebooks_of_the_checkout(lab: str, browser) -> None:
    url, token = lab.split()
    page = browser.new_page()
    page.goto(f"{url}/lab?reset&token={token}")
    page.locator(".jp-DirListing-item", has_text=NOTEBOOKS[0].name).wait_for()
    page.locator(".jp-BreadCrumbs-home").click()
    page.locator(".jp-DirListing-item", has_text="README.md").wait_for()
    page.close()
