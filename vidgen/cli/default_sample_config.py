"""The config of `vidgen sample` when --config names none: the small model."""

from vidgen import sample


def get_config() -> sample.SampleConfig:
  """Returns the defaults."""
  return sample.SampleConfig()
