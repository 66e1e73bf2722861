"""The config of `vidgen sample` when --config names none: CogVideoX-2b."""

from vidgen import sample


def get_config() -> sample.SampleConfig:
  """Returns the defaults."""
  return sample.SampleConfig()
