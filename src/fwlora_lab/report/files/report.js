"use strict";
// Sorts tables and copies texts; the page can be read without it.

const announcement = document.getElementById("announcement"); // read out by screen readers

function valueOf(row, column) {
  return row.cells[column].dataset.value ?? "";
}

function sort(table, column, heading) {
  const down = heading.getAttribute("aria-sort") === "ascending";
  const number = heading.classList.contains("number");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    if (x === "" || y === "") return (x === "") - (y === ""); // unknown values come last in either direction
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
    // The browser refuses: select the text in a visible box, and use the older interface.
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
    const message = button.nextElementSibling;
    message.textContent = done ? "copied" : "selected: press Ctrl+C";
    announcement.textContent = message.textContent;
    setTimeout(() => { message.textContent = ""; }, 4000);
  });
}

// On paper nothing can be opened, so everything is open while the page is printed.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
