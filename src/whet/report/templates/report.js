"use strict";
// Sort a table by the column whose heading was pressed; a second press turns the order round. Rows without a value stay last.
document.querySelectorAll("table.sortable th button").forEach((button) => {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const body = heading.closest("table").tBodies[0];
    const column = heading.cellIndex;
    const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    heading.parentNode.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const key = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (heading.classList.contains("number") ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
    };
    [...body.rows].sort(compare).forEach((row) => body.append(row));
  });
});

const copy = document.getElementById("copy-recipe");
if (copy) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    const text = document.getElementById("recipe");
    try {
      await navigator.clipboard.writeText(text.textContent);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      copy.textContent = "Selected: copy it with your keyboard";
    }
  });
}

const save = document.getElementById("save-json");
save.hidden = false;
save.addEventListener("click", () => {
  const data = JSON.parse(document.getElementById("report-json").textContent);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  link.download = "report.json";
  link.click();
});

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
