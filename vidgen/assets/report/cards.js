// One clip on the page, and one row of clips that belong together.

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
  for (const name of ["seed", "clip"]) {
    const value = clip[name];
    if (value !== undefined && value !== told[name]) {
      parts.push(`${name} ${value}`);
    }
  }
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
  if (clip.seconds !== undefined) {
    parts.push(`made in ${duration(clip.seconds)}`);
  }
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
  const tag = {
    same: ["good", "same frames"],
    differs: ["warn", "frames differ"],
  };
  const [kind, words] = tag[row.match] || ["", ""];
  const about = el("div", { class: "caption about" },
    words ? el("span", { class: `tag ${kind}` }, words) : null,
    data.by_step || first.step !== undefined
      ? el("strong", {}, plain(first.name)) : null,
    first.step !== undefined && !data.by_step
      ? el("span", { class: "meta" }, `step ${first.step.toLocaleString("en")}`)
      : null,
    prompts(first),
    el("div", { class: "meta" }, ["seed", "clip"]
      .filter((name) => first[name] !== undefined)
      .map((name) => `${name} ${first[name]}`).join(" · ")));
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
