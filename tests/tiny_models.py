"""Tiny random models of several architectures, and a tokenizer of 512 words."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

N_LAYERS, D_MODEL, N_HEADS, N_CTX = 6, 32, 4, 256
# Made by tests/make_tokenizer.py.
TOKENIZER = Path(__file__).parent / "data" / "tokenizer"
TINY_ARCHITECTURES = ("llama", "qwen2", "gemma3", "gpt2", "gptneox")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def tiny_hf(
    architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Weights larger than the usual initialisation, so that f is far from linear."""
    common = {"vocab_size": len(tokenizer()), "initializer_range": 0.3}
    modern = {
        **common,
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": 2,
        "head_dim": D_MODEL // N_HEADS,
        "max_position_embeddings": N_CTX,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**modern)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**modern)),
        # Two kinds of layer, a window shorter than the prompts: their masks and rotations differ.
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**modern, sliding_window=4, sliding_window_pattern=2)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                **common, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=N_CTX
            )
        ),
        "gptneox": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                **common,
                hidden_size=D_MODEL,
                intermediate_size=64,
                num_hidden_layers=N_LAYERS,
                num_attention_heads=N_HEADS,
                max_position_embeddings=N_CTX,
            )
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf_model = makers[architecture]()
    hf_model.config._attn_implementation = "eager"
    hf_model.config.architectures = [type(hf_model).__name__]
    return hf_model.to(dtype).eval()


def tiny_bridge(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    return as_bridge(tiny_hf(architecture, dtype, seed), f"tiny-{architecture}")


def as_bridge(hf_model: PreTrainedModel, name: str = "tiny") -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        name, hf_model=hf_model, tokenizer=tokenizer(), device="cpu", dtype=hf_model.dtype
    )


def tiny_hooked_llama() -> Any:
    """The weights of `tiny_hf("llama")` in a HookedTransformer (TransformerLens 3 only)."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    hf_model = tiny_hf("llama")
    cfg = HookedTransformerConfig(
        d_model=D_MODEL,
        d_head=D_MODEL // N_HEADS,
        n_heads=N_HEADS,
        n_key_value_heads=2,
        d_mlp=64,
        n_layers=N_LAYERS,
        n_ctx=N_CTX,
        d_vocab=hf_model.config.vocab_size,
        eps=hf_model.config.rms_norm_eps,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=D_MODEL // N_HEADS,
        rotary_base=int(hf_model.config.rope_parameters["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        model_name="tiny-llama",
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    model = HookedTransformer(cfg, tokenizer=tokenizer())
    model.load_state_dict(convert_llama_weights(hf_model, cfg), strict=False)
    return model.eval()
