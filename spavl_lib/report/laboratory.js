"use strict";
// Sorts and filters the table, and opens the answers of a row. Without it every row is shown.
(() => {
  const table = document.getElementById("cells");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const answers = JSON.parse(document.getElementById("answers").textContent);
  const count = document.getElementById("row-count");
  const nothing = document.getElementById("nothing");
  const columns = table.tHead.rows[0].cells.length;
  const filters = ["method", "attack", "understood"].map((name) => [
    name,
    document.getElementById("filter-" + name),
  ]);
  const place = new Map(rows.map((row, index) => [row, index]));
  const opened = new Map();

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // --- filters and order ---

  function draw() {
    let shown = 0;
    for (const row of rows) {
      const fits = filters.every(([name, select]) =>
        !select.value || row.dataset[name] === select.value);
      row.hidden = !fits;
      if (opened.has(row)) opened.get(row).hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
    nothing.hidden = shown > 0;
  }

  function sort(header, key) {
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const name = key.replace(/_(.)/g, (_, letter) => letter.toUpperCase());
    const words = key === "method" || key === "attack";
    const column = header.cellIndex;
    const value = (row) => words ? row.cells[column].textContent : row.dataset[name];
    const ordered = [...rows].sort((a, b) => {
      const [first, second] = [value(a), value(b)];
      // Rows without the number stay last, whichever way the others are sorted.
      if (first === undefined || second === undefined) {
        return (first === undefined) - (second === undefined) || place.get(a) - place.get(b);
      }
      const order = words ? first.localeCompare(second) : Number(first) - Number(second);
      return (down ? -order : order) || place.get(a) - place.get(b);
    });
    for (const row of ordered) {
      body.append(row);
      if (opened.has(row)) body.append(opened.get(row));
    }
  }

  // --- answers ---

  function answerOf(entry, key) {
    const box = element("div", entry.unsafe ? "answer bad" : "answer");
    const where = element("p", "where");
    where.append(element("span", entry.unsafe ? "chip bad" : "chip mild", entry.kind));
    where.append(" " + entry.where);
    const prompt = element("p", "prompt", entry.prompt);
    const said = element("p", "said", entry.response);
    prompt.dir = said.dir = "auto";
    box.append(where, prompt);
    if (!entry.unsafe) {
      box.append(said);
      return box;
    }
    const veil = element("div", "veil");
    const peek = element("input", "peek");
    peek.type = "checkbox";
    peek.id = "peek-" + key;
    const label = element("label");
    label.htmlFor = peek.id;
    label.append(element("span", "on", "Show answer judged unsafe"), element("span", "off", "Hide"));
    veil.append(peek, label, said);
    box.append(veil);
    return box;
  }

  function toggle(button, row, index) {
    if (opened.has(row)) {
      opened.get(row).remove();
      opened.delete(row);
      button.setAttribute("aria-expanded", "false");
      button.removeAttribute("aria-controls");
      return;
    }
    const found = answers[row.dataset.key];
    const line = element("tr");
    const cell = element("td");
    cell.colSpan = columns;
    line.id = "answers-" + index;
    const list = element("div", "said-list");
    list.append(element("p", "hint", `Answers that went wrong, seed ${found.seed}; at most three ` +
      "of each kind and test set."));
    found.answers.forEach((entry, i) => list.append(answerOf(entry, `${index}-${i}`)));
    cell.append(list);
    line.append(cell);
    row.after(line);
    opened.set(row, line);
    button.setAttribute("aria-expanded", "true");
    button.setAttribute("aria-controls", line.id);
  }

  // --- start ---

  for (const header of table.tHead.rows[0].cells) {
    if (!header.dataset.sort) continue;
    const button = element("button", "", header.textContent);
    button.type = "button";
    button.addEventListener("click", () => sort(header, header.dataset.sort));
    header.replaceChildren(button);
  }
  rows.forEach((row, index) => {
    const button = row.querySelector("button.open");
    if (!button) return;
    button.hidden = false;
    row.querySelector(".without").remove();
    button.addEventListener("click", () => toggle(button, row, index));
  });
  filters.forEach(([, select]) => select.addEventListener("change", draw));
  document.getElementById("table-bar").hidden = false;
  draw();
})();
