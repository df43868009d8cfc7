"use strict";
// Pages and filters the gallery. Without it every tile is shown and all else works.
(() => {
  const gallery = document.getElementById("tiles");
  if (!gallery) return;
  const PAGE = 12;
  const tiles = [...gallery.children];
  const filters = ["class", "set", "change"].map((name) => [
    name,
    document.getElementById("filter-" + name),
  ]);
  const count = document.getElementById("tile-count");
  const more = document.getElementById("more");
  let room = PAGE;

  const matches = (tile) =>
    filters.every(([name, select]) => !select.value || tile.dataset[name] === select.value);

  function draw() {
    const found = tiles.filter(matches);
    tiles.forEach((tile) => { tile.hidden = true; });
    found.slice(0, room).forEach((tile) => { tile.hidden = false; });
    count.textContent = `${Math.min(room, found.length)} of ${found.length} shown`;
    more.hidden = found.length <= room;
  }

  filters.forEach(([, select]) =>
    select.addEventListener("change", () => { room = PAGE; draw(); }));
  more.addEventListener("click", () => {
    const next = tiles.filter(matches)[room];
    room += PAGE;
    draw();
    if (next) next.focus({ preventScroll: true });
  });
  document.getElementById("gallery-bar").hidden = false;
  draw();
})();
