"""Tiny models of transformers for the wide list: a class name each, small sizes, and inputs that fit.

Sizes come from ``SIZES``, as far as the configuration of a model knows them, then from ``CONFIGS`` of
:mod:`benchmarks.wide_families`. Configurations inside a configuration are made small in the same way.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks import wide_families as families

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: configurations are made here, weights are random

SIZES: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=101,
    max_position_embeddings=64, num_key_value_heads=2, head_dim=16, d_model=64, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, n_embd=64,
    n_layer=2, n_head=4, n_positions=64, n_inner=128, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
    num_decoder_layers=2, emb_dim=64, n_layers=2, n_heads=4, dim=64, hidden_dim=128, ffn_dim=128,
    word_embed_proj_dim=64, embedding_size=32, image_size=32, patch_size=8, num_local_experts=4,
    num_experts_per_tok=2, num_experts=4, n_routed_experts=4, moe_intermediate_size=48,
    shared_expert_intermediate_size=48, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
    kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, state_size=8,
    d_inner=128, d_head=16, n_ctx=64, dff=128, attention_types=[[["global", "local"], 1]], rotary_dim=8,
    num_mel_bins=16, max_source_positions=32, max_target_positions=32, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1, projection_dim=32, conv_dim=(32, 32, 32), conv_stride=(5, 2, 2),
    conv_kernel=(10, 3, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, max_seq_len=64,
    num_frames=4, type_vocab_size=2, relative_attention_num_buckets=8, squeeze_factor=2, decoder_hidden_size=64,
    num_labels=5, sliding_window=8, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=16, mamba_expand=2,
    shared_intermediate_size=48, decoder_intermediate_size=128, decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4, encoder_num_hidden_layers=2, encoder_num_attention_heads=4,
    encoder_num_key_value_heads=4, decoder_num_key_value_heads=4, lru_width=64, attention_window_size=8,
    entity_vocab_size=50, entity_emb_size=32, max_2d_position_embeddings=64, coordinate_size=11, shape_size=10,
    num_decoder_attention_heads=4, num_encoder_attention_heads=4, num_encoder_layers=2, prediction_length=4,
    context_length=16, attention_hidden_size=64, num_blocks=2, block_size=4, num_random_blocks=1,
    attention_window=8, ngram=2, num_buckets=8, relative_max_distance=16, max_relative_position=8,
    ffn_hidden_size=128, num_queries=5, pooler_hidden_size=64, hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=101, num_kv_shared_layers=0, laurel_rank=8,
)  # fmt: skip
# Off, unless a configuration turns them on itself.
_OPTIONAL = ("sliding_window", "q_lora_rank", "pooler_hidden_size", "head_dim")


def names() -> list[str]:
    """Class names of the models, in the order of the list."""
    return list(families.INPUTS)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a class name of the list with random weights, and its example inputs."""
    import transformers

    model_class = getattr(transformers, name)
    config = _tiny(model_class.config_class, families.CONFIGS.get(name, {}))
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if not 0 <= (getattr(config, "pad_token_id", None) or 0) < SIZES["vocab_size"]:
        config.pad_token_id = 0
    model = model_class(config)
    for attribute, value in families.ATTRIBUTES.get(name, {}).items():
        setattr(model, attribute, value)
    inputs: Callable[[], dict[str, Any]] = families.INPUTS[name]
    return model, inputs()


def _tiny(config_class: Any, given: Mapping[str, Any]) -> Any:
    """A configuration with the sizes it knows; ``given`` comes before ``SIZES``, None leaves the default."""
    defaults = _defaults(config_class)
    known = set(defaults) | set(inspect.signature(config_class.__init__).parameters)
    aliases = getattr(config_class, "attribute_map", None) or {}
    values = {
        key: size
        for key, size in SIZES.items()
        if key in known and key not in aliases and _fits(key, size, defaults.get(key))
    }
    for key, inner in (getattr(config_class, "sub_configs", None) or {}).items():
        if key not in given:
            try:
                values[key] = _tiny(inner, {})
            except Exception:  # an inner configuration that cannot stand alone keeps its defaults
                continue
    values.update(given)
    return config_class(**{key: value for key, value in values.items() if value is not None})


def _defaults(config_class: Any) -> dict[str, Any]:
    try:
        return dict(config_class().to_dict())
    except Exception:  # some configurations need arguments
        return {}


def _fits(key: str, size: Any, default: Any) -> bool:
    """Whether a size has the form of the default: a number for a number, a sequence for a sequence."""
    if default is None:
        return key not in _OPTIONAL and not key.startswith("conv_")
    return isinstance(default, list | tuple) == isinstance(size, list | tuple)


def tensors(output: Any) -> list[torch.Tensor]:
    """All floating tensors of a model's output but those of caches."""
    from torch.utils import _pytree

    caches = ("past_key_values", "mems", "cache_params", "state")
    if isinstance(output, dict):
        output = {key: value for key, value in output.items() if key not in caches}
    leaves = _pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())]
