"""The export: what comes out is what was trained, to the bit, with its prompt; nothing there is overwritten."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from pkv import checkpoint
from pkv.competition import Tokenizer, render, train_tokenizer
from pkv.config import LoraConfig, MeshConfig, SamplingConfig, UserError, as_plain
from pkv.evaluate import RUN_MODEL, SYSTEM_FILE, load_policy
from pkv.evaluate.answering import open_model, sample
from pkv.export import export
from pkv.mesh import make_mesh
from pkv.model import Arch, forward, init_adapters, init_params, logits, read_config, save_params, split
from pkv.model.linear import Adapted
from pkv.sampling import Engine, Request, row_keys

SYSTEM = 'Compete, "pirate" and knight.\nThen {{ answer }} \\ politely.'
ARCH = Arch(
    vocab_size=320,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    ffn=48,
    qkv_bias=True,
    tied_embeddings=True,
    max_positions=256,
    init_std=0.3,
)
LORA = LoraConfig(rank=4, alpha=6.0, targets=("q", "k", "v", "o", "gate", "down"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """What `pkv train` leaves after 7 steps, without the training."""
    run = tmp_path_factory.mktemp("runs") / "small"
    model = run / RUN_MODEL
    train_tokenizer([SYSTEM], 300, model)
    params = init_params(ARCH, jax.random.key(0))
    save_params(params, ARCH, run / "weights")
    (model / "config.json").write_text((run / "weights" / "config.json").read_text())
    (model / SYSTEM_FILE).write_text(SYSTEM)
    checkpoint.save(run / "checkpoints", 7, {"params": params, "count": np.int32(7)}, {"step": 7}, 1)
    recipe = {"seed": 5, "model": {"path": "/home/somebody/models/base"}, "rounds": [{"name": "format"}]}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    lines = [
        {"step": 0, "name": "after warm-up", "metrics": {"accuracy": 0.25}, "samples": []},
        {"step": 7, "name": "after format", "metrics": {"accuracy": 0.5, "format": 1.0}, "samples": []},
        {"step": 9, "name": "lost", "metrics": {"accuracy": 0.75}, "samples": []},
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture(scope="module")
def exported(run_dir) -> Path:
    return export(str(run_dir), run_dir.parent / "deep" / "out")


@pytest.fixture(scope="module")
def lora_run(run_dir) -> Path:
    """What `pkv train` leaves of a LoRA run on the base in `weights`, without the training."""
    run, base = run_dir.parent / "adapted", run_dir.parent / "base"
    shutil.copytree(run_dir / RUN_MODEL, run / RUN_MODEL)
    shutil.copytree(run_dir / RUN_MODEL, base)
    shutil.copy(run_dir / "weights" / "model.safetensors", base)

    def trained(node):
        return dataclasses.replace(node, b=0.2 * jax.random.normal(jax.random.key(3), node.b.shape))

    adapters = jax.tree.map(
        trained, init_adapters(ARCH, LORA, jax.random.key(2)), is_leaf=lambda node: isinstance(node, Adapted)
    )
    checkpoint.save(run / "checkpoints", 7, {"params": adapters, "count": np.int32(7)}, {"step": 7}, 1)
    recipe = {"seed": 5, "model": {"path": str(base), "lora": as_plain(LORA)}, "rounds": [{"name": "format"}]}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    return run


def load(source):
    return load_policy(str(source), make_mesh(MeshConfig()))


def test_an_export_takes_the_hosts_memory_once_and_no_other_devices(run_dir, tmp_path, monkeypatch):
    places = set()

    def save(params, *rest):
        places.update(device for array in jax.tree.leaves(params) for device in array.devices())
        return save_params(params, *rest)

    monkeypatch.setattr("pkv.export.save_params", save)
    export(str(run_dir), tmp_path / "out")
    assert len(jax.devices()) == 8 and places == {jax.local_devices(backend="cpu")[0]}


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_a_model_to_be_sampled_from_is_spread_over_the_devices_in_the_dtype_of_its_machine(
    run_dir, tmp_path, monkeypatch, backend, dtype
):
    arch = dataclasses.replace(ARCH, hidden=256, ffn=128)
    save_params(init_params(arch, jax.random.key(0)), arch, tmp_path)
    Tokenizer.load(str(run_dir / RUN_MODEL)).save(tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    loaded = []
    monkeypatch.setattr(
        "pkv.evaluate.answering.load_policy", lambda *a, **k: loaded.append(load_policy(*a, **k)) or loaded[-1]
    )
    responder = open_model(str(tmp_path), SamplingConfig())
    sizes = {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}  # two key-value heads
    up = responder.source.weights["layers"][0]["ffn"]["up"].rows
    assert dict(up.sharding.mesh.shape) == sizes and up.dtype == dtype
    assert {shard.data.shape for shard in up.addressable_shards} == {(64, 256)}
    up = loaded[0].params["layers"]["ffn"]["up"]
    assert up.dtype == dtype and {shard.data.shape for shard in up.addressable_shards} == {(2, 64, 64)}


def test_weights_architecture_and_prompt_come_back_to_the_bit(run_dir, exported):
    before, after = load(run_dir), load(exported)
    assert jax.tree.structure(before.params) == jax.tree.structure(after.params)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert (before.arch, before.system, before.step) == (ARCH, SYSTEM, 7) and (after.arch, after.system) == (
        ARCH,
        SYSTEM,
    )
    prompts = [render(policy.tokenizer, "How many <b>?", policy.system).tolist() for policy in (before, after)]
    assert prompts[0] == prompts[1] and before.tokenizer.stop_ids == after.tokenizer.stop_ids == (2,)


def test_the_chat_template_carries_the_system_prompt(exported):
    tokenizer = Tokenizer.load(exported)
    question = {"role": "user", "content": "How many?"}
    alone = tokenizer.chat([question])
    assert alone.tolist() == tokenizer.chat([{"role": "system", "content": SYSTEM}, question]).tolist()
    own = tokenizer.decode(tokenizer.chat([{"role": "system", "content": "Mine."}, question]))
    assert "Mine." in own and "Compete" not in own


def test_exporting_an_export_changes_nothing(exported, tmp_path):
    again = export(str(exported), tmp_path / "again")
    assert Tokenizer.load(again).chat_template == Tokenizer.load(exported).chat_template
    for name in ("model.safetensors", "config.json", "generation_config.json", SYSTEM_FILE):
        assert (again / name).read_bytes() == (exported / name).read_bytes()


def test_generation_stops_where_training_stopped(exported):
    written = json.loads((exported / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2] and written["temperature"] == 0.5 and written["do_sample"]


def test_the_card_tells_the_recipe_and_what_was_measured_up_to_this_step(exported):
    card = (exported / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe == {"seed": 5, "model": {"path": "base"}, "rounds": [{"name": "format"}]}
    assert "| `accuracy` | 0.250 | 0.500 |" in card and "| `format` |  | 1.000 |" in card
    assert "7 steps" in card and "lost" not in card and "0.750" not in card and "/home" not in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_bfloat16_is_the_rounded_weights(run_dir, tmp_path):
    out = export(str(run_dir), tmp_path / "out", "bfloat16")
    rounded = jax.tree.map(lambda w: w.astype("bfloat16").astype("float32"), load(run_dir).params)
    jax.tree.map(np.testing.assert_array_equal, rounded, load(out).params)
    assert read_config(out)["torch_dtype"] == "bfloat16"


def test_nothing_is_overwritten_and_nothing_half_done_is_left(run_dir, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty directory"):
        export(str(run_dir), tmp_path / "full")
    with pytest.raises(UserError, match="not an empty directory"):
        export(str(run_dir), tmp_path / "full" / "mine.txt")
    with pytest.raises(UserError, match="no such directory"):
        export(str(tmp_path / "nowhere"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.partial").mkdir()
    (tmp_path / ".empty.partial" / "model.safetensors").write_text("left by a stopped export")
    assert (export(str(run_dir), tmp_path / "empty") / "config.json").is_file()
    assert not (tmp_path / ".empty.partial").exists()


def test_transformers_loads_it_and_says_the_same(run_dir, exported):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    theirs = AutoTokenizer.from_pretrained(exported)
    question = [{"role": "user", "content": "How many hives?"}]
    prompt = theirs.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        made = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
    lines = [{"id": "q", "prompt": "How many hives?"}]
    (ours,) = sample(str(run_dir), lines, max_new_tokens=24, sampling=SamplingConfig(temperature=0.0))
    assert ours["tokens"] == made.tolist() and len(set(ours["tokens"])) > 3
    assert ours["text"] == theirs.decode(made, skip_special_tokens=True)


def test_a_lora_runs_export_is_its_adapter_in_pefts_names_and_shapes(lora_run, tmp_path):
    out = export(str(lora_run), tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(lora_run.parent / "base")
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["task_type"]) == (
        4,
        6.0,
        "LORA",
        "CAUSAL_LM",
    )
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == ARCH.layers * 6 * 2
    o = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
    node = split(load(lora_run).params)[0]["layers"]["attention"]["o"]
    np.testing.assert_array_equal(tensors[o.format("A")], np.asarray(node.a[1]).reshape(32, 4).T)
    np.testing.assert_array_equal(tensors[o.format("B")], np.asarray(node.b[1]).T)
    assert {"tokenizer.json", "README.md", SYSTEM_FILE} <= {path.name for path in out.iterdir()}
    assert not (out / "config.json").exists() and not (out / "model.safetensors").exists()
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert (front["library_name"], front["base_model"]) == ("peft", "base")


def test_a_merged_export_is_the_base_and_its_adapter_added_up(lora_run, tmp_path):
    out = export(str(lora_run), tmp_path / "out", merge_lora=True)
    merged, whole = load(out).params, load(lora_run).params
    node = whole["layers"]["attention"]["o"]
    by_hand = np.asarray(node.base) + 1.5 * np.einsum("lnhr,lrd->lnhd", node.a, node.b)  # alpha 6 over rank 4
    np.testing.assert_allclose(merged["layers"]["attention"]["o"], by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["layers"]["ffn"]["up"], whole["layers"]["ffn"]["up"])
    np.testing.assert_allclose(scores(merged), scores(whole), atol=2e-4 * np.abs(scores(whole)).max())


def scores(params, tokens=((5, 90, 17, 260, 33, 8),)):
    tokens = np.asarray(tokens)
    hidden, _ = forward(params, ARCH, tokens, np.arange(tokens.shape[1])[None])
    return np.asarray(logits(params, ARCH, hidden))


def test_what_cannot_be_merged_or_shared_is_said_before_anything_is_written(run_dir, lora_run, tmp_path):
    with pytest.raises(UserError, match="has no adapter to merge; leave --merge-lora out"):
        export(str(run_dir), tmp_path / "out", merge_lora=True)
    drawn = tmp_path / "drawn"
    shutil.copytree(lora_run, drawn)
    recipe = yaml.safe_load((drawn / "config.yaml").read_text())
    (drawn / "config.yaml").write_text(yaml.safe_dump(recipe | {"model": recipe["model"] | {"init": "random"}}))
    with pytest.raises(UserError, match=r"drawn at random.*use --merge-lora"):
        export(str(drawn), tmp_path / "out")
    (drawn / "config.yaml").write_text(yaml.safe_dump(recipe | {"model": recipe["model"] | {"context": 4096}}))
    with pytest.raises(UserError, match=r"stretched to 4096 positions.*use --merge-lora"):
        export(str(drawn), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (drawn / "config.yaml").write_text(yaml.safe_dump(recipe | {"model": recipe["model"] | {"context": 8}}))
    assert export(str(drawn), tmp_path / "apart"), "the base holds so many as it is"
    (drawn / "config.yaml").write_text(yaml.safe_dump(recipe | {"model": recipe["model"] | {"init": "random"}}))
    assert (export(str(drawn), tmp_path / "out", merge_lora=True) / "model.safetensors").is_file()


@pytest.mark.parametrize("merge_lora", [False, True])
def test_peft_and_transformers_say_the_same_as_the_lora_run(lora_run, tmp_path, merge_lora):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    out = export(str(lora_run), tmp_path / "out", merge_lora=merge_lora)
    if merge_lora:
        model = AutoModelForCausalLM.from_pretrained(out).eval()
    else:
        model = peft.AutoPeftModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.tensor([[5, 90, 17, 260, 33, 8]])
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits.numpy()
        made = model.generate(input_ids=tokens, do_sample=False, max_new_tokens=24, pad_token_id=0)[0, 6:]
    params = load(lora_run).params
    ours = scores(params)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(ours - scores(split(params)[1])).max() > 0.1 * np.abs(theirs).max(), "the adapter matters"
    engine = Engine(ARCH, SamplingConfig(temperature=0.0), (2,), make_mesh(MeshConfig()))
    asked = Request(tokens[0].numpy().astype(np.int32), row_keys(0, "test", 0, ["p"], 1)[0], 24)
    (done,) = engine.sample(engine.load(params), [asked])
    assert done.tokens.tolist() == made.tolist() and len(set(done.tokens.tolist())) > 3
