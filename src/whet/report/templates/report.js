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

// Values under the pointer, under a finger, and by the arrow keys on a chart that has the focus. Without scripts, titles tell them.
const tip = document.createElement("div");
tip.id = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);

const tell = (text, x, y) => {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y - height - 12 < 8 ? y + 18 : y - height - 12}px`;
};
const leave = (chart) => {
  tip.hidden = true;
  chart.querySelectorAll(".on").forEach((part) => part.classList.remove("on"));
  chart.querySelectorAll(".cursor").forEach((part) => part.remove());
};

// Each kind of chart says how many places it has, which is under the pointer, and how to show one: its text, and where.
const marks = (chart) => {
  const parts = [...chart.querySelectorAll(".hit")];
  parts.forEach((part) => {
    const title = part.querySelector("title");
    part.dataset.tip = title.textContent;
    part.setAttribute("aria-label", title.textContent);
    title.remove();
  });
  return {
    count: parts.length,
    at: (event) => parts.indexOf(event.target.closest(".hit")),
    show: (index) => {
      parts[index].classList.add("on");
      const centre = (part) => {
        const box = part.querySelector(".halo").getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2];
      };
      const [x, y] = centre(parts[index]);
      const covered = parts.filter((part, i) => i !== index && Math.hypot(centre(part)[0] - x, centre(part)[1] - y) < 5);
      return [[parts[index], ...covered].map((part) => part.dataset.tip).join("\n\n"), x, y];
    },
  };
};
const bins = (chart) => {
  chart.querySelector("title").remove();
  const [before, after] = [chart.dataset.before, chart.dataset.after].map((counts) => counts.split(",").map(Number));
  const [low, high, total] = [Number(chart.dataset.low), Number(chart.dataset.high), before.reduce((a, b) => a + b, 0)];
  const edge = (index) => Number((low + ((high - low) * index) / before.length).toPrecision(3));
  const share = (count) => `${count.toLocaleString("en")} (${((100 * count) / total).toFixed(1)} %)`;
  return {
    count: before.length,
    at: (event) => {
      const box = chart.getBoundingClientRect();
      return Math.min(before.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * before.length)));
    },
    show: (index) => {
      const { width, height } = chart.viewBox.baseVal;
      const cursor = document.createElementNS(chart.namespaceURI, "rect");
      const place = { class: "cursor", x: (width * index) / before.length, y: 0, width: width / before.length, height };
      Object.entries(place).forEach(([name, value]) => cursor.setAttribute(name, value));
      chart.append(cursor);
      const box = cursor.getBoundingClientRect();
      const said = `${edge(index)} to ${edge(index + 1)}\nbefore: ${share(before[index])}\nafter: ${share(after[index])}`;
      return [said, box.left + box.width / 2, box.top];
    },
  };
};
document.querySelectorAll("svg.chart").forEach((chart) => {
  const places = chart.classList.contains("hist") ? bins(chart) : marks(chart);
  if (!places.count) return;
  let current = -1;
  const show = (index) => {
    leave(chart);
    current = index;
    if (index >= 0) tell(...places.show(index));
  };
  chart.tabIndex = 0;
  chart.addEventListener("pointermove", (event) => show(places.at(event)));
  chart.addEventListener("pointerdown", (event) => show(places.at(event)));
  // A lifted finger leaves the values standing, until it touches something else or scrolls.
  chart.addEventListener("pointerleave", (event) => event.pointerType === "touch" || leave(chart));
  chart.addEventListener("pointercancel", () => leave(chart));
  document.addEventListener("pointerdown", (event) => chart.contains(event.target) || leave(chart), true);
  chart.addEventListener("blur", () => leave(chart));
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") leave(chart);
    if (!step) return;
    event.preventDefault();
    show(current < 0 ? 0 : (current + step + places.count) % places.count);
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
