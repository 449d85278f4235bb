"""Dimensions of the models that can be made: their config.json and their tensors, by role."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from flashinfer.quant import codec_named

TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
BOS, EOS, FIRST_WORD = 256, 257, 258
"""Token ids below `BOS` are the bytes; those from `FIRST_WORD` on stand for words (`text.token_ids`)."""
POSITION_OFFSET = 2
"""OPT's learned positions start at this row."""

_NAMES = {
    "llama": {
        "embed": "embed_tokens", "final_norm": "norm", "attn.norm": "input_layernorm",
        "ffn.norm": "post_attention_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "ffn.gate": "mlp.gate_proj",
        "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj",
    },
    "opt": {
        "embed": "embed_tokens", "positions": "embed_positions", "final_norm": "final_layer_norm",
        "attn.norm": "self_attn_layer_norm", "ffn.norm": "final_layer_norm", "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.out_proj",
        "ffn.gate": "fc1", "ffn.down": "fc2",
    },
}  # fmt: skip
"""Role -> name within its layer, or below the prefix. The matrix that decides who fires is always `ffn.gate`."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of one model. `dtype` is a codec's name."""

    family: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    vocab: int
    activation: str = "relu"
    dtype: str = "f16"
    context: int = 2048

    @property
    def gated(self) -> bool:
        """Whether the FFN has an up projection beside its gate; if not, it has biases (and so has everything)."""
        return self.family == "llama"

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads

    @property
    def norm_eps(self) -> float:
        """What the norms add to the variance."""
        return 1e-5

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        common = {
            "vocab_size": self.vocab, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "max_position_embeddings": self.context,
            "torch_dtype": TORCH_NAMES[self.dtype], "bos_token_id": BOS, "eos_token_id": EOS,
        }  # fmt: skip
        if self.family == "llama":
            return {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", **common,
                "intermediate_size": self.ffn, "num_key_value_heads": self.heads, "hidden_act": self.activation,
                "rms_norm_eps": self.norm_eps, "rope_theta": 10000.0, "tie_word_embeddings": False,
            }  # fmt: skip
        return {
            "architectures": ["OPTForCausalLM"], "model_type": "opt", **common, "ffn_dim": self.ffn,
            "word_embed_proj_dim": self.hidden, "activation_function": self.activation,
            "do_layer_norm_before": True, "dropout": 0.0,
        }  # fmt: skip

    def name(self, role: str, layer: int | None = None) -> str:
        """The checkpoint's name of `role` (`attn.q.weight`), of one layer or of none."""
        part, kind = role.rsplit(".", 1)
        if part == "head":
            return f"lm_head.{kind}"
        prefix = "model." if self.family == "llama" else "model.decoder."
        within = "" if layer is None else f"layers.{layer}."
        return f"{prefix}{within}{_NAMES[self.family][part]}.{kind}"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, in the order in which a forward pass uses them."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield self.name("embed.weight"), (self.vocab, self.hidden)
        if self.family == "opt":
            yield self.name("positions.weight"), (self.context + POSITION_OFFSET, self.hidden)
        for layer in range(self.layers):
            yield from self._block(layer, "attn", dict.fromkeys("qkvo", (self.hidden, self.hidden)))
            inner = (self.ffn, self.hidden)
            up = {"up": inner} if self.gated else {}
            yield from self._block(layer, "ffn", {"gate": inner, **up, "down": (self.hidden, self.ffn)})
        yield from self._vectors("final_norm", None, self.hidden)
        if self.family == "llama":
            yield self.name("head.weight"), (self.vocab, self.hidden)

    def _block(
        self, layer: int, block: str, matrices: dict[str, tuple[int, int]]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from self._vectors(f"{block}.norm", layer, self.hidden)
        for part, shape in matrices.items():
            yield self.name(f"{block}.{part}.weight", layer), shape
            if not self.gated:
                yield self.name(f"{block}.{part}.bias", layer), shape[:1]

    def _vectors(self, role: str, layer: int | None, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield self.name(f"{role}.weight", layer), (width,)
        if not self.gated:
            yield self.name(f"{role}.bias", layer), (width,)

    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        width = codec_named(self.dtype).row_bytes(1)
        total = 0
        for shape in self.tensors().values():
            total += width * shape[0] * (shape[1] if len(shape) == 2 else 1)
        return total


SHAPES = {
    "llama-3b": Shape("llama", 3200, 8640, 26, 32, 32000),
    "llama-7b": Shape("llama", 4096, 11008, 32, 32, 32000),
    "opt-6.7b": Shape("opt", 4096, 16384, 32, 32, 50272),
    "tiny-llama": Shape("llama", 256, 1024, 3, 4, 2048),
    "tiny-opt": Shape("opt", 256, 1024, 3, 4, 2048),
}


def shape_named(name: str, *, layers: int | None = None, activation: str = "relu") -> Shape:
    """The shape of that name, with fewer or more layers, and another activation, where asked."""
    shape = replace(SHAPES[name], activation=activation)
    return replace(shape, layers=layers) if layers else shape


def shape_of_config(config: dict[str, Any]) -> Shape:
    """The shape of a checkpoint written by this package, from its config.json."""
    opt = config["model_type"] == "opt"
    dtypes = {name: codec for codec, name in TORCH_NAMES.items()}
    return Shape(
        family=config["model_type"],
        hidden=config["hidden_size"],
        ffn=config["ffn_dim" if opt else "intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        vocab=config["vocab_size"],
        activation=config["activation_function" if opt else "hidden_act"],
        dtype=dtypes[config["torch_dtype"]],
        context=config["max_position_embeddings"],
    )
