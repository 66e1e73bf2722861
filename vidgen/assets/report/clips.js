// The clips: a grid of one run, rows that compare several; filters and pages.

const SIZES = [["130px", "small"], ["200px", "medium"], ["320px", "large"]];

function clipsSection() {
  const comparing = data.columns.length > 1;
  const state = {
    query: "", status: "all", match: "all", all: false,
    sort: null, down: false, page: 0, perPage: comparing ? 24 : 48, rows: [],
  };
  const haystack = data.texts.map((text) => text.toLowerCase());
  const of = (row) => row.cells.filter((i) => i !== null).map((i) => data.clips[i]);
  const cellsHost = el("div");
  const told = el("span", { class: "quiet", role: "status" });
  let observer = null;

  // The transport.
  const playButton = button("Play", "Play or pause all in sight (space)",
    () => clock.toggle(), { class: "main", id: "play" });
  const position = el("input", {
    type: "range", min: 0, max: 1000, value: 0, class: "position",
    "aria-label": "Position",
    oninput: () => clock.seek((position.value / 1000) * clock.longest),
  });
  const time = el("span", { class: "clock quiet" });
  const clock = new Clock(() => {
    playButton.textContent = clock.playing ? "Pause" : "Play";
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
  const rates = [0.1, 0.25, 0.5, 1, 2].map((x) => [String(x), `${x}×`]);

  function matches(row) {
    const clips = of(row);
    if (state.all && clips.length < data.columns.length) return false;
    if (state.match !== "all" && row.match !== state.match) return false;
    if (state.status !== "all" &&
        !clips.some((clip) => clip.status === state.status)) return false;
    const { query } = state;
    return !query || clips.some((clip) =>
      haystack[clip.prompt]?.includes(query) ||
      haystack[clip.negative_prompt]?.includes(query) ||
      clip.name.toLowerCase().includes(query));
  }

  function refresh() {
    state.rows = data.rows.filter(matches);
    if (state.sort) state.rows.sort(sorted(state.sort, state.down));
    state.page = 0;
    show();
  }

  function show() {
    const { rows, page, perPage } = state;
    const from = page * perPage;
    const part = rows.slice(from, from + perPage);
    observer?.disconnect();
    clock.clear();
    observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const player = players.get(target);
        if (isIntersecting) clock.enter(player);
        else if (clock.inSight.has(player)) clock.leave(player);
      }
    }, { rootMargin: "80px" });
    const players = new Map();
    const screened = (clip) => {
      const { screen, player } = screenOf(clip, clock);
      if (player) {
        players.set(screen, player);
        observer.observe(screen);
      }
      return screen;
    };
    const noun = comparing ? "row" : "clip";
    if (!part.length) {
      cellsHost.replaceChildren(el("p", { class: "empty" },
        data.rows.length ? "Nothing matches these filters." : "No clips."));
    } else if (comparing) {
      cellsHost.replaceChildren(el("div", { class: "compare" },
        el("div", { class: "scroll" },
          el("div", { class: "compare" },
            part.map((row) => compared(row, screened))))));
    } else {
      cellsHost.replaceChildren(el("div", { class: "grid" }, part.map((row) => {
        const clip = of(row)[0];
        return el("article", { class: "card" }, screened(clip),
          el("div", { class: "caption" }, prompts(clip), facts(clip)));
      })));
    }
    told.textContent = rows.length > perPage
      ? `${from + 1}–${from + part.length} of ${count(rows.length, noun)}`
      : count(rows.length, noun);
    back.disabled = page === 0;
    next.disabled = from + perPage >= rows.length;
  }

  function turn(by) {
    const last = Math.max(0, Math.ceil(state.rows.length / state.perPage) - 1);
    const page = Math.min(Math.max(state.page + by, 0), last);
    if (page === state.page) return;
    state.page = page;
    show();
    if (section.getBoundingClientRect().top < 0) section.scrollIntoView();
  }

  const search = el("input", {
    type: "search", id: "filter", placeholder: "Filter by prompt or name  /",
    "aria-label": "Filter by prompt or name", autocomplete: "off",
    spellcheck: "false",
    oninput: () => { state.query = search.value.toLowerCase(); refresh(); },
  });
  const totals = { done: 0, failed: 0, missing: 0 };
  for (const clip of data.clips) totals[clip.status]++;
  const statuses = choice("Status",
    [["all", "All"], ...Object.entries(totals).map(([key, n]) =>
      [key, `${key} ${n.toLocaleString("en")}`])],
    "all", (key) => { state.status = key; refresh(); });
  const back = button("‹", "Page before (p)", () => turn(-1));
  const next = button("›", "Next page (n)", () => turn(1));
  const perPage = select("On a page",
    [12, 24, 48, 96, 192].map((n) => [String(n), `${n} a page`]),
    String(state.perPage),
    (n) => { state.perPage = Number(n); refresh(); });
  const measured = [...new Set(
    data.clips.flatMap((clip) => Object.keys(clip.metrics || {})))].slice(0, 20);
  if (data.clips.some((clip) => clip.seconds !== undefined)) {
    measured.push("seconds");
  }
  const order = select("Order", [["", "in order"], ...measured.flatMap((name) => [
    [`<${name}`, `lowest ${plain(name)} first`],
    [`>${name}`, `highest ${plain(name)} first`],
  ])], "", (key) => {
    state.down = key.startsWith(">");
    state.sort = key.slice(1);
    refresh();
  });
  const sizes = choice("Size", SIZES.map(([key, label]) => [key, label[0].toUpperCase()]),
    "200px", (size) => document.documentElement.style.setProperty("--cell", size));
  const compare = [];
  if (comparing && !data.by_step) {
    compare.push(choice("Frames",
      [["all", "All rows"], ["differs", "Different"], ["same", "Same"]],
      "all", (key) => { state.match = key; refresh(); }));
    compare.push(el("label", {}, el("input", {
      type: "checkbox", id: "all-runs",
      onchange: (event) => { state.all = event.target.checked; refresh(); },
    }), "in all runs"));
  }
  const toolbar = el("div", { class: "toolbar" },
    el("div", { class: "bar" }, search, statuses, compare,
      measured.length ? el("span", { class: "end" }, order) : null),
    el("div", { class: "bar" },
      playButton,
      el("span", { class: "group" },
        button("−1", "One frame back (,)", () => clock.step(-1), { id: "back" }),
        button("+1", "One frame on (.)", () => clock.step(1), { id: "on" })),
      position, time,
      select("Speed", rates, "1", (rate) => clock.setRate(Number(rate))),
      loop, el("span", { class: "bar end" }, told,
        el("span", { class: "group" }, back, next), perPage, sizes)));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (typing) {
      if (event.key === "Escape") typing.blur();
      return;
    }
    const keys = {
      "/": () => search.focus(), ",": () => clock.step(-1),
      ".": () => clock.step(1), n: () => turn(1), p: () => turn(-1),
      l: () => loop.click(),
    };
    // The space bar presses a button that has the focus.
    if (!event.target.closest("button, a, summary")) {
      keys[" "] = () => clock.toggle();
    }
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  });

  const section = el("section", { id: "clips" },
    el("h2", {}, data.by_step ? "Samples by step" : "Clips"),
    toolbar, cellsHost);
  refresh();
  return section;
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

// A screen of the clip's own shape, so that nothing moves when it loads.
function screenOf(clip, clock) {
  const screen = el("div", { class: "screen" });
  screen.style.aspectRatio =
    `${clip.width || 16} / ${clip.height || (clip.width ? clip.width : 9)}`;
  if (!clip.src || clip.status !== "done") {
    screen.classList.add("none");
    const kind = clip.status === "done" ? "quiet" : "bad";
    screen.append(el("strong", { class: kind },
      clip.status === "done" ? "no picture" : clip.status));
    if (clip.error) screen.append(shown(clip.error, 2000));
    else if (clip.status === "done") screen.append("latents only");
    return { screen, player: null };
  }
  const frame = el("span", { class: "frame" });
  const player = new Player(clip, screen, frame, (p) => p.tell());
  const press = async () => {
    if (clock.playing) return clock.pause();
    if (!player.paused) return player.pause();
    await player.ready();
    if (player.time >= player.duration - 1e-3) player.seek(0);
    player.play(clock.rate);
    const follow = () => {
      player.tell();
      if (!player.paused) requestAnimationFrame(follow);
    };
    follow();
  };
  screen.append(frame, el("button", {
    type: "button", onclick: press, "aria-label": `Play ${plain(clip.name)}`,
  }));
  return { screen, player };
}

function prompts(clip) {
  const nodes = [];
  const add = (text, lead) => {
    const box = el("div", { class: "prompt" }, lead, shown(text, 1200));
    nodes.push(box);
    if (text.length <= 110) return;
    const more = el("button", {
      type: "button", class: "more", "aria-expanded": "false",
      onclick: () => {
        const open = box.classList.toggle("open");
        more.textContent = open ? "less" : "more";
        more.setAttribute("aria-expanded", open);
        box.replaceChildren(lead, shown(text, open ? Infinity : 1200));
      },
    }, "more");
    nodes.push(more);
  };
  if (clip.prompt !== undefined) add(data.texts[clip.prompt], "");
  if (clip.negative_prompt !== undefined) {
    add(data.texts[clip.negative_prompt],
      el("span", { class: "quiet" }, "not: "));
  }
  return nodes;
}

function facts(clip, told = {}) {
  const parts = [];
  const add = (name, text) => { if (told[name] !== clip[name]) parts.push(text); };
  if (clip.seed !== undefined) add("seed", `seed ${clip.seed}`);
  if (clip.clip !== undefined) add("clip", `clip ${clip.clip}`);
  if (clip.width) parts.push(`${clip.width}×${clip.height}`);
  if (clip.frames) parts.push(`${clip.frames} frames`);
  if (clip.fps) parts.push(`${figure(clip.fps)} fps`);
  for (const [name, value] of Object.entries(clip.settings || {})) {
    const words = name.replaceAll("_", " ").replace(/^num /, "");
    parts.push(`${words} ${plain(String(value)).slice(0, 80)}`);
  }
  for (const [name, value] of Object.entries(clip.metrics || {})) {
    parts.push(`${plain(name)} ${figure(value)}`);
  }
  if (clip.seconds !== undefined) parts.push(`made in ${duration(clip.seconds)}`);
  const name = clip.src && clip.status === "done"
    ? el("a", { href: clip.src, class: "mono" }, plain(clip.name))
    : el("span", { class: "mono" }, plain(clip.name));
  return [
    parts.length ? el("div", { class: "meta" }, parts.join(" · ")) : null,
    el("div", { class: "meta" }, name,
      clip.where ? ` ${plain(clip.where).slice(0, 120)}` : ""),
  ];
}

function compared(row, screened) {
  const clips = row.cells.map((i) => (i === null ? null : data.clips[i]));
  const first = clips.find((clip) => clip);
  const tag = { same: ["good", "same frames"], differs: ["warn", "frames differ"] };
  const [kind, words] = tag[row.match] || ["", ""];
  const about = el("div", { class: "caption about" },
    words ? el("span", { class: `tag ${kind}` }, words) : null,
    data.by_step || first.step !== undefined
      ? el("strong", {}, plain(first.name)) : null,
    first.step !== undefined && !data.by_step
      ? el("span", { class: "meta" }, `step ${first.step.toLocaleString("en")}`)
      : null,
    prompts(first),
    first.seed !== undefined
      ? el("div", { class: "meta" }, `seed ${first.seed} · clip ${first.clip}`)
      : null);
  const cells = clips.map((clip, i) => {
    const label = el("strong", { class: "meta" }, plain(data.columns[i]));
    if (!clip) {
      const none = el("div", { class: "screen none quiet" }, "not in this run");
      none.style.aspectRatio = `${first.width || 16} / ${first.height || 9}`;
      return el("div", { class: "card" }, none,
        el("div", { class: "caption" }, label));
    }
    const other = clip.negative_prompt !== first.negative_prompt
      ? prompts({ negative_prompt: clip.negative_prompt }) : [];
    return el("div", { class: "card" }, screened(clip),
      el("div", { class: "caption" }, label, other, facts(clip, first),
        clip.hash ? el("div", { class: "meta mono" }, clip.hash) : null));
  });
  const node = el("div", { class: `row ${row.match || ""}` }, about, cells);
  node.style.setProperty("--columns", clips.length);
  return node;
}
