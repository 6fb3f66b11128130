// Style sheet and hover script of report.html. Inline: the report is one file and asks for nothing.
#pragma once

namespace cambium {

// Colours are variables with a light and a dark value; boxes follow the width of the window.
inline constexpr const char* kReportStyle = R"css(
:root { color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1d1d1b; --soft: #64645f; --rule: #e4e4de;
  --blue: #2468c8; --orange: #c9591a; --green: #1d8a5a; --violet: #7a4fc4;
  --heat-over: 201 89 26; --heat-under: 36 104 200; --good: #1d7a4d; --bad: #b3261e;
  --open: #8a6100; }
@media (prefers-color-scheme: dark) { :root {
  --page: #151614; --card: #1f211e; --ink: #ecece6; --soft: #a3a49c; --rule: #35372f;
  --blue: #6ea8ff; --orange: #f0925a; --green: #55c795; --violet: #b394f0;
  --heat-over: 240 146 90; --heat-under: 110 168 255; --good: #55c795; --bad: #ff8a80;
  --open: #e0b64c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
header, main { max-width: 1200px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; }
header p { flex-basis: 100%; margin: 0; color: var(--soft); }
main { padding-top: 18px; padding-bottom: 40px; display: grid; gap: 16px;
  grid-template-columns: minmax(0, 1fr); }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0; }
.badge { font-size: 13px; font-weight: 600; padding: 2px 10px; border-radius: 99px;
  border: 1px solid currentColor; }
.badge.good { color: var(--good); } .badge.bad { color: var(--bad); }
.badge.open { color: var(--open); }
.tiles { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 16px; display: flex; flex-direction: column; }
.tile span, .tile em, .note { color: var(--soft); font-size: 13px; font-style: normal; }
.tile strong { font-size: 23px; font-weight: 650; font-variant-numeric: tabular-nums; }
.card { padding: 14px 16px; min-width: 0; }
.note { margin: 1px 0 0; }
.grid { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.grid > :last-child:nth-child(odd) { grid-column: 1 / -1; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin-top: 4px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; }
.legend i.faint { opacity: .4; }
.plot { position: relative; height: 190px; margin: 16px 12px 26px 46px; touch-action: pan-y; }
.wide .plot { height: 320px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; }
.line { stroke-width: 2; stroke-linejoin: round; }
.line.faint { stroke-width: 1; opacity: .4; } .line.thin { stroke-width: 1.5; }
.dots { stroke-width: 7; stroke-linecap: round; }
path.grid { stroke: var(--rule); stroke-width: 1; }
path.level { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
.plot span { position: absolute; font-size: 12px; color: var(--soft); white-space: nowrap;
  font-variant-numeric: tabular-nums; pointer-events: none; }
.plot .y { right: calc(100% + 7px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 5px); transform: translateX(-50%); }
.plot span.level { right: 2px; transform: translateY(-108%); color: var(--ink); }
.plot span.level.under { transform: translateY(8%); }
.cross { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft);
  pointer-events: none; }
.tip { position: absolute; top: 4px; z-index: 1; background: var(--card); color: var(--ink);
  border: 1px solid var(--rule); border-radius: 6px; padding: 4px 8px; font-size: 12px;
  white-space: pre; pointer-events: none; font-variant-numeric: tabular-nums;
  box-shadow: 0 2px 8px rgb(0 0 0 / .18); }
.heat { width: 100%; border-collapse: separate; border-spacing: 2px; table-layout: fixed;
  margin-top: 10px; font-size: 12px; font-variant-numeric: tabular-nums; }
.heat th { color: var(--soft); font-weight: 400; padding: 0; }
.heat th:first-child { width: 38px; }
.heat td { height: 30px; text-align: center; border-radius: 4px; padding: 0; }
.heat td.over { background: rgb(var(--heat-over) / var(--a)); }
.heat td.under { background: rgb(var(--heat-under) / var(--a)); }
.heat b { font-weight: 400; }
.heat.close b { font-size: 10px; } .heat.dense tr:first-child th { font-size: 0; }
.grid > .full { grid-column: 1 / -1; }
.heat.dense { border-spacing: 1px; } .heat.dense td { height: 14px; border-radius: 2px; }
.facts { border-collapse: collapse; margin-top: 8px; width: 100%; }
.facts th { text-align: left; font-weight: 400; color: var(--soft); padding: 3px 16px 3px 0;
  vertical-align: top; white-space: nowrap; width: 1%; }
.facts td { overflow-wrap: anywhere; padding: 3px 0; }
pre { margin: 10px 0 0; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre.sample { font: 15px/1.6 Georgia, serif; max-width: 75ch; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 520px) { header, main { padding-left: 12px; padding-right: 12px; }
  .heat b { font-size: 9px; } .heat.close b { display: none; } .wide .plot { height: 240px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; } .tile { padding: 10px 12px; }
  .tile strong { font-size: 19px; } }
@media print { .card { break-inside: avoid; } }
)css";

// A vertical line and the values at the step nearest to the pointer.
inline constexpr const char* kReportScript = R"js(
for (const plot of document.querySelectorAll('.plot')) {
  const data = JSON.parse(plot.querySelector('script').textContent);
  const cross = plot.querySelector('.cross'), tip = plot.querySelector('.tip');
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return x - xs[low] < xs[high] - x ? low : high;
  };
  const hide = () => { cross.hidden = tip.hidden = true; };
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('pointermove', event => {
    const box = plot.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    if (at < 0 || at > 1 || !data.series.length || !data.series[0].x.length) return hide();
    const [first, last] = data.x;
    const main = data.series[0];
    const step = main.x[nearest(main.x, first + at * (last - first))];
    const left = (step - first) / (last - first) * 100;
    const lines = ['step ' + step.toLocaleString('en')];
    for (const one of data.series) {
      const value = one.y[nearest(one.x, step)];
      if (one.x.length) lines.push(one.name + '  ' + (value === null ? 'not finite' : value));
    }
    tip.textContent = lines.join('\n');
    cross.hidden = tip.hidden = false;
    cross.style.left = left + '%';
    tip.style.left = left < 50 ? 'calc(' + left + '% + 8px)' : 'auto';
    tip.style.right = left < 50 ? 'auto' : 'calc(' + (100 - left) + '% + 8px)';
  });
}
)js";

}  // namespace cambium
