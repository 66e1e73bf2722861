"""How the published tensors become the transformer's parameters."""

from vidgen import weights
from vidgen.weights import CONV2D, LINEAR, Rule


def _dense(published: str, ours: str) -> tuple[Rule, Rule]:
  return (
    Rule(f"{published}.weight", f"{ours}/kernel", LINEAR),
    Rule(f"{published}.bias", f"{ours}/bias"),
  )


def _norm(published: str, ours: str) -> tuple[Rule, Rule]:
  return (
    Rule(f"{published}.weight", f"{ours}/scale"),
    Rule(f"{published}.bias", f"{ours}/bias"),
  )


_BLOCK = "transformer_blocks.{layer}"


def table(temporal_patches: bool) -> weights.Table:
  """Returns the table of a model without or with temporal patches.

  Args:
    temporal_patches: CogVideoX 1.5 projects patches by a linear layer where 1.0
      has a convolution.
  """
  patch_axes = LINEAR if temporal_patches else CONV2D
  return (
    Rule("patch_embed.proj.weight", "patch_embed/kernel", patch_axes),
    Rule("patch_embed.proj.bias", "patch_embed/bias"),
    *_dense("patch_embed.text_proj", "text_embed"),
    Rule("patch_embed.pos_embedding", "pos_embedding"),
    *_dense("time_embedding.linear_1", "time_embedding/in"),
    *_dense("time_embedding.linear_2", "time_embedding/out"),
    *_dense("ofs_embedding.linear_1", "ofs_embedding/in"),
    *_dense("ofs_embedding.linear_2", "ofs_embedding/out"),
    *_dense(f"{_BLOCK}.norm1.linear", "blocks/modulation_1/linear"),
    *_norm(f"{_BLOCK}.norm1.norm", "blocks/norm_1"),
    *_dense(f"{_BLOCK}.attn1.to_q", "blocks/attention/query"),
    *_dense(f"{_BLOCK}.attn1.to_k", "blocks/attention/key"),
    *_dense(f"{_BLOCK}.attn1.to_v", "blocks/attention/value"),
    *_norm(f"{_BLOCK}.attn1.norm_q", "blocks/attention/query_norm"),
    *_norm(f"{_BLOCK}.attn1.norm_k", "blocks/attention/key_norm"),
    *_dense(f"{_BLOCK}.attn1.to_out.0", "blocks/attention/out"),
    *_dense(f"{_BLOCK}.norm2.linear", "blocks/modulation_2/linear"),
    *_norm(f"{_BLOCK}.norm2.norm", "blocks/norm_2"),
    *_dense(f"{_BLOCK}.ff.net.0.proj", "blocks/feed_forward/in"),
    *_dense(f"{_BLOCK}.ff.net.2", "blocks/feed_forward/out"),
    *_norm("norm_final", "norm_final"),
    *_dense("norm_out.linear", "modulation_out"),
    *_norm("norm_out.norm", "norm_out"),
    *_dense("proj_out", "proj_out"),
  )
