"""How the published tensors of the autoencoder become our parameters."""

from collections.abc import Iterator

from vidgen import weights


def _conv(published: str, ours: str, axes: tuple[int, ...]) -> weights.Table:
  return (
    weights.Rule(f"{published}.weight", f"{ours}/kernel", axes),
    weights.Rule(f"{published}.bias", f"{ours}/bias"),
  )


def _group_norm(published: str, ours: str) -> weights.Table:
  return (
    weights.Rule(f"{published}.weight", f"{ours}/scale"),
    weights.Rule(f"{published}.bias", f"{ours}/bias"),
  )


def _spatial_norm(published: str, ours: str) -> weights.Table:
  conv3d = weights.CONV3D
  return (
    *_group_norm(f"{published}.norm_layer", f"{ours}/norm"),
    *_conv(f"{published}.conv_y.conv", f"{ours}/scale", conv3d),
    *_conv(f"{published}.conv_b.conv", f"{ours}/shift", conv3d),
  )


def _network(name: str) -> Iterator[weights.Rule]:
  """Yields the rules of the encoder or the decoder."""
  way, norm = ("down", _group_norm)
  if name == "decoder":
    way, norm = ("up", _spatial_norm)
  conv3d = weights.CONV3D
  for end in ("conv_in", "conv_out"):
    yield from _conv(f"{name}.{end}.conv", f"{name}/{end}", conv3d)
  yield from norm(f"{name}.norm_out", f"{name}/norm_out")
  blocks = {
    "mid_block.resnets.{resnet}": "mid_resnet_{resnet}",
    f"{way}_blocks.{{block}}.resnets.{{resnet}}": (
      f"{way}_{{block}}_resnet_{{resnet}}"
    ),
  }
  for published, ours in blocks.items():
    published, ours = f"{name}.{published}", f"{name}/{ours}"
    for i in (1, 2):
      yield from norm(f"{published}.norm{i}", f"{ours}/norm{i}")
      yield from _conv(f"{published}.conv{i}.conv", f"{ours}/conv{i}", conv3d)
    yield from _conv(f"{published}.conv_shortcut", f"{ours}/shortcut", conv3d)
  yield from _conv(
    f"{name}.{way}_blocks.{{block}}.{way}samplers.0.conv",
    f"{name}/{way}_{{block}}_resize",
    weights.CONV2D,
  )


VAE_TABLE: weights.Table = (*_network("encoder"), *_network("decoder"))
