"""Reports in a real browser, opened as files.

Debian's Chromium (`apt-get install chromium`), or one of another name.
"""

import contextlib
import io
import json
import os
import shutil
import time

import numpy as np
import PIL.Image
import pytest
from playwright import sync_api

from tests import report_runs
from vidgen import report, video

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
)


@pytest.fixture(scope="module")
def browser():
  path = next(filter(None, map(shutil.which, BROWSERS)), None)
  if path is None:
    pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture
def show(browser):
  """Opens a page; no error on it and no request but for files, to its end."""
  with contextlib.ExitStack() as stack:
    faults = []

    def opened(path, scheme="light"):
      context = browser.new_context(
        viewport={"width": 1400, "height": 1000}, color_scheme=scheme
      )
      stack.callback(context.close)
      page = context.new_page()
      page.set_default_timeout(10_000)
      page.on("console", lambda message: faults.append(message.text))
      page.on("pageerror", lambda error: faults.append(str(error)))
      page.on("requestfailed", lambda request: faults.append(request.url))
      page.on(
        "request",
        lambda r: None if r.url.startswith("file:") else faults.append(r.url),
      )
      page.goto(path.as_uri())
      page.wait_for_selector("html[data-ready]")
      return page

    opened.faults = faults
    yield opened
    # What a page lets go of as it turns is no fault.
    assert [f for f in faults if not f.endswith((".mp4", ".jpg"))] == []


def times(page):
  """The playing times of all videos that are in sight."""
  return page.eval_on_selector_all(
    "video", "all => all.map(v => v.readyState >= 2 ? v.currentTime : -1)"
  )


def until(page, condition):
  """Waits; playwright's own way evaluates text, which the policy forbids."""
  end = time.perf_counter() + 30
  while not page.evaluate(condition):
    assert time.perf_counter() < end, condition
    page.wait_for_timeout(10)


def wait_for_frames(page, time):
  until(
    page,
    "[...document.querySelectorAll('video')].every(v => v.readyState >= 2 && "
    f"!v.seeking && Math.abs(v.currentTime - {time}) < 1e-3)",
  )


def wait_for_step(page, time):
  """Waits until all videos play, and as one; a busy machine may drop some."""
  until(
    page,
    "(times => Math.min(...times) > "
    f"{time} && Math.max(...times) - Math.min(...times) < 0.15)("
    "[...document.querySelectorAll('video')].map(v => v.currentTime))",
  )


def test_clips_play_in_step(show, tmp_path):
  job = tmp_path / "a job, #1?"
  report_runs.job(job, ["a red disc", "a blue disc", "two discs"])
  # Longer than the others, which wait for it before all begin again.
  long = report_runs.frames(5, count=17)
  report_runs.clip(job, 3, "a red square", pixels=long)
  page = show(report.write(job))
  assert page.locator("video").count() == 4
  assert times(page) == [-1] * 4  # Nothing was loaded but posters.
  posters = "document.querySelectorAll('video[poster]').length === 4"
  until(page, posters)

  page.keyboard.press(" ")
  wait_for_step(page, 0.3)
  until(
    page, "[...document.querySelectorAll('video')].at(-1).currentTime > 1.4"
  )
  first = times(page)[0]
  assert 1.0 < first < 1.2  # At its end.
  # All from the beginning.
  until(page, "document.querySelector('video').currentTime < 0.5")
  wait_for_step(page, 0.1)
  page.click("#play")
  until(page, "[...document.querySelectorAll('video')].every(v => v.paused)")
  assert page.inner_text("#play") == "Play"


def test_steps_add_up_while_clips_load(show, tmp_path):
  report_runs.job(tmp_path / "job", ["a", "b"])
  page = show(report.write(tmp_path / "job"))
  # In one turn of the page's: none has loaded before the third.
  page.evaluate(
    "for (let i = 0; i < 3; i++) document.querySelector('#on').click()"
  )
  wait_for_frames(page, 3.5 / 8)


def test_frames_step_and_speed(show, tmp_path):
  report_runs.job(tmp_path / "job", ["a", "b"])
  page = show(report.write(tmp_path / "job"))
  for _ in range(3):
    page.click("#on")
  wait_for_frames(page, 3.5 / 8)
  page.keyboard.press(",")
  wait_for_frames(page, 2.5 / 8)
  until(page, "document.querySelector('.frame').textContent === '3 / 9'")
  for _ in range(4):
    page.keyboard.press(",")
  wait_for_frames(page, 0.5 / 8)
  page.select_option("[aria-label=Speed]", "0.25")
  page.keyboard.press("l")
  page.click("#play")
  until(page, "document.querySelector('video').currentTime > 0.1")
  rate = page.eval_on_selector("video", "v => v.playbackRate")
  assert rate == 0.25
  page.select_option("[aria-label=Speed]", "2")
  # Without the loop it ends.
  until(page, "document.querySelector('#play').textContent === 'Play'")
  assert min(times(page)) > 1.0


def test_the_pixels_are_those_of_the_frame(show, tmp_path):
  pixels = report_runs.frames(3, size=64)
  report_runs.clip(tmp_path / "job", 0, "a", pixels=pixels)
  page = show(report.write(tmp_path / "job"))
  for frame in range(1, 6):
    page.click("#on")
    wait_for_frames(page, (frame + 0.5) / 8)
    page.evaluate("new Promise(r => requestAnimationFrame(r))")
    page.evaluate("document.querySelector('.frame').hidden = true")
    data = page.locator("video").screenshot()
    with PIL.Image.open(io.BytesIO(data)) as image:
      got = np.asarray(image.convert("RGB").resize((64, 64)), float)
    got = got[:48]  # The frame's number is below.
    off = [np.abs(got - other[:48]).mean() for other in pixels]
    assert np.argmin(off) == frame and off[frame] < 8


def test_prompts_stay_text(show, tmp_path):
  report_runs.job(tmp_path / "job", report_runs.NASTY)
  report_runs.clip(
    tmp_path / "job", 20, "x", status="failed", error=report_runs.NASTY[0]
  )
  value = {"command": report_runs.NASTY[1], report_runs.NASTY[0]: "x"}
  (tmp_path / "job" / "manifest.json").write_text(json.dumps(value))
  bad = {report_runs.NASTY[0]: {"value": 1.0, "name": report_runs.NASTY[1]}}
  (tmp_path / "job" / "evaluate.json").write_text(json.dumps({"metrics": bad}))
  page = show(report.write(tmp_path / "job"))
  page.click("summary")
  assert page.evaluate("window.xss") is None
  assert page.locator("script").count() == 2
  assert page.locator("article img").count() == 0
  told = page.locator(".prompt").all_inner_texts()
  assert told[0] == report_runs.NASTY[0]
  assert told[2] == report_runs.NASTY[2]
  assert told[3].startswith("start U+202E desrever U+202C")
  assert told[4] == "half a pair: U+D800"
  assert told[5] == report_runs.NASTY[5]
  assert "<script>" in page.inner_text(".screen.none")
  box = page.locator(".prompt").nth(6)
  assert box.bounding_box()["height"] < 80
  page.click(".more >> nth=-1")
  assert len(box.inner_text().strip()) >= 9_999


def test_the_policy_holds(show, tmp_path):
  report_runs.job(tmp_path / "job", ["a"])
  page = show(report.write(tmp_path / "job"))
  page.evaluate(
    "const s = document.createElement('script'); s.textContent = 'xss = 1';"
    "document.body.append(s);"
    "const d = document.createElement('div');"
    "d.innerHTML = '<img src=x onerror=\"window.xss = 2\">';"
    "document.body.append(d);"
  )
  page.evaluate("fetch('https://example.com/').catch(() => 0)")
  page.wait_for_timeout(200)
  assert page.evaluate("window.xss") is None
  told = " ".join(show.faults)
  assert "script-src" in told and "connect" in told
  show.faults.clear()


def test_filters(show, tmp_path):
  job = tmp_path / "job"
  paths = report_runs.job(job, ["a red disc", "a blue disc", "A RED square"])
  report_runs.clip(job, 3, "red", status="failed", error="out of memory")
  report_runs.clip(job, 2, "A RED square", seconds=60)
  paths[1].unlink()
  page = show(report.write(job))
  told = lambda: page.inner_text("[role=status]")
  assert told() == "4 clips"
  page.keyboard.press("/")
  page.keyboard.type("Red")
  assert told() == "3 clips"
  page.click("text=failed 1")
  assert told() == "1 clip"
  assert page.inner_text(".screen.none") == "failed\nout of memory"
  page.fill("#filter", "")
  page.click("text=missing 1")
  assert told() == "1 clip"
  assert "not there" in page.inner_text(".screen.none")
  page.click("text=done 2")
  assert told() == "2 clips"
  page.select_option("[aria-label=Order]", ">seconds")
  assert page.locator(".prompt").first.inner_text() == "A RED square"
  page.fill("#filter", "nothing like it")
  assert "Nothing matches" in page.inner_text("#clips")


def test_a_job_that_was_stopped(show, tmp_path):
  report_runs.job(tmp_path / "job", ["a", "b"])
  attempts = [{"seconds": s} for s in (3600, None, 61)]
  held = {"planned": 1234, "seconds": 61, "attempts": attempts}
  (tmp_path / "job" / "manifest.json").write_text(json.dumps(held))
  page = show(report.write(tmp_path / "job"))
  table = page.locator("main table").first
  cells = zip(
    table.locator("thead th").all_inner_texts(),
    table.locator("tbody").locator("th, td").all_inner_texts(),
    strict=True,
  )
  told = {name.lower(): text for name, text in cells}
  assert (told["done"], told["left"]) == ("2", "1,232")
  want = "1 h 1 min in 3 attempts, 1 of unknown length left out"
  assert told["took"] == want


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_two_runs(show, tmp_path, scheme):
  first, second = tmp_path / "first", tmp_path / "second"
  report_runs.job(first, ["a", "b", "c"])
  report_runs.clip(second, 0, "a")
  report_runs.clip(second, 1, "b", pixels=report_runs.frames(9))
  for folder, n in ((first, 2048), (second, 1024)):
    result = {"value": 300.5, "low": 290.0, "high": 310.0, "n": n}
    fvd = result | {"skipped": 1, "name": "fvd-v1"}
    # Of the same n, but of other files.
    psnr = result | {"n": 3, "name": f"psnr-{folder.name}"}
    metrics = {"metrics": {"fvd": fvd, "psnr": psnr}}
    (folder / "evaluate.json").write_text(json.dumps(metrics))
    value = {"config": {"seed": n, "steps": 4}, "exit": {"reason": "done"}}
    (folder / "manifest.json").write_text(json.dumps(value))
  page = show(report.write(first, second, out=tmp_path / "both.html"), scheme)
  assert page.locator(".row").count() == 3
  assert page.locator(".row.differs").count() == 1
  assert page.locator(".screen").count() == 6
  page.click("summary")
  until(page, "document.querySelectorAll('.facts tbody tr').length === 1")
  assert page.locator(".facts tbody tr").inner_text().split() == [
    "config.seed",
    "2048",
    "1024",
  ]
  assert page.inner_text("#evaluation").count("not comparable") == 4
  page.check("#all-runs")
  assert page.inner_text("[role=status]") == "2 rows"
  page.click("button:text-is('Different')")
  assert page.inner_text("[role=status]") == "1 row"
  page.click("#play")
  wait_for_step(page, 0.3)
  assert "not in this run" not in page.inner_text("#clips")
  page.click("button:text-is('All rows')")
  page.uncheck("#all-runs")
  assert "not in this run" in page.inner_text("#clips")
  # What is drawn is of the scheme, and more than a plain ground.
  data = page.screenshot(path=tmp_path / "both.png")
  with PIL.Image.open(io.BytesIO(data)) as image:
    colours = image.convert("RGB").getcolors(1 << 24)
  ground = max(colours)[1]
  assert (sum(ground) > 600) == (scheme == "light") and len(colours) > 200


def test_curves(show, tmp_path):
  report_runs.training(tmp_path / "run")
  report_runs.training(tmp_path / "again")
  page = show(report.write(tmp_path / "run", tmp_path / "again"))
  assert page.locator(".chart .curve").count() == 8
  loss = page.locator(".chart").first
  assert "last step 200: 0.125 | 0.125" in loss.inner_text()
  path = lambda: loss.locator(".curve").first.get_attribute("d")
  plain = path()
  assert plain.count("L") == 199 and "NaN" not in plain
  page.click("button:text-is('Log')")
  logged = path()
  assert logged != plain and "NaN" not in logged
  page.fill("[aria-label=Smoothing]", "90")
  assert path() != logged and loss.locator(".raw").count() == 2
  box = loss.locator("svg").bounding_box()
  page.mouse.move(box["x"] + 40, box["y"] + 100)
  assert "step 1:" in loss.inner_text()
  assert "80.0 % in steps · 50 s · 2 starts" in page.inner_text("#time")
  assert page.locator(".row").count() == 4


def test_the_bar_of_a_short_run_is_full(show, tmp_path):
  report_runs.training(tmp_path / "run")
  value = {"step": 1, "starts": 1, "seconds": {"step": 0.2, "load": 0.1}}
  text = json.dumps(value | {"goodput": 0.7})
  (tmp_path / "run" / "goodput.json").write_text(text)
  page = show(report.write(tmp_path / "run"))
  width = lambda part: part.bounding_box()["width"]
  whole = width(page.locator(".share"))
  parts = [width(part) for part in page.locator(".share > span").all()]
  assert len(parts) == 2 and sum(parts) > 0.98 * whole


def test_a_long_command_is_read_in_lines(show, tmp_path):
  for name in "abc":
    report_runs.job(tmp_path / name, ["a"])
    argv = ["sample", *(f"--config.number_{i}=12345" for i in range(9))]
    value = {"argv": argv, "exit": {"reason": "failed: a long reason " * 4}}
    (tmp_path / name / "manifest.json").write_text(json.dumps(value))
  folders = [tmp_path / name for name in "abc"]
  page = show(report.write(*folders, out=tmp_path / "all.html"))
  page.set_viewport_size({"width": 700, "height": 600})
  widths = lambda name: [
    cell.bounding_box()["width"] for cell in page.locator(name).all()
  ]
  assert len(widths("td.wide.mono")) == 3
  assert min(widths("td.wide.mono")) >= 240 and min(widths("td.wide")) >= 120


def test_gifs_and_folders_of_frames(show, tmp_path):
  frames = report_runs.frames(0)
  video.write_png_frames(tmp_path / "000000_a", frames)
  video.write_gif(tmp_path / "000001_b.gif", frames, 8)
  (tmp_path / "000002_c.npz").write_bytes(b"PK")
  files = ["000000_a", "000001_b.gif", "000002_c.npz"]
  with (tmp_path / "clips.jsonl").open("w") as file:
    for index, name in enumerate(files):
      record = {"index": index, "files": [name], "frames": 9, "fps": 8}
      file.write(json.dumps(record) + "\n")
  page = show(report.write(tmp_path))
  images = page.locator(".screen img")
  assert images.count() == 2
  page.click("#on")
  page.keyboard.press(".")
  until(page, "document.querySelector('img').src.endsWith('/000002.png')")
  assert "latents only" in page.inner_text(".screen.none")


def test_a_clip_that_cannot_be_played_holds_up_none(show, tmp_path):
  paths = report_runs.job(tmp_path / "job", ["a", "b"])
  paths[0].write_bytes(b"x" * paths[0].stat().st_size)
  page = show(report.write(tmp_path / "job"))
  page.click("#play")
  until(page, "document.querySelectorAll('video')[1].currentTime > 0.3")
  assert page.locator(".frame").first.inner_text() == "cannot be played"


def test_ten_thousand_clips(show, tmp_path):
  (path,) = report_runs.job(tmp_path / "job", ["a"])
  line = json.loads((tmp_path / "job" / "clips.jsonl").read_text())
  with (tmp_path / "job" / "clips.jsonl").open("w") as file:
    for i in range(10_000):
      name = f"{i:06d}_{i:012x}.mp4"
      os.link(path, path.with_name(name))
      prompt = f"prompt {i}: " + "a disc that moves to the right, " * 5
      record = {"index": i, "name": name[:-4], "prompt": prompt, "clip": i}
      record |= {"files": [name], "bytes": {name: line["bytes"][path.name]}}
      file.write(json.dumps(line | record) + "\n")
  start = time.process_time()
  page = report.write(tmp_path / "job", posters=False)
  assert time.process_time() - start < 10
  start = time.perf_counter()
  page = show(page)
  page.wait_for_selector("video")
  assert time.perf_counter() - start < 3
  assert page.locator("article").count() == 48
  assert page.inner_text("[role=status]") == "1\N{EN DASH}48 of 10,000 clips"
  start = time.perf_counter()
  page.fill("#filter", "prompt 77")
  assert page.inner_text("[role=status]") == "1\N{EN DASH}48 of 111 clips"
  assert time.perf_counter() - start < 1
  page.keyboard.press("Escape")
  page.keyboard.press("n")
  page.keyboard.press("n")
  assert page.inner_text("[role=status]") == "97\N{EN DASH}111 of 111 clips"
  assert page.locator("article").count() == 15
