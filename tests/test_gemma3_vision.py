"""A Gemma 3 with vision, which is how 4B, 12B and 27B come: its text model alone is read, trained and exported."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden.compare import difference, run
from safetensors.numpy import load_file, save_file

from pkv.config import UserError
from pkv.model import load_params, read_arch, read_config, save_params
from pkv.model.families import family_of, gemma3
from pkv.model.rope import Linear

GOLDEN = Path(__file__).parent / "golden" / "gemma3_text"
# As google/gemma-3-4b-it says it, from memory; the other sizes say more of the text.
RELEASED_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}


def test_the_released_config_reads_as_its_text_model():
    config = gemma3.text_config(RELEASED_4B)
    arch = family_of(config).read(config)
    assert (arch.vocab_size, arch.heads, arch.kv_heads, arch.head_size) == (262208, 8, 4, 256)
    assert (arch.layers, arch.window, arch.max_positions, arch.rope_scaling) == (34, 1024, 131072, Linear(8.0))
    assert arch.local_layers[:6] == (True,) * 5 + (False,) and config["eos_token_id"] == [1, 106]
    with pytest.raises(UserError, match="unknown feature audio_config"):
        gemma3.text_config({**RELEASED_4B, "audio_config": {"layers": 1}})


@pytest.mark.parametrize("before", ["language_model.model.", "model.language_model."])
def test_tensors_of_the_text_are_found_and_those_of_the_vision_left_alone(tmp_path, before):
    tensors = {before + name.removeprefix("model."): array for name, array in weights(GOLDEN).items()}
    tensors |= {"vision_tower.probe": np.ones(3, np.int8), "model.multi_modal_projector.norm.weight": np.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((GOLDEN / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = read_arch(tmp_path)
    assert arch == read_arch(GOLDEN)
    np.testing.assert_array_equal(load_params(tmp_path, arch)["embedding"], load_params(GOLDEN, arch)["embedding"])
    save_file({**tensors, "audio_tower.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no place for the tensor audio_tower\.weight"):
        load_params(tmp_path, arch)


def weights(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def test_it_says_what_transformers_says_and_its_export_is_a_text_model(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "query_pre_attn_scalar": 13,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "initializer_range": 0.3,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        boi_token_index=60, eoi_token_index=61, image_token_index=62,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "vision")
    tokens = np.random.default_rng(0).integers(0, 60, (2, 20))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    arch = read_arch(tmp_path / "vision")
    params = load_params(tmp_path / "vision", arch)
    assert difference(run(params, arch, jnp.asarray(tokens), jnp.arange(20)), expected) < 1e-4
    assert np.abs(expected).max() > 1
    save_params(params, arch, tmp_path / "out", read_config(tmp_path / "vision"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(again).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-4)
