"""What the text of compiled programs says of their collectives."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from vidgen import hlo, sharding

SPLIT = P("tensor")


def compiled(body, mesh, out=SPLIT):
  """The text of `body`, mapped over 8 x 32 floats split along `tensor`."""
  mapped = jax.shard_map(
    body, mesh=mesh, in_specs=SPLIT, out_specs=out, check_vma=False
  )
  x = jax.ShapeDtypeStruct((8, 32), jnp.float32)
  return jax.jit(mapped).lower(x).compile().as_text()


BODIES = {
  "all-gather": (lambda x: lax.all_gather(x, "tensor", tiled=True), P()),
  "all-reduce": (lambda x: lax.psum(x, "tensor"), P()),
  "reduce-scatter": (
    lambda x: lax.psum_scatter(x.T, "tensor", tiled=True),
    P("tensor"),
  ),
  "all-to-all": (
    lambda x: lax.all_to_all(x, "tensor", 1, 0, tiled=True),
    P("tensor"),
  ),
  "collective-permute": (
    lambda x: lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]),
    P("tensor"),
  ),
}
# Of a block of 2 x 32 floats, 256 bytes, on each of 4 devices: what one of them
# has in the end, and what it sends.
SIZES = {
  "all-gather": (1024, 768),
  "all-reduce": (256, 384),
  "reduce-scatter": (64, 192),
  "all-to-all": (256, 192),
  "collective-permute": (256, 256),
}


@pytest.mark.parametrize("kind", BODIES)
def test_each_kind(kind):
  mesh = sharding.make_mesh({"data": 2, "tensor": 4})
  (one,) = hlo.collectives(compiled(BODIES[kind][0], mesh, BODIES[kind][1]))
  assert one.kind == kind and one.count == 1
  assert (one.result_bytes, one.wire_bytes) == SIZES[kind]
  if kind != "collective-permute":
    assert one.group == 4


def test_each_of_a_kind_counts():
  """What `shard_map` asks for shares one channel."""
  mesh = sharding.make_mesh({"tensor": 4})
  body = lambda x: lax.psum(jnp.sin(lax.psum(x, "tensor")), "tensor")
  assert [one.count for one in hlo.collectives(compiled(body, mesh, P()))] == [
    1,
    1,
  ]


def test_pairs_of_which_some_stay():
  """Blocks 1 and 2 change places, 0 and 3 do not."""
  mesh = sharding.make_mesh({"tensor": 4})
  pairs = [(0, 0), (1, 2), (2, 1), (3, 3)]
  body = lambda x: lax.ppermute(x, "tensor", pairs)
  (one,) = hlo.collectives(compiled(body, mesh))
  assert (one.kind, one.group) == ("collective-permute", 2)


GROUPS = {
  "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}": 4,
  "mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}": 2,
  "mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}": 8,
  "mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}": 2,
  "{{0,1,2},{3,4,5}}": 3,
  "[2,4]<=[8]": 4,
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups(groups):
  text = (
    "HloModule jit_f, num_partitions=8\n\nENTRY %main (a: f32[4]) -> f32[4] {\n"
    f"  %ar = f32[4]{{0}} all-reduce(%a), channel_id=3, replica_groups={groups}, "
    "to_apply=%add\n}\n"
  )
  (one,) = hlo.collectives(text)
  assert one.group == GROUPS[groups]


def test_loops_multiply():
  mesh = sharding.make_mesh({"tensor": 4})

  def body(x):
    inner = lambda x, _: (lax.psum(x, "tensor") / 4, None)
    outer = lambda x, _: (lax.scan(inner, x * 2, None, length=5)[0], None)
    return lax.scan(outer, x, None, length=3)[0]

  (one,) = hlo.collectives(compiled(body, mesh))
  assert one.count == 15
  assert hlo.total([one]) == {"all-reduce": {"count": 15, "bytes": 15 * 256}}


def test_a_loop_that_the_program_decides_counts_once():
  mesh = sharding.make_mesh({"tensor": 4})

  def body(x):
    on = lambda x: x.sum() < 100
    return lax.while_loop(on, lambda x: lax.psum(x, "tensor"), x)

  found = hlo.collectives(compiled(body, mesh))
  assert [one.count for one in found] == [1]


def test_groups_of_one_move_nothing():
  mesh = sharding.make_mesh({"tensor": 4})
  body = functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=P("tensor"),
    out_specs=P("tensor"),
    check_vma=False,
  )(lambda x: lax.psum(x, "data"))
  x = jax.ShapeDtypeStruct((8, 32), jnp.float32)
  text = jax.jit(body).lower(x).compile().as_text()
  assert hlo.collectives(text) == []


# ruff: noqa: E501
# As a TPU's compiler prints them: an asynchronous pair within a loop without a
# noted trip count, and one printed in a step of what it runs beside, too.
TPU = """HloModule jit_f, num_partitions=8

%body (p: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %x = bf16[4,128]{1,0} get-tuple-element(%p), index=1
  %ag = (bf16[4,128]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)}) all-gather-start(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  %agd = bf16[8,128]{1,0} all-gather-done(%ag)
  %cp = (f32[64]{0}, f32[64]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=2, source_target_pairs={{0,1},{1,0}}
}

%cond (p: (s32[], bf16[4,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(42)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%fused (q: bf16[2,2]) -> bf16[2,2] {
  ROOT %ar.1 = bf16[2,2]{1,0} all-reduce(%q), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, frontend_attributes={chain_id="0"}
}

ENTRY %main (a: bf16[4,128]) -> bf16[4,128] {
  %w = (s32[], bf16[4,128]) while(%t), condition=%cond, body=%body
  %f1 = bf16[2,2] fusion(%b), kind=kCustom, calls=%fused
  %ar.2 = bf16[2,2]{1,0} all-reduce(%b), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
}
"""


def test_a_tpus_text():
  found = {one.kind: one for one in hlo.collectives(TPU)}
  assert len(hlo.collectives(TPU)) == 3
  gather, permute = found["all-gather"], found["collective-permute"]
  assert (gather.count, gather.result_bytes, gather.group) == (42, 2048, 2)
  assert (permute.count, permute.result_bytes) == (42, 256)
  reduce = found["all-reduce"]
  assert (reduce.count, reduce.result_bytes, reduce.group) == (1, 8, 4)


# One that starts in a loop over layers, beside another loop, and ends after it.
BESIDE = """HloModule jit_f, num_partitions=2

%step (p: f32[4]) -> (f32[4], f32[8]) {
  %ag.2 = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t.2 = (f32[4], f32[8]) tuple(%p, %ag.2)
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f.2 = (f32[4], f32[8]) fusion(%x), kind=kCustom, calls=%step
}

%inner_cond (p: (s32[], f32[4])) -> pred[] {
  %n.2 = s32[] constant(64)
}

%begin (p: f32[4]) -> f32[8] {
  %ag.1 = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c.1 = (f32[4], f32[8]) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%end (p: f32[4]) -> f32[8] {
  %ag.3 = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c.3 = f32[8] custom-call(%p, %ag.3), custom_call_target="AsyncCollectiveDone"
}

%layer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f.1 = f32[8] fusion(%x), kind=kCustom, calls=%begin
  %w.1 = (s32[], f32[4]) while(%t), condition=%inner_cond, body=%inner
  %f.3 = f32[8] fusion(%x), kind=kCustom, calls=%end
}

%cond (p: (s32[], f32[4])) -> pred[] {
  %n = s32[] constant(24)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%layer
}
"""


def test_what_runs_beside_a_loop_counts_where_it_starts():
  (one,) = hlo.collectives(BESIDE)
  assert (one.count, one.result_bytes) == (24, 32)


# A TPU's reduce-scatter of two arrays.
SCATTER = """HloModule jit_f, num_partitions=4

%all-reduce-scatter.4 (a: f32[192,32], b: f32[192,32]) -> (f32[192,8], f32[192,8]) {
  %all-reduce.2 = (f32[192,32]{0,1}, f32[192,32]{0,1}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (a: f32[192,32], b: f32[192,32]) -> f32[192,8] {
  %f = (f32[192,8]{0,1}, f32[192,8]{0,1}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.4
}
"""


def test_a_tpus_reduce_scatter():
  (one,) = hlo.collectives(SCATTER)
  size = 2 * 192 * 8 * 4
  assert (one.kind, one.result_bytes) == ("reduce-scatter", size)
  assert one.wire_bytes == 3 * size
