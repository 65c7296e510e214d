"""config.json as transformers and as DeepSeek write it."""

from __future__ import annotations

import math

from .config import CSA, HASH_MOE, HCA, MOE, SLIDING, ModelConfig, Yarn
from .config_kinds import TOKENS, check_kinds

# Ours, then other names for the same size; transformers' own come first where ours differ.
_NAMES = {
    "vocab_size": (),
    "hidden_size": ("dim",),
    "num_hidden_layers": ("n_layers",),
    "num_attention_heads": ("n_heads",),
    "head_dim": (),
    "rope_dim": ("qk_rope_head_dim", "rope_head_dim"),
    "q_lora_rank": (),
    "o_lora_rank": (),
    "o_groups": (),
    "moe_intermediate_size": ("moe_inter_dim",),
    "n_routed_experts": ("num_local_experts",),
    "num_experts_per_tok": ("n_activated_experts",),
    "n_shared_experts": (),
    "routed_scaling_factor": ("route_scale",),
    "swiglu_limit": (),
    "sliding_window": ("window_size",),
    "index_n_heads": (),
    "index_head_dim": (),
    "index_topk": (),
    "max_position_embeddings": ("max_seq_len",),
    "rope_theta": (),
    "compress_rope_theta": (),
    "hc_mult": (),
    "hc_sinkhorn_iters": (),
    "hc_eps": (),
    "rms_norm_eps": ("norm_eps",),
    "bos_token_id": (),
    "eos_token_id": (),
    "num_nextn_predict_layers": ("n_mtp_layers",),
}
_NUMBERS = (
    *(n for ours, others in _NAMES.items() if ours not in TOKENS for n in (ours, *others)),
    "partial_rotary_factor", "compress_rate_csa", "compress_rate_hca", "num_hash_layers", "n_hash_layers",
    "original_seq_len", "rope_factor", "beta_fast", "beta_slow",
)  # fmt: skip
_INTEGERS_AS_FLOAT = ("routed_scaling_factor", "swiglu_limit", "rope_theta", "compress_rope_theta")
# What transformers and DeepSeek can express and this model does not do.
_ONLY = {
    "scoring_func": "sqrtsoftplus",
    "score_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "num_key_value_heads": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_NEEDED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "o_groups",
    "moe_intermediate_size", "n_routed_experts",
)  # fmt: skip


def read_config(values: dict) -> ModelConfig:
    """A ModelConfig from the names of transformers' DeepseekV4Config or of DeepSeek's inference code.

    Args:
        values: a parsed config.json.

    Raises:
        TypeError: not a dict.
        ValueError: a size missing or out of range, two that contradict each other, or something this model
            does not do.
    """
    if not isinstance(values, dict):
        raise TypeError(f"config must be a dict, got {type(values).__name__}")
    model_type = values.get("model_type", "deepseek_v4")
    if model_type != "deepseek_v4":
        raise ValueError(f"config: model_type must be 'deepseek_v4', got {model_type!r}")
    for name, only in _ONLY.items():
        if values.get(name, only) != only:
            raise ValueError(f"config: {name} must be {only!r}, got {values[name]!r}")
    check_kinds(values, _NUMBERS)
    sizes = _sizes(values)
    sizes["rope_dim"] = _rope_dim(values, sizes)
    sizes.update(_ratios(values))
    sizes["layer_types"] = _layer_types(values, sizes)
    sizes["mlp_layer_types"] = _mlp_layer_types(values, sizes["num_hidden_layers"])
    sizes.update(_rope(values))
    return ModelConfig(**sizes)


def write_config(config: ModelConfig) -> dict:
    """The config.json that transformers' DeepseekV4Config reads, and `read_config` too."""
    c = config
    values = {name: getattr(c, name) for name in _NAMES if name != "rope_dim"}
    if isinstance(c.eos_token_id, tuple):
        values["eos_token_id"] = list(c.eos_token_id)
    values |= {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "layer_types": list(c.layer_types),
        "mlp_layer_types": list(c.mlp_layer_types),
        "compress_rates": {CSA: c.csa_ratio, HCA: c.hca_ratio},
        "partial_rotary_factor": _rotary_part(c),
        "rope_parameters": _rope_parameters(c),
        **{k: _ONLY[k] for k in ("scoring_func", "norm_topk_prob", "hidden_act", "num_key_value_heads")},
        "tie_word_embeddings": False,
    }
    return values


def _sizes(values: dict) -> dict:
    """Every plain size that is given, under our name."""
    sizes = {}
    for name, others in _NAMES.items():
        if name in TOKENS:  # may be a list, and null is a value
            if name in values:
                sizes[name] = values[name]
            continue
        given = {n: values[n] for n in (name, *others) if values.get(n) is not None}
        if len(set(given.values())) > 1:
            (a, x), (b, y) = list(given.items())[:2]
            raise ValueError(f"config: {a} = {x!r} contradicts {b} = {y!r}")
        if given:
            value = next(iter(given.values()))
            sizes[name] = float(value) if name in _INTEGERS_AS_FLOAT else value
    missing = [n for n in _NEEDED if n not in sizes]
    if missing:
        raise ValueError(f"config: {missing[0]} is missing")
    return sizes


def _rope_dim(values: dict, sizes: dict) -> int:
    head_dim = sizes.get("head_dim", 512)
    factor, given = values.get("partial_rotary_factor"), sizes.get("rope_dim")
    if factor is None:
        return 64 if given is None else given
    by_factor = int(head_dim * factor)
    if given is not None and given != by_factor:
        raise ValueError(
            f"config: qk_rope_head_dim = {given} contradicts partial_rotary_factor = {factor} of "
            f"head_dim = {head_dim}"
        )
    return by_factor


def _ratios(values: dict) -> dict:
    rates = values.get("compress_rates") or {}
    return {
        "csa_ratio": values.get("compress_rate_csa", rates.get(CSA, 4)),
        "hca_ratio": values.get("compress_rate_hca", rates.get(HCA, 128)),
    }


def _layer_types(values: dict, sizes: dict) -> tuple[str, ...]:
    """Named types, or a ratio for each layer, of which those beyond the layers belong to draft layers."""
    layers, kinds = sizes["num_hidden_layers"], {0: SLIDING, sizes["csa_ratio"]: CSA, sizes["hca_ratio"]: HCA}
    ratios = values.get("compress_ratios")
    from_ratios = None
    if ratios is not None:
        unknown = [r for r in ratios if r not in kinds]
        if unknown:
            raise ValueError(f"config: compress_ratios may hold {sorted(kinds)}, got {unknown[0]!r}")
        if not layers <= len(ratios) <= layers + max(sizes.get("num_nextn_predict_layers", 1), 1):
            raise ValueError(f"config: compress_ratios has {len(ratios)} entries for {layers} layers")
        from_ratios = tuple(kinds[r] for r in ratios[:layers])
    named = values.get("layer_types")
    if named is None and from_ratios is None:
        raise ValueError("config: neither layer_types nor compress_ratios is given")
    if named is not None and from_ratios is not None and tuple(named) != from_ratios:
        raise ValueError("config: layer_types contradicts compress_ratios")
    return tuple(named) if named is not None else from_ratios


def _mlp_layer_types(values: dict, layers: int) -> tuple[str, ...]:
    named = values.get("mlp_layer_types")
    hashed = values.get("num_hash_layers", values.get("n_hash_layers"))
    if named is None and hashed is None:
        raise ValueError("config: neither mlp_layer_types nor num_hash_layers is given")
    if hashed is None:
        return tuple(named)
    if not isinstance(hashed, int) or not 0 <= hashed <= layers:
        raise ValueError(f"config: num_hash_layers must lie within 0 and {layers}, got {hashed!r}")
    by_count = (HASH_MOE,) * hashed + (MOE,) * (layers - hashed)
    if named is not None and tuple(named) != by_count:
        raise ValueError(f"config: mlp_layer_types contradicts num_hash_layers = {hashed}")
    return by_count


def _rope(values: dict) -> dict:
    """Thetas and YaRN from nested rope_parameters, from rope_scaling, or from DeepSeek's flat names."""
    nested = values.get("rope_parameters") or {}
    if isinstance(nested.get("main"), dict) and isinstance(nested.get("compress"), dict):
        return _nested_rope(values, nested["main"], nested["compress"])
    scaling = values.get("rope_scaling") or nested or None
    if scaling is None and values.get("original_seq_len"):
        scaling = {
            "type": "yarn",
            "factor": values.get("rope_factor"),
            "original_max_position_embeddings": values["original_seq_len"],
            "beta_fast": values.get("beta_fast"),
            "beta_slow": values.get("beta_slow"),
        }
    return {"yarn": _yarn(scaling or {})}


def _nested_rope(values: dict, main: dict, compress: dict) -> dict:
    if main.get("rope_type", "default") != "default":
        raise ValueError(
            f"config: rope_parameters.main.rope_type must be 'default', got {main['rope_type']!r}"
        )
    if compress.get("rope_type") == "yarn" and "attention_factor" not in compress:
        raise ValueError(
            "config: rope_parameters.compress needs attention_factor = 1.0 beside its YaRN scaling"
        )
    thetas = {}
    for name, part in (("rope_theta", main), ("compress_rope_theta", compress)):
        theta = part.get("rope_theta", values.get(name))
        if theta is not None:
            thetas[name] = float(theta)
    return thetas | {"yarn": _yarn(compress)}


def _yarn(scaling: dict) -> Yarn | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"config: rope scaling must be 'default' or 'yarn', got {kind!r}")
    if scaling.get("attention_factor", 1.0) != 1.0:
        raise ValueError(f"config: attention_factor must be 1.0, got {scaling['attention_factor']!r}")
    for name in ("factor", "original_max_position_embeddings"):
        if scaling.get(name) is None:
            raise ValueError(f"config: the YaRN scaling needs {name}")
    return Yarn(
        float(scaling["factor"]), int(scaling["original_max_position_embeddings"]),
        float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1),
    )  # fmt: skip


def _rotary_part(c: ModelConfig) -> float:
    """The share of the head that rotates; its product with the width is cut to an integer by readers."""
    part = c.rope_dim / c.head_dim
    return part if int(c.head_dim * part) == c.rope_dim else math.nextafter(part, 2.0)


def _rope_parameters(c: ModelConfig) -> dict:
    part = _rotary_part(c)
    main = {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": part}
    compress = {"rope_type": "default", "rope_theta": c.compress_rope_theta, "partial_rotary_factor": part}
    if c.yarn is not None:
        compress |= {
            "rope_type": "yarn", "factor": c.yarn.factor, "attention_factor": 1.0,
            "original_max_position_embeddings": c.yarn.original_positions,
            "beta_fast": c.yarn.beta_fast, "beta_slow": c.yarn.beta_slow,
        }  # fmt: skip
    return {"main": main, "compress": compress}
