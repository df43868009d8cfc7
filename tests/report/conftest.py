"""One whole run, written once, and its page."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from spavl_lib.report import write_report
from tests.report.synthetic import write_run

VOID = {"meta", "img", "input", "br", "link", "base", "hr", "source"}


class Page(HTMLParser):
    """A parsed page: its elements with their attributes and text, in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.source = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    @property
    def text(self) -> str:
        """What a reader sees."""
        seen = (t for path, t in self.texts if not {"script", "style"} & set(path))
        return " ".join(" ".join(seen).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a kind, `class_` holding a word of `class`."""
        found = [a for t, a in self.elements if t == tag]
        word = attributes.pop("class_", None)
        if word:
            found = [a for a in found if word in (a.get("class") or "").split()]
        return [a for a in found if all(a.get(k) == v for k, v in attributes.items())]


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with two models, one row a class and set; not to be changed."""
    root = tmp_path_factory.mktemp("report") / "made-up"
    return write_run(root, rows_per_class=2, overrides={"dpo.beta": 0.2, "seed": 3})


@pytest.fixture(scope="session")
def page(run_path: Path) -> Page:
    """Its report, parsed."""
    return Page(write_report(run_path).read_text(encoding="utf-8"))
