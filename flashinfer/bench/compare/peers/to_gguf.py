"""A llama-shaped Hugging Face checkpoint in f16 as a GGUF file for llama.cpp, one tensor in memory at a time.

    python -m peers.to_gguf CHECKPOINT OUT.gguf

Matrices stay f16, norms become f32; rows of q and k are put in the order of llama.cpp's rotary layout. The vocabulary
is made up (bytes, begin, end, numbered words): tokens are forced by id, no text is split.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from .halves import sources

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def permuted(w: npt.NDArray[np.float16], heads: int) -> npt.NDArray[np.float16]:
    """Rows of each head interleaved: Hugging Face rotates halves, llama.cpp neighbours."""
    rows, columns = w.shape
    return w.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def plan(config: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """GGUF name -> name in the checkpoint, and heads to permute for (0: none)."""
    heads = config["num_attention_heads"]
    turned = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads}
    names = {f"{new}.weight": (f"{old}.weight", 0) for new, old in TOP.items()}
    if config.get("tie_word_embeddings"):
        del names["output.weight"]
    for i in range(config["num_hidden_layers"]):
        for new, old in LAYER.items():
            names[f"blk.{i}.{new}.weight"] = (f"model.layers.{i}.{old}.weight", turned.get(new, 0))
    return names


def describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Hyperparameters and the made-up vocabulary."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_vocabulary(writer, config["vocab_size"])


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """The made-up vocabulary."""
    kinds = gguf.TokenType
    tokens = [(f"<0x{b:02X}>", kinds.BYTE) for b in range(256)] + [("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    tokens += [(f"\u2581w{n}", kinds.NORMAL) for n in range(len(tokens), size)]
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([name for name, _ in tokens])
    writer.add_token_scores([-float(n) for n in range(len(tokens))])
    writer.add_token_types([int(kind) for _, kind in tokens])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def convert(root: Path, out: Path) -> None:
    """Write `out`, beside itself first, so that only a whole file gets its name."""
    config, there = json.loads((root / "config.json").read_text()), sources(root)
    draft = out.with_name(f"{out.name}.part")
    writer = gguf.GGUFWriter(draft, "llama")
    describe(writer, config)
    names = plan(config)
    for new, (old, _) in names.items():
        shape = there[old].shape
        dtype = np.dtype(np.float16 if len(shape) == 2 else np.float32)
        writer.add_tensor_info(new, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for old, heads in names.values():
        values = there[old].read()
        if values.ndim == 1:
            writer.write_tensor_data(values.astype(np.float32))
        else:
            writer.write_tensor_data(np.ascontiguousarray(permuted(values, heads)) if heads else values)
    writer.close()
    draft.replace(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
