// The element that has the keyboard: the number of the stop, its outline, and whether it is in view.
() => {
  const one = document.activeElement;
  const style = getComputedStyle(one);
  const box = one.getBoundingClientRect();
  one.dataset.stop ??= String(document.querySelectorAll('[data-stop]').length);
  return {
    tag: one.tagName,
    stop: Number(one.dataset.stop),
    outline: style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth),
    seen: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
  };
}
