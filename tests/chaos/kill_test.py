"""Jobs that are killed at random moments end as if they had not been."""

import pytest

from tests.chaos import kill

CLIPS = 12


@pytest.mark.parametrize("job", ["sample", "train"])
def test_killed_five_times_it_ends_in_the_same_bits(job, tmp_path):
  want, got, moments = kill.run(
    job, tmp_path, kills=5, seed=1, clips=CLIPS, steps=60
  )
  assert got == want
  assert len(moments) == 5
  assert len(want) >= (CLIPS if job == "sample" else 60)
