"""Random-weight models of the supported families: two layers, true head layout, fused projections, experts, windows."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE, num_key_value_heads=4),
    "mistral": MistralConfig(**SIZE, **GROUPED, sliding_window=6),
    "gemma": GemmaConfig(**SIZE, **GROUPED, head_dim=8),
    "gemma2": Gemma2Config(**SIZE, **GROUPED, head_dim=8, sliding_window=6),
    "gemma3": Gemma3TextConfig(**SIZE, num_key_value_heads=1, head_dim=8, sliding_window=6),  # as 1b and 270m
    "qwen2": Qwen2Config(**SIZE, **GROUPED),
    "qwen3": Qwen3Config(**SIZE, **GROUPED, head_dim=8),
    "olmo2": Olmo2Config(**SIZE, **GROUPED),
    "phi3": Phi3Config(**SIZE, **GROUPED),
    "mixtral": MixtralConfig(**SIZE, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
}


def random_model(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """An exact model: eager attention, eager experts, weights large enough that patches show."""
    torch.manual_seed(0)
    kwargs = {"experts_implementation": "eager"} if family == "mixtral" else {}
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="eager", **kwargs)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:  # norm weights as training leaves them, neither 1 nor 0
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def left_padded_batch() -> dict[str, torch.Tensor]:
    """Two rows of 11 and 7 tokens, left-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
