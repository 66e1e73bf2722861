"""The operations of the UNet, as its architecture tells them."""

from vidgen.models.svd.unet import CROSS_DOWN, CROSS_UP, UnetConfig

# Multiplications of an attention's four projections, and of a feed-forward
# layer that is four times as wide and gated, per position and channel².
_ATTENTION, _FEED_FORWARD = 4, 12


def flops(
  config: UnetConfig,
  frames: int,
  height: int,
  width: int,
  *,
  images: bool = False,
  by_weights: bool = False,
) -> float:
  """Returns two operations for each multiplication of a matrix.

  Norms, sums, embeddings and attention to a single token are left out.

  Args:
    config: The architecture.
    frames: Of a clip.
    height: Of its latents.
    width: Of its latents.
    images: Whether there are no layers over time.
    by_weights: Leaves out the products of attention.
  """
  widths = config.block_out_channels
  last = len(widths) - 1
  sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(last + 1)]
  tokens = [h * w for h, w in sizes]
  depth = config.transformer_layers_per_block

  def convolve(i: int, o: int, level: int) -> int:
    return 9 * i * o * tokens[level]

  def resnet(i: int, o: int, level: int) -> int:
    shortcut = i * o * tokens[level] if i != o else 0
    time = 0 if images else 2 * 3 * o * o * tokens[level]
    return convolve(i, o, level) + convolve(o, o, level) + shortcut + time

  def attend(level: int) -> int:
    n, c = tokens[level], widths[level]
    scored = 0 if by_weights else 2 * c
    space = (_ATTENTION + _FEED_FORWARD) * c * c + n * scored
    time = (_ATTENTION + 2 * _FEED_FORWARD) * c * c + frames * scored
    return n * (2 * c * c + depth * (space + (0 if images else time)))

  total = convolve(config.in_channels, widths[0], 0)
  total += convolve(widths[0], config.out_channels, 0)
  x, skips = widths[0], [widths[0]]
  for level, kind in enumerate(config.down_block_types):
    for _ in range(config.layers_per_block):
      total += resnet(x, widths[level], level)
      total += attend(level) if kind == CROSS_DOWN else 0
      x = widths[level]
      skips.append(x)
    if level < last:
      total += convolve(x, x, level + 1)
      skips.append(x)
  total += 2 * resnet(x, x, last) + attend(last)
  for i, kind in enumerate(config.up_block_types):
    level = last - i
    for _ in range(config.layers_per_block + 1):
      total += resnet(x + skips.pop(), widths[level], level)
      total += attend(level) if kind == CROSS_UP else 0
      x = widths[level]
    if level:
      total += convolve(x, x, level - 1)
  return 2.0 * frames * total
