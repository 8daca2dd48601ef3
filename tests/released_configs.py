"""Each config.json as its makers publish it, from memory, and the Arch that it means."""

import dataclasses
import math

from pkv.model import Arch
from pkv.model.rope import Linear, Llama3, LongRope, Yarn

# What is beside the decoder in released configs.
FILES = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}
QWEN25_14B = {
    **FILES,
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
YARN_BLOCK = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
QWEN3_8B = {
    **FILES,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA31_8B = {
    **FILES,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA32_1B = {
    **LLAMA31_8B,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA31_8B["rope_scaling"], "factor": 32.0},
    "tie_word_embeddings": True,
}
LLAMA2_7B = {
    **FILES,
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
SMOLLM2_135M = {
    **FILES,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "vocab_size": 49152,
}
MISTRAL_V03 = {
    **FILES,
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32768,
}
GEMMA2_2B = {
    **FILES,
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3_1B = {
    **FILES,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
PHI3_4K = {
    **FILES,
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
SHORT, LONG = [1.0 + 0.01 * i for i in range(48)], [1.1 + 1.3 * i for i in range(48)]
LONGROPE_BLOCK = {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}
PHI3_128K = {**PHI3_4K, "max_position_embeddings": 131072, "rope_scaling": LONGROPE_BLOCK, "sliding_window": 262144}
PHI4 = {
    **PHI3_4K,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "rope_theta": 250000,
    "sliding_window": None,
    "vocab_size": 100352,
}
PHI4_MINI = {
    **PHI3_128K,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}

QWEN_SIZES = {"vocab_size": 152064, "hidden": 5120, "layers": 48, "heads": 40, "kv_heads": 8, "head_size": 128}
QWEN = Arch(**QWEN_SIZES, ffn=13824, rope_theta=1e6, qkv_bias=True)
LLAMA = Arch(
    *(128256, 4096, 32, 32, 8, 128, 14336),
    rope_theta=5e5,
    rope_scaling=Llama3(8.0, 1.0, 4.0, 8192),
    norm_eps=1e-5,
    max_positions=131072,
)
MISTRAL = Arch(*(32768, 4096, 32, 32, 8, 128, 14336), rope_theta=1e6, norm_eps=1e-5)
GEMMA = {
    "norm_offset": True,
    "post_norms": True,
    "query_pre_attn_scalar": 256,
    "activation": "gelu_tanh",
    "scaled_embedding": True,
    "tied_embeddings": True,
}
GEMMA2 = Arch(
    *(256000, 2304, 26, 8, 4, 256, 9216),
    attention_cap=50.0,
    logit_cap=30.0,
    window=4096,
    local_layers=(True, False) * 13,
    max_positions=8192,
    **GEMMA,
)
GEMMA3 = Arch(
    *(262144, 1152, 26, 4, 1, 256, 6912),
    rope_theta=1e6,
    local_rope_theta=1e4,
    qk_norm=True,
    window=512,
    local_layers=(*(True, True, True, True, True, False) * 4, True, True),
    **GEMMA,
)
PHI3 = Arch(
    *(32064, 3072, 32, 32, 32, 96, 8192), norm_eps=1e-5, window=2047, local_layers=(True,) * 32, max_positions=4096
)
LONGROPE = LongRope(tuple(SHORT), tuple(LONG), 4096, math.sqrt(1 + math.log(32) / math.log(4096)), True)


def but(arch, **changes):
    return dataclasses.replace(arch, **changes)


PHI3_LONG = but(PHI3, rope_scaling=LONGROPE, window=262144, max_positions=131072)
RELEASED = {
    "Qwen2.5-14B-Instruct": (QWEN25_14B, QWEN),
    "Qwen2.5-14B-Instruct, YaRN": (
        {**QWEN25_14B, "rope_scaling": YARN_BLOCK},
        but(QWEN, rope_scaling=Yarn(4.0, 32768, 0.1 * math.log(4) + 1), max_positions=131072),
    ),
    "Qwen3-8B": (
        QWEN3_8B,
        Arch(*(151936, 4096, 36, 32, 8, 128, 12288), rope_theta=1e6, qk_norm=True, max_positions=40960),
    ),
    "Llama-3.1-8B": (LLAMA31_8B, LLAMA),
    "Llama-3.2-1B": (
        LLAMA32_1B,
        but(
            LLAMA,
            hidden=2048,
            layers=16,
            head_size=64,
            ffn=8192,
            tied_embeddings=True,
            rope_scaling=Llama3(32.0, 1.0, 4.0, 8192),
        ),
    ),
    "Llama-2-7b": (LLAMA2_7B, Arch(*(32000, 4096, 32, 32, 32, 128, 11008), norm_eps=1e-5, max_positions=4096)),
    "SmolLM2-135M-Instruct": (
        SMOLLM2_135M,
        Arch(
            *(49152, 576, 30, 9, 3, 64, 1536),
            rope_theta=1e5,
            norm_eps=1e-5,
            tied_embeddings=True,
            max_positions=8192,
            init_std=1 / 24,
        ),
    ),
    "Mistral-7B-v0.3": (MISTRAL_V03, MISTRAL),
    "Mistral-7B-v0.1": (
        {**MISTRAL_V03, "sliding_window": 4096, "rope_theta": 10000.0, "vocab_size": 32000},
        but(MISTRAL, window=4096, local_layers=(True,) * 32, rope_theta=1e4, vocab_size=32000),
    ),
    "gemma-2-2b": (GEMMA2_2B, GEMMA2),
    "gemma-3-1b-it": (GEMMA3_1B, GEMMA3),
    "gemma-3-1b-it with the scaling of larger ones": (
        {**GEMMA3_1B, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        but(GEMMA3, rope_scaling=Linear(8.0)),
    ),
    "Phi-3-mini-4k": (PHI3_4K, PHI3),
    "Phi-3-mini-128k": (PHI3_128K, PHI3_LONG),
    "Phi-3-mini-128k, early": ({**PHI3_128K, "rope_scaling": {**LONGROPE_BLOCK, "type": "su"}}, PHI3_LONG),
    "phi-4": (
        PHI4,
        Arch(*(100352, 5120, 40, 40, 10, 128, 17920), rope_theta=25e4, norm_eps=1e-5, max_positions=16384),
    ),
    "Phi-4-mini": (
        PHI4_MINI,
        but(PHI3_LONG, heads=24, kv_heads=8, head_size=128, rotary_share=0.75, tied_embeddings=True, vocab_size=200064),
    ),
}
