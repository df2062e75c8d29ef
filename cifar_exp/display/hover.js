// The values under the pointer are read back from the SVG paths, which hold all that is drawn.
const plots = document.querySelector('.plots'), tip = plots.querySelector('.tip');
const crosses = plots.querySelectorAll('.cross'), {end, epoch} = plots.dataset;
const curves = [...plots.querySelectorAll('path[data-name]')].map(({dataset, attributes}) => ({...dataset,
  points: [...attributes.d.value.matchAll(/(-?[\d.]+),(-?[\d.]+)/g)].map(found => [+found[1], +found[2]])}));
const done = Math.max(0, ...curves.flatMap(curve => curve.points.map(point => point[0]))) / 1000;
plots.addEventListener('pointermove', event => {
  if (!done) return;
  const frame = crosses[0].ownerSVGElement.getBoundingClientRect();
  const share = Math.min(done, Math.max(0, (event.clientX - frame.left) / frame.width));
  const step = Math.round(share * end);
  const lines = curves.filter(curve => curve.points.length).map(({name, top, unit, points}) => {
    const nearest = points.reduce((a, b) => Math.abs(b[0] - share * 1000) < Math.abs(a[0] - share * 1000) ? b : a);
    return `${name}: ${((1 - nearest[1] / 1000) * top).toFixed(unit ? 1 : 3)}${unit && ' ' + unit}`;
  });
  const current = Math.max(1, Math.ceil(step / epoch));
  tip.textContent = [`iteration ${step.toLocaleString('en')}, epoch ${current}`, ...lines].join('\n');
  tip.hidden = false;
  const left = frame.left - plots.getBoundingClientRect().left + share * frame.width;
  tip.style.left = `${share < .5 ? left + 14 : left - tip.offsetWidth - 14}px`;
  for (const cross of crosses) {
    for (const x of ['x1', 'x2']) cross.setAttribute(x, `${100 * share}%`);
    cross.setAttribute('visibility', 'visible');
  }
});
plots.addEventListener('pointerleave', () => {
  tip.hidden = true;
  for (const cross of crosses) cross.setAttribute('visibility', 'hidden');
});
