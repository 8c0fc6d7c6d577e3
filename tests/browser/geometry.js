// What overlaps, overflows or lies outside, in words; an empty list for a page that is whole at this width.
() => {
  const found = [];
  const shown = one => one.getClientRects().length > 0;
  const name = one => `${one.tagName}.${one.getAttribute('class') || ''} "${one.textContent.trim().slice(0, 40)}"`;
  const apart = (a, b) =>
    a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
  const compare = (boxes, what, near) => {
    for (let i = 1; i < boxes.length; i++)
      for (let j = Math.max(0, i - near); j < i; j++)
        if (!apart(boxes[i][1], boxes[j][1])) found.push(`${what}: ${name(boxes[i][0])} and ${name(boxes[j][0])}`);
  };
  const boxesOf = list => [...list].filter(shown).map(one => [one, one.getBoundingClientRect()]);

  const wide = document.scrollingElement.scrollWidth;
  if (wide > innerWidth) found.push(`the page is ${wide} wide in ${innerWidth}`);

  for (const one of document.querySelectorAll('body *')) {
    if (!shown(one) || one.closest('svg') || (one.closest('.scroll') && !one.matches('.scroll'))) continue;
    const box = one.getBoundingClientRect();
    if (box.left < -1 || box.right > innerWidth + 1) found.push(`outside: ${name(one)}, ${box.left} to ${box.right}`);
    if (!one.matches('.scroll') && one.clientWidth && one.scrollWidth > one.clientWidth + 1)
      found.push(`overflows: ${name(one)}, ${one.scrollWidth} in ${one.clientWidth}`);
  }
  for (const cell of document.querySelectorAll('td, th'))
    if (shown(cell) && cell.scrollWidth > cell.clientWidth + 1) found.push(`overflows its cell: ${name(cell)}`);

  for (const parent of document.querySelectorAll('body, main, section, article, header, figure, .figures, .flow, ul, dl'))
    if (shown(parent)) compare(boxesOf(parent.children), 'overlap', 8);

  for (const drawing of document.querySelectorAll('svg')) {
    if (!shown(drawing)) continue;
    const frame = drawing.getBoundingClientRect();
    const texts = boxesOf(drawing.querySelectorAll('text'));
    for (const [one, box] of texts)
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1 || box.top < frame.top - 3)
        found.push(`outside its drawing: ${name(one)}`);
    compare(texts, 'texts overlap', 200);
  }
  return [...new Set(found)].slice(0, 12);
}
