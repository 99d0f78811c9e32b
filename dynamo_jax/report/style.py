"""The look of the report: colours are CSS variables, which follow the reader's light or dark mode; prints are light.

A chart of class ``fluid`` fills the page. On a small screen it keeps its size and scrolls, and a hint says so; a
``panel`` shrinks to the screen.
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #5c6670; --line: #d5dae0; --panel: #f4f6f8;
  --none: #c9ced4; --better: #0072b2; --worse: #c04f00; --auto: #00805d; --rtn: #8a939c; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ec; --soft: #a2acb6;
  --line: #363d45; --panel: #1d2228; --none: #4a525b; --better: #56b4e9; --worse: #f08a3c; --auto: #2fc09a;
  --rtn: #8a939c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, "Segoe UI", Helvetica, Arial,
  sans-serif; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
main { max-width: 1100px; margin: 0 auto; padding: 28px 28px 60px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; padding-top: .7rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1rem 0 .15rem; overflow-wrap: anywhere; }
p { max-width: 80ch; } .lead { font-size: 1.15rem; margin: 0 0 1rem; } .soft, figcaption { color: var(--soft); }
nav { font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1.2rem; } a { color: inherit; }
.key { display: inline-flex; align-items: center; gap: .3rem; margin-right: 1.4rem; font-size: .88rem; }
ul.findings { list-style: none; padding: 0; margin: 0; }
ul.findings li { padding: .35rem .8rem; border-left: 4px solid var(--line); margin: .35rem 0; background: var(--panel);
  overflow-wrap: anywhere; }
ul.findings li.better { border-color: var(--better); } ul.findings li.worse { border-color: var(--worse); }
figure { margin: 1rem 0 1.6rem; } figcaption { font-size: .88rem; max-width: 95ch; margin-top: .5rem; }
.plot { overflow-x: auto; } .hint { display: none; margin: 0 0 .3rem; font-size: .85rem; color: var(--soft); }
figure.first { margin: 1.2rem 0; }
.beside { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; align-items: flex-start; }
svg { display: block; max-width: 100%; height: auto; font-size: 11px; } svg.fluid, svg.panel { width: 100%; }
.panels { display: flex; flex-wrap: wrap; gap: .5rem 2rem; } .panels > div { flex: 1 1 400px; min-width: 0; }
.panels h3 { margin-top: 0; }
svg text { fill: var(--soft); } svg text.ink, svg text.label { fill: var(--ink); } svg text.label { font-size: 12px; }
svg text.on-dark { fill: #fff; } svg text.on-light { fill: #111; }
svg .cell text { font-size: 10px; pointer-events: none; }
h3 + svg { margin-bottom: .6rem; }
svg .line { stroke: var(--line); } svg .zero { stroke: var(--soft); }
svg .trace { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.rtn { --mark: var(--rtn); } .baseline { --mark: var(--ink); } .auto { --mark: var(--auto); }
.better { --mark: var(--better); } .worse { --mark: var(--worse); } .noise, .same, .unknown { --mark: var(--soft); }
.strip .mark { fill-opacity: .6; }
svg .mark { fill: var(--mark, var(--ink)); stroke: var(--mark, var(--ink)); }
table.wide td.word { white-space: nowrap; } table.wide td.word:last-child { color: var(--mark); }
tr.auto td.word { font-weight: 600; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td { white-space: nowrap; } td.word, th.word { text-align: left; overflow-wrap: break-word; }
td.word { white-space: normal; } table.facts td:last-child { overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tr.group th { text-align: left; background: var(--panel); padding-top: .45rem; }
table.wide td.word:first-child { padding-left: 1.6rem; }
table.matrix td { text-align: center; border: 2px solid var(--paper); } table.matrix th { border: 0; font-weight: 400; }
table.wide { width: 100%; }
pre { background: var(--panel); padding: .7rem 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
@media screen and (max-width: 760px) { main { padding: 16px; } .hint { display: block; }
  .plot svg { max-width: none; } svg.fluid { width: auto; } .plot svg.panel { max-width: 100%; }
  table.wide td.word:first-child { position: sticky; left: 0; background: var(--paper); padding-left: .3rem; } }
@media print { html { font-size: 12px; } table { font-size: .85rem; } th, td { padding: .15rem .4rem; }
  main { max-width: none; padding: 0; } nav { display: none; } h2, h3 { break-after: avoid; }
  figure.whole, tbody, svg, li { break-inside: avoid; } }
"""
