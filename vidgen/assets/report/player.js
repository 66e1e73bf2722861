// Players of clips, and the clock that they share.

// A browser gives up on more decoders than this.
const MOST = 60;

class Player {
  constructor(clip, screen, frame, moved) {
    Object.assign(this, { clip, screen, frame, moved });
    this.media = null;
    this.loading = null;
    this.images = [];
    this.shownFrame = 0;
    this.corrected = 0;
    this.started = null;
  }

  get fps() { return this.clip.fps || 8; }

  get controlled() { return this.clip.kind !== "image"; }

  get duration() {
    if (this.clip.kind === "video" && this.media?.duration > 0) {
      return this.media.duration;
    }
    return (this.clip.frames || 1) / this.fps;
  }

  get count() {
    const { frames } = this.clip;
    return frames || Math.max(1, Math.round(this.duration * this.fps));
  }

  get time() {
    if (this.clip.kind === "video") return this.media?.currentTime ?? 0;
    if (this.started === null) return this.shownFrame / this.fps;
    const gone = (performance.now() - this.started.at) / 1000;
    return this.started.time + gone * this.started.rate;
  }

  get paused() {
    if (this.clip.kind === "video") return this.media?.paused ?? true;
    return this.started === null;
  }

  // Makes the element; nothing but the first picture is read before it plays.
  mount() {
    if (this.media) return;
    const { clip } = this;
    if (clip.kind === "video") {
      this.media = el("video", {
        preload: clip.poster ? "none" : "metadata",
        poster: clip.poster,
        playsinline: true,
      });
      this.media.muted = true;
      this.media.addEventListener("ended", () => this.moved(this));
    } else {
      this.media = el("img", { alt: "", decoding: "async" });
    }
    this.broken = false;
    this.media.addEventListener("error", () => {
      this.broken = true;
      this.frame.textContent = "cannot be played";
    });
    this.media.src = clip.src;
    this.screen.prepend(this.media);
  }

  // Lets go of the element and its decoder.
  unmount() {
    if (!this.media) return;
    this.pause();
    if (this.clip.kind === "video") {
      this.media.removeAttribute("src");
      this.media.load();
    }
    this.media.remove();
    this.media = this.loading = null;
    this.images = [];
    this.shownFrame = 0;
    this.frame.textContent = "";
  }

  ready() {
    this.mount();
    this.loading ??= this.clip.kind === "video" ? this.#load() : this.#fetch();
    return this.loading;
  }

  #load() {
    const { media } = this;
    return new Promise((resolve) => {
      if (media.readyState >= 2) return resolve(true);
      const end = (good) => () => resolve(good);
      media.addEventListener("loadeddata", end(true), { once: true });
      media.addEventListener("error", end(false), { once: true });
      media.preload = "auto";
      media.load();
      // A stalled disk must not hold up the others for ever.
      setTimeout(end(false), 5000);
    });
  }

  // Of a folder of frames, reads all: 000000.png, 000001.png, ...
  async #fetch() {
    if (this.clip.kind !== "frames" || this.images.length) return true;
    for (let i = 0; i < this.count; i++) {
      const image = new Image();
      image.src = this.clip.src.replace(/0{6}(?=\.png$)/,
        String(i).padStart(6, "0"));
      this.images.push(image);
    }
    await Promise.allSettled(this.images.map((x) => x.decode()));
    return true;
  }

  play(rate) {
    if (!this.media || !this.controlled) return;
    if (this.clip.kind === "video") {
      this.media.playbackRate = rate;
      // It may be paused, or gone, before it has begun.
      this.media.play().catch(() => {});
    } else {
      this.started = { at: performance.now(), time: this.time, rate };
    }
  }

  pause() {
    if (this.clip.kind === "video") this.media?.pause();
    this.started = null;
  }

  seek(time) {
    if (!this.media || !this.controlled) return;
    if (this.clip.kind === "video") {
      this.media.currentTime = Math.min(time, this.duration);
    } else {
      if (this.started) {
        this.started = { ...this.started, at: performance.now(), time };
      }
      this.#show(Math.floor(time * this.fps + 1e-3));
    }
  }

  // The middle of a frame's time: its start may round to the one before.
  seekFrame(frame) {
    const last = this.count - 1;
    this.seek((Math.min(Math.max(frame, 0), last) + 0.5) / this.fps);
  }

  get number() {
    const frame = Math.floor(this.time * this.fps + 1e-3);
    return Math.min(Math.max(frame, 0), this.count - 1);
  }

  #show(frame) {
    const number = Math.min(Math.max(frame, 0), this.count - 1);
    const image = this.images[number];
    if (image && this.media && number !== this.shownFrame) {
      this.media.src = image.src;
      this.shownFrame = number;
    }
  }

  tell() {
    if (!this.media || !this.controlled || this.broken) return;
    if (this.clip.kind === "frames" && this.started) this.#show(this.number);
    const text = `${this.number + 1} / ${this.count}`;
    if (this.frame.textContent !== text) this.frame.textContent = text;
  }
}

// Plays what is in sight, all from one clock: a clip that falls behind is set
// right, and all begin again when the longest has ended.
class Clock {
  constructor(changed) {
    this.changed = changed;
    this.inSight = new Set();
    this.group = [];
    this.playing = false;
    this.loop = true;
    this.rate = 1;
    this.position = 0;
    this.turn = 0;
    this.owed = 0;
    this.owing = 0;
    this.since = 0;
  }

  get longest() {
    return Math.max(0, ...this.#controlled().map((p) => p.duration));
  }

  #controlled() {
    return [...this.inSight].filter((p) => p.controlled).slice(0, MOST);
  }

  async play() {
    const turn = ++this.turn;
    this.group = this.#controlled();
    this.playing = true;
    this.changed();
    await Promise.all(this.group.map((p) => p.ready()));
    if (turn !== this.turn) return;
    if (this.position >= this.longest - 1e-3) this.position = 0;
    this.#begin(this.position);
    requestAnimationFrame(() => this.#tick(turn));
  }

  #begin(position) {
    this.position = this.base = position;
    this.since = performance.now();
    for (const player of this.group) {
      player.seek(position);
      if (position < player.duration) player.play(this.rate);
    }
  }

  pause() {
    this.turn++;
    this.playing = false;
    for (const player of this.inSight) player.pause();
    this.changed();
  }

  toggle() { return this.playing ? this.pause() : this.play(); }

  #tick(turn) {
    if (turn !== this.turn) return;
    const now = performance.now();
    const longest = this.longest;
    this.position = this.base + ((now - this.since) / 1000) * this.rate;
    if (this.position >= longest) {
      if (this.loop && longest > 0) this.#begin(0);
      else {
        this.position = longest;
        return this.pause();
      }
    }
    for (const player of this.group) this.#follow(player, now);
    this.changed();
    requestAnimationFrame(() => this.#tick(turn));
  }

  #follow(player, now) {
    player.tell();
    if (this.position >= player.duration - 0.5 / player.fps) return;
    const off = Math.abs(player.time - this.position);
    // A seek takes a while: one at a time.
    if (now - player.corrected < 600) return;
    if (off > Math.max(0.08, 0.05 * this.rate)) {
      player.corrected = now;
      player.seek(this.position);
    }
    if (player.paused) player.play(this.rate);
  }

  setRate(rate) {
    this.rate = rate;
    if (this.playing) this.#begin(this.position);
  }

  async seek(position) {
    if (this.playing) this.pause();
    const turn = ++this.turn;
    this.position = position;
    this.group = this.#controlled();
    await Promise.all(this.group.map((p) => p.ready()));
    if (turn !== this.turn) return;
    for (const player of this.group) {
      player.seekFrame(Math.floor(position * player.fps + 1e-3));
    }
    this.#told();
  }

  // All go to the same number of frame, whatever their frame rates.
  async step(by) {
    if (this.playing) this.pause();
    // Presses while the clips load add up.
    this.owed = (this.turn === this.owing ? this.owed : 0) + by;
    const turn = this.owing = ++this.turn;
    this.group = this.#controlled();
    await Promise.all(this.group.map((p) => p.ready()));
    if (turn !== this.turn) return;
    by = this.owed;
    this.owed = 0;
    if (!this.group.length) return;
    const first = this.group.reduce((a, b) => (b.count > a.count ? b : a));
    const from = Math.floor(this.position * first.fps + 1e-3);
    const frame = Math.min(Math.max(from + by, 0), first.count - 1);
    this.position = frame / first.fps;
    for (const player of this.group) player.seekFrame(frame);
    this.#told();
  }

  #told() {
    this.changed();
    // What a video tells of its time is so only when it has sought.
    for (const player of this.group) {
      player.tell();
      if (player.clip.kind !== "video") continue;
      player.media?.addEventListener("seeked", () => player.tell(),
        { once: true });
    }
  }

  enter(player) {
    player.mount();
    this.inSight.add(player);
    this.changed();
    if (!this.playing || !player.controlled) return;
    if (this.group.length >= MOST) return;
    const turn = this.turn;
    player.ready().then(() => {
      if (turn !== this.turn || !this.inSight.has(player)) return;
      this.group.push(player);
      player.seek(this.position);
      player.play(this.rate);
    });
  }

  leave(player) {
    this.inSight.delete(player);
    this.group = this.group.filter((p) => p !== player);
    player.unmount();
  }

  clear() {
    if (this.playing) this.pause();
    this.turn++;
    for (const player of [...this.inSight]) this.leave(player);
    this.position = 0;
    this.changed();
  }
}
