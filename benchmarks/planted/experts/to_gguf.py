"""A planted mixture as a GGUF file for llama.cpp: what `pack --quant q4_0` keeps in 4 bits, in Q4_0, tables in Q8_0."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from flashinfer.bench.compare.peers.to_gguf import add_vocabulary

from .shape import MixtureShape
from .source import PlantedMixture

Kind = gguf.GGMLQuantizationType
ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
NORMS = {
    "attn_norm": "input_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: the checkpoint's matrices it stacks (a vector or a matrix: one), and its type."""

    name: str
    sources: tuple[str, ...]
    kind: Kind


def plan(shape: MixtureShape) -> Iterator[Tensor]:
    """All of them, in the order of the file."""
    yield Tensor("token_embd.weight", ("model.embed_tokens.weight",), Kind.Q8_0)
    yield Tensor("output_norm.weight", ("model.norm.weight",), Kind.F32)
    yield Tensor("output.weight", ("lm_head.weight",), Kind.Q8_0)
    for i in range(shape.layers):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        for new, old in NORMS.items():
            yield Tensor(f"{block}.{new}.weight", (f"{layer}.{old}.weight",), Kind.F32)
        for new, old in ATTENTION.items():
            yield Tensor(f"{block}.{new}.weight", (f"{layer}.self_attn.{old}.weight",), Kind.Q4_0)
        yield Tensor(f"{block}.ffn_gate_inp.weight", (f"{layer}.mlp.gate.weight",), Kind.F32)
        for part in shape.expert():
            every = (f"{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(shape.experts))
            yield Tensor(f"{block}.ffn_{part}_exps.weight", tuple(every), Kind.Q4_0)


def describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Hyperparameters, and a vocabulary nobody uses: tokens are forced by id."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    add_vocabulary(writer, config["vocab_size"])


def write_gguf(source: PlantedMixture, out: Path) -> int:
    """Write `out`, beside itself first, so that only a whole file gets its name; its bytes. Memory is one tensor."""
    draft, tensors = out.with_name(f"{out.name}.part"), list(plan(source.shape))
    writer = gguf.GGUFWriter(draft, "qwen3moe")
    describe(writer, dict(source.config))
    for tensor in tensors:
        plain = tensor.kind == Kind.F32
        kind: np.dtype[Any] = np.dtype(np.float32 if plain else np.uint8)
        shape = source.tensors[tensor.sources[0]].shape if plain else _bytes_shape(source, tensor)
        writer.add_tensor_info(tensor.name, shape, kind, int(np.prod(shape)) * kind.itemsize, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ThreadPoolExecutor() as pool:
        for tensor in tensors:
            writer.write_tensor_data(_values(source, tensor, pool))
    writer.close()
    draft.replace(out)
    return out.stat().st_size


def _bytes_shape(source: PlantedMixture, tensor: Tensor) -> tuple[int, ...]:
    """Of the encoded tensor: experts stacked, and rows of bytes."""
    rows, columns = source.tensors[tensor.sources[0]].matrix
    block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    stacked = (len(tensor.sources),) if len(tensor.sources) > 1 else ()
    return *stacked, rows, columns // block * size


def _values(source: PlantedMixture, tensor: Tensor, pool: ThreadPoolExecutor) -> npt.NDArray[Any]:
    """The encoded tensor."""
    if tensor.kind == Kind.F32:
        return source.values(tensor.sources[0])
    out = np.empty(_bytes_shape(source, tensor), dtype=np.uint8)
    parts = out.reshape(len(tensor.sources), *out.shape[-2:])

    def encode(n: int) -> None:
        parts[n] = gguf.quants.quantize(source.values(tensor.sources[n]), tensor.kind)

    list(pool.map(encode, range(len(parts))))
    return out
