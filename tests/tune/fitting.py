"""Samples of a store's layers as `collect` leaves them, made of random inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from flashinfer.store import Store
from flashinfer.tune.collect import sample_file
from flashinfer.tune.samples import SampleWriter
from flashinfer.tune.work import Work
from tests.twin import role_tensors

Floats = npt.NDArray[np.float32]


def weights_of(checkpoint: Path, layer: int) -> dict[str, Floats]:
    """The FFN tensors of a layer, read from the checkpoint: `gate.weight`, `up.bias`, ..."""
    at = f"layers.{layer}.ffn."
    return {
        role.removeprefix(at): np.asarray(tensor.to(torch.float32).numpy())
        for role, tensor in role_tensors(checkpoint).items()
        if role.startswith(at)
    }


def inputs_of(layer: int, count: int, hidden: int) -> Floats:
    """Values that samples hold exactly, of few directions more than of the others."""
    rng = np.random.default_rng(layer)
    x = rng.standard_normal((count, 12)) @ rng.standard_normal((12, hidden)) / 4 + rng.standard_normal((count, hidden))
    return np.asarray(x.astype(np.float16).astype(np.float32))


def products(checkpoint: Path, layer: int, x: Floats, part: str) -> Floats:
    w = weights_of(checkpoint, layer)
    return np.asarray(x @ w[f"{part}.weight"].T + w.get(f"{part}.bias", np.float32(0)))


def write_samples(store: Store, checkpoint: Path, work: Work, count: int, sparse: bool = True) -> None:
    facts = store.manifest.facts
    for layer in range(facts.num_layers):
        x = inputs_of(layer, count, facts.hidden_size)
        with SampleWriter(sample_file(work, layer), facts.hidden_size, facts.intermediate_size) as writer:
            for start in range(0, count, 256):
                some = x[start : start + 256]
                fired = products(checkpoint, layer, some, facts.decision) > 0
                writer.add(some, fired if sparse else np.ones_like(fired))
    work.note("samples")
