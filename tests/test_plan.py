"""A plan's parts: what it takes for a run's arrays are the real ones, what it reads from programs is what they do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import PartitionSpec
from released_configs import QWEN25_14B

from pkv import cli
from pkv.cli.output import Output
from pkv.config import (
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyLoss,
    UserError,
    load_config,
    parse_config,
)
from pkv.grpo import Learner, reference_weights
from pkv.mesh import AXES, fold, make_mesh, replicated
from pkv.model import Arch, Kernel, freezer, init_adapters, init_params, join, param_shapes, split
from pkv.model.families import family_of
from pkv.model.layout import by_path
from pkv.plan import as_record, find, in_words, make_plan, model_shape, read_slice, work_of
from pkv.plan.arithmetic import activations, sent_by_formula
from pkv.plan.collectives import NETWORK, sent_bytes
from pkv.plan.compiled import Program, compile_program, refused_bytes
from pkv.plan.models import TABLE
from pkv.plan.planning import AT_REST, described_mesh
from pkv.plan.planning import _spread as spread_of
from pkv.plan.planning import plan as plan_of
from pkv.plan.programs import Gpu, Programs, Task, bytes_on_chip, policy_shapes, reference_shapes, sampling_shapes
from pkv.plan.roofline import ASSUMED, Spread, compute_seconds, decode_step_seconds, rows_at_once, sent_seconds
from pkv.plan.search import _reliefs, candidates, nearest, quicker, search
from pkv.sampling import Engine
from pkv.sampling.engine import SHARE_OF_FREE
from pkv.sampling.laying import apart_on_gpu

ARCH = Arch(vocab_size=128, hidden=128, layers=9, heads=4, kv_heads=2, head_size=16, ffn=128, qkv_bias=True)
WIDE = dataclasses.replace(ARCH, hidden=4096, ffn=16_384, heads=32, kv_heads=8, head_size=128)
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")


def config_of(**more):
    """A config of two rounds on a mesh of 8, its model ARCH's."""
    given = {
        "model": {"path": "nowhere", "dtype": "bfloat16"},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "sampling": {"slots": 8, "page_tokens": 64},
        "grpo": {"prompts": 2, "samples": 4, "row_tokens": 512, "micro_rows": 4},
        "rounds": [
            {"name": "short", "steps": 10, "max_new_tokens": 128},
            {"name": "long", "steps": 20, "samples": 8, "max_new_tokens": 256},
        ],
    }
    for section, values in more.items():
        given[section] = given.get(section, {}) | values
    return parse_config(given)


def test_a_slice_is_a_kind_and_a_grid():
    pair = read_slice("2xv5e:4x8")
    assert (pair.chips, pair.slices, pair.topology, pair.compiles) == (64, 2, "v5e:4x8", True)
    assert read_slice("v5p:2x2x2").chips == 8
    assert read_slice("h100:8").chips == 8 and not read_slice("h100:8").compiles
    assert (read_slice("3xh100:4").chips, read_slice("3xh100:4").machines) == (12, 3)
    for wrong, said in (
        ("v5e", "expected a kind and a grid"),
        ("v9z:2x2", "kinds: v4, v5e"),
        ("v5p:2x2", r"grids of 3 axes, got 2; such as v5p:2x2x2"),
        ("v5e:0x2", "at least one chip along each axis, as the grids of v5e"),
        ("h100:0", "at least one chip"),
        ("99999999xv5e:2x2", "399999996 chips; expected at most 65536"),
        ("0xh100:2", "expected a kind and a grid"),
        ("V5P:2x2x2", r"h200; did you mean v5p:2x2x2\?"),
        ("v6e-8", "h200; v6e-8 is v6e:2x4"),
        ("v5litepod-16", "h200; v5litepod-16 is v5e:4x4"),
        ("V5P-8", "h200; V5P-8 is v5p:2x2x1"),  # whose number counts two of each chip
        ("v5p-12", "h200$"),
        ("h100:2x4", "grids of 1 axes"),
        (
            "h100:12",
            "a machine has 8 of them at most; expected a multiple of that, or machines of fewer as in 2xh100:4",
        ),
    ):
        with pytest.raises(UserError, match=said):
            read_slice(wrong)


def test_of_a_chip_with_two_devices_each_is_planned_as_one(tmp_path):
    own = tmp_path / "prices.yaml"
    own.write_text("tpu7x: 9\n")
    assert read_slice("tpu7x:2x2x2").chips == 16 and read_slice("tpu7x:2x2x2", own).chip.dollars == 4.5
    one = plan_of(load_config("qwen2.5-7b", []), "h100:8")
    said = in_words(dataclasses.replace(one, wanted=read_slice("tpu7x:2x2x1")))
    assert said.startswith("tpu7x:2x2x1: 1 machine of 4 chips, 8 devices, as") and "no price known" in said
    assert as_record(dataclasses.replace(one, wanted=read_slice("tpu7x:2x2x1")))["dollars"] is None  # and not for free
    assert "dollars at 9.00 a chip" in in_words(dataclasses.replace(one, wanted=read_slice("tpu7x:2x2x1", own)))


def test_prices_are_data(tmp_path):
    own = tmp_path / "prices.yaml"
    own.write_text("v5e: 0.5\n")
    assert read_slice("v5e:2x2", own).chip.dollars == 0.5
    assert read_slice("v6e:2x2", own).chip.dollars == read_slice("v6e:2x2").chip.dollars
    for wrong, said in (
        ("v5e: cheap", "dollars a chip and hour, got 'cheap'"),
        ("h100: -3", "h100: expected dollars a chip and hour, got -3"),
        ("v5: 1", "v5: no chip of that name; kinds: v4"),
    ):
        own.write_text(wrong)
        with pytest.raises(UserError, match=said):
            read_slice("v5e:2x2", own)


HLO = """HloModule jit_step, is_scheduled=true

%turn (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %ag = (bf16[2,128], bf16[8,128]{1,0:T(8,128)(2,1)}) all-gather-start(%y), replica_groups=[2,4]<=[8], dimensions={0}
  %ag.done = bf16[8,128]{1,0} all-gather-done(%ag)
  ROOT %t = (s32[], bf16[8,128]) tuple(%i, %x)
}

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(10)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%inner (a: f32[16]) -> f32[16] {
  ROOT %rs = f32[4]{0} reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %w = (s32[], bf16[8,128]) while(%i), condition=%condition, body=%turn, backend_config={"known_trip_count":{"n":"48"}}
  %v = (s32[], bf16[8,128]) while(%init), condition=%condition, body=%turn
  %f = f32[4]{0} fusion(%a), kind=kLoop, calls=%inner
  %cp = (f32[256]{0}, f32[256]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  ROOT %ar = (f32[1024]{0}, f32[8]{0}) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_what_a_program_sends_is_read_from_its_text():
    sent = sent_bytes(HLO)
    assert sent == {
        "all-gather": (48 + 10) * (8 * 128 * 2) * 3 / 4,
        "reduce-scatter": 4 * 4 * 3,
        "collective-permute": 256 * 4,
        "all-reduce": 2 * (1024 + 8) * 4 * 7 / 8,
    }


CHAIN = """
HloModule m

%begin (p: bf16[8]) -> bf16[32] {
  ROOT %g = bf16[32]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%piece (p: bf16[8]) -> bf16[32] {
  %g = bf16[32]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
  ROOT %m = bf16[32]{0} multiply(%g, %g)
}

%turn (s: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %f = bf16[32]{0} fusion(%s), kind=kCustom, calls=%piece
  ROOT %t = (s32[], bf16[8]) tuple(%i, %f)
}

%layer (s: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %a = bf16[32]{0} fusion(%s), kind=kCustom, calls=%begin
  ROOT %w = (s32[], bf16[8]) while(%a), condition=%c, body=%turn, backend_config={"known_trip_count":{"n":"4"}}
}

ENTRY %main (a: bf16[8]) -> bf16[8] {
  ROOT %w = (s32[], bf16[8]) while(%i), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"48"}}
}
"""


def test_a_collective_that_is_done_piece_by_piece_is_counted_once_each_time_that_it_begins():
    assert sent_bytes(CHAIN) == {"all-gather": 48 * 64 * 3 / 4}


GATHER = "ENTRY %main (a: f32[4]) -> f32[8] {\n  ROOT %g = f32[8]{0} all-gather(%a), GROUPS, dimensions={0}\n}\n"


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", 4),
        ("channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, use_global_device_ids=true", 4),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", 8),
        ("replica_groups=mesh['x'=2,'y'=8], device_ids=([8,2]T(1,0)) {'y':(2)4,'x'}", 8),
        ("replica_groups=mesh[x=2,y=8] {y:(1)2}", 2),
    ],
)
def test_groups_of_chips_are_read_in_every_way_that_they_are_written(groups, chips):
    assert sent_bytes(GATHER.replace("GROUPS", groups)) == {"all-gather": 32 * (chips - 1) / chips}


SCATTER = """
%all-reduce-scatter.7 (a: f32[64]) -> f32[16] {
  %r = f32[64]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d = f32[16]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={16}
}

ENTRY %main (a: f32[64]) -> f32[16] {
  ROOT %f = f32[16]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.7
}
"""


def test_a_sum_of_which_each_chip_keeps_a_part_sends_half_of_a_whole_one():
    assert sent_bytes(SCATTER) == {"reduce-scatter": 64 * 4 * 3 / 4}


SLICES = """
ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %s = (bf16[64,128]{1,0}, u32[], token[]) send(%a, %t), channel_id=2, is_host_transfer=true, frontend_attributes={HOW}
  %done = token[] send-done(%s), channel_id=2, is_host_transfer=true, frontend_attributes={HOW}
  %r = (bf16[64,128]{1,0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, frontend_attributes={HOW}
  ROOT %ar = bf16[64,128]{1,0} all-reduce(%b), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""
HOW = '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type='


def test_what_goes_over_slices_is_counted_once_and_apart_from_links():
    size = 64 * 128 * 2
    sent = sent_bytes(SLICES.replace("HOW", HOW + '"ALL_REDUCE"'))
    assert sent == {NETWORK: 2 * size * 2 / 3, "all-reduce": size}
    wanted = read_slice("3xv5e:4x8")  # its machines have four chips each
    over_links = size / (wanted.chip.link_gbs * 1e9 * ASSUMED["link_share"])
    over_network = 4 * 2 * size * 2 / 3 / (wanted.chip.dcn_gbs * 1e9 * ASSUMED["link_share"])
    assert sent_seconds(sent, wanted) == pytest.approx(over_links + over_network)
    with pytest.raises(ValueError, match=r"over slices can.t be read: .*ALL_GATHER"):
        sent_bytes(SLICES.replace("HOW", HOW + '"ALL_GATHER"'))


def test_groups_that_cannot_be_read_are_no_guess():
    with pytest.raises(ValueError, match=r"can.t be read: .*all-gather"):
        sent_bytes(GATHER.replace("GROUPS", "replica_groups=new"))


def test_a_sum_over_devices_within_a_scan_is_counted_at_every_turn():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(x):
        def turn(carry, _):
            return jax.lax.psum(carry, "x") * 0.5, None

        return jax.lax.scan(turn, x, None, length=5)[0]

    mapped = jax.shard_map(total, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((8 * 100,), jnp.float32)).compile().as_text()
    assert sent_bytes(text) == {"all-reduce": 5 * 2 * 400 * 7 / 8}


LORA = {"lora": {"rank": 4}}
KINDS = [{}, LORA, {"lora": {"rank": 4, "base": "int8"}}, {"lora": {"rank": 4, "base": "nf4"}}]


def described(tree):
    """By path, since Adapted and Quantised are equal to themselves only."""
    return {jax.tree_util.keystr(path): (a.shape, a.dtype) for path, a in jax.tree.leaves_with_path(tree)}


def same_places(found, real):
    return jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, b.ndim), found, real))


@pytest.mark.parametrize("model", KINDS, ids=["full", "lora", "int8", "nf4"])
def test_planned_arrays_are_those_of_a_run(model):
    config = config_of(model=model)
    mesh = make_mesh(config.mesh)
    planned = Programs(work_of(config, ARCH), mesh)
    real = init_params(ARCH, jax.random.key(0), config.model.dtype if model else "float32", mesh)
    if model:
        keep = freezer(ARCH, config.model.lora.base, mesh)
        frozen = {path: keep(path, weight) for path, weight in by_path(real).items()}
        real = jax.tree_util.tree_map_with_path(
            lambda path, _: frozen[jax.tree_util.keystr(path, simple=True, separator=".")], real
        )
        real = join(init_adapters(ARCH, config.model.lora, fold(jax.random.key(0), "adapters"), mesh), real)
    assert described(planned.policy) == described(real) and same_places(planned.policy, real)
    learner = Learner(ARCH, config.model, config.optimizer, mesh, split(real)[1])
    state = learner.init(real)
    assert described(planned.state) == described(state) and same_places(planned.state, state)
    engine = Engine(ARCH, config.sampling, (0,), mesh, "bfloat16")
    sampled = engine.load(real)
    assert described(planned.sampled) == described(sampled) and same_places(planned.sampled, sampled)
    on_one = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(sampled))
    assert bytes_on_chip(planned.sampled) == on_one
    if not model:
        reference = reference_weights(real, "bfloat16")
        assert described(reference_shapes(planned.policy, "bfloat16")) == described(reference)


@pytest.mark.parametrize("layers", [2, 9])
def test_weights_that_are_sampled_from_are_planned_stacked_or_not(layers):
    arch, config = dataclasses.replace(ARCH, layers=layers), config_of()
    mesh = make_mesh(config.mesh)
    engine = Engine(arch, config.sampling, (0,), mesh, "bfloat16")
    real = engine.load(init_params(arch, jax.random.key(0), mesh=mesh))
    found = sampling_shapes(engine, policy_shapes(arch, config, mesh))
    assert described(found) == described(real) and same_places(found, real)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [{}, {"kl_weight": 0.1}], ids=["plain", "reference"])
def test_planned_updates_are_compiled_of_the_shapes_that_updates_run(loss):
    """Every program of a real update is one that the plan names, with the same arguments: nothing else is compiled."""
    config = config_of(grpo={"loss": loss, "epochs": 2}, model={"dtype": "float32"})
    mesh = make_mesh(config.mesh)
    planned = Programs(work_of(config, ARCH), mesh)
    tasks = {task.name: task for task in planned.update()}
    wanted = {"init", "old_logprobs", "gradient", "apply"} | ({"reference_logprobs"} if loss else set())
    assert set(tasks) == wanted
    for task in tasks.values():
        memory = task.lowered.compile().memory_analysis()
        assert memory.argument_size_in_bytes >= sum(task.given.values())
        assert memory.argument_size_in_bytes < sum(task.given.values()) + 12 * 4 * planned.micro[0] * planned.micro[1]


def test_released_shapes_have_as_many_weights_as_their_names_say():
    sizes = {"0.5B": 0.494, "1.5B": 1.544, "3B": 3.086, "7B": 7.616, "14B": 14.77, "32B": 32.76, "72B": 72.71}
    for name in yaml.safe_load(TABLE.read_text()):
        shapes = jax.tree.leaves(param_shapes(model_shape(name)))
        billions = sum(math.prod(shape.shape) for shape in shapes) / 1e9
        wanted = next(size for label, size in sizes.items() if f"-{label}" in name.removesuffix("-Instruct") + "-")
        assert billions == pytest.approx(wanted, rel=2e-3), name
    assert model_shape("Qwen/Qwen2.5-14B") == family_of(QWEN25_14B).read(QWEN25_14B)


def test_a_run_is_a_model_as_it_is_for_training(tmp_path):
    """Its checkpoints' policy is what the next run would start from; what that is made of lies beside them."""
    tiny = Path(__file__).parent.parent / "configs/tiny"
    for folder in ("checkpoints", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model/config.json").write_text((tiny / "config.json").read_text())
    assert model_shape(str(tmp_path)) == model_shape(str(tiny))


SPREAD = Spread(
    chips=8,
    shards=4,
    fsdp=2,
    tensor=2,
    sequence=1,
    sampled=1e6,
    read=1e6,
    laid=1e6,
    trained=2e6,
    kv_token=100.0,
    kv=1e9,
    micro=(4, 512),
)


def test_rows_decode_as_slots_rows_and_memory_allow():
    work = work_of(config_of(), ARCH)  # 16 rows wanted, 8 slots, over 4 shards
    assert rows_at_once(work, SPREAD, 256) == 2
    length = 256 + ASSUMED["mean_response"] * 256
    assert rows_at_once(work, dataclasses.replace(SPREAD, kv=100.0 * length * 1.5), 256) == 1.5


def test_a_decode_step_reads_weights_and_keys_once():
    work, chip = work_of(config_of(), ARCH), read_slice("v5e:2x2").chip
    alone = dataclasses.replace(SPREAD, tensor=1, read=8e9, kv_token=1000.0)
    seconds = decode_step_seconds(work, alone, chip, 2, 300, sending=0.0)
    assert seconds == pytest.approx((8e9 + 2 * 300 * 1000) / (chip.hbm_gbs * 1e9 * ASSUMED["memory_share"]))


@pytest.mark.parametrize(("topology", "times"), [("t4:1", 1), ("a100-40gb:1", 2), ("h100:1", 2), ("v5e:1x1", 1)])
def test_products_are_timed_in_the_dtype_that_they_run_in(topology, times):
    """TF32 has half of bfloat16's rate; a T4 has neither, and a TPU rounds to bfloat16."""
    chip = read_slice(topology).chip
    assert compute_seconds(1e15, 1, chip, "float32") == pytest.approx(
        times * compute_seconds(1e15, 1, chip, "bfloat16")
    )
    of_t4 = read_slice("t4:1").chip
    assert compute_seconds(8.1e12 * ASSUMED["matrix_share"], 1, of_t4, "bfloat16") == pytest.approx(1)


def test_formulas_of_what_is_sent_by_hand():
    """SPREAD is data 2, fsdp 2, tensor 2; a row of 512 tokens a shard, nine layers of 128 numbers, and two passes."""
    work, eight = work_of(config_of(), ARCH), read_slice("h100:8")
    sent = sent_by_formula(work, SPREAD, eight)
    trained = 2e6 / 2  # a chip's, in 16 bits
    assert sent["gradient"] == {
        "fsdp": (2 * 1e6 + 2 * 2 * trained) / 2,
        "data": 2 * trained / 2,
        "tensor": 4 * 2 * 9 * 512 * 128 * 2 / 2,
        "sequence": 0,
        NETWORK: 0,
    }
    rows = rows_at_once(work, SPREAD, 256) * work.config.sampling.segment
    assert sent["decode"] == {"tensor": 2 * 2 * 9 * rows * 128 * 2 / 2} and sent["reshard"] == {"fsdp": 1e6 / 2}
    assert sent_by_formula(work, SPREAD, read_slice("2xv5e:2x2"))["gradient"][NETWORK] == 2 * trained / 2
    again = sent_by_formula(work_of(config_of(model={"remat": "all"}), ARCH), SPREAD, eight)["gradient"]
    assert again["tensor"] == 1.5 * sent["gradient"]["tensor"]
    of_four = dataclasses.replace(eight, chip=dataclasses.replace(eight.chip, host_chips=4))
    crossing = sent_by_formula(work, SPREAD, of_four)["gradient"]  # two machines, each with a copy of the weights
    assert crossing[NETWORK] == sent["gradient"]["data"]
    small = dataclasses.replace(SPREAD, shards=8, fsdp=1, tensor=1)  # eight copies, in a ring that leaves each once
    whole = sent_by_formula(work, small, of_four)["gradient"]
    assert whole[NETWORK] == whole["data"] / 4
    wide = dataclasses.replace(SPREAD, fsdp=4)  # a copy takes both, by a ring of fsdp for each of a row's two chips
    of_one = sent_by_formula(work, wide, of_four)["gradient"]
    assert of_one["data"] == 0 and of_one[NETWORK] == of_one["fsdp"] * 2 / 4


def test_machines_of_gpus_may_be_asked_for_one_by_one():
    """A model's state over more than one of them, too."""
    pair, sixteen = (plan_of(load_config("qwen2.5-14b", []), topology) for topology in ("2xh100:8", "h100:16"))
    assert pair.mesh == sixteen.mesh and pair.mesh["data"] == 1 and pair.mesh["fsdp"] == 4
    sent, same = ({p.name: p.sent for p in plan.programs}["gradient"] for plan in (pair, sixteen))
    assert sent == same and sent[NETWORK] > 0


@pytest.mark.parametrize(
    ("config", "topology", "tensor"),
    [("qwen2.5-14b", "v6e:2x4", 4), ("qwen2.5-72b", "v5p:2x2x4", 4), ("qwen2.5-32b", "v5p:2x2x2", 4)],
)
def test_scale_on_paper_fits_where_compiled_plans_did(config, topology, tensor):
    """See the configs' headers."""
    file = Path(__file__).parents[1] / "benchmarks" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", file)
    scale = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = scale
    spec.loader.exec_module(scale)
    loaded, wanted = load_config(config, []), read_slice(topology)
    work = work_of(loaded, model_shape(loaded.model.path))
    assert not isinstance(scale.placed(work, wanted, tensor, 512), str)
    many = dataclasses.replace(wanted, slices=512)
    assert scale.placed(work, many, tensor, 512) == f"fewer than 2 rollouts for each of {many.machines} machines"
    assert scale.placed(work, read_slice("v5e:2x2"), tensor, 512) == "does not fit"


def test_what_waits_on_the_host_is_what_stands_between_layers():
    """Of 9 layers, one row of 512 tokens a shard and 128 numbers a token, spread over two chips, two bytes each."""
    kept = {
        remat: activations(work_of(config_of(model={"remat": remat}), ARCH), SPREAD, "xla")
        for remat in ("none", "cheap", "all", "offload")
    }
    assert kept["all"] - kept["offload"] == 9 * 512 * 128 / 2 * 2
    assert kept["cheap"] - kept["all"] == 9 * 512 * 4 * 16 / 2 * 2  # four heads of 16
    assert kept["none"] > kept["cheap"]


def test_scores_are_kept_where_cudnn_does_not_compute_them():
    """Four heads over two chips, half of 512 by 512 pairs, each a score in 32 bits and a share in 16."""
    work = work_of(config_of(model={"dtype": "bfloat16"}), ARCH)
    kernels: tuple[Kernel, ...] = "xla", "cudnn", "cudnn_masked"
    by_xla, by_cudnn, masked = (activations(work, SPREAD, kernel) for kernel in kernels)
    assert by_xla - by_cudnn == 512**2 / 2 * 4 / 2 * (4 + 2)
    assert masked == by_cudnn


def test_a_plan_for_gpus_has_the_kernel_that_a_run_there_would_have():
    def kernel(capability, **model):
        config = config_of(mesh={"data": 1, "fsdp": 8, "tensor": 1}, model={"dtype": "bfloat16"} | model)
        mesh = described_mesh(config, read_slice("h100:8"))
        return Programs(work_of(config, ARCH), mesh, Gpu(8e10, capability)).kernel

    assert [kernel(c) for c in (7.5, 8.0, 9.0)] == ["xla", "cudnn_masked", "cudnn"]
    assert kernel(9.0, dtype="float32") == kernel(9.0, attention="xla") == "xla"


def kinds_on_one_gpu(config, topology, *flags):
    """Of decoding."""
    asked = [*flags, "--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "1"]
    return plan_of(load_config(config, asked), topology).programs[-1].kinds


def test_on_a_gpu_layers_apart_are_a_copy_of_a_frozen_base_where_there_is_room():
    lora = "--model.lora.rank", "8"
    roomy, narrow = (kinds_on_one_gpu("qwen2.5-7b", topology, *lora) for topology in ("h100:1", "l4:1"))
    assert roomy["sampled base"] == roomy["base"] == narrow["base"] and "sampled base" not in narrow  # 14 of 79, of 22
    # As at run time it is the numbers that count, and not the bits that they are in.
    quantised = kinds_on_one_gpu("qwen2.5-32b", "h100:1", *lora, "--model.lora.base", "nf4")
    assert quantised["base"] < 0.4 * 79 * 2**30 and "sampled base" not in quantised


@pytest.mark.parametrize("config", ["qwen2.5-1.5b", "tiny"])
def test_on_a_gpu_layers_apart_are_a_copy_of_what_is_trained_in_any_dtype(config):
    """Of tied embeddings there is one: the tiny model's would give the scores as a second array on a CPU."""
    kinds = kinds_on_one_gpu(config, "h200:1", "--model.dtype", "float32")
    assert kinds["sampled weights"] == kinds["weights"]


def test_on_a_gpu_layers_apart_take_as_much_as_their_bits():
    """32 billion numbers don't lie twice on one GPU in 16 bits, in 8 they nearly do."""
    sizes = model_shape("Qwen/Qwen2.5-32B-Instruct"), "bfloat16", 1
    assert [apart_on_gpu(*sizes, 100e9, eight_bit=eight_bit) for eight_bit in (False, True)] == [False, True]


@pytest.mark.parametrize("flags", [("--sampling.attention", "triton"), ("--model.attention", "cudnn")])
def test_a_gpus_kernels_can_be_planned_where_there_is_none(flags):
    assert kinds_on_one_gpu("qwen2.5-0.5b", "h100:1", *flags) == kinds_on_one_gpu("qwen2.5-0.5b", "h100:1")


@pytest.mark.parametrize(
    ("name", "chips"),
    [
        ("v5e:1x1", 1),
        ("v5e:2x4", 8),
        ("v6e:4x4", 4),
        ("2xv5e:2x4", 8),
        ("v5p:2x2x2", 4),
        ("h100:4", 4),
        ("h100:16", 8),
        ("tpu7x:2x2x1", 8),
        ("tpu7x:2x2x2", 8),
    ],
)
def test_a_machine_holds_a_small_slice_and_four_chips_of_a_large_one(name, chips):
    assert read_slice(name).host_chips == chips


def test_a_mesh_whose_rows_need_several_machines_is_refused():
    eight = read_slice("h100:8")
    of_four = dataclasses.replace(eight, chip=dataclasses.replace(eight.chip, host_chips=4))
    config = config_of(mesh={"data": 1, "fsdp": 1, "tensor": 8})
    described_mesh(config, eight)
    with pytest.raises(UserError, match=r"tensor = 8, and a machine of h100:8 has 4 chips and samples by itself"):
        described_mesh(config, of_four)


def test_meshes_that_are_tried_use_every_chip_with_and_without_data_within_a_slice():
    work, wanted = work_of(config_of(), dataclasses.replace(ARCH, heads=8)), read_slice("2xv5e:2x4")
    tried = [[change.work.config for change in changes] for changes in candidates(work, wanted)]
    assert [config.grpo.micro_rows for config, *_ in tried] == [4, 1] * 3
    meshes = [[dataclasses.astuple(config.mesh) for config in configs] for configs in tried]
    assert all(math.prod(mesh) == 16 and mesh[0] % 2 == 0 for each in meshes for mesh in each)
    assert [each[0][2] for each in meshes] == [1, 1, 2, 2, 4, 4]
    assert [(data, fsdp) for data, fsdp, _, tensor in meshes[0] if tensor == 2] == [(8, 1), (4, 2), (2, 4)]
    by_machine = [change.work.config.mesh for changes in candidates(work, read_slice("v5e:4x4")) for change in changes]
    assert max(mesh.sequence * mesh.tensor for mesh in by_machine) == 4


def test_a_search_takes_the_fastest_of_what_fits():
    """For a small model that isn't fsdp alone, which gathers its weights for every micro-batch."""
    config, eight = load_config("qwen2.5-1.5b", []), read_slice("a100-80gb:8")
    work = work_of(config, model_shape(config.model.path))
    found, flags = search(work, eight, print)
    over_fsdp = dataclasses.replace(config, mesh=MeshConfig(1, 8, 1, 1))
    assert found.fits and found.mesh["data"] > 1 and f"--mesh.data {found.mesh['data']}" in flags
    assert found.hours < plan_of(over_fsdp, "a100-80gb:8").hours


def test_what_the_compiler_needs_is_read_from_its_refusal():
    said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    said += "Used 27.80G of 15.75G hbm."
    assert refused_bytes(said, 2**30) == 26.8 * 2**30
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.83G) exceeds "
    )
    assert refused_bytes(said + "available HBM (15.75G).", 2**30) == 17.83 * 2**30
    assert refused_bytes("INTERNAL: something else", 0.0) is None


@needs_libtpu
@pytest.mark.parametrize("gib, fits", [(4, True), (7, False)])
def test_a_programs_memory_is_all_that_is_there_at_once_compiled_or_refused(gib, fits):
    """Two halves of an array are sorted, and both are there when they meet: three times the array."""
    wanted = read_slice("v5e:2x2")
    given = jax.ShapeDtypeStruct(
        (gib * 2**18, 1024),
        jnp.float32,
        sharding=replicated(described_mesh(config_of(mesh={"data": 1, "fsdp": 4, "tensor": 1}), wanted)),
    )
    meet = lambda x: (jnp.sort(x[:, :512], axis=0)[::-1] * jnp.sort(x[:, 512:], axis=0)).sum()  # noqa: E731
    task = Task("meet", "update", jax.jit(meet).lower(given), {"weights": gib * 2.0**30}, {})
    program = compile_program(task, wanted)
    assert program.fits == fits
    assert program.bytes_per_chip == pytest.approx(3 * gib * 2**30, rel=0.03)


@needs_libtpu
@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 2, "fsdp": 2}])
def test_sums_over_data_do_not_make_a_tpus_gradient_whole(sizes):
    """Beside weights and sums there is less than half of the layers' gradient."""
    arch = Arch(vocab_size=512, hidden=512, layers=24, heads=4, kv_heads=4, head_size=128, ffn=2048)
    mesh = described_mesh(config_of(mesh={"fsdp": 1, "tensor": 1} | sizes), read_slice("v5e:2x2"))
    trainer = Learner(arch, ModelConfig(dtype="bfloat16", remat="all", attention="xla"), OptimizerConfig(), mesh)
    state = trainer.template(param_shapes(arch))
    memory = trainer.lower(state, 4, 128, PolicyLoss())["gradient"].compile().memory_analysis()
    assert memory.temp_size_in_bytes < bytes_on_chip(state.params["layers"]) / 2


def test_what_cannot_be_planned_is_said_in_a_line(tmp_path):
    with pytest.raises(UserError, match=r"rounds: nothing to plan"):
        work_of(parse_config({"model": {"path": "x"}}), ARCH)
    with pytest.raises(UserError, match=r"tokens of max_new_tokens: raise it or lower them"):
        work_of(config_of(grpo={"row_tokens": 256}), ARCH)
    with pytest.raises(UserError, match=r"--prompt-tokens 1000: grpo.row_tokens leaves room for 2 to 256"):
        work_of(config_of(), ARCH, 1000)


def plan(capsys, *words):
    """The exit code and what is said on stdout and stderr."""
    code = cli.main(["plan", *words])
    return code, *capsys.readouterr()


def test_gpus_are_planned_by_arithmetic_and_the_exit_code_is_the_verdict(capsys):
    code, out, _ = plan(capsys, "qwen2.5-7b", "--topology", "h100:8", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["mesh"] == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 4}
    assert {"fits", "topology", "mesh", "programs"} <= set(found)
    for program in found["programs"]:
        assert {"name", "bytes_per_chip", "limit_bytes", "flops", "seconds_estimate"} <= set(program)
        assert program["bytes_per_chip"] == pytest.approx(sum(program["kinds"].values()))
    gradient = next(program for program in found["programs"] if program["name"] == "gradient")
    each = (
        7_615_616_512 * 4 / 8
    )  # weights in 32 bits over 8 chips; norms and a few heads' biases aren't spread over all
    assert gradient["kinds"]["weights"] == pytest.approx(each, rel=1e-3) == gradient["kinds"]["gradient"]
    assert found["dollars"] == pytest.approx(found["hours"] * 8 * read_slice("h100:8").chip.dollars)
    sent = {program["name"]: sum(program["sent_bytes"].values()) for program in found["programs"]}
    assert min(sent["gradient"], sent["decode"], sent["reshard"]) > 0
    code, out, _ = plan(capsys, "qwen2.5-7b", "--topology", "t4:4")
    assert code == 3 and "nothing was compiled" in out and "Does not fit" in out and "sampling at rest needs" in out


def test_too_little_that_a_config_leaves_for_keys_and_values_is_no_lack_of_memory(capsys):
    words = ("qwen2.5-0.5b", "--topology", "h100:1", "--sampling.kv_memory_gb", "0.001")
    code, out, err = plan(capsys, *words, "--json")
    found = json.loads(out)
    assert code == 3 and found["settings"] == ["--sampling.kv_memory_gb 0"], err
    assert found["limit_bytes"] == read_slice("h100:1").chip.hbm_gib * 2**30
    _, out, _ = plan(capsys, *words)
    assert "as one chip; 79.20 GiB a chip" in out and "It would fit with: --sampling.kv_memory_gb 0" in out
    lacks, rest = Program("gradient", "update", {"a": 3 * 2**30}, 2 * 2**30, 0, {}, 0), found["programs"][0]
    at_rest = Program(rest["name"], rest["phase"], rest["kinds"], rest["limit_bytes"], 0, {}, 0)
    both = dataclasses.replace(plan_of(load_config("qwen2.5-0.5b", []), "h100:1"), programs=(at_rest, lacks))
    assert "gradient needs 1.00 GiB more" in in_words(both)  # each is held against its own limit


def test_a_rounds_hours_are_a_mean_over_its_budgets():
    """Of equal parts of its steps; each budget alone is a round with that many new tokens."""
    config = load_config("qwen2.5-7b", [])
    grows = dataclasses.replace(config.rounds[-1], budgets=(4096,), max_new_tokens=7168)
    alone = [dataclasses.replace(grows, budgets=(), max_new_tokens=tokens) for tokens in (4096, 7168)]
    short = dataclasses.replace(grows, steps=1)  # which ends at its own max_new_tokens, and so begins there
    found = plan_of(dataclasses.replace(config, rounds=(grows, *alone, short)), "h100:8").rounds
    both, small, large, one = (round_.hours for round_ in found)
    assert small < large and both == pytest.approx((small + large) / 2) and one == pytest.approx(large / grows.steps)


def test_the_machines_that_are_assumed_and_the_plans_own_time_are_said():
    one = plan_of(load_config("qwen2.5-7b", []), "h100:8")
    assert in_words(one).startswith("h100:8: 1 machine of 8 chips, as fsdp 2, tensor 4;")
    assert "of rounds alone: a warm-up, evaluations," in in_words(one)
    assert f"Planned in {one.took_s:.0f} s." in in_words(one) and as_record(one)["took_s"] == one.took_s > 0
    for topology, said in (
        ("v5e:2x4", "1 machine of 8"),
        ("v5e:4x4", "4 machines of 4"),
        ("h100:16", "2 machines of 8"),
    ):
        found = dataclasses.replace(one, wanted=read_slice(topology))
        assert in_words(found).startswith(f"{topology}: {said} chips")
        assert [as_record(found)[key] for key in ("machines", "machine_chips")] == [int(said[0]), int(said[-1])]


def test_a_plans_time_has_what_was_tried_after_it(monkeypatch):
    config, clock = load_config("qwen2.5-72b", []), iter([0.0, 500.0])
    monkeypatch.setattr("pkv.plan.search.nearest", lambda *_: None)
    monkeypatch.setattr("pkv.plan.search.time", SimpleNamespace(perf_counter=clock.__next__))
    found, flags = find(work_of(config, model_shape(config.model.path)), read_slice("h100:8"), lambda _: None, False)
    assert not found.fits and not flags and found.took_s == 500


def test_the_room_can_be_called():
    import pkv

    found = pkv.plan(pkv.load_config("qwen2.5-7b"), "h100:8")
    assert found.fits and found.wanted.chips == 8 and found.hours > 0


def test_one_process_plans_for_any_number_of_gpus_and_keeps_its_own_devices():
    import pkv

    config, own = (
        pkv.load_config("qwen2.5-7b", ["--mesh.data", "-1", "--mesh.fsdp", "1", "--mesh.tensor", "1"]),
        jax.devices(),
    )
    planned = [pkv.plan(config, topology) for topology in ("h200:1", f"{len(own)}xh200:8", "h200:8")]
    assert [plan.mesh["data"] for plan in planned] == [1, 8 * len(own), 8] and jax.devices() == own


def test_what_would_fit_is_found_by_trying(capsys):
    words = ["qwen2.5-3b", "--topology", "a100-40gb:2", "--tensor", "2", "--grpo.micro_rows", "64"]
    code, out, _ = plan(capsys, *words)
    assert code == 3 and "It would fit with: --grpo.micro_rows 1" in out
    flags = out.split("It would fit with: ")[1].split()
    code, out, _ = plan(capsys, *words[:-2], *flags)
    assert code == 0 and "Fits, with" in out


@pytest.mark.parametrize("how", [(), ("--search",), ("--mesh.fsdp", "8", "--mesh.tensor", "1")])
def test_adapters_are_what_would_fit_where_a_whole_model_cannot_be_trained(capsys, how):
    words = ["qwen2.5-72b", "--topology", "h100:8"]
    code, out, _ = plan(capsys, *words, *how)
    assert code == 3 and out.endswith("raise the rounds' learning_rate some ten times.\n")
    flags = out.split("It would fit with: ")[1].splitlines()[0].split()
    assert flags[flags.index("--model.lora.rank") + 1] == "32" and plan(capsys, *words, *flags)[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("h100:8", "--optimizer.name", "muon", "--optimizer.moments", "float32"), "--optimizer.name adamw"),
        (("h100:2", "--tensor", "2", "--sampling.weights", "int8"), "--model.lora.base int8 --sampling.weights plain"),
    ],
)
def test_what_would_fit_is_no_config_that_a_run_would_refuse(capsys, words, said):
    code, out, _ = plan(capsys, "qwen2.5-72b", "--topology", *words)
    flags = out.split("It would fit with: ")[1].splitlines()[0]
    assert code == 3 and said in flags and plan(capsys, "qwen2.5-72b", "--topology", *words, *flags.split())[0] == 0


def test_moments_of_adapters_lose_nothing_where_they_free_too_little(capsys):
    words = ("qwen2.5-32b", "--topology", "h100:1", "--tensor", "1", "--model.lora.rank", "8")
    _, out, _ = plan(capsys, *words)
    flags = out.split("It would fit with: ")[1]
    assert "--model.remat offload" in flags and "moments" not in flags and plan(capsys, *words, *flags.split())[0] == 0


def test_keys_and_values_in_8_bits_are_what_would_fit_where_a_row_lacks_little(capsys):
    words = ["qwen2.5-7b", "--topology", "h100:8", "--sampling.kv_memory_gb", "0.1"]  # of 0.12 that a row takes
    code, out, _ = plan(capsys, *words)
    assert code == 3 and out.endswith("It would fit with: --sampling.kv_cache int8\n")
    assert plan(capsys, *words, "--sampling.kv_cache", "int8")[0] == 0


def test_weights_in_8_bits_leave_more_for_keys_and_values():
    wanted, config = read_slice("h100:8"), load_config("qwen2.5-7b", [])
    work = work_of(config, model_shape(config.model.path))
    lighter = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, weights="int8"))
    plain, light = make_plan(work, wanted), make_plan(dataclasses.replace(work, config=lighter), wanted)
    one, other = (next(p for p in plan.programs if p.name == "decode") for plan in (plain, light))
    layers = 28 * (2 * 3584 * (28 + 4) * 128 + 3 * 3584 * 18944) / 4  # numbers of a chip, in two bytes or one
    outputs = 28 * (3584 + (28 + 2 * 4) * 128 + 3584 + 2 * 18944)  # with a step of four bytes each, over tensor or not
    less = one.kinds["sampled weights"] - other.kinds["sampled weights"]
    assert layers - 4 * outputs <= less <= layers - outputs
    assert light.kv_bytes - plain.kv_bytes == pytest.approx(SHARE_OF_FREE * less)
    # What they do to a GPU's time nobody looked at, and sums over tensor are of 32 bits.
    assert plain.hours < light.hours < 1.03 * plain.hours


@pytest.mark.parametrize("flags", [(), ("--sampling.weights", "int8"), ("--model.lora.rank", "8")])
def test_resharding_sends_what_is_laid_anew_as_it_lies_then(flags):
    found = plan_of(load_config("qwen2.5-7b", flags), "h100:8")  # whose weights two have between them
    reshard = next(program for program in found.programs if program.name == "reshard")
    assert reshard.sent == {"fsdp": pytest.approx(reshard.kinds["sampled weights"] / 2)}


def test_weights_in_8_bits_take_a_decode_steps_time_by_what_is_known_of_the_chip():
    config, eight = config_of(sampling={"weights": "int8"}), read_slice("h100:8")
    known = dataclasses.replace(eight, chip=dataclasses.replace(eight.chip, int8_weights=0.5))
    mesh = described_mesh(config, eight)
    programs = Programs(work_of(config, ARCH), mesh)
    others, layers = programs.weights_bytes()
    spread = spread_of(known, mesh, programs, 1e9)
    assert (spread.sampled, spread.read) == (others + layers, others + layers / 2) and layers > 0
    plain = Programs(work_of(config_of(), ARCH), mesh)
    assert plain.weights_bytes() == (pytest.approx(spread.sampled, rel=0.02), 0)  # and steps, which are read too
    slower = decode_step_seconds(work_of(config, ARCH), spread_of(eight, mesh, programs, 1e9), eight.chip, 2, 300, 0.0)
    assert decode_step_seconds(work_of(config, ARCH), spread, known.chip, 2, 300, 0.0) < slower


def test_no_settings_are_tried_twice(monkeypatch):
    """A memory limit that leaves no room for a row, and none, which leaves none for the rest."""
    tried = []

    def made(work, *_, **__):
        tried.append(work.config)
        limited = work.config.sampling.kv_memory_gb > 0
        name, kinds = (AT_REST, {"weights": 2e9}) if limited else ("decode", {"keys and values": 2e9})
        return SimpleNamespace(fits=False, tightest=Program(name, "sample", kinds, 1e9, 0.0, {}, 0.0))

    monkeypatch.setattr("pkv.plan.search.make_plan", made)
    monkeypatch.setattr("pkv.plan.search.search", lambda *_: None)
    work = work_of(config_of(), ARCH)
    assert nearest(work, read_slice("h100:8"), made(work), lambda _: None) is None
    assert len(set(map(repr, tried))) == len(tried) > 3 and tried[-1].optimizer.moments == "float8"


def test_weights_in_8_bits_are_what_would_fit_where_a_row_lacks_little(capsys):
    words = ["qwen2.5-14b", "--topology", "a100-40gb:8", "--data", "1", "--fsdp", "8", "--tensor", "1"]
    code, out, _ = plan(capsys, *words)
    assert code == 3 and "sampling at rest needs 4.14 GiB more" in out
    flags = out.split("It would fit with: ")[1].split()
    assert flags[:2] == ["--sampling.weights", "int8"] and plan(capsys, *words, *flags)[0] == 0


def test_weights_in_8_bits_go_before_what_training_would_lose():
    work = work_of(config_of(), ARCH)
    kinds = {"weights": 4e9, "optimizer": 4e9, "sampled weights": 4e9, "keys and values": 1e8}
    lacking = Program("prefill", "sample", kinds, 11e9, 0.0, {}, 0.0)
    gpus = read_slice("h100:8")
    assert next(_reliefs(work.config, lacking, gpus))[0] == "--sampling.weights int8"
    too_little = dataclasses.replace(lacking, limit_bytes=10e9)
    assert next(_reliefs(work.config, too_little, gpus))[0] == "--optimizer.moments bfloat16"
    lora = dataclasses.replace(work.config, model=dataclasses.replace(work.config.model, lora=LoraConfig(rank=8)))
    held = Program("apply", "update", {"base": 4e9, "sampled base": 4e9}, 7e9, 0.0, {}, 0.0)  # it always is
    assert next(_reliefs(lora, held, gpus))[0] == "--sampling.weights int8"


def test_pages_that_fill_a_tpus_rows_are_what_would_fit_where_smaller_ones_do_not():
    """configs/tiny.yaml has pages of 64, for a CPU."""
    work = work_of(config_of(), ARCH)
    lacking = Program("decode", "sample", {"keys and values": 1e9, "activations": 2e9}, 1e9, 0.0, {}, 0.0)
    flag, config = next(_reliefs(work.config, lacking, read_slice("v5e:1x1")))
    assert flag == "--sampling.page_tokens 128" and config.sampling.page_tokens == 128
    assert flag not in [flag for flag, _ in _reliefs(config, lacking, read_slice("v5e:1x1"))]
    assert flag not in [flag for flag, _ in _reliefs(work.config, lacking, read_slice("h100:8"))]


def test_weights_in_8_bits_are_offered_where_decoding_takes_most_of_the_time(monkeypatch, capsys):
    known = dataclasses.replace(
        read_slice("h100:8"), chip=dataclasses.replace(read_slice("h100:8").chip, int8_weights=0.5)
    )
    config = config_of()
    slow = dataclasses.replace(config.grpo, prompts=1, samples=1)  # a row a shard: a step reads the weights for little
    found = make_plan(work_of(dataclasses.replace(config, grpo=slow), WIDE), known)
    flag, hours = quicker(found)
    assert found.fits and flag == "--sampling.weights int8" and 0.5 * found.hours < hours < 0.9 * found.hours
    assert quicker(dataclasses.replace(found, wanted=read_slice("h100:8"))) is None  # where nobody knows of a gain
    taken = dataclasses.replace(found.work.config, sampling=dataclasses.replace(config.sampling, weights="int8"))
    assert quicker(make_plan(dataclasses.replace(found.work, config=taken), known)) is None
    monkeypatch.setattr("pkv.plan.quicker", lambda plan: ("--sampling.weights int8", plan.hours / 2))
    code, out, _ = plan(capsys, "qwen2.5-7b", "--topology", "h100:8", "--json")
    said = json.loads(out)
    assert code == 0 and said["quicker"] == {"settings": ["--sampling.weights int8"], "hours": said["hours"] / 2}
    code, out, _ = plan(capsys, "qwen2.5-7b", "--topology", "h100:8")
    assert out.rstrip().endswith("hours with --sampling.weights int8")


def test_another_mesh_is_what_would_fit_where_nothing_else_does(capsys):
    words = ["qwen2.5-7b", "--topology", "a100-40gb:8", "--data", "8", "--fsdp", "1", "--tensor", "1"]
    code, out, _ = plan(capsys, *words)
    assert code == 3 and "It would fit with: --mesh.data 2 --mesh.fsdp 1" in out
    flags = out.split("It would fit with: ")[1].split()
    assert plan(capsys, *words[:3], *flags)[0] == 0
    assert plan(capsys, *words, *flags)[0] == 0  # behind the same line they take its sizes' place
    code, out, _ = plan(capsys, "qwen2.5-72b", "--topology", "t4:1", "--tensor", "1")
    assert code == 3 and "Nothing that was tried fits" in out


def test_a_search_that_finds_nothing_has_a_verdict_though_the_configs_mesh_cant_be(capsys):
    words = ["qwen2.5-32b", "--topology", "a100-40gb:3", "--grpo.prompts", "9"]  # its tensor axis is of 4
    code, _, err = plan(capsys, *words)
    assert code == 2 and "does not fit on 3 devices" in err and "pkv plan --search" in err
    code, out, _ = plan(capsys, *words, "--search")
    assert code == 3 and "as data 3;" in out and "Nothing that was tried fits" in out
    words = ["qwen2.5-3b", "--topology", "a100-40gb:1", "--tensor", "2", "--search"]
    code, out, _ = plan(capsys, *words, "--json")
    found = json.loads(out)
    assert code == 3 and {"--mesh.tensor 1", "--optimizer.moments float8"} <= set(found["settings"])
    flags = [word for flag in found["settings"] for word in flag.split()]
    assert plan(capsys, *words[:3], *flags)[0] == 0


def test_what_a_run_would_refuse_is_no_plan(tmp_path, capsys):
    eight = read_slice("h100:8")
    of_two = dataclasses.replace(eight, chip=dataclasses.replace(eight.chip, host_chips=2))
    described_mesh(config_of(grpo={"prompts": 4}), of_two)
    with pytest.raises(UserError, match=r"grpo.prompts: 2 a step are too few for the 4 machines of h100:8"):
        described_mesh(config_of(), of_two)
    short = {**QWEN25_14B, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(short))
    code, _, err = plan(capsys, "qwen2.5-14b", "--topology", "h100:8", "--model.path", str(tmp_path))
    assert code == 2 and "the model's context: 4096 tokens; prompts and max_new_tokens need" in err


def test_a_program_that_the_compiler_refuses_is_json_too(capsys):
    refused = Program("gradient", "update", {"activations": 2.0**40}, 2.0**30, 1.0, {}, math.inf)
    found = dataclasses.replace(plan_of(load_config("qwen2.5-7b"), "h100:8"), programs=(refused,), whole=False)
    Output(sys.stdout, json=True).result("", as_record(found))

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(capsys.readouterr().out, parse_constant=refuse)["programs"][0]["seconds_estimate"] is None


def test_a_search_finds_a_mesh_by_itself(capsys):
    code, out, _ = plan(capsys, "qwen2.5-7b", "--topology", "h100:8", "--search")
    assert code == 0 and "With: --mesh.data 2 --mesh.fsdp 1" in out


def test_bad_words_are_one_line(capsys):
    for words, said in (
        (["qwen2.5-7b", "--topology", "v9:2"], "--topology v9:2: expected a kind and a grid"),
        (["qwen2.5-7b", "--topology", "h100:8", "--grpo.micro_row", "1"], "did you mean"),
        (["qwen2.5-7b", "--topology", "h100:8", "--sampling.attention", "triton"], "triton needs mesh.tensor 1"),
        (["qwen2.5-7b", "--topology", "t4:8", "--model.attention", "cudnn"], "capability 8 or more"),
        (["qwen2.5-7b", "--topology", "h100:8", "--tensor", "3"], "does not fit on 8 devices"),
    ):
        code, out, err = plan(capsys, *words)
        assert code == 2 and said in err and err.count("\n") == 1 and not out


@needs_libtpu
def test_slices_are_described_from_one_chip_to_several_slices():
    sizes = {"v5e:1x1": (1, 1), "v5p:2x2x1": (1, 4), "2xv5e:2x2": (2, 4)}
    sizes |= {"v4:1x1x1": (1, 1), "v4:2x2x1": (1, 4), "2xv4:2x2x1": (2, 4)}
    for name, (data, fsdp) in sizes.items():
        config = config_of(mesh={"data": data, "fsdp": -1, "tensor": 1}, grpo={"prompts": 8})
        mesh = described_mesh(config, read_slice(name))
        assert (mesh.shape["data"], mesh.shape["fsdp"]) == (data, fsdp), name
    with pytest.raises(UserError, match=r"--topology v5e:3x7: cannot be described here"):
        described_mesh(config_of(), read_slice("v5e:3x7"))


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "sizes"),
    [
        ("v4:2x2x4", (2, 2, 1, 4)),
        ("v5e:4x8", (1, 8, 1, 4)),
        ("v5p:2x2x4", (2, 2, 1, 4)),
        ("tpu7x:2x2x2", (1, 4, 1, 4)),
    ],
)
def test_a_row_of_the_mesh_is_a_machine_and_all_machines_are_laid_alike(topology, sizes):
    """Where one is laid otherwise than the others, the TPU compiler ends the process at collectives over several."""
    mesh = described_mesh(
        config_of(mesh=dict(zip(AXES, sizes, strict=True)), grpo={"prompts": 8}), read_slice(topology)
    )
    machines = mesh.devices.reshape(-1, read_slice(topology).host_chips)
    assert all(len({device.process_index for device in machine}) == 1 for machine in machines)
    places = np.array([[device.coords for device in machine] for machine in machines])
    within = places - places.min(axis=1, keepdims=True)
    assert (within == within[0]).all()


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "remat"),
    [
        ("v4:2x2x1", {"data": 1, "fsdp": 2, "tensor": 2}, "all"),
        ("v5p:2x2x1", {"data": 1, "fsdp": 2, "tensor": 2}, "all"),
        ("2xv5e:2x2", {"data": 2, "fsdp": 2, "tensor": 2}, "all"),
        (
            "v6e:2x2",
            {"data": 1, "fsdp": 1, "sequence": 2, "tensor": 2},
            "offload",
        ),  # as the plans of 128k tokens have it
    ],
)
def test_every_program_compiles_for_every_kind_of_slice(topology, mesh, remat):
    """Of a small model; and what they send is what the formulas say, within a factor of two."""
    arch = Arch(vocab_size=512, hidden=512, layers=4, heads=4, kv_heads=4, head_size=128, ffn=1024)
    config = config_of(mesh=mesh, model={"remat": remat}, grpo={"prompts": 8})
    work, wanted = work_of(config, arch), read_slice(topology)
    found, formulas = make_plan(work, wanted), make_plan(work, wanted, by_formula=True)
    assert found.fits and found.hours > 0
    programs = {program.name: program for program in found.programs}
    assert {"gradient", "apply", "init", "reshard", "prefill", "decode"} <= set(programs)
    gradient, formula = programs["gradient"], next(p for p in formulas.programs if p.name == "gradient")
    assert gradient.sent.get(NETWORK, 0.0) == pytest.approx(formula.sent[NETWORK], rel=0.1)
    assert 0.5 < sum(formula.sent.values()) / sum(gradient.sent.values()) < 2
    assert (gradient.host_bytes > 0) == (remat == "offload")
    assert ("all-to-all" in gradient.sent) == (mesh.get("sequence", 1) > 1)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "activations_gib"),
    [
        ("qwen2.5-14b --topology v5e:4x8", 4.6),
        ("qwen2.5-14b --topology v5e:4x4 --optimizer.moments float8", 5.5),
        ("qwen2.5-14b --topology v6e:2x4", 7.0),
        ("qwen2.5-14b-128k --topology v5p:2x2x2", 31.0),
        ("qwen2.5-14b-lora --topology v5e:2x4", 2.4),
    ],
)
def test_headline_configs_fit_the_slices_that_their_headers_name(asked, activations_gib):
    """Every program of a full step of 14B at 11,264 new tokens or 122,880, compiled for TPU, in a new process."""
    command = [sys.executable, "-m", "pkv", "plan", *asked.split(), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout)
    assert found["fits"] and not found["settings"]
    assert {"gradient", "apply", "init", "reshard", "prefill", "decode"} <= {p["name"] for p in found["programs"]}
    gradient = next(program for program in found["programs"] if program["name"] == "gradient")
    assert gradient["kinds"]["activations"] < activations_gib * 2**30
    assert sum(gradient["sent_bytes"].values()) > 1e9
