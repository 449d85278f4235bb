"""Write a random-weights Hugging Face checkpoint of about a given size, one tensor at a time.

    python benchmarks/make_checkpoint.py OUT --size 2GiB [--family llama|opt] [--dtype f16|bf16|f32]

Weights are normal random numbers from a fixed seed (a pool drawn once, shifted for each tensor), so that
nothing on the way compresses or deduplicates them. The tokenizer is byte-level: one token per byte.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.quant import codec_named
from flashinfer.units import MIB, format_size, parse_size

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SHARD = 1024 * MIB
VOCAB = 320

Shapes = dict[str, tuple[int, ...]]


def llama(hidden: int, ffn: int, layers: int, dtype: str) -> tuple[dict[str, Any], Shapes]:
    """config.json and tensor shapes of a llama with `hidden / 128` heads and ReLU."""
    heads = hidden // 128
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 2048, "hidden_act": "relu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": TORCH_NAMES[dtype],
        "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes |= {f"{at}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, ffn)
    return config, shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCAB, hidden)}


def opt(hidden: int, ffn: int, layers: int, dtype: str) -> tuple[dict[str, Any], Shapes]:
    """config.json and tensor shapes of an OPT with `hidden / 64` heads."""
    config = {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": VOCAB, "hidden_size": hidden,
        "word_embed_proj_dim": hidden, "ffn_dim": ffn, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "max_position_embeddings": 2048, "activation_function": "relu",
        "do_layer_norm_before": True, "torch_dtype": TORCH_NAMES[dtype], "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    decoder = "model.decoder."
    shapes: Shapes = {
        f"{decoder}embed_tokens.weight": (VOCAB, hidden),
        f"{decoder}embed_positions.weight": (2050, hidden),
    }
    norms = ["final_layer_norm"]
    for i in range(layers):
        at = f"{decoder}layers.{i}."
        matrices = {f"self_attn.{n}_proj": (hidden, hidden) for n in ("q", "k", "v", "out")}
        matrices |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
        for name, shape in matrices.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        norms += [f"layers.{i}.self_attn_layer_norm", f"layers.{i}.final_layer_norm"]
    for norm in norms:
        shapes |= {f"{decoder}{norm}.weight": (hidden,), f"{decoder}{norm}.bias": (hidden,)}
    return config, shapes


FAMILIES = {"llama": (llama, 128, 8 / 3), "opt": (opt, 64, 4.0)}
"""Per family: its shapes, the size of a head, and FFN neurons per hidden value."""


def choose_shape(family: str, size: int, dtype: str) -> tuple[dict[str, Any], Shapes]:
    """The config whose weights come nearest to `size` bytes: wider models are deeper, as real ones are."""
    make, head, ratio = FAMILIES[family]
    itemsize = codec_named(dtype).row_bytes(1)
    candidates = []
    for hidden in range(4 * head, 8192 + 1, 4 * head):
        ffn = int(ratio * hidden) // 256 * 256
        for layers in range(4, 65):
            total = itemsize * layers * (4 * hidden**2 + (3 if family == "llama" else 2) * hidden * ffn)
            candidates.append((abs(total - size) / size + abs(layers - hidden / 128) / 100, hidden, ffn, layers))
    _, hidden, ffn, layers = min(candidates)
    return make(hidden, ffn, layers, dtype)


def tensor_bytes(index: int, shape: tuple[int, ...], dtype: str, pool: npt.NDArray[np.float32]) -> Iterator[bytes]:
    """The encoded values of one tensor, in pieces: the pool from a place of its own, scaled by the width."""
    count, scale = int(np.prod(shape)), np.float32(shape[-1] ** -0.5 if len(shape) == 2 else 0.1)
    codec = codec_named(dtype)
    start = index * 7919
    while count > 0:
        at = start % len(pool)
        piece = pool[at : at + count]
        yield codec.encode((piece * scale).reshape(1, -1)).tobytes()
        start, count = start + len(piece) + 1, count - len(piece)


def write_shard(path: Path, shapes: Shapes, dtype: str, first: int, pool: npt.NDArray[np.float32]) -> None:
    """One safetensors file, streamed."""
    itemsize, end, table = codec_named(dtype).row_bytes(1), 0, {}
    for name, shape in shapes.items():
        start, end = end, end + itemsize * int(np.prod(shape))
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for i, shape in enumerate(shapes.values()):
            for piece in tensor_bytes(first + i, shape, dtype, pool):
                file.write(piece)


def shards_of(shapes: Shapes, dtype: str) -> list[Shapes]:
    """The tensors in files of about `SHARD` bytes."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        width = codec_named(dtype).row_bytes(int(np.prod(shape)))
        if shards[-1] and size + width > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += width
    return shards


def write_tokenizer(out: Path) -> None:
    """Byte-level, no merges: token n is byte n (in GPT-2's printable alphabet), 256 and 257 begin and end a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    vocab = {alphabet[b]: b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(out / "tokenizer.json"))


def make_checkpoint(out: Path, *, family: str, size: int, dtype: str, seed: int = 0) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    out.mkdir(parents=True, exist_ok=True)
    config, shapes = choose_shape(family, size, dtype)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": 257}))
    write_tokenizer(out)
    pool = np.random.default_rng(seed).standard_normal(16 * MIB // 4 + 1, dtype=np.float32)
    shards, weight_map, first = shards_of(shapes, dtype), {}, 0
    for n, shard in enumerate(shards):
        name = f"model-{n + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_shard(out / name, shard, dtype, first, pool)
        weight_map |= dict.fromkeys(shard, name)
        first += len(shard)
    total = sum(codec_named(dtype).row_bytes(int(np.prod(s))) for s in shapes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=parse_size, default="512MiB")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="f16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total = make_checkpoint(args.out, family=args.family, size=args.size, dtype=args.dtype, seed=args.seed)
    print(f"{args.out}: {format_size(total)} of weights")


if __name__ == "__main__":
    main()
