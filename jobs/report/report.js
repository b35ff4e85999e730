"use strict";
// Reading, hiding and zooming. The geometry is that of charts.py; everything else on the page works without this.
(() => {
  const EXTENT = 1000;
  const { charts, marks } = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const range = { low: null, high: null };
  document.documentElement.classList.add("scripted");

  const valueText = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (value !== 0 && !(size >= 1e-3 && size < 1e6)) return value.toExponential(2).replace("e+", "e");
    const power = value ? Math.floor(Math.log10(size)) : 0;
    return value.toFixed(power >= 0 ? Math.max(0, 3 - power) : 2 - power);
  };

  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - xs[low - 1] <= xs[low] - x ? low - 1 : low;
  };

  const ticks = (low, high, about, whole) => {
    const rough = (high - low) / about;
    const power = 10 ** Math.floor(Math.log10(rough));
    let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    if (whole) step = Math.max(1, step);
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) {
      const value = i * step + 0, digits = Math.min(decimals, 3);
      const text = decimals > 3 && value ? value.toExponential(0).replace("e+", "e")
        : value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
      found.push({ percent: (value - low) / (high - low) * 100, text });
    }
    return found;
  };

  class Chart {
    constructor(data) {
      this.data = data;
      this.hidden = new Set();
      this.figure = document.querySelector(`figure[data-chart="${data.key}"]`);
      this.plot = this.figure.querySelector(".plot");
      this.cross = this.figure.querySelector(".cross");
      this.band = this.figure.querySelector(".band");
      this.legend = new Map(all("button[data-series]", this.figure).map((b) => [b.dataset.series, b]));
      this.paths = new Map(all("path[data-series]", this.figure).map((p) => [p.dataset.series, p]));
      this.points = new Map(all("path[data-points]", this.figure).map((p) => [p.dataset.points, p]));
      this.lasts = new Map([...this.legend].map(([key, b]) => [key, b.querySelector("b").textContent]));
      for (const [key, button] of this.legend) button.addEventListener("click", () => this.toggle(key));
      this.listen();
    }

    get x() { return range.low === null ? this.data.x : [range.low, range.high]; }
    get shown() { return this.data.series.filter((s) => !this.hidden.has(s.key)); }

    toggle(key) {
      if (!this.hidden.delete(key)) this.hidden.add(key);
      this.legend.get(key).setAttribute("aria-pressed", String(!this.hidden.has(key)));
      this.redraw();
    }

    yDomain() {
      const [x0, x1] = this.x, values = [], stack = new Map();
      let areas = false;
      for (const s of this.shown) s.x.forEach((x, i) => {
        if (s.kind === "reference" ? range.low !== null : x < x0 || x > x1) return;
        if (s.kind === "area") { areas = true; stack.set(i, (stack.get(i) ?? 0) + (s.y[i] ?? 0)); }
        else if (s.y[i] !== null) values.push(s.y[i]);
      });
      values.push(...stack.values());
      const low = values.length ? values.reduce((a, b) => Math.min(a, b)) : 0;
      const high = values.length ? values.reduce((a, b) => Math.max(a, b)) : 1;
      if (this.data.fromZero || areas) return [0, (high > 0 ? high : 1) * 1.06];
      const pad = 0.06 * (high - low) || Math.max(Math.abs(high) * 0.05, 1e-12);
      return [low - pad, high + pad];
    }

    redraw() {
      const [x0, x1] = this.x, [y0, y1] = this.yDomain();
      const atX = (x) => ((x - x0) / (x1 - x0) * EXTENT).toFixed(1);
      const atY = (y) => (EXTENT - (y - y0) / (y1 - y0) * EXTENT).toFixed(1);
      let floor = null;
      for (const s of this.data.series) {
        const path = this.paths.get(s.key), points = this.points.get(s.key);
        if (this.hidden.has(s.key)) { path.setAttribute("d", ""); points?.setAttribute("d", ""); continue; }
        let line = "";
        if (s.kind === "area") {
          floor ??= s.x.map(() => 0);
          const top = s.y.map((y, i) => floor[i] + (y ?? 0));
          const there = s.x.map((x, i) => `${atX(x)},${atY(top[i])}`);
          const back = s.x.map((x, i) => `${atX(x)},${atY(floor[i])}`).reverse();
          line = "M" + [...there, ...back].join("L") + "Z";
          floor = top;
        } else if (s.kind === "reference") {
          line = `M0,${atY(s.y[0])}L${EXTENT.toFixed(1)},${atY(s.y[0])}`;
        } else {
          let up = true, dots = "";
          s.x.forEach((x, i) => {
            const y = s.y[i];
            if (y !== null) {
              const at = `${atX(x)},${atY(y)}`;
              line += up ? `M${at}h0` : `L${at}`;
              dots += `M${at}h0`;
            }
            up = y === null;
          });
          points?.setAttribute("d", dots);
        }
        path.setAttribute("d", line);
      }
      this.axes(x0, x1, y0, y1);
    }

    axes(x0, x1, y0, y1) {
      const label = (side) => ({ percent, text }) => {
        const span = document.createElement("span");
        span.textContent = text;
        span.style[side] = `${percent}%`;
        return span;
      };
      const yTicks = ticks(y0, y1, 4, false);
      this.figure.querySelector(".ys").replaceChildren(...yTicks.map(label("bottom")));
      this.figure.querySelector(".xs").replaceChildren(...ticks(x0, x1, 6, true).map(label("left")));
      const lines = yTicks.map((tick) => {
        const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
        path.setAttribute("d", `M0,${(EXTENT - tick.percent * 10).toFixed(1)}H${EXTENT}`);
        return path;
      });
      this.figure.querySelector(".grid").replaceChildren(...lines);
      all(".marks path", this.figure).forEach((path, i) => {
        path.setAttribute("d", `M${(marks[i] - x0) / (x1 - x0) * EXTENT},0V${EXTENT}`);
      });
      all(".flags span", this.figure).forEach((flag, i) => {
        flag.style.left = `${(marks[i] - x0) / (x1 - x0) * 100}%`;
        flag.hidden = marks[i] < x0 || marks[i] > x1;
      });
    }

    // The step nearest to a place on the screen, among the steps this chart has.
    stepAt(clientX) {
      const box = this.plot.getBoundingClientRect(), [x0, x1] = this.x;
      const x = x0 + (clientX - box.left) / box.width * (x1 - x0);
      const s = this.data.series.find((one) => one.kind !== "reference" && one.kind !== "dots") ?? this.data.series[0];
      return s.x[nearest(s.x, Math.min(x1, Math.max(x0, x)))];
    }

    read(step) {
      const [x0, x1] = this.x, inside = step !== null && step >= x0 && step <= x1;
      this.cross.hidden = !inside;
      if (inside) {
        this.cross.style.left = `${(step - x0) / (x1 - x0) * 100}%`;
        this.cross.firstElementChild.textContent = `step ${step}`;
      }
      for (const s of this.data.series) {
        const shown = this.legend.get(s.key).querySelector("b");
        if (step === null) { shown.textContent = this.lasts.get(s.key); continue; }
        let i = s.kind === "reference" ? 0 : nearest(s.x, step);
        if (s.kind === "dots" && s.x[i] > step) i -= 1;  // the evaluation that was known at that step
        shown.textContent = valueText(s.y[i]);
      }
    }

    listen() {
      let from = null, step = null;
      const percent = (clientX) => {
        const box = this.plot.getBoundingClientRect();
        return Math.min(100, Math.max(0, (clientX - box.left) / box.width * 100));
      };
      this.plot.addEventListener("pointermove", (event) => {
        readAll(step = this.stepAt(event.clientX));
        if (from === null) return;
        const [a, b] = [percent(from), percent(event.clientX)].sort((p, q) => p - q);
        this.band.hidden = false;
        this.band.style.left = `${a}%`;
        this.band.style.width = `${b - a}%`;
      });
      this.plot.addEventListener("pointerdown", (event) => {
        if (event.pointerType === "touch" || event.button !== 0) return;
        from = event.clientX;
        this.plot.setPointerCapture(event.pointerId);
      });
      this.plot.addEventListener("pointerup", (event) => {
        const start = from;
        from = null;
        this.band.hidden = true;
        if (start === null || Math.abs(event.clientX - start) < 6) return;
        const [low, high] = [this.stepAt(start), this.stepAt(event.clientX)].sort((p, q) => p - q);
        if (high > low) zoom(low, high);
      });
      this.plot.addEventListener("pointerleave", () => readAll(step = null));
      this.plot.addEventListener("dblclick", () => zoom(null, null));
      this.plot.addEventListener("blur", () => readAll(step = null));
      this.plot.addEventListener("keydown", (event) => {
        const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (event.key === "Escape") zoom(null, null);
        if (move === undefined) return;
        event.preventDefault();
        const xs = this.data.series[0].x, [x0, x1] = this.x;
        const i = step === null ? nearest(xs, move > 0 ? x0 : x1) : nearest(xs, step) + move;
        readAll(step = xs[Math.min(xs.length - 1, Math.max(0, i))]);
      });
    }
  }

  const drawn = charts.map((data) => new Chart(data));
  const readAll = (step) => drawn.forEach((chart) => chart.read(step));
  const zoom = (low, high) => {
    Object.assign(range, { low, high });
    document.querySelector(".zoomed").hidden = low === null;
    document.documentElement.classList.toggle("in-range", low !== null);
    document.getElementById("range").textContent = low === null ? "" : `${low} to ${high}`;
    drawn.forEach((chart) => chart.redraw());
    readAll(null);
  };
  document.getElementById("reset").addEventListener("click", () => zoom(null, null));

  const search = document.getElementById("search");
  search?.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = all("#settings tbody tr");
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    const left = rows.filter((row) => !row.hidden).length;
    document.getElementById("found").textContent = words.length ? `${left} of ${rows.length}` : "";
  });

  const links = all("nav a");
  const here = () => {
    const passed = links.filter((link) => document.querySelector(link.hash).getBoundingClientRect().top < 120);
    const current = window.innerHeight + window.scrollY >= document.body.scrollHeight - 4 ? links.at(-1) : passed.at(-1);
    links.forEach((link) => link.classList.toggle("here", link === current));
  };
  addEventListener("scroll", here, { passive: true });
  here();
})();
