"""How published tensors become the UNet's parameters."""

from collections.abc import Iterator

from vidgen import weights
from vidgen.models.svd import rules
from vidgen.weights import CONV2D, LINEAR, Rule


def _block(published: str, ours: str) -> Iterator[weights.Rule]:
  """Yields the rules of a transformer's block, spatial or temporal."""
  for name in ("norm_in", "norm1", "norm2", "norm3"):
    yield from rules.norm(f"{published}.{name}", f"{ours}/{name}")
  for i, name in ((1, "self_attention"), (2, "cross_attention")):
    for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
      yield Rule(
        f"{published}.attn{i}.to_{short}.weight",
        f"{ours}/{name}/{long}/kernel",
        LINEAR,
      )
    yield from rules.layer(
      f"{published}.attn{i}.to_out.0", f"{ours}/{name}/out", LINEAR
    )
  for short, long in (("ff", "feed_forward"), ("ff_in", "feed_forward_in")):
    yield from rules.layer(
      f"{published}.{short}.net.0.proj", f"{ours}/{long}/in", LINEAR
    )
    yield from rules.layer(
      f"{published}.{short}.net.2", f"{ours}/{long}/out", LINEAR
    )


def _transformer(published: str, ours: str) -> Iterator[weights.Rule]:
  yield from rules.norm(f"{published}.norm", f"{ours}/norm")
  yield from rules.layer(f"{published}.proj_in", f"{ours}/proj_in", LINEAR)
  yield from rules.layer(f"{published}.proj_out", f"{ours}/proj_out", LINEAR)
  for i, name in ((1, "in"), (2, "out")):
    yield from rules.layer(
      f"{published}.time_pos_embed.linear_{i}", f"{ours}/frames/{name}", LINEAR
    )
  yield Rule(f"{published}.time_mixer.mix_factor", f"{ours}/blend/mix_factor")
  yield from _block(
    f"{published}.transformer_blocks.{{pair}}", f"{ours}/spatial_{{pair}}"
  )
  yield from _block(
    f"{published}.temporal_transformer_blocks.{{pair}}",
    f"{ours}/temporal_{{pair}}",
  )


def _table(images: bool) -> Iterator[weights.Rule]:
  for i, name in ((1, "in"), (2, "out")):
    yield from rules.layer(
      f"time_embedding.linear_{i}", f"time_embedding/{name}", LINEAR
    )
    yield from rules.layer(
      f"add_embedding.linear_{i}", f"vector_embedding/{name}", LINEAR
    )
  # Of models that interpolate; nobody has published one.
  yield weights.Rule("mask_embedding", "mask", (1, 2, 0))
  for name in ("conv_in", "conv_out"):
    yield from rules.layer(name, name, CONV2D)
  yield from rules.norm("conv_norm_out", "norm_out")
  for way in ("down", "up"):
    yield from rules.layer(
      f"{way}_blocks.{{level}}.{way}samplers.0.conv",
      f"{way}_{{level}}_resize",
      CONV2D,
    )
  for published, ours in (
    ("mid_block", "mid"),
    ("down_blocks.{level}", "down_{level}"),
    ("up_blocks.{level}", "up_{level}"),
  ):
    at, to = f"{published}.resnets.{{index}}", f"{ours}_resnet_{{index}}"
    if images:
      yield from rules.resnet(at, f"{to}/spatial", CONV2D)
    else:
      yield from rules.video_resnet(at, to)
    yield from _transformer(
      f"{published}.attentions.{{index}}", f"{ours}_attention_{{index}}"
    )


UNET_TABLE: weights.Table = tuple(_table(images=False))

# Of the image model that Stable Diffusion 2 publishes: our layers over frames.
IMAGE_TABLE: weights.Table = tuple(_table(images=True))
