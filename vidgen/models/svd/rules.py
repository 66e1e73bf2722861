"""Rules that the tables of the UNet and of the autoencoder share."""

from collections.abc import Iterator

from vidgen import weights
from vidgen.weights import CONV2D, CONV3D, LINEAR, Rule


def layer(published: str, ours: str, axes: tuple[int, ...]) -> weights.Table:
  """Returns the rules of a layer whose kernel turns by `axes`."""
  return (
    Rule(f"{published}.weight", f"{ours}/kernel", axes),
    Rule(f"{published}.bias", f"{ours}/bias"),
  )


def norm(published: str, ours: str) -> weights.Table:
  """Returns the rules of a norm."""
  return (
    Rule(f"{published}.weight", f"{ours}/scale"),
    Rule(f"{published}.bias", f"{ours}/bias"),
  )


def resnet(
  published: str, ours: str, axes: tuple[int, ...]
) -> Iterator[weights.Rule]:
  """Yields the rules of a residual block, whose convolutions turn by `axes`."""
  for i in (1, 2):
    yield from norm(f"{published}.norm{i}", f"{ours}/norm{i}")
    yield from layer(f"{published}.conv{i}", f"{ours}/conv{i}", axes)
  yield from layer(f"{published}.time_emb_proj", f"{ours}/time", LINEAR)
  yield from layer(f"{published}.conv_shortcut", f"{ours}/shortcut", axes)


def video_resnet(published: str, ours: str) -> Iterator[weights.Rule]:
  """Yields the rules of a block of frames, one of time, and their blend."""
  spatial, temporal = (
    f"{published}.spatial_res_block",
    f"{published}.temporal_res_block",
  )
  yield from resnet(spatial, f"{ours}/spatial", CONV2D)
  yield from resnet(temporal, f"{ours}/temporal", CONV3D)
  yield Rule(f"{published}.time_mixer.mix_factor", f"{ours}/blend/mix_factor")
