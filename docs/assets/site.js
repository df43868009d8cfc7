"use strict";
// Formulas, with KaTeX: `.arithmatex` in Markdown pages, `$...$` in the prose of notebooks. And what
// the theme leaves out for readers without a mouse or without sight.
document.addEventListener("DOMContentLoaded", () => {
  const delimiters = [
    { left: "$$", right: "$$", display: true },
    { left: "\\[", right: "\\]", display: true },
    { left: "\\(", right: "\\)", display: false },
    { left: "$", right: "$", display: false },
  ];
  for (const element of document.querySelectorAll(".arithmatex, .jp-RenderedMarkdown"))
    window.renderMathInElement?.(element, { delimiters, throwOnError: false });

  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  const names = new Map();
  const name = (nav, label) => {
    const count = (names.get(label.toLowerCase()) ?? 0) + 1;
    names.set(label.toLowerCase(), count);
    nav.ariaLabel = count > 1 ? `${label} ${count}` : label;
  };
  document.querySelectorAll("nav[aria-label]").forEach((nav) => name(nav, nav.ariaLabel));
  const complete = () => {
    document.querySelectorAll("nav:not([aria-label], [aria-labelledby])").forEach((nav) => name(nav, "Code"));
    document.querySelectorAll(".md-typeset__scrollwrap, .katex-display").forEach((box) => { box.tabIndex = 0; });
  };
  complete();
  new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });
});
