"""Dimensions of the mixtures that can be made: their config.json and their tensors, as Qwen 3 names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..shapes import BOS, EOS


@dataclass(frozen=True)
class MixtureShape:
    """Dimensions of one model, every layer of which is one of experts. `size`: neurons of an expert."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    per_token: int
    size: int
    vocab: int = 32000
    context: int = 4096
    theta: float = 1e6
    norm_eps: float = 1e-6

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "float32",
            "vocab_size": self.vocab, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": self.per_token * self.size, "max_position_embeddings": self.context,
            "num_experts": self.experts, "num_experts_per_tok": self.per_token, "moe_intermediate_size": self.size,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps, "rope_theta": self.theta, "attention_bias": False,
            "tie_word_embeddings": False, "bos_token_id": BOS, "eos_token_id": EOS,
        }  # fmt: skip

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, in the order in which a forward pass uses them."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, queries, keys = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (hidden,)
            for part, rows in (("q", queries), ("k", keys), ("v", keys)):
                yield f"{layer}.self_attn.{part}_proj.weight", (rows, hidden)
            for part in "qk":
                yield f"{layer}.self_attn.{part}_norm.weight", (self.head_dim,)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{layer}.mlp.gate.weight", (self.experts, hidden)
            for e in range(self.experts):
                for part, shape in self.expert().items():
                    yield f"{layer}.mlp.experts.{e}.{part}_proj.weight", shape
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab, hidden)

    def expert(self) -> dict[str, tuple[int, int]]:
        """Shapes of one expert's matrices."""
        return {"gate": (self.size, self.hidden), "up": (self.size, self.hidden), "down": (self.hidden, self.size)}


SHAPES = {
    "qwen3-30b-a3b": MixtureShape(2048, 48, 32, 4, 128, 128, 8, 768),
    "tiny": MixtureShape(256, 2, 8, 2, 64, 32, 4, 64, vocab=20480),
}
"""The first has the dimensions of Qwen3-30B-A3B but for its vocabulary, which is 151936 there."""


def shape_named(name: str, layers: int | None = None) -> MixtureShape:
    """The shape of that name, with fewer or more layers where asked."""
    return replace(SHAPES[name], layers=layers) if layers else SHAPES[name]
