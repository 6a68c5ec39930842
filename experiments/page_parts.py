"""The style and the script of a page.

The colours are those of the figures (``canvas``). The script makes headers into buttons, so that a table is sorted by
pointer and by keyboard and says so to a screen reader (``aria-sort``, the pattern of the WAI-ARIA authoring practices);
it reads numbers from ``data-value``, else from the start of a cell's text, and puts missing ones last both ways. A long
table gets a box to filter its rows by words.
"""

from experiments.canvas import BLUE, GREEN, INK, ORANGE, SKY

STYLE = (
    """
:root { color-scheme: light dark; --ink: INK; --paper: #ffffff; --faint: #5f5f5f; --line: #dcdcdc; --head: #f2f4f6;
  --link: BLUE; --best: #e2f3ed; --edge: GREEN; --front: ORANGE; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #17191c; --faint: #a8a8a8; --line: #3a3e44;
  --head: #24282d; --link: SKY; --best: #12382c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 1rem clamp(0.75rem, 3vw, 2rem) 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; padding-bottom: 0.25rem; border-bottom: 2px solid var(--link); }
p, ul { max-width: 75ch; margin: 0.5rem 0; }
a { color: var(--link); }
.scroll { overflow: auto; max-height: 85vh; margin: 0.8rem 0 0.4rem; border: 1px solid var(--line);
  border-radius: 6px; width: fit-content; max-width: 100%; }
.scroll:focus-visible, button:focus-visible, input:focus-visible, summary:focus-visible, a:focus-visible {
  outline: 3px solid var(--front); outline-offset: 1px; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
h3 { font-size: 0.95rem; margin: 1.2rem 0 0.4rem; max-width: 90ch; }
th, td { padding: 0.3rem 0.55rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
td.long { white-space: normal; min-width: 18rem; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--head); border-bottom: 2px solid var(--line); }
.number { text-align: right; }
td.best { background: var(--best); font-weight: 700; box-shadow: inset 3px 0 0 var(--edge); }
tr.front td:first-child { box-shadow: inset 4px 0 0 var(--front); }
tfoot td { border-top: 2px solid var(--line); border-bottom: 0; font-style: italic; }
.mark { font-style: normal; }
.legend { font-size: 0.85rem; color: var(--faint); margin: 0.1rem 0; }
thead button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0.1rem 0;
  cursor: pointer; white-space: nowrap; }
thead button::after { content: "\\2195"; opacity: 0.35; padding-left: 0.35em; }
th[aria-sort="ascending"] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "\\2193"; opacity: 1; }
.filter { display: flex; flex-wrap: wrap; gap: 0.5rem 0.8rem; align-items: center; margin-top: 0.8rem; }
.filter input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--faint);
  border-radius: 4px; padding: 0.2rem 0.5rem; max-width: 60vw; }
.filter output { color: var(--faint); font-size: 0.85rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  margin: 0.8rem 0; align-items: start; }
figure { margin: 0; padding: 0.6rem; border: 1px solid var(--line); border-radius: 6px; background: #ffffff;
  color: INK; text-align: center; }
figure.wide { grid-column: 1 / -1; overflow-x: auto; }
figure img { max-width: 100%; height: auto; }
figure.wide img { min-width: 40rem; }
figcaption { font-size: 0.9rem; text-align: left; padding-top: 0.4rem; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow: auto; max-height: 70vh; padding: 0.8rem; background: var(--head); border-radius: 6px;
  font-size: 0.85rem; overflow-wrap: normal; }
@media print { .scroll, pre { max-height: none; overflow: visible; } .filter { display: none; } }
""".replace("INK", INK)
    .replace("BLUE", BLUE)
    .replace("GREEN", GREEN)
    .replace("ORANGE", ORANGE)
    .replace("SKY", SKY)
)

SCRIPT = """
"use strict";
const LONG = 12;

function key(cell) {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim();
  if (text === "" || text === "\\u2013") return null;
  return /^[-+]?[0-9]*\\.?[0-9]+(e[-+]?[0-9]+)?( |$)/.test(text) ? parseFloat(text) : text;
}

function compare(a, b) {
  if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return typeof a === "number" ? -1 : 1;
}

function sort(table, rows, column, direction) {
  const keyed = rows.map((row) => [key(row.cells[column]), row]);
  const there = keyed.filter(([value]) => value !== null).sort((a, b) => direction * compare(a[0], b[0]));
  const missing = keyed.filter(([value]) => value === null);
  table.tBodies[0].append(...there.concat(missing).map(([, row]) => row));
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], rows = [...table.tBodies[0].rows];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(table, rows, column, descending ? -1 : 1);
    });
  });
}

function filterable(table) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length <= LONG) return;
  const box = document.createElement("div"), label = document.createElement("label");
  const input = document.createElement("input"), count = document.createElement("output");
  box.className = "filter";
  input.type = "search";
  input.placeholder = "words";
  label.append("Filter ", input);
  box.append(label, count);
  table.parentElement.before(box);
  const show = () => {
    const words = input.value.toLowerCase().split(/\\s+/);
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    count.textContent = rows.filter((row) => !row.hidden).length + " of " + rows.length + " rows";
  };
  input.addEventListener("input", show);
  show();
}

for (const table of document.querySelectorAll("table")) {
  sortable(table);
  filterable(table);
}
"""
