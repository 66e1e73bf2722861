"""How the published tensors of the autoencoder become our parameters."""

from collections.abc import Iterator

from vidgen import weights
from vidgen.models.svd import rules
from vidgen.weights import CONV2D, CONV3D, LINEAR


def _network(name: str, temporal: bool) -> Iterator[weights.Rule]:
  """Yields the rules of the encoder or of a decoder."""
  way = "down" if name == "encoder" else "up"
  for end in ("conv_in", "conv_out"):
    yield from rules.layer(f"{name}.{end}", f"{name}/{end}", CONV2D)
  yield from rules.norm(f"{name}.conv_norm_out", f"{name}/norm_out")
  for published, ours in (
    ("mid_block.resnets.{index}", "mid_resnet_{index}"),
    (
      f"{way}_blocks.{{level}}.resnets.{{index}}",
      f"{way}_{{level}}_resnet_{{index}}",
    ),
  ):
    published, ours = f"{name}.{published}", f"{name}/{ours}"
    if temporal:
      yield from rules.video_resnet(published, ours)
    else:
      yield from rules.resnet(published, ours, CONV2D)
  attention = f"{name}.mid_block.attentions.0"
  yield from rules.norm(f"{attention}.group_norm", f"{name}/mid_attention/norm")
  for theirs, ours in (
    ("to_q", "query"),
    ("to_k", "key"),
    ("to_v", "value"),
    ("to_out.0", "out"),
  ):
    yield from rules.layer(
      f"{attention}.{theirs}", f"{name}/mid_attention/{ours}", LINEAR
    )
  yield from rules.layer(
    f"{name}.{way}_blocks.{{level}}.{way}samplers.0.conv",
    f"{name}/{way}_{{level}}_resize",
    CONV2D,
  )


def table(temporal: bool) -> weights.Table:
  """Returns the table of an autoencoder.

  Args:
    temporal: Whether its decoder looks at neighbouring frames.
  """
  return (
    *_network("encoder", False),
    *_network("decoder", temporal),
    *rules.layer("decoder.time_conv_out", "decoder/time_out", CONV3D),
    *rules.layer("quant_conv", "encoder/quant", CONV2D),
    *rules.layer("post_quant_conv", "decoder/post_quant", CONV2D),
  )
