"use strict";
// Reads lanes and levels at the pointer. The pictures themselves are drawn by timeline.py and need no script.
(() => {
  const { end, memory } = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  document.documentElement.classList.add("scripted");
  const plots = all(".timed .plot");
  const shown = document.getElementById("moment");
  const peaks = new Map(all("[data-level]").map((b) => [b.dataset.level, b.textContent]));

  const size = (bytes) => {
    const units = ["KiB", "MiB", "GiB", "TiB"];
    let value = bytes / 1024, unit = 0;
    while (Math.abs(value) >= 1024 && unit < 3) { value /= 1024; unit += 1; }
    return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}`;
  };
  const seconds = (s) => s < 1 ? `${(s * 1000).toPrecision(3)} ms` : `${s.toPrecision(4)} s`;

  // Levels hold from their time on until the next.
  const level = ({ x, y }, time) => {
    let low = 0, high = x.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (x[middle] <= time) low = middle; else high = middle - 1;
    }
    return y[low];
  };

  const doing = (lane, place) => {
    const bar = all("rect", lane).find((r) => {
      const start = Number(r.getAttribute("x"));
      return place >= start && place < start + Number(r.getAttribute("width"));
    });
    return bar ? `${lane.dataset.lane}: ${bar.querySelector("title").textContent.split(",")[0]}` : null;
  };

  const read = (share) => {
    for (const plot of plots) {
      const cross = plot.querySelector(".cross");
      cross.hidden = share === null;
      if (share !== null) {
        cross.style.left = `${share * 100}%`;
        cross.firstElementChild.textContent = seconds(share * end);
      }
    }
    for (const one of memory) {
      const text = share === null ? peaks.get(one.tier) : size(level(one, share * end));
      document.querySelector(`[data-level="${one.tier}"]`).textContent = text;
    }
    const lanes = share === null ? [] : all("g[data-lane]").map((lane) => doing(lane, share * 1000)).filter(Boolean);
    shown.textContent = share === null ? "" : [`At ${seconds(share * end)}`, ...lanes].join(" · ");
  };

  let at = null;
  for (const plot of plots) {
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      read(at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
    });
    plot.addEventListener("pointerleave", () => read(at = null));
    plot.addEventListener("blur", () => read(at = null));
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -0.005, ArrowRight: 0.005 }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      read(at = Math.min(1, Math.max(0, (at ?? 0) + move)));
    });
  }
})();
