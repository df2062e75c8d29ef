"""Style and scripts of the HTML pages."""

# Colours: Okabe and Ito's, told apart by the colour-blind (https://jfly.uni-koeln.de/color/), lighter ones on dark.
STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #1b1f24; --soft: #59636e; --edge: #dfe3e8;
  --band: #f0f2f6; --accuracy: #0072b2; --loss: #d55e00; --drop: #8a3f74; --good: #007a55; --bad: #b3261e;
  --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1116; --card: #171b22; --ink: #e8ebef; --soft: #9da7b3;
  --edge: #2b323c; --band: #1e242d; --accuracy: #56b4e9; --loss: #f08c46; --drop: #dd9ac4; --good: #3fc796;
  --bad: #ff8a80; --warn: #e6b450; } }
* { box-sizing: border-box; margin: 0; }
body { max-width: 1320px; margin: auto; padding: 20px 24px 12px; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
header { display: flex; align-items: center; gap: 14px; }
h1 { font-size: 22px; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 14px; font-weight: 650; margin-bottom: 8px; }
.badge { padding: 2px 11px; border: 1.5px solid; border-radius: 99px; font-size: 13px; font-weight: 600;
  color: var(--soft); }
.badge.running { color: var(--accuracy); } .badge.finished { color: var(--good); }
.badge.failed { color: var(--bad); } .badge.stopped { color: var(--warn); }
.progress { height: 8px; margin: 14px 0 4px; border-radius: 4px; background: var(--edge); overflow: hidden; }
.progress i { display: block; height: 100%; border-radius: 4px; background: var(--accuracy); }
.progress.finished i { background: var(--good); } .progress.failed i { background: var(--bad); }
.progress.stopped i { background: var(--warn); }
.progress-text { display: flex; justify-content: space-between; color: var(--soft); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(142px, 1fr)); gap: 10px; margin: 12px 0; }
.tiles div, section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tiles div { padding: 8px 13px 9px; }
dt::first-letter, th::first-letter { text-transform: uppercase; }
.tiles dt { color: var(--soft); font-size: 12.5px; white-space: nowrap; }
.tiles dd { font-size: 20px; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
main { display: grid; grid-template-columns: minmax(0, 1fr) 320px; gap: 12px; align-items: start; }
aside { display: grid; gap: 12px; }
section { padding: 14px 16px; }
.plots { position: relative; padding: 14px 26px 36px 70px; }
.plots > svg { position: absolute; }
.curves { overflow: visible; } .curves path { clip-path: url(#room); }
figure + figure { margin-top: 14px; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 18px; margin: 0 0 30px -54px; }
figcaption b { margin-right: auto; font-weight: 650; }
.loss figcaption { margin-bottom: 10px; }
.accuracy { --line: var(--accuracy); } .loss { --line: var(--loss); }
.key { color: var(--soft); font-size: 12.5px; }
.key::before { content: ""; display: inline-block; width: 22px; margin-right: 6px; vertical-align: middle;
  border-top: 2.5px solid var(--line); }
.key.raw::before { opacity: .35; } .key.validation::before { border-top: 2.5px dashed var(--ink); }
.frame { display: block; width: 100%; height: clamp(190px, 27vh, 340px); overflow: visible; }
.frame text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.frame .middle { text-anchor: middle; } .frame .end { text-anchor: end; }
.frame text.drop { fill: var(--drop); font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
path, line { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }
.ground { fill: var(--card); } .bands { fill: var(--band); }
.grid { stroke: var(--edge); } line.drop { stroke: var(--drop); stroke-width: 1.5; stroke-dasharray: 2 4; }
path.raw { stroke: var(--line); opacity: .3; } path.smooth { stroke: var(--line); stroke-width: 2.2; }
path.validation { stroke: var(--ink); stroke-width: 1.3; stroke-dasharray: 3 4; opacity: .75; }
.dots { stroke: var(--ink); stroke-width: 5.5; }
.cross { stroke: var(--soft); }
.tip { position: absolute; top: 52px; padding: 7px 11px; border: 1px solid var(--edge); border-radius: 8px;
  background: var(--card); box-shadow: 0 3px 14px #0003; font-size: 12.5px; white-space: pre; pointer-events: none;
  font-variant-numeric: tabular-nums; }
.waiting { position: absolute; inset: 27% 0 auto; text-align: center; color: var(--soft); }
table { width: 100%; border-collapse: collapse; font-size: 13px; }
th { padding: 5px 12px 5px 0; text-align: left; vertical-align: top; font-weight: 400; color: var(--soft);
  white-space: nowrap; }
td { padding: 5px 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
tr + tr > * { border-top: 1px solid var(--edge); }
.shares td { padding-left: 12px; text-align: right; white-space: nowrap; }
.split { display: flex; gap: 2px; height: 18px; margin-bottom: 6px; border-radius: 5px; overflow: hidden; }
.split i { flex-basis: 0; min-width: 1px; }
.shares i { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 3px; }
.part0 { background: #0072b2; } .part1 { background: #e69f00; } .part2 { background: #009e73; }
.part3 { background: #cc79a7; } .part4 { background: #56b4e9; } .part5 { background: #d55e00; }
.part6 { background: #b8ac1f; } .part7 { background: #7d8590; } .part8 { background: #6f5bb0; }
footer { margin-top: 10px; color: var(--soft); font-size: 12px; }
@media (max-width: 900px) { main { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 640px) { body { padding: 14px 12px; } }
"""
# The values under the pointer are read back from the paths, which hold all that is drawn.
HOVER_SCRIPT = """
const plots = document.querySelector('.plots'), tip = plots.querySelector('.tip');
const crosses = plots.querySelectorAll('.cross'), {end, epoch} = plots.dataset;
const curves = [...plots.querySelectorAll('path[data-name]')].map(({dataset, attributes}) => ({...dataset,
  points: [...attributes.d.value.matchAll(/(-?[\\d.]+),(-?[\\d.]+)/g)].map(found => [+found[1], +found[2]])}));
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
  tip.textContent = [`iteration ${step.toLocaleString('en')}, epoch ${current}`, ...lines].join('\\n');
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
"""
# Loading again keeps the scroll position; it waits while somebody reads values off the curves.
RELOAD_SCRIPT = "setInterval(() => { if (tip.hidden) location.reload(); }, 2000);\n"
