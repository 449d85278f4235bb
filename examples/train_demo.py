"""Train the embedded demo model: a small ReLU-gated llama whose FFN is sparse on purpose.

    python examples/train_demo.py --train stories.txt[.zst] --valid valid.txt[.zst] --out DIR --minutes 90

`--activation silu` trains its twin instead, an ordinary SwiGLU llama without any penalty: what thresholds are tried on.
A `tokenizer.model` already in DIR is used, so that the twin can have the tokenizer of the embedded model.

Needs `pip install -e .[test]`. Any UTF-8 text works; stories separated by a line `<|story|>` become one sequence each.
The run can be stopped at any time and started again with the same command: it resumes from
`DIR/state.pt`. The schedule is warm-up, constant, linear cool-down over the *budget* of training
minutes (time the process was stopped does not count), so a run may also be resumed with another
budget. At the end `DIR/hf/` holds an ordinary Hugging Face checkpoint (f16) and, of the sparse model, a model card.

Sparsity comes from the loss: cross-entropy + l1 * mean(relu(gate)), the second term ramped in
over the first third of the budget (ProSparse, arXiv 2402.13516, does the same to larger models) and
lifted from a layer while fewer than `--target` of its neurons fire (without that, layer 1 died out).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
import zstandard
from safetensors.torch import save_file
from torch import Tensor, nn

STORY_END = "<|story|>"
WINDOW = 5
ACTIVATIONS = {"relu": F.relu, "silu": F.silu}
MARKS = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})


@dataclass(frozen=True)
class Shape:
    """The model's dimensions; the names are those of a Hugging Face `config.json`."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 1536
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    hidden_act: str = "relu"


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = s.num_attention_heads, s.num_key_value_heads
        self.head_dim = s.hidden_size // s.num_attention_heads
        self.q_proj = nn.Linear(s.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, s.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v.to(q.dtype), is_causal=True, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)
        self.activation = ACTIVATIONS[s.hidden_act]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.activation(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x)), gate


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(s), MLP(s)
        self.input_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y, gate = self.mlp(self.post_attention_layernorm(x))
        return x + y, gate


class Llama(nn.Module):
    """Parameter names are those of transformers' LlamaForCausalLM below its `model.` prefix."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.norm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        dim = s.hidden_size // s.num_attention_heads
        inv = s.rope_theta ** (-torch.arange(0, dim, 2).float() / dim)
        angles = torch.outer(torch.arange(s.max_position_embeddings).float(), inv)
        self.cos, self.sin = angles.cos(), angles.sin()
        out_scale = 0.02 / math.sqrt(2 * s.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=out_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """ids [batch, tokens] -> logits [batch, tokens, vocab], gate activations per layer."""
        x, gates = self.embed_tokens(ids).float(), []
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x, gate = layer(x, cos, sin)
            gates.append(gate)
        return F.linear(self.norm(x), self.embed_tokens.weight), gates


def read_stories(path: Path) -> list[str]:
    raw = path.read_bytes()
    if path.suffix == ".zst":
        raw = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
    stories = (s.strip() for s in raw.decode("utf-8").translate(MARKS).split(STORY_END))
    return [s for s in stories if s and s.isascii()]


def train_tokenizer(stories: list[str], out: Path, vocab: int) -> None:
    spm.SentencePieceTrainer.train(
        sentence_iterator=(line for s in stories[:30000] for line in s.splitlines() if line.strip()),
        model_prefix=str(out / "tokenizer"), vocab_size=vocab, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=2, minloglevel=2,
    )  # fmt: skip


def tokens_of(path: Path, cache: Path, sp: spm.SentencePieceProcessor) -> np.ndarray:
    if not cache.exists():
        ids = [[sp.bos_id(), *e, sp.eos_id()] for e in sp.encode(read_stories(path), num_threads=2)]
        np.save(cache, np.concatenate([np.array(i, dtype=np.uint16) for i in ids]))
    return np.load(cache, mmap_mode="r")


def batch_of(data: np.ndarray, rng: np.random.Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    at = rng.integers(0, len(data) - length - 1, size)
    rows = torch.from_numpy(np.stack([data[i : i + length + 1] for i in at]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def lr_factor(progress: float) -> float:
    """Warm-up over 1 % of the budget, constant to 55 %, then linear to 2 % of the peak."""
    if progress < 0.01:
        return 0.05 + 0.95 * progress / 0.01
    return 1.0 if progress < 0.55 else max(0.02, 1 - 0.98 * (progress - 0.55) / 0.45)


def make_optimizers(model: Llama, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    if not muon_lr:
        return [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def evaluate(model: Llama, data: np.ndarray, length: int, sequences: int) -> tuple[float, list[float]]:
    """Held-out loss (nats per token) and active share per layer."""
    n = min(sequences, (len(data) - 1) // length)
    loss, active = 0.0, np.zeros(len(model.layers))
    for i in range(n):
        row = torch.from_numpy(data[i * length : (i + 1) * length + 1].astype(np.int64))[None]
        logits, gates = model(row[:, :-1])
        loss += F.cross_entropy(logits[0], row[0, 1:]).item() / n
        active += np.array([(g > 0).float().mean().item() for g in gates]) / n
    return loss, active.tolist()


@torch.no_grad()
def window_overlap(model: Llama, data: np.ndarray, length: int, sequences: int) -> list[dict[str, float]]:
    """Per layer: share of neurons in a window of WINDOW tokens, and share a new token adds to it."""
    held, new = np.zeros(len(model.layers)), np.zeros(len(model.layers))
    for i in range(sequences):
        row = torch.from_numpy(data[i * length : (i + 1) * length].astype(np.int64))[None]
        for j, g in enumerate(model(row)[1]):
            on = (g[0] > 0).numpy()
            union = np.stack([on[t - WINDOW : t].any(0) for t in range(WINDOW, length)])
            held[j] += union.mean() / sequences
            new[j] += (on[WINDOW:] & ~union).mean() / sequences
    return [{"held": float(h), "new_per_token": float(x)} for h, x in zip(held, new, strict=True)]


def export(model: Llama, shape: Shape, work: Path, valid: np.ndarray, tokens_seen: int) -> None:
    out = work / "hf"
    out.mkdir(exist_ok=True)
    state = {f"model.{n}": p.detach().to(torch.float16).contiguous() for n, p in model.named_parameters()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.model").write_bytes((work / "tokenizer.model").read_bytes())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(shape),
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "float16",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    half = Llama(shape)
    half.load_state_dict({n.removeprefix("model."): t.float() for n, t in state.items()})
    loss, active = evaluate(half, valid, 256, 200)
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()), "tokens_seen": tokens_seen, "held_out_loss": loss,
    }  # fmt: skip
    if shape.hidden_act == "relu":
        overlap = window_overlap(half, valid, 256, 100)
        facts |= {"active_share": active, "window": WINDOW, "window_overlap": overlap}
        (out / "README.md").write_text(model_card(shape, facts))
    print(json.dumps(facts))


def model_card(shape: Shape, facts: dict[str, Any]) -> str:
    """The card that goes with the checkpoint; every figure in it was just measured on the f16 weights."""
    rows = [
        f"| {i} | {100 * active:.1f} % | {100 * window['held']:.1f} % | {100 * window['new_per_token']:.1f} % |"
        for i, (active, window) in enumerate(zip(facts["active_share"], facts["window_overlap"], strict=True))
    ]
    ffn = 3 * shape.hidden_size * shape.intermediate_size * shape.num_hidden_layers / facts["parameters"]
    card = (Path(__file__).parent / "demo_card.md").read_text(encoding="utf-8")
    return card.format(
        millions=facts["parameters"] / 1e6, ffn=100 * ffn, shape=shape, tokens=facts["tokens_seen"] / 1e6,
        loss=facts["held_out_loss"], perplexity=math.exp(facts["held_out_loss"]), window=WINDOW, rows="\n".join(rows),
    )  # fmt: skip


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", type=Path, required=True)
    p.add_argument("--valid", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=90)
    p.add_argument("--batch", type=int, default=24)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--muon-lr", type=float, default=0.0, help="0: AdamW for every parameter")
    p.add_argument("--activation", choices=list(ACTIVATIONS), default="relu", help="silu: no penalty, not sparse")
    p.add_argument("--l1", type=float, default=0.5)
    p.add_argument("--target", type=float, default=0.09, help="active share the penalty aims at")
    p.add_argument("--threads", type=int, default=0)
    return p.parse_args()


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # momentum of neurons that stopped firing decays into numbers that are slow to add
    args.out.mkdir(parents=True, exist_ok=True)
    shape = Shape(hidden_act=args.activation)
    if not (args.out / "tokenizer.model").exists():
        train_tokenizer(read_stories(args.train), args.out, shape.vocab_size)
    sp = spm.SentencePieceProcessor(model_file=str(args.out / "tokenizer.model"))
    train = tokens_of(args.train, args.out / "train.npy", sp)
    valid = tokens_of(args.valid, args.out / "valid.npy", sp)
    model = Llama(shape)
    optimizers = make_optimizers(model, args.lr, args.muon_lr)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    step, elapsed, state = 0, 0.0, args.out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for o, s in zip(optimizers, saved["optimizers"], strict=True):
            o.load_state_dict(s)
        step, elapsed = saved["step"], saved["elapsed"]

    def save() -> None:
        blob = {
            "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
            "step": step, "elapsed": elapsed,
        }  # fmt: skip
        torch.save(blob, state.with_suffix(".tmp"))
        state.with_suffix(".tmp").replace(state)

    l1_weight = args.l1 if args.activation == "relu" else 0.0
    budget, last = args.minutes * 60, time.monotonic()
    while elapsed < budget:
        progress = elapsed / budget
        groups = [g for o in optimizers for g in o.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(progress)
        ids, targets = batch_of(train, np.random.default_rng(step), args.batch, args.length)
        with torch.autocast("cpu", torch.bfloat16):
            logits, gates = model(ids)
        ce = F.cross_entropy(logits.float().view(-1, shape.vocab_size), targets.reshape(-1))
        l1 = torch.stack([g.float().mean() * ((g > 0).float().mean() > args.target) for g in gates]).mean()
        loss = ce + l1_weight * min(1.0, progress * 3) * l1
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        now = time.monotonic()
        elapsed += min(now - last, 20.0)  # a stopped process (SIGSTOP, suspend) does not spend the budget
        last = now
        if step % 20 == 0:
            share = " ".join(f"{100 * (g > 0).float().mean().item():.0f}" for g in gates)
            print(f"{elapsed / 60:6.1f} min  step {step}  loss {ce.item():.3f}  active % {share}", flush=True)
        if step % 200 == 0:
            print(f"held-out {evaluate(model, valid, args.length, 40)[0]:.3f}", flush=True)
            save()
            last = time.monotonic()
    save()
    export(model, shape, args.out, valid, step * args.batch * args.length)


if __name__ == "__main__":
    main()
