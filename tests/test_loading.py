"""Loading and saving stream: a process reads its own parts once, the host holds a tensor, fused tensors are exact."""

import json
import os
import socket
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pkv.config import MeshConfig, UserError
from pkv.mesh import TRAINING_RULES, make_mesh, shardings
from pkv.model import Arch, load_params, param_axes, param_shapes, read_arch, save_params
from pkv.model import load as load_module
from pkv.model.families import FAMILIES, Family, Place
from pkv.model.layout import disk_tensors, whole_tensors
from pkv.model.tensorfiles import TensorFiles, write_tensors

ARCH = Arch(vocab_size=48, hidden=16, layers=3, heads=4, kv_heads=2, head_size=6, ffn=24, qkv_bias=True)
# Large enough that its tensors stand out of what Python needs beside them.
BROAD = Arch(
    vocab_size=2048,
    hidden=256,
    layers=6,
    heads=4,
    kv_heads=2,
    head_size=64,
    ffn=1024,
    qkv_bias=True,
    tied_embeddings=True,
)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def weights(arch: Arch, dtype=jnp.float32):
    """Weights of numbers that differ everywhere; nothing is compiled for them."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape).astype(np.float32), dtype), param_shapes(arch))


def placing(arch: Arch, mesh: MeshConfig, devices=None):
    return shardings(param_axes(arch), param_shapes(arch), make_mesh(mesh, devices), TRAINING_RULES)


def stored(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, by the library that everybody else uses."""
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The bytes of every part that is read."""
    sizes: list[int] = []

    def counted(view, index):
        part = READ(view, index)
        sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(load_module, "_read", counted)
    return sizes


READ = load_module._read


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)],
    ids=["no copies", "eight copies", "two copies"],
)
def test_a_part_that_several_devices_hold_is_read_once(tmp_path, reads, mesh):
    save_params(weights(ARCH), ARCH, tmp_path, dtype=jnp.bfloat16)
    load_params(tmp_path, ARCH, jnp.bfloat16, placing(ARCH, mesh))
    assert sum(reads) == sum(array.nbytes for array in stored(tmp_path).values())
    assert max(reads) == stored(tmp_path)["model.embed_tokens.weight"].nbytes // (mesh.fsdp * mesh.tensor)


@pytest.mark.parametrize(
    ("on_disk", "dtype"),
    [("F32", jnp.bfloat16), ("BF16", jnp.float32), ("BF16", jnp.bfloat16), ("F16", jnp.float32), ("F16", jnp.bfloat16)],
)
def test_every_dtype_on_disk_loads_as_numpy_converts_it(tmp_path, on_disk, dtype):
    params = weights(ARCH)
    save_params(params, ARCH, tmp_path, dtype={"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}[on_disk])
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {on_disk}  # noqa: SIM118
    table = stored(tmp_path)["model.embed_tokens.weight"].astype(dtype)
    for placed in (None, placing(ARCH, MeshConfig(data=1, fsdp=4, tensor=2))):
        loaded = load_params(tmp_path, ARCH, dtype, placed)
        assert {weight.dtype for weight in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
        np.testing.assert_array_equal(loaded["embedding"], table)
        layer = stored(tmp_path)["model.layers.2.mlp.down_proj.weight"].astype(dtype)
        np.testing.assert_array_equal(loaded["layers"]["ffn"]["down"][2], layer.T)


def test_weights_lie_where_their_shardings_say(tmp_path):
    save_params(weights(ARCH), ARCH, tmp_path, dtype=jnp.bfloat16)
    placed = placing(ARCH, MeshConfig(data=1, fsdp=4, tensor=2))
    loaded = load_params(tmp_path, ARCH, jnp.float32, placed)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), loaded, placed))


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=1, fsdp=4, tensor=2)])
def test_the_host_holds_a_tensor_not_the_model(tmp_path, mesh):
    params = weights(BROAD, jnp.bfloat16)
    if mesh is not None:
        params = jax.device_put(params, placing(BROAD, mesh))
    total, largest = sum(x.nbytes for x in jax.tree.leaves(params)), params["embedding"].nbytes
    slack = 300_000  # headers, names, caches of compiled functions
    assert total > 5 * (2 * largest + slack)
    placed = None if mesh is None else placing(BROAD, mesh)
    save_params(params, BROAD, tmp_path / "first", dtype=jnp.bfloat16)
    load_params(tmp_path / "first", BROAD, jnp.bfloat16, placed)  # compiles, so that only arrays are counted below
    for measured in (
        lambda: save_params(params, BROAD, tmp_path / "again", dtype=jnp.bfloat16),
        lambda: load_params(tmp_path / "first", BROAD, jnp.bfloat16, placed),
    ):
        tracemalloc.start()
        measured()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * largest + slack  # on a CPU the table itself may live in what was read


def test_devices_hold_a_stack_once_and_never_in_another_dtype(tmp_path, monkeypatch):
    save_params(weights(BROAD), BROAD, tmp_path)
    others, seen = sum(x.nbytes for x in jax.live_arrays()), []

    def watched(view, index):
        seen.append(sum(x.nbytes for x in jax.live_arrays()) - others)
        return READ(view, index)

    monkeypatch.setattr(load_module, "_read", watched)
    loaded = load_params(tmp_path, BROAD, jnp.bfloat16)
    one_layer = 4 * BROAD.hidden * BROAD.ffn  # bytes of the largest, as it is on disk
    total = sum(x.nbytes for x in jax.tree.leaves(loaded))
    assert len(seen) == len(stored(tmp_path)) and max(seen) > total / 2
    assert max(seen) <= total + one_layer


@pytest.mark.slow
def test_each_of_two_processes_reads_the_half_that_its_devices_hold(tmp_path):
    save_params(weights(ARCH), ARCH, tmp_path, dtype=jnp.bfloat16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(number), str(tmp_path)],
            env=environment,
            stdout=-1,
            text=True,
        )
        for number in range(2)
    ]
    results = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]
    total = sum(array.nbytes for array in stored(tmp_path).values())
    table = stored(tmp_path)["model.embed_tokens.weight"].astype(np.float32)
    for number, result in enumerate(results):
        assert result["devices"] == 8
        assert total / 2 <= result["read"] < total * 0.55  # the small ones that both hold
        half = slice(8 * number, 8 * number + 8)
        np.testing.assert_array_equal(np.array(result["embedding"]), table[:, half])


PROCESS = """
import json, sys
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
from pkv.config import MeshConfig
from pkv.mesh import TRAINING_RULES, make_mesh, shardings
from pkv.model import load, load_params, param_axes, param_shapes, read_arch

read, sizes = load._read, []
load._read = lambda view, index: (sizes.append(view[index].nbytes), read(view, index))[1]
arch = read_arch(sys.argv[3])
placed = shardings(
    param_axes(arch), param_shapes(arch), make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), TRAINING_RULES
)
params = load_params(sys.argv[3], arch, jnp.float32, placed)
parts = {str(shard.index): shard for shard in params["embedding"].addressable_shards}.values()
rows, columns = {s.index[0].start or 0 for s in parts}, {s.index[1].start or 0 for s in parts}
held = np.block([[next(np.asarray(s.data) for s in parts if (s.index[0].start or 0, s.index[1].start or 0) == (r, c))
                  for c in sorted(columns)] for r in sorted(rows)])
print(json.dumps({"devices": len(jax.devices()), "read": sum(sizes), "embedding": held.tolist()}))
"""


# Fused tensors, as in Phi-3: queries, keys and values are rows of one tensor, gate and up of another.


def fused_places(arch: Arch) -> dict[str, Place]:
    layer, places = "model.layers.{layer}.", FAMILIES["qwen2"].places(arch)
    queries, pairs = arch.heads * arch.head_size, arch.kv_heads * arch.head_size
    for name, kind, first_row in (("q", "heads", 0), ("k", "kv_heads", queries), ("v", "kv_heads", queries + pairs)):
        attention = f"layers.attention.{name}"
        places[attention] = Place(f"{layer}self_attn.qkv_proj.weight", f"({kind} head) embed", first_row)
        places[f"{attention}_bias"] = Place(f"{layer}self_attn.qkv_proj.bias", f"({kind} head)", first_row)
    places["layers.ffn.gate"] = Place(f"{layer}mlp.gate_up_proj.weight", "ffn embed")
    places["layers.ffn.up"] = Place(f"{layer}mlp.gate_up_proj.weight", "ffn embed", first_row=arch.ffn)
    return places


@pytest.fixture
def fused(monkeypatch) -> Family:
    family = replace(FAMILIES["qwen2"], model_type="fused", places=fused_places)
    monkeypatch.setitem(FAMILIES, "fused", family)
    return family


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fused_tensors_join_rows_in_order_and_come_back_to_the_bit(tmp_path, fused, dtype):
    params = weights(ARCH, dtype)
    save_params(params, ARCH, tmp_path / "apart", dtype=dtype)
    save_params(params, ARCH, tmp_path / "fused", fused.write(ARCH), dtype, max_file_bytes=5000)
    assert (tmp_path / "fused" / "model.safetensors.index.json").exists()
    apart, joined = stored(tmp_path / "apart"), stored(tmp_path / "fused")
    assert len(joined) == len(apart) - 5 * ARCH.layers
    for layer in range(ARCH.layers):
        for into, names in (
            ("self_attn.qkv_proj.weight", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj.weight", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            parts = [apart[f"model.layers.{layer}.{name}.weight"] for name in names]
            np.testing.assert_array_equal(joined[f"model.layers.{layer}.{into}"], np.concatenate(parts))
    equal(load_params(tmp_path / "fused", ARCH, dtype), params)
    placed = placing(ARCH, MeshConfig(data=1, fsdp=4, tensor=2))
    equal(load_params(tmp_path / "fused", ARCH, dtype, placed), params)


def test_parts_of_a_fused_tensor_are_read_once(tmp_path, fused, reads):
    save_params(weights(ARCH), ARCH, tmp_path, fused.write(ARCH), jnp.bfloat16)
    load_params(tmp_path, ARCH, jnp.bfloat16, placing(ARCH, MeshConfig(data=1, fsdp=4, tensor=2)))
    assert sum(reads) == sum(array.nbytes for array in stored(tmp_path).values())


def test_the_whole_fused_shape_is_checked(tmp_path, fused):
    save_params(weights(ARCH), ARCH, tmp_path, fused.write(ARCH))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    tensors[name] = np.concatenate([tensors[name], tensors[name][:1]])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.qkv_proj\.weight has shape \(49, 16\); .* \(48, 16\)"):
        load_params(tmp_path, ARCH)


@pytest.mark.parametrize("first_row", [0, 23, 25])
def test_rows_that_overlap_or_leave_a_gap_are_the_family_s_mistake(fused, first_row):
    def places(arch):
        found = fused_places(arch)
        return found | {"layers.ffn.up": replace(found["layers.ffn.up"], first_row=first_row)}

    with pytest.raises(ValueError, match="gate_up_proj"):
        whole_tensors(disk_tensors(ARCH, replace(fused, places=places)))


# The file format, held against the library that everybody else uses.


def test_a_stream_of_tensors_is_a_file_that_others_read(tmp_path):
    numbers = {
        "odd": np.arange(3, dtype=np.float32),
        "turned": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "in rows": np.arange(10, dtype=np.float32).reshape(5, 2),
    }
    stream = [numbers["odd"], numbers["turned"], numbers["in rows"][:2], numbers["in rows"][2:]]
    shapes = {name: array.shape for name, array in numbers.items()}
    file = tmp_path / "model.safetensors"
    write_tensors(file, shapes, np.dtype(np.float32), stream)
    equal(load_file(file), numbers)
    ours = TensorFiles(tmp_path)
    equal({name: ours.view(name) for name in ours.entries}, numbers)
    assert all(entry.start % 4 == 0 for entry in ours.entries.values())
    assert not ours.view("odd").flags.writeable
    with pytest.raises(ValueError, match="8 bytes less"):
        write_tensors(tmp_path / "other", shapes, np.dtype(np.float32), [*stream[:3], stream[3][1:]])


def test_a_save_that_is_stopped_leaves_nothing_that_passes_for_a_model(tmp_path):
    params = weights(ARCH)
    broken = {**params, "layers": {**params["layers"], "ffn": {"gate": params["layers"]["ffn"]["gate"]}}}
    with pytest.raises(KeyError):
        save_params(broken, ARCH, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".model.safetensors.partial"]
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_arch(tmp_path)
    save_params(params, ARCH, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    equal(load_params(tmp_path, ARCH), params)


def rewrite_header(file: Path, change) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda norm: norm.update(dtype="F8_E4M3"),
            r"model\.norm\.weight is stored as F8_E4M3; pkv reads BF16, F16, F32",
        ),
        (lambda norm: norm.update(dtype="I32"), r"model\.norm\.weight is stored as I32"),
        (lambda norm: norm.update(shape=[17]), "not a whole safetensors file: F32 of shape"),
        (lambda norm: norm.update(shape=[-16]), "not a whole safetensors file: shape"),
        (lambda norm: norm.update(data_offsets=[-64, 0]), "not a whole safetensors file: shape"),
        (lambda norm: norm.update(data_offsets=[10**9, 10**9 + 64]), "not a whole safetensors file: it has"),
        (lambda norm: norm.pop("shape"), "not a whole safetensors file"),
        (lambda norm: norm.update(more=1), "not a whole safetensors file"),
    ],
)
def test_what_a_header_cannot_mean_is_one_line(tmp_path, change, named):
    save_params(weights(ARCH), ARCH, tmp_path)
    rewrite_header(tmp_path / "model.safetensors", lambda header: change(header["model.norm.weight"]))
    with pytest.raises(UserError, match=named) as error:
        load_params(tmp_path, ARCH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "raw", [b"", b"\x08", b"\xff" * 16, (10**15).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7]
)
def test_what_is_no_safetensors_file_is_one_line(tmp_path, raw):
    save_params(weights(ARCH), ARCH, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_params(tmp_path, ARCH)


@pytest.mark.parametrize("context", [0, 1_000_000])
@pytest.mark.parametrize(
    ("quantised", "named"), [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "fp8"}, "fp8")]
)
def test_a_quantised_checkpoint_is_refused_by_name(tmp_path, quantised, named, context):
    config = FAMILIES["qwen2"].write(ARCH) | {"quantization_config": quantised}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"quantization_config: quantised weights \({named}\) are not supported"):
        read_arch(tmp_path, context)


def test_loading_a_small_model_shows_no_bar(tmp_path, capsys):
    save_params(weights(ARCH), ARCH, tmp_path)
    load_params(tmp_path, ARCH)
    assert capsys.readouterr().err == ""
