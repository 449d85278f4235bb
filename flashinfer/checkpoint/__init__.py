"""Checkpoints: what a user has. One module per source; each is a lazy name -> tensor mapping."""

from flashinfer.checkpoint.base import Checkpoint, TensorInfo
from flashinfer.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
