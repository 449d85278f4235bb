"""Tiny models with a tokenizer, a text for them, and calibrating them in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer import pack
from flashinfer.backend import has_native
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.store import Store, open_store
from flashinfer.text import load_tokenizer
from flashinfer.tune.calibrate import Report, calibrate
from flashinfer.tune.options import Options
from flashinfer.tune.work import NAME
from tests.checkpoints import make_llama, make_opt
from tests.tiny_tokenizers import CORPUS, tiny_gpt2, tiny_sentencepiece

KINDS = ["relu", "opt", "silu"]
"""What `make_store` makes."""
CONTEXT = 32
OPTIONS = Options(
    tokens=160, held_out=48, context=CONTEXT, share=0.25, recall=0.9, recalls=(0.9, 0.98), densities=(0.7, 0.4)
)
"""Quick: few tokens, few levels."""
QUICK = Options(
    tokens=96, held_out=32, context=CONTEXT, share=0.25, recall=0.9, recalls=(0.9,), densities=(0.5,), density=0.5
)
"""Quicker: one level."""
SIZE: dict[str, Any] = {"hidden_size": 64, "vocab_size": 340, "num_hidden_layers": 2, "max_position_embeddings": 64}

PROMPT = [int(t) for t in np.random.default_rng(5).integers(3, 300, 21)]
DECODED = [int(t) for t in np.random.default_rng(6).integers(3, 300, 6)]
Floats = npt.NDArray[np.float32]


def words(count: int, seed: int = 0) -> str:
    """A text of so many words, in no order: its windows differ."""
    known = " ".join(CORPUS[:2]).split()
    return " ".join(known[i] for i in np.random.default_rng(seed).integers(0, len(known), count)) + "\n"


def make_store(folder: Path, kind: str, *, seed: int = 0, **packing: Any) -> Path:
    """A packed tiny model in `folder`, of two layers of 192 neurons. kind: `opt`, or the activation of a llama, which
    has biases in its FFN."""
    if kind == "opt":
        checkpoint = make_opt(folder / "checkpoint", seed=seed, ffn_dim=192, word_embed_proj_dim=64, **SIZE)
        tiny_gpt2(checkpoint)
    else:
        checkpoint = make_llama(
            folder / "checkpoint", seed=seed, intermediate_size=192, hidden_act=kind, mlp_bias=True, dtype="float16",
            **SIZE,
        )  # fmt: skip
        tiny_sentencepiece(checkpoint)
    pack(checkpoint, folder / "store", **packing)
    return folder / "store"


def calibrated(
    store: Path,
    text: Path,
    options: Options = QUICK,
    *,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    run: RunConfig | None = None,
) -> Report:
    return calibrate(store, text, options, cap=Cap(), run=run or RunConfig(), device="cpu", progress=progress)


def copy_of(store: Path, where: Path) -> Path:
    return Path(shutil.copytree(store, where))


def contents(store: Path) -> dict[str, bytes]:
    """Every file by name, but for the lock and what a calibration keeps for the next one."""
    return {p.name: p.read_bytes() for p in store.iterdir() if p.name not in ("lock", NAME)}


def token_ids(store: Path, text: Path) -> list[int]:
    manifest = open_store(store).manifest
    tokenizer = load_tokenizer({name: store / entry.name for name, entry in manifest.text.items()})
    return list(tokenizer.encode(text.read_text(), add_bos=False))


def logits(store: Path | Store, predictor: str = "exact") -> list[Floats]:
    """Of a prompt and of some tokens after it."""
    with Model.open(store, context=64, run=RunConfig(predictor=predictor)) as model:
        session = model.session()
        return [model.logits(session, PROMPT), *(model.step(session, [t]) for t in DECODED)]


def assert_same(found: list[Floats], expected: list[Floats]) -> None:
    """Bit for bit on the native backend; torch sums tile by tile, and tiles of a larger set hold other neurons."""
    for a, b in zip(found, expected, strict=True):
        if has_native():
            assert np.array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
