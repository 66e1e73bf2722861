// Curves of training, and where its time went.

const TITLES = {
  loss: "loss", grad_norm: "gradient norm", learning_rate: "learning rate",
  seconds_per_step: "step time (s/step)", videos_per_second: "videos/s",
  mfu: "MFU (of 1)",
};
const FIRST = ["loss", "grad_norm", "learning_rate", "seconds_per_step"];
const HEIGHT = 220;
const EDGE = { left: 52, right: 10, top: 10, bottom: 24 };

const series = (i) => `var(--s${i % 8})`;

// Round numbers between two, about `most` of them.
function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((x) => x * power >= rough);
  const marks = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i++) {
    marks.push(i * step);
  }
  return marks;
}

function logTicks(low, high) {
  const marks = [];
  const factors = Math.log10(high / low) < 2 ? [1, 2, 5] : [1];
  const stride = Math.max(1, Math.ceil(Math.log10(high / low) / 6));
  const last = Math.log10(high);
  for (let e = Math.floor(Math.log10(low)); e <= last; e += stride) {
    for (const factor of factors) {
      const mark = factor * 10 ** e;
      if (mark >= low && mark <= high) marks.push(mark);
    }
  }
  return marks.length > 1 ? marks : [low, high];
}

// An exponential mean, its start set right (Kingma and Ba, section 3).
function smooth(values, factor) {
  let mean = 0;
  let weight = 0;
  return values.map((value) => {
    mean = factor * mean + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return mean / weight;
  });
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e6 && value % 100 === 0) return `${value / 1e3}k`;
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size !== 0 && size < 1e-4) {
    return value.toExponential(1).replace(".0e", "e");
  }
  return String(Number(value.toPrecision(4)));
}

class Chart {
  static made = 0;

  constructor(name, settings) {
    Object.assign(this, { name, settings });
    this.id = `inside-${Chart.made++}`;
    this.lines = data.runs.flatMap((run, i) =>
      run.curves[name] ? [{ i, x: run.curves[name][0], y: run.curves[name][1],
        // Of a long run the means of parts: extremes alone are not its mean.
        mean: run.curves[name][2] ?? run.curves[name][1] }] : []);
    this.told = el("span", { class: "quiet" });
    this.svg = svg("svg", { role: "img", "aria-label": `Curve of ${name}` });
    this.node = el("figure", { class: "chart" },
      el("figcaption", {},
        el("h3", {}, plain(TITLES[name] || name)), this.told),
      this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
  }

  draw() {
    const width = this.svg.clientWidth;
    if (!width) return;
    const { smoothing, log } = this.settings;
    const drawn = this.lines.map((line) => {
      const values = smoothing ? smooth(line.mean, smoothing) : line.y;
      return { ...line, values };
    });
    const every = drawn.flatMap((line) => line.y);
    const logged = log && every.some((y) => y > 0);
    const good = logged ? every.filter((y) => y > 0) : every;
    const extreme = (xs) => xs.reduce(
      ([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
    let [low, high] = extreme(good);
    if (this.settings.calm && good.length > 20) {
      // A spike of one step may stand out of the picture.
      const sorted = [...good].sort((a, b) => a - b);
      low = sorted[Math.floor(0.01 * sorted.length)];
      high = sorted[Math.ceil(0.99 * sorted.length) - 1];
    }
    let [left, right] = extreme(drawn.flatMap((line) => line.x));
    if (right === left) [left, right] = [left - 1, right + 1];
    if (logged) {
      if (low === high) [low, high] = [low / 2, high * 2];
    } else {
      const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
      const floor = low >= 0 ? 0 : -Infinity;
      [low, high] = [Math.max(floor, low - room), high + room];
    }
    const scale = logged ? Math.log : (v) => v;
    const wide = width - EDGE.left - EDGE.right;
    const tall = HEIGHT - EDGE.top - EDGE.bottom;
    this.x = (v) => EDGE.left + (wide * (v - left)) / (right - left);
    this.y = (v) => EDGE.top +
      tall * (1 - (scale(v) - scale(low)) / (scale(high) - scale(low)));
    this.drawn = drawn;
    const parts = [];
    for (const mark of logged ? logTicks(low, high) : ticks(low, high, 5)) {
      const at = Math.round(this.y(mark)) + 0.5;
      parts.push(svg("path", {
        class: "axis", d: `M${EDGE.left} ${at}H${width - EDGE.right}`,
      }));
      parts.push(svg("text", {
        x: EDGE.left - 6, y: at + 4, "text-anchor": "end",
      }, short(mark)));
    }
    for (const mark of ticks(left, right, Math.max(2, wide / 56))) {
      const at = Math.round(this.x(mark)) + 0.5;
      if (!Number.isInteger(mark)) continue;
      parts.push(svg("path", {
        class: "axis", d: `M${at} ${HEIGHT - EDGE.bottom}v4`,
      }));
      parts.push(svg("text", {
        x: at, y: HEIGHT - 6,
        "text-anchor": at > width - 30 ? "end" : "middle",
      }, short(mark)));
    }
    parts.push(svg("text", {
      x: EDGE.left - 6, y: HEIGHT - 6, "text-anchor": "end",
    }, "step"));
    const inside = svg("clipPath", { id: this.id });
    inside.append(svg("rect", {
      x: EDGE.left, y: EDGE.top - 2, width: wide + 2, height: tall + 4,
    }));
    parts.push(inside);
    for (const line of drawn) {
      const color = series(line.i);
      if (smoothing) parts.push(this.path(line.x, line.y, "raw", color));
      parts.push(this.path(line.x, line.values, "curve", color));
    }
    this.cursor = svg("path", { class: "cursor", d: "" });
    parts.push(this.cursor);
    this.svg.replaceChildren(...parts);
    this.point(null);
  }

  path(xs, ys, kind, color) {
    let d = "";
    let pen = "M";
    for (let i = 0; i < xs.length; i++) {
      const at = this.y(ys[i]);
      if (!Number.isFinite(at)) { pen = "M"; continue; }
      d += `${pen}${this.x(xs[i]).toFixed(1)} ${at.toFixed(1)}`;
      pen = "L";
    }
    // One point alone is drawn as a dot.
    if (xs.length === 1) d += "h0.01";
    const path = svg("path", { class: kind, d });
    path.setAttribute("clip-path", `url(#${this.id})`);
    path.style.stroke = color;
    path.style.strokeLinecap = "round";
    if (xs.length === 1) path.style.strokeWidth = "5";
    return path;
  }

  // Tells the values under the pointer, or the last ones.
  point(event) {
    if (!this.drawn) return;
    const at = event
      ? event.clientX - this.svg.getBoundingClientRect().left : Infinity;
    let near = null;
    const values = this.drawn.map((line) => {
      let best = line.x.length - 1;
      line.x.forEach((x, i) => {
        const off = Math.abs(this.x(x) - at);
        if (off < Math.abs(this.x(line.x[best]) - at)) best = i;
      });
      near ??= line.x[best];
      return figure(line.values[best]);
    });
    this.told.textContent =
      `${event ? "" : "last "}step ${figure(near)}: ${values.join(" | ")}`;
    this.cursor.setAttribute("d", event
      ? `M${Math.round(this.x(near)) + 0.5} ${EDGE.top}V${HEIGHT - EDGE.bottom}`
      : "");
  }
}

function curvesSection() {
  const all = data.runs.flatMap((run) => Object.keys(run.curves));
  const names = [...new Set(all)];
  if (!names.length) return null;
  const settings = { smoothing: 0, log: false, calm: false };
  const main = FIRST.filter((name) => names.includes(name));
  const rest = names.filter((name) => !main.includes(name)).sort();
  const made = new Map(names.map((name) => [name, new Chart(name, settings)]));
  const draw = () => { for (const chart of made.values()) chart.draw(); };
  const grid = (part) =>
    el("div", { class: "charts" }, part.map((name) => made.get(name).node));
  const told = el("output", { class: "clock" }, "none");
  const slider = el("input", {
    type: "range", min: 0, max: 99, value: 0, "aria-label": "Smoothing",
    oninput: () => {
      settings.smoothing = slider.value / 100;
      told.textContent = settings.smoothing || "none";
      draw();
    },
  });
  const toggle = (key, label, name) => {
    const node = button(label, name, () => {
      settings[key] = !settings[key];
      node.setAttribute("aria-pressed", settings[key]);
      draw();
    }, { "aria-pressed": "false" });
    return node;
  };
  let wait = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(wait);
    wait = requestAnimationFrame(draw);
  }).observe(document.getElementById("app"));
  const more = rest.length
    ? el("details", { ontoggle: draw },
      el("summary", {}, `${count(rest.length, "more curve")}`), grid(rest))
    : null;
  return el("section", { id: "curves" },
    el("h2", {}, "Curves"),
    el("div", { class: "bar block" },
      el("span", { class: "group" },
        toggle("log", "Log", "Logarithmic scale"),
        toggle("calm", "Cut spikes", "Scale to 98 % of the points")),
      el("label", {}, "Smoothing", slider, told),
      data.runs.length > 1 ? legend() : null),
    el("div", { class: "block" }, main.length ? grid(main) : null), more);
}

function swatch(color) {
  const key = el("span", { class: "key" });
  key.style.background = color;
  return key;
}

function legend() {
  return el("span", { class: "legend" }, data.runs.map((run, i) =>
    el("span", {}, swatch(series(i)), plain(run.label))));
}

// Steps first, then what they waited for.
const SPENDING = ["step", "data", "compile", "load", "checkpoint", "sample",
  "publish", "lost", "other"];

const COLOURS = [0, 6, 1, 5, 2, 3, 7, 4, 7];

function goodputSection() {
  const runs = data.runs.filter((run) => run.goodput);
  if (!runs.length) return null;
  return el("section", { id: "time" },
    el("h2", {}, "Where the time went"),
    runs.map((run) => {
      const { seconds, goodput, starts } = run.goodput;
      const rank = (name) => (SPENDING.indexOf(name) + 100) % 100;
      const parts = Object.entries(seconds).filter(([, s]) => s > 0)
        .sort((a, b) => rank(a[0]) - rank(b[0]));
      const total = parts.reduce((sum, [, s]) => sum + s, 0);
      const bar = el("div", { class: "share", "aria-hidden": "true" });
      const keys = el("div", { class: "legend" });
      parts.forEach(([name, s], i) => {
        const share = el("span", { title: `${plain(name)} ${duration(s)}` });
        // Of less than 1 in all, flex would fill that part of the bar alone.
        share.style.flex = `${(100 * s) / total} 0 0`;
        share.style.background = series(COLOURS[rank(name)] ?? i);
        bar.append(share);
        keys.append(el("span", {}, swatch(share.style.background),
          `${plain(name)} ${duration(s)} ` +
          `(${((100 * s) / total).toFixed(1)} %)`));
      });
      const head = [
        data.runs.length > 1 ? plain(run.label) : null,
        goodput !== null ? `${(100 * goodput).toFixed(1)} % in steps` : null,
        duration(total),
        starts ? count(starts, "start") : null,
      ];
      return el("div", { class: "block" },
        el("div", {}, head.filter((x) => x).join(" · ")), bar, keys);
    }));
}
