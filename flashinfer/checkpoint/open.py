"""Which source a path is, and what is added to it on the way."""

from __future__ import annotations

from pathlib import Path

from flashinfer.checkpoint.adapter import open_adapter
from flashinfer.checkpoint.base import Checkpoint
from flashinfer.checkpoint.delta import add_delta
from flashinfer.checkpoint.huggingface import HuggingFaceCheckpoint
from flashinfer.checkpoint.merge import merge_adapter
from flashinfer.checkpoint.quantised import dequantising
from flashinfer.errors import CheckpointError
from flashinfer.store.open import hub_hint

_TENSORS = (".safetensors", ".bin")
_NOT_READ = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX"}


def open_checkpoint(
    path: str | Path | Checkpoint, *, delta: str | Path | None = None, adapter: str | Path | None = None
) -> Checkpoint:
    """Open the checkpoint at `path`: a Hugging Face directory, a GGUF file, or a directory with just that.

    Matrices that others quantised (`checkpoint/quantised`) are among its tensors like all others. Close it when done.

    Args:
        path: the checkpoint; or one that is open already, which then belongs to what is returned.
        delta: a checkpoint of differences to add to it (`checkpoint/delta.py`).
        adapter: a directory with a LoRA adapter to merge, after the delta (`checkpoint/merge.py`).

    Raises:
        CheckpointError: there is none, it is incomplete, damaged or of a kind that is not read, or delta or adapter
            belong to another.
    """
    opened = _open(Path(path)) if isinstance(path, (str, Path)) else path
    try:
        if delta is not None:
            opened = _with_delta(opened, Path(delta))
        if adapter is not None:
            opened = _with_adapter(opened, Path(adapter))
    except BaseException:
        opened.close()
        raise
    return opened


def _open(root: Path) -> Checkpoint:
    if not root.exists():
        hint = hub_hint(str(root)) or "give the directory of a downloaded checkpoint, or a GGUF file"
        raise CheckpointError(f"{root} does not exist; {hint}")
    if root.is_file():
        if root.suffix != ".gguf":
            raise CheckpointError(
                f"{root} is a file, a checkpoint is a directory with config.json or a .gguf file: give its directory"
            )
        return _open_gguf(root)
    inside = {suffix: sorted(root.glob(f"*{suffix}")) for suffix in (".gguf", *_TENSORS, *_NOT_READ)}
    if not any(inside[suffix] for suffix in _TENSORS):
        if len(inside[".gguf"]) == 1:
            return _open_gguf(inside[".gguf"][0])
        if inside[".gguf"]:
            raise CheckpointError(f"{root} holds several GGUF files; name one of them, such as {inside['.gguf'][0]}")
        if kinds := [kind for suffix, kind in _NOT_READ.items() if inside[suffix]]:
            raise CheckpointError(
                f"{root} holds {' and '.join(kinds)} files only, which are not read; get the checkpoint as safetensors"
            )
    opened = HuggingFaceCheckpoint(root)
    try:
        return dequantising(opened)
    except BaseException:
        opened.close()
        raise


def _open_gguf(path: Path) -> Checkpoint:
    from flashinfer.checkpoint.gguf import GgufCheckpoint  # the gguf library takes half a second to import

    return GgufCheckpoint(path)


def _with_delta(base: Checkpoint, path: Path) -> Checkpoint:
    delta = _open(path)
    try:
        return add_delta(base, delta)
    except BaseException:
        delta.close()
        raise


def _with_adapter(base: Checkpoint, path: Path) -> Checkpoint:
    adapter = open_adapter(path)
    try:
        return merge_adapter(base, adapter)
    except BaseException:
        adapter.file.close()
        raise
