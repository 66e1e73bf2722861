// The clips: a grid of one run, rows that compare several; filters and pages.

const SIZES = [["130px", "S"], ["200px", "M"], ["320px", "L"]];
const RATES = [0.1, 0.25, 0.5, 1, 2];
const COUNTS = [12, 24, 48, 96, 192];
const COMPARING = data.columns.length > 1;
const NOUN = COMPARING ? "row" : "clip";

const clipsOf = (row) =>
  row.cells.filter((i) => i !== null).map((i) => data.clips[i]);

function clipsSection() {
  const state = {
    query: "", status: "all", match: "all", all: false, sort: "", down: false,
    page: 0, perPage: COMPARING ? 24 : 48, rows: [],
  };
  const transport = transportBar();
  const { clock } = transport;
  const host = el("div");
  const show = shower(host, clock);
  const matches = matcher(state);

  const refresh = () => {
    state.rows = data.rows.filter(matches);
    if (state.sort) state.rows.sort(sorted(state.sort, state.down));
    state.page = 0;
    redraw();
  };
  const set = (change) => { Object.assign(state, change); refresh(); };
  const turn = (by) => {
    const last = Math.max(0, Math.ceil(state.rows.length / state.perPage) - 1);
    const page = Math.min(Math.max(state.page + by, 0), last);
    if (page === state.page) return;
    state.page = page;
    redraw();
    if (section.getBoundingClientRect().top < 0) section.scrollIntoView();
  };
  const pager = pagerBar(state, set, turn);
  const redraw = () => {
    const from = state.page * state.perPage;
    show(state.rows.slice(from, from + state.perPage));
    pager.tell();
  };

  const filters = filterBar(set);
  const section = el("section", { id: "clips" },
    el("h2", {}, data.by_step ? "Samples by step" : "Clips"),
    el("div", { class: "toolbar" }, filters.node,
      el("div", { class: "bar" }, transport.nodes, pager.node)),
    host);
  listen({
    "/": () => filters.search.focus(), ",": () => clock.step(-1),
    ".": () => clock.step(1), n: () => turn(1), p: () => turn(-1),
    l: () => transport.loop.click(), " ": () => clock.toggle(),
  });
  refresh();
  return section;
}

// Says whether a row passes the filters.
function matcher(state) {
  const haystack = data.texts.map((text) => text.toLowerCase());
  const holds = (clip, query) =>
    haystack[clip.prompt]?.includes(query) ||
    haystack[clip.negative_prompt]?.includes(query) ||
    clip.name.toLowerCase().includes(query);
  return (row) => {
    const { query, status, match, all } = state;
    const clips = clipsOf(row);
    if (all && clips.length < data.columns.length) return false;
    if (match !== "all" && row.match !== match) return false;
    if (status !== "all" && clips.every((clip) => clip.status !== status)) {
      return false;
    }
    return !query || clips.some((clip) => holds(clip, query));
  };
}

// Shows rows; what is out of sight has no video element.
function shower(host, clock) {
  const players = new Map();
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const player = players.get(target);
      // An entry may be of a page that has been turned.
      if (!player) continue;
      if (isIntersecting) clock.enter(player);
      else if (clock.inSight.has(player)) clock.leave(player);
    }
  }, { rootMargin: "80px" });
  const screened = (clip) => {
    const { screen, player } = screenOf(clip, clock);
    if (player) {
      players.set(screen, player);
      observer.observe(screen);
    }
    return screen;
  };
  const card = (clip) => el("article", { class: "card" }, screened(clip),
    el("div", { class: "caption" }, prompts(clip), facts(clip)));
  return (rows) => {
    observer.disconnect();
    clock.clear();
    players.clear();
    if (!rows.length) {
      host.replaceChildren(
        el("p", { class: "empty" }, "Nothing matches these filters."));
    } else if (COMPARING) {
      host.replaceChildren(el("div", { class: "scroll bare" },
        el("div", { class: "compare" },
          rows.map((row) => compared(row, screened)))));
    } else {
      host.replaceChildren(el("div", { class: "grid" },
        rows.map((row) => card(clipsOf(row)[0]))));
    }
  };
}

function transportBar() {
  const play = button("Play", "Play or pause all in sight (space)",
    () => clock.toggle(), { class: "main", id: "play" });
  const position = el("input", {
    type: "range", min: 0, max: 1000, value: 0, class: "position",
    "aria-label": "Position",
    oninput: () => clock.seek((position.value / 1000) * clock.longest),
  });
  const time = el("span", { class: "clock quiet" });
  const clock = new Clock(() => {
    play.textContent = clock.playing ? "Pause" : "Play";
    const { longest } = clock;
    if (document.activeElement !== position || clock.playing) {
      position.value = longest ? (1000 * clock.position) / longest : 0;
    }
    time.textContent =
      `${clock.position.toFixed(2)} / ${longest.toFixed(2)} s`;
  });
  const loop = button("Loop", "Loop (l)", () => {
    clock.loop = !clock.loop;
    loop.setAttribute("aria-pressed", clock.loop);
  }, { "aria-pressed": "true" });
  const steps = el("span", { class: "group" },
    button("−1", "One frame back (,)", () => clock.step(-1), { id: "back" }),
    button("+1", "One frame on (.)", () => clock.step(1), { id: "on" }));
  const speed = select("Speed", RATES.map((x) => [String(x), `${x}×`]), "1",
    (rate) => clock.setRate(Number(rate)));
  return { clock, loop, nodes: [play, steps, position, time, speed, loop] };
}

function filterBar(set) {
  const search = el("input", {
    type: "search", id: "filter", placeholder: "Filter by prompt or name  /",
    "aria-label": "Filter by prompt or name", autocomplete: "off",
    spellcheck: "false",
    oninput: () => set({ query: search.value.toLowerCase() }),
  });
  const totals = { done: 0, failed: 0, missing: 0 };
  for (const clip of data.clips) totals[clip.status]++;
  const statuses = choice("Status",
    [["all", "All"], ...Object.entries(totals).map(([key, n]) =>
      [key, `${key} ${n.toLocaleString("en")}`])],
    "all", (status) => set({ status }));
  const node = el("div", { class: "bar" }, search, statuses);
  if (COMPARING && !data.by_step) {
    node.append(
      choice("Frames",
        [["all", "All rows"], ["differs", "Different"], ["same", "Same"]],
        "all", (match) => set({ match })),
      el("label", {}, el("input", {
        type: "checkbox", id: "all-runs",
        onchange: (event) => set({ all: event.target.checked }),
      }), "in all runs"));
  }
  const names = data.clips.flatMap((clip) => Object.keys(clip.metrics || {}));
  const measured = [...new Set(names)].slice(0, 20);
  if (data.clips.some((clip) => clip.seconds !== undefined)) {
    measured.push("seconds");
  }
  if (measured.length) {
    const options = measured.flatMap((name) => [
      [`<${name}`, `lowest ${plain(name)} first`],
      [`>${name}`, `highest ${plain(name)} first`],
    ]);
    node.append(el("span", { class: "end" },
      select("Order", [["", "in order"], ...options], "",
        (key) => set({ sort: key.slice(1), down: key.startsWith(">") }))));
  }
  return { node, search };
}

function pagerBar(state, set, turn) {
  const told = el("span", { class: "quiet", role: "status" });
  const back = button("‹", "Page before (p)", () => turn(-1));
  const next = button("›", "Next page (n)", () => turn(1));
  const perPage = select("On a page",
    COUNTS.map((n) => [String(n), `${n} a page`]), String(state.perPage),
    (n) => set({ perPage: Number(n) }));
  const sizes = choice("Size", SIZES, "200px", (size) =>
    document.documentElement.style.setProperty("--cell", size));
  const tell = () => {
    const { page, rows } = state;
    const from = page * state.perPage;
    const to = Math.min(from + state.perPage, rows.length);
    told.textContent = rows.length > state.perPage
      ? `${from + 1}–${to} of ${count(rows.length, NOUN)}`
      : count(rows.length, NOUN);
    back.disabled = page === 0;
    next.disabled = to >= rows.length;
  };
  const node = el("span", { class: "bar end" }, told,
    el("span", { class: "group" }, back, next), perPage, sizes);
  return { node, tell };
}

// Keys that work wherever nothing is typed.
function listen(keys) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (typing) {
      if (event.key === "Escape") typing.blur();
      return;
    }
    // The space bar presses a button that has the focus.
    const pressing = event.target.closest("button, a, summary");
    if (!keys[event.key] || (event.key === " " && pressing)) return;
    event.preventDefault();
    keys[event.key]();
  });
}

// By a number of the first clip of a row that has it; rows without it are last.
function sorted(name, down) {
  const read = (row) => {
    for (const i of row.cells) {
      const clip = data.clips[i];
      const value = name === "seconds" ? clip?.seconds : clip?.metrics?.[name];
      if (value !== undefined) return down ? -value : value;
    }
    return Infinity;
  };
  return (a, b) => {
    const [x, y] = [read(a), read(b)];
    return x === y ? 0 : x - y;
  };
}
