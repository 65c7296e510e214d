"""What a DeepSeek-V4 model is made of: one frozen dataclass, three presets."""

from __future__ import annotations

from dataclasses import dataclass

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
LAYER_TYPES = (SLIDING, CSA, HCA)
HASH_MOE, MOE = "hash_moe", "moe"


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary frequencies in layers with a compressor; no factor on cos and sin."""

    factor: float = 16.0
    original_positions: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V4 model's sizes; the defaults are those shared by Flash and Pro.

    Args:
        vocab_size, hidden_size, num_hidden_layers: V, H, layers.
        num_attention_heads, head_dim, rope_dim: query heads; their width, also that of the one key and
            value vector; how many of the last channels rotate (even).
        q_lora_rank, o_lora_rank, o_groups: ranks of the low-rank query and output; heads divide into groups.
        moe_intermediate_size, n_routed_experts, num_experts_per_tok: of each expert; E; k.
        layer_types: one of LAYER_TYPES for each layer.
        mlp_layer_types: "hash_moe" (experts chosen by token id) or "moe" for each layer.
        routed_scaling_factor, swiglu_limit: factor on the routing weights; where SwiGLU's inputs are cut.
        csa_ratio, hca_ratio: tokens in a block that becomes one compressed entry.
        sliding_window: keys a query sees uncompressed, itself included.
        index_n_heads, index_head_dim, index_topk: the indexer of the CSA layers.
        rope_theta, compress_rope_theta, yarn: rotation of sliding layers, of the others, and its scaling.
        hc_mult, hc_sinkhorn_iters, hc_eps: the residual streams and their mixing.
        num_nextn_predict_layers: draft layers a checkpoint may hold; they are not built.

    Raises:
        ValueError: a size out of range, or two that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    o_groups: int
    moe_intermediate_size: int
    n_routed_experts: int
    layer_types: tuple[str, ...]
    mlp_layer_types: tuple[str, ...]
    head_dim: int = 512
    rope_dim: int = 64
    o_lora_rank: int = 1024
    num_experts_per_tok: int = 6
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    csa_ratio: int = 4
    hca_ratio: int = 128
    sliding_window: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    max_position_embeddings: int = 1048576
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: Yarn | None = Yarn()
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    num_nextn_predict_layers: int = 0

    def __post_init__(self):
        for name in ("layer_types", "mlp_layer_types", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_counts(self)
        _check_schedules(self)
        _check_agreement(self)

    def ratio(self, layer: int) -> int:
        """Tokens a compressed entry of this layer stands for, 0 where it has none."""
        return {SLIDING: 0, CSA: self.csa_ratio, HCA: self.hca_ratio}[self.layer_types[layer]]

    def hashed(self, layer: int) -> bool:
        """Whether this layer's experts are chosen by token id."""
        return self.mlp_layer_types[layer] == HASH_MOE

    @classmethod
    def nano(cls) -> ModelConfig:
        """The byte-level model that ships in data/nano."""
        return cls(
            vocab_size=256, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, head_dim=128,
            rope_dim=32, q_lora_rank=128, o_groups=2, o_lora_rank=128, moe_intermediate_size=128,
            n_routed_experts=8, num_experts_per_tok=4, index_n_heads=4, index_head_dim=32, index_topk=128,
            layer_types=(SLIDING, SLIDING, CSA, HCA, CSA, CSA), mlp_layer_types=_hash_first(2, 6),
            max_position_embeddings=4096, yarn=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip

    @classmethod
    def flash(cls) -> ModelConfig:
        """DeepSeek-V4 Flash: 284.3 B parameters, 13.27 B of them active."""
        return cls(
            vocab_size=129280, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64,
            q_lora_rank=1024, o_groups=8, moe_intermediate_size=2048, n_routed_experts=256,
            layer_types=(SLIDING,) * 2 + (CSA, HCA) * 20 + (CSA,), mlp_layer_types=_hash_first(3, 43),
            num_nextn_predict_layers=1,
        )  # fmt: skip

    @classmethod
    def pro(cls) -> ModelConfig:
        """DeepSeek-V4 Pro: 1573.0 B parameters, 48.85 B of them active."""
        return cls(
            vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128,
            q_lora_rank=1536, o_groups=16, moe_intermediate_size=3072, n_routed_experts=384,
            layer_types=(HCA,) * 2 + (CSA, HCA) * 29 + (CSA,), mlp_layer_types=_hash_first(3, 61),
            routed_scaling_factor=2.5, index_topk=1024, num_nextn_predict_layers=1,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """Read a config.json of transformers or of DeepSeek; see `dialects.read_config`."""
        from .dialects import read_config

        return read_config(values)

    def to_dict(self) -> dict:
        """A config.json that transformers' DeepseekV4Config reads; see `dialects.write_config`."""
        from .dialects import write_config

        return write_config(self)


def _hash_first(hashed: int, layers: int) -> tuple[str, ...]:
    return (HASH_MOE,) * hashed + (MOE,) * (layers - hashed)


_COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "o_groups",
    "moe_intermediate_size", "n_routed_experts", "head_dim", "rope_dim", "o_lora_rank", "num_experts_per_tok",
    "n_shared_experts", "csa_ratio", "hca_ratio", "sliding_window", "index_n_heads", "index_head_dim",
    "index_topk", "max_position_embeddings", "hc_mult", "hc_sinkhorn_iters",
)  # fmt: skip
_POSITIVE = (
    "routed_scaling_factor", "swiglu_limit", "rope_theta", "compress_rope_theta", "hc_eps", "rms_norm_eps",
)  # fmt: skip


def _check_counts(c: ModelConfig) -> None:
    for name in _COUNTS:
        value = getattr(c, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        if value >= 2**31:
            raise ValueError(f"config: {name} must be below 2^31, got {value}")
    for name in _POSITIVE:
        value = getattr(c, name)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"config: {name} must be a positive number, got {value!r}")


def _check_schedules(c: ModelConfig) -> None:
    for name, kinds in (("layer_types", LAYER_TYPES), ("mlp_layer_types", (HASH_MOE, MOE))):
        types = getattr(c, name)
        if len(types) != c.num_hidden_layers:
            raise ValueError(
                f"config: {name} names {len(types)} layers, but num_hidden_layers is {c.num_hidden_layers}"
            )
        unknown = sorted(set(types) - set(kinds))
        if unknown:
            raise ValueError(f"config: {name} may hold {', '.join(kinds)}, got {unknown[0]!r}")


def _check_agreement(c: ModelConfig) -> None:
    if c.num_attention_heads % c.o_groups:
        raise ValueError(
            f"config: num_attention_heads ({c.num_attention_heads}) must divide into o_groups ({c.o_groups})"
        )
    narrow = min(c.head_dim, c.index_head_dim if CSA in c.layer_types else c.head_dim)
    if c.rope_dim % 2 or c.rope_dim > narrow:
        raise ValueError(
            f"config: the rotated width must be even and at most the head width {narrow}, got {c.rope_dim}"
        )
    if c.num_experts_per_tok > c.n_routed_experts:
        raise ValueError(
            f"config: num_experts_per_tok ({c.num_experts_per_tok}) exceeds n_routed_experts "
            f"({c.n_routed_experts})"
        )
    if c.n_shared_experts != 1:
        raise ValueError(f"config: n_shared_experts must be 1, got {c.n_shared_experts}")
