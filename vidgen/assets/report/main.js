// The page: what the runs were, then curves, metrics and clips.

// What stands of a manifest in the table of runs.
const HEADLINES = [
  ["command", (f) => f.get("argv") || f.get("command")],
  ["ended", (f) => f.get("exit.reason")],
  ["began", (f) => f.get("start")?.slice(0, 16).replace("T", " ")],
  ["took", (f, run) => took(run.took)],
  ["device", devices],
  ["mesh", (f) => [...f].filter(([name]) => name.startsWith("mesh.axes."))
    .map(([name, size]) => `${name.slice(10)} ${size}`).join(", ")],
  ["commit", (f) => f.get("code.commit") &&
    f.get("code.commit").slice(0, 10) +
    (f.get("code.dirty") ? " + changes" : "")],
  ["config", (f) => f.get("config_fingerprint")?.slice(0, 10)],
];

// The time of all attempts, as far as it is known.
function took(times) {
  if (!times) return null;
  const [seconds, attempts, unknown] = times;
  if (attempts === 1) return duration(seconds);
  return `${duration(seconds)} in ${attempts} attempts` +
    (unknown ? `, ${unknown} of unknown length left out` : "");
}

function devices(facts) {
  const number = facts.get("devices.count");
  const kind = facts.get("devices.kind");
  return number > 1 ? `${number} × ${kind}` : kind;
}

function runsSection() {
  const found = data.runs.map((run) => {
    const known = new Map(run.facts);
    return HEADLINES.map(([, read]) => read(known, run) || "");
  });
  const used = HEADLINES.map((_, i) => found.some((facts) => facts[i]));
  const made = data.runs.map(() => ({ done: 0, failed: 0, missing: 0, s: [] }));
  for (const clip of data.clips) {
    made[clip.run][clip.status]++;
    if (clip.seconds !== undefined) made[clip.run].s.push(clip.seconds);
  }
  const clips = data.clips.length > 0;
  const planned = data.runs.some((run) => run.left !== null);
  const timed = made.some((m) => m.s.length);
  const last = data.runs.map((run) => Math.max(0,
    ...Object.values(run.curves).map(([x]) => x[x.length - 1])));
  const trained = last.some((step) => step);
  const numeric = (text, kind = "") =>
    el("td", { class: `number ${kind}` }, text);
  const head = (text) => el("th", { class: "number" }, text);
  const rows = data.runs.map((run, i) => {
    const { done, failed, missing, s } = made[i];
    const mean = s.length ? s.reduce((a, b) => a + b, 0) / s.length : null;
    return el("tr", {},
      el("th", {}, data.runs.length > 1 && Object.keys(run.curves).length
        ? swatch(series(i)) : null,
      el("a", { href: run.href, title: plain(run.folder) }, plain(run.label))),
      trained ? numeric(last[i].toLocaleString("en")) : null,
      clips ? [
        numeric(done.toLocaleString("en")),
        numeric(failed.toLocaleString("en"), failed ? "bad" : "quiet"),
        numeric(missing.toLocaleString("en"), missing ? "bad" : "quiet"),
      ] : null,
      planned ? numeric(run.left === null ? "–" : run.left.toLocaleString("en"),
        run.left ? "" : "quiet") : null,
      timed ? numeric(mean === null ? "–" : duration(mean)) : null,
      HEADLINES.map(([name], j) => {
        if (!used[j]) return null;
        const text = found[i][j];
        const fixed = ["command", "commit", "config"].includes(name);
        const wraps = ["command", "ended", "took"].includes(name);
        const size = wraps ? "wide" : "short";
        return el("td", { class: `${size} ${fixed ? "mono" : ""}` },
          shown(text, 300));
      }));
  });
  return el("section", {},
    el("div", { class: "scroll fit" }, table([
      "run", ...(trained ? [head("steps")] : []),
      ...(clips ? ["done", "failed", "missing"].map(head) : []),
      ...(planned ? [head("left")] : []),
      ...(timed ? [head("per clip")] : []),
      ...HEADLINES.filter((_, j) => used[j]).map(([name]) => name),
    ], rows)),
    factsDetails());
}

function factsDetails() {
  const known = data.runs.map((run) => new Map(run.facts));
  const names = [...new Set(data.runs.flatMap((r) => r.facts.map(([n]) => n)))];
  if (!names.length) return null;
  const several = data.runs.length > 1;
  const differs = (name) => new Set(known.map((k) => k.get(name))).size > 1;
  const host = el("div", { class: "scroll facts", tabindex: "0" });
  const fill = (only) => host.replaceChildren(table(
    ["field", ...data.runs.map((run) => plain(run.label))],
    names.filter((name) => !only || differs(name)).map((name) =>
      el("tr", { class: several && differs(name) ? "differs" : null },
        el("th", { class: "mono" }, plain(name)),
        known.map((k) => el("td", {},
          k.has(name) ? shown(k.get(name)) : el("span", { class: "quiet" }, "–")
        ))))));
  const changed = several ? names.filter(differs).length : 0;
  const kind = names.every((n) => n.startsWith("config."))
    ? "Config" : "Manifest";
  const details = el("details", {
    // Filled when it is opened: most never are.
    ontoggle: () => { if (!host.firstChild) fill(several); },
  }, el("summary", {}, several
    ? `${kind}: ${count(names.length, "field")}, ${changed} different`
    : `${kind}: ${count(names.length, "field")}`),
  several ? el("label", { class: "block" }, el("input", {
    type: "checkbox", checked: true,
    onchange: (event) => fill(event.target.checked),
  }), "only what differs") : null, host);
  return details;
}

function evaluationSection() {
  const keys = [];
  for (const run of data.runs) {
    for (const [file, metrics] of Object.entries(run.evaluations)) {
      for (const metric of Object.keys(metrics)) {
        if (!keys.some(([f, m]) => f === file && m === metric)) {
          keys.push([file, metric]);
        }
      }
    }
  }
  if (!keys.length) return null;
  const files = new Set(keys.map(([file]) => file)).size;
  const rows = keys.map(([file, metric]) => {
    const results = data.runs.map((run) => run.evaluations[file]?.[metric]);
    const there = results.filter((r) => r);
    const names = [...new Set(there.map((r) => r.name).filter((x) => x))];
    const uneven = names.length > 1 ||
      new Set(there.map((r) => r.n)).size > 1;
    return el("tr", {},
      el("th", {}, plain(metric),
        files > 1 ? el("span", { class: "quiet" }, ` ${plain(file)}`) : null,
        names.map((name) =>
          el("div", { class: "quiet mono" }, plain(String(name))))),
      results.map((r) => r ? el("td", { class: "number" },
        el("strong", {}, typeof r.value === "string"
          ? plain(r.value) : figure(r.value)),
        typeof r.low === "number" && typeof r.high === "number"
          ? el("span", { class: "quiet" },
            `  [${figure(r.low)}, ${figure(r.high)}]`) : null,
        el("div", { class: uneven ? "warn" : "quiet" },
          [typeof r.n === "number" ? `n ${r.n.toLocaleString("en")}` : null,
            r.skipped ? `${r.skipped} skipped` : null,
            uneven ? "not comparable" : null].filter((x) => x).join(", ")))
        : el("td", { class: "number quiet" }, "–")));
  });
  return el("section", { id: "evaluation" },
    el("h2", {}, "Evaluation"),
    el("div", { class: "scroll fit" }, table(
      ["metric", ...data.runs.map((run) =>
        el("th", { class: "number" }, plain(run.label)))], rows)),
    el("p", { class: "quiet note" }, "In brackets the 95 % interval."));
}

const sections = [
  ["Curves", curvesSection()],
  ["Time", goodputSection()],
  ["Evaluation", evaluationSection()],
  ["Clips", data.clips.length ? clipsSection() : null],
].filter(([, node]) => node);

document.getElementById("app").append(
  el("header", {},
    el("h1", {}, data.runs.map((run) => plain(run.label)).join("  ·  ")),
    el("span", { class: "quiet" }, `vidgen ${data.version}, ${data.made}`),
    sections.length > 1 ? el("nav", { "aria-label": "Sections" },
      sections.map(([name, node]) => el("a", { href: `#${node.id}` }, name)))
      : null),
  el("main", {}, runsSection(), sections.map(([, node]) => node)));
document.documentElement.dataset.ready = "1";
