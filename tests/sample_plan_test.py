import dataclasses
import json
import os

import numpy as np
import PIL.Image
import pytest
from array_record.python import array_record_module

from tests import sampling_jobs as jobs
from vidgen import (
  clips,
  diffusion,
  errors,
  prepare,
  prompts,
  sample,
  video,
)
from vidgen.models import base


@pytest.fixture
def pipeline(monkeypatch, tmp_path_factory):
  return jobs.fake_pipeline(monkeypatch, tmp_path_factory)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({}, "--prompt=TEXT or --prompts=FILE"),
    ({"prompt": "a", "prompts": "a.txt"}, "--prompt=TEXT or"),
    ({"prompts": "no.txt"}, "no.txt"),
    ({"prompt": "a", "height": 0}, "height must be at least 1"),
    ({"prompt": "a", "num_frames": 0}, "num_frames must be at least 1"),
    ({"prompt": "a", "dtype": "bfloat"}, "Did you mean bfloat16"),
    ({"prompt": "a", "residency": "al"}, "Did you mean all"),
    ({"prompt": "a", "formats": ("mp5",)}, "Did you mean mp4"),
    ({"prompt": "a", "formats": ()}, "formats is empty"),
    ({"prompt": "a", "fps": 0.0}, "fps must be from 0.01"),
    ({"prompt": "a", "fps": float("nan")}, "fps must be from 0.01"),
    ({"prompt": "a", "seed": 2**32}, "seed must be from 0"),
    ({"prompt": "a", "sampler": "euler"}, "sampler must be one of"),
    ({"prompt": "a", "image": "no.png"}, "no.png: there is no such image"),
    ({"prompt": "a", "video": "no.mp4"}, "no.mp4: there is no such video"),
    ({"prompt": "a", "strength": 0.5}, "strength needs a video"),
    ({"prompt": "a", "last_image": "no.png"}, "no.png: there is no such image"),
    ({"prompt": "a", "lora": "no.st"}, "no.st: there is no such LoRA"),
    ({"prompt": "a", "lora": {"no.st": 1.0}}, "no.st: there is no such LoRA"),
    ({"prompt": "a", "lora_scale": float("inf")}, "must be finite"),
    ({"prompt": "a", "options": {"seed": 1}}, "'seed' is no option"),
  ],
)
def test_mistakes_are_told_before_the_weights_are_read(
  tmp_path, pipeline, fields, message
):
  with pytest.raises(errors.InputError, match=message) as caught:
    sample.run(jobs.config(tmp_path, **fields))
  assert "\n" not in str(caught.value)
  assert not hasattr(pipeline, "loaded")
  assert not (tmp_path / "out").exists()


def test_image_and_video_exclude_each_other(tmp_path, pipeline):
  PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  video.write_mp4(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
  path = tmp_path / "a.jsonl"
  path.write_text('{"prompt": "a", "image": "a.png", "video": "a.mp4"}')
  with pytest.raises(errors.InputError, match=r"a.jsonl:1: .*exclude"):
    sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))
  path.write_text('{"prompt": "a", "strength": 0.5}')
  with pytest.raises(errors.InputError, match=r"a.jsonl:1: strength"):
    sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))
  path.write_text('{"prompt": "a", "image": "b.png"}')
  with pytest.raises(errors.InputError, match=r"a.jsonl:1: .*b.png"):
    sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))


def test_a_bad_line_takes_as_many_numbers_as_it_asks_for(tmp_path, pipeline):
  path = tmp_path / "a.jsonl"
  bad = (
    {"image": "b.png", "videos_per_prompt": 3},
    {"height": -1, "videos_per_prompt": 2},
    {"height": -1, "videos_per_prompt": 0},
  )
  lines = [{"prompt": "a", **fields} for fields in (*bad, {})]
  path.write_text("\n".join(map(json.dumps, lines)))
  job = jobs.config(tmp_path, prompts=os.fspath(path), videos_per_prompt=4)
  planned, failures = sample.sample_plan.sift(job)
  assert [failure.index for failure in failures] == [0, 3, 5]
  assert [clip.index for clip in planned] == [9, 10, 11, 12]


def test_what_is_no_image_may_be_a_video(tmp_path):
  frames = np.zeros((3, 32, 32, 3), np.uint8)
  video.write_mp4(tmp_path / "a.mp4", frames, 8)
  path = tmp_path / "a.jsonl"
  lines = [{"prompt": "a", name: "a.mp4"} for name in ("image", "video")]
  path.write_text("\n".join(map(json.dumps, lines)))
  job = jobs.config(tmp_path, prompts=os.fspath(path))
  planned, failures = sample.sample_plan.sift(job)
  assert ([f.index for f in failures], [c.index for c in planned]) == ([0], [1])


def test_a_negative_prompt_that_nothing_reads_is_told_first(
  tmp_path, pipeline, monkeypatch
):
  plan = lambda request: base.Plan(
    num_frames=5,
    height=32,
    width=32,
    latents=(2, 4, 4, 16),
    padding=0,
    schedule=diffusion.karras(0.1, 1.0, 2),
    sampler="ddim",
    guidance=request.guidance_scale and np.full(2, request.guidance_scale),
    options={},
    fps=8,
  )
  monkeypatch.setattr(pipeline, "plan", plan)
  job = jobs.config(tmp_path, prompt="a", negative_prompt="blurry")
  with pytest.raises(errors.InputError, match="negative_prompt"):
    sample.run(job)
  assert not pipeline.calls
  assert not (tmp_path / "out").exists()
  # A folder of the user's own stays, whatever fails in it.
  (tmp_path / "out").mkdir()
  with pytest.raises(errors.InputError, match="negative_prompt"):
    sample.run(job)
  assert (tmp_path / "out").exists()
  path = tmp_path / "a.csv"
  path.write_text("prompt,guidance_scale\na,6\nb,\n")
  job = dataclasses.replace(job, prompt=None, prompts=os.fspath(path))
  (failure,) = sample.run(job).failures
  assert "a.csv:3: negative_prompt" in failure


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/2", "a/b", "0/0"])
def test_bad_shards(tmp_path, pipeline, shard):
  with pytest.raises(errors.InputError, match="shard must be i/n"):
    sample.run(jobs.many(tmp_path, 2, shard=shard))


def test_prompts_of_an_array_record_and_of_a_data_set(tmp_path, pipeline):
  path = tmp_path / "a.array_record"
  writer = array_record_module.ArrayRecordWriter(
    os.fspath(path), "group_size:1"
  )
  for record in ('{"prompt": "a", "seed": 4}', "b", '{"promt": "c"}'):
    writer.write(record.encode())
  writer.close()
  summary = sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))
  assert [(c["prompt"], c["seed"]) for c in pipeline.calls] == [
    ("a", 4),
    ("b", 0),
  ]
  (failure,) = summary.failures
  assert "a.array_record:3: unknown field 'promt'" in failure
  prepare.run(
    prepare.PrepareConfig(
      "moving_shapes", os.fspath(tmp_path / "data"), num_clips=40
    )
  )
  (folder,) = (tmp_path / "data/moving_shapes").iterdir()
  lines = prompts.read(f"{folder}:train")
  assert len(lines) == 40 and all(" " in line.prompt for line in lines)
  with pytest.raises(errors.InputError, match=r"has the splits .*train"):
    prompts.read(f"{folder}:tran")


def test_a_job_without_prompts_type_is_complete():
  # A new field of a line must be applied to its clips too.
  clip = {field.name for field in dataclasses.fields(clips.Clip)}
  assert prompts.TYPES.keys() - clip == {"videos_per_prompt"}


def test_a_last_image_needs_a_first(tmp_path):
  path = tmp_path / "a.png"
  PIL.Image.new("RGB", (8, 8)).save(path)
  config = sample.SampleConfig(prompt="a", last_image=str(path))
  with pytest.raises(errors.InputError, match="last_image needs an image"):
    sample.plan(config)
