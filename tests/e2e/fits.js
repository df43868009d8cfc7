// Elements that reach beyond the page or an ancestor that cuts them off, and cannot be scrolled to.
() => {
  const lost = [];
  const handled = (style) => style.position === "fixed" || style.textOverflow === "ellipsis" ||
    style.clipPath !== "none" || style.clip !== "auto";
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    const seen = element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
    if (!seen || !box.width || !box.height) continue;
    let [left, right, free] = [0, innerWidth, false];
    for (let up = element; up !== document.body && !free; up = up.parentElement) {
      const style = getComputedStyle(up);
      free = handled(style) || (up !== element && ["auto", "scroll"].includes(style.overflowX));
      if (up !== element && style.overflowX !== "visible") {
        const holder = up.getBoundingClientRect();
        [left, right] = [Math.max(left, holder.left), Math.min(right, holder.right)];
      }
    }
    if (!free && (box.left < left - 1 || box.right > right + 1))
      lost.push(`${element.tagName}.${element.className}: ${box.left}–${box.right} in ${left}–${right}`);
  }
  return lost;
}
