"""Models that the benchmarks run beside ours."""

from pathlib import Path
from typing import Any

import torch

from tl_melbo.model.load import bundled_model_path


def plain() -> tuple[Any, Any, Path]:
    """The bundled model as Hugging Face gives it, without TransformerLens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = bundled_model_path()
    options = {"gguf_file": path.name}
    hf_model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return hf_model.eval(), tokenizer, path
