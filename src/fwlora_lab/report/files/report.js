"use strict";
// Sorting, copying, and nothing that the page could not be read without.

const said = document.getElementById("said");

function valueOf(row, column) {
  return row.cells[column].dataset.value ?? "";
}

function sort(table, column, heading) {
  const down = heading.getAttribute("aria-sort") === "ascending";
  const number = heading.classList.contains("number");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what is not known stands last, whichever way
    const order = number ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
}

async function copy(text, box) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Not allowed here: the old way, with the text in sight.
    box.hidden = false;
    box.value = text;
    box.focus();
    box.select();
    return document.execCommand("copy");
  }
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const heading of table.tHead.rows[0].cells) {
    heading.querySelector("button")?.addEventListener("click", () => sort(table, heading.cellIndex, heading));
  }
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const box = document.getElementById(button.dataset.copy);
    const done = await copy(box.defaultValue, box);
    const told = button.nextElementSibling;
    told.textContent = done ? "copied" : "selected: press Ctrl+C";
    said.textContent = told.textContent;
    setTimeout(() => { told.textContent = ""; }, 4000);
  });
}

// Paper cannot be clicked: everything is opened for it.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
