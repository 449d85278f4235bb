"""`pack`: the whole compilation, from an opened checkpoint to the committed store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy.typing as npt

from flashinfer.checkpoint import Checkpoint, open_checkpoint
from flashinfer.config import COPY_CHUNK, STORE_ALIGNMENT
from flashinfer.errors import CheckpointError
from flashinfer.layout import Layout, find_layout, match_layout, read_layout
from flashinfer.pack.plan import PackOptions, PackPlan, plan_pack
from flashinfer.pack.recipe import Recipe, parse_recipe
from flashinfer.pack.stream import layer_chunks, tensor_chunks
from flashinfer.pack.views import Views
from flashinfer.store.dense import write_dense
from flashinfer.store.manifest import FileEntry, Manifest
from flashinfer.store.neurons import write_neurons
from flashinfer.store.progress import Meter, Progress
from flashinfer.store.writer import StoreWriter

CheckText = Callable[[Mapping[str, Path], int], None]
"""What looks at the text files of a checkpoint, by name, and at how many rows its embedding has."""


@dataclass(frozen=True)
class PackReport:
    """What `pack` wrote. Sizes in bytes; `path` is the store."""

    path: Path
    family: str
    seconds: float
    bytes: int
    weight_bytes: int
    dense_bytes: int
    neuron_bytes: int


def pack(
    checkpoint: str | Path | Checkpoint,
    store: str | Path,
    *,
    quant: str | None = None,
    layout: str | Path | Layout | None = None,
    delta: str | Path | None = None,
    merge_adapter: str | Path | None = None,
    force: bool = False,
    decision: Literal["separate", "bundled"] = "separate",
    bundles_per_record: int | None = None,
    alignment: int = STORE_ALIGNMENT,
    permutation: Sequence[npt.ArrayLike] | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    check_text: CheckText | None = None,
) -> PackReport:
    """Compile the checkpoint into a weight store at `store`.

    Peak memory is a constant (a few times `config.PACK_BLOCK`), whatever the model's size. An interrupted
    or failed call leaves nothing behind.

    Args:
        checkpoint: a Hugging Face directory with safetensors or PyTorch files, or a GGUF file (`docs/checkpoints.md`);
            or an open `checkpoint.Checkpoint`, whatever makes its tensors, which is closed at the end.
        store: the directory to make; its parent must exist.
        quant: codecs of the matrices, as `recipe.parse_recipe` has it (`f16`, `nf4`, `ffn=nf4,attn=int8`); None keeps
            each tensor's own type, or the codes of one that comes quantised (`docs/checkpoints.md`).
        allow_nonfinite: pack NaN and infinity as they are; matrices of codes cannot hold them.
        layout: a layout file (or a read one); None finds it by the architecture.
        delta: a checkpoint of differences that are added to it.
        merge_adapter: a directory with a LoRA adapter that is merged into it.
        force: replace a store that is already there.
        decision: where the decision matrix goes (`docs/format.md`).
        bundles_per_record: None chooses it from bundle size and alignment.
        alignment: of records, in bytes: a power of two from 512 to 4096.
        permutation: per layer, which neuron lies at each position; None keeps the original order.
        progress: called with bytes written and bytes in all.
        check_text: called before anything is written; what it raises ends the call.

    Raises:
        CheckpointError: the checkpoint cannot be packed: missing or damaged files, wrong or non-finite tensors.
        LayoutError: no layout fits it.
        StoreError: `store` exists, or cannot be written.
        DiskFullError: not enough room.
    """
    started = time.monotonic()
    options = PackOptions(_recipe(quant), decision, alignment, bundles_per_record, permutation)
    source = open_checkpoint(checkpoint, delta=delta, adapter=merge_adapter)
    try:
        plan, source = _plan(source, layout, options)
        if check_text is not None:
            check_text(source.text, plan.match.facts.vocab_size)
        with StoreWriter(Path(store), need=plan.need, force=force) as writer:
            manifest = _write(source, plan, writer, Meter(plan.data_bytes, progress), allow_nonfinite)
            writer.commit(manifest)
    finally:
        source.close()
    return PackReport(
        path=Path(store),
        family=manifest.facts.family,
        seconds=time.monotonic() - started,
        bytes=sum(f.bytes for f in manifest.files()),
        weight_bytes=manifest.weight_bytes(),
        dense_bytes=manifest.dense.bytes,
        neuron_bytes=manifest.neurons.bytes,
    )


def _recipe(quant: str | None) -> Recipe:
    try:
        return parse_recipe(quant)
    except ValueError as e:
        raise CheckpointError(str(e)) from e


def _plan(source: Checkpoint, layout: str | Path | Layout | None, options: PackOptions) -> tuple[PackPlan, Checkpoint]:
    """The plan, and the checkpoint it reads: with the tensors the layout cuts out of it."""
    if layout is None:
        layout = find_layout(source.config, source.tensors)
    elif not isinstance(layout, Layout):
        layout = read_layout(Path(layout))
    match = match_layout(layout, source.config, {name: t.shape for name, t in source.tensors.items()})
    source = Views(source, match.views) if match.views else source
    return plan_pack(source, match, options), source


def _write(source: Checkpoint, plan: PackPlan, writer: StoreWriter, meter: Meter, allow_nonfinite: bool) -> Manifest:
    """All data files; returns the manifest with their names and checksums."""
    draft, sources = plan.draft, plan.match.sources

    def dense_chunks(role: str) -> Iterator[memoryview]:
        if role in plan.orders:
            return meter([plan.orders[role].data.cast("B")])
        return meter(tensor_chunks(source, sources[role], draft.tensors[role].codec, allow_nonfinite))

    def neuron_chunks(layer: int) -> Iterator[memoryview]:
        entry = draft.layers[layer]
        order = plan.orders[entry.permutation] if entry.permutation else None
        return meter(layer_chunks(source, entry, order, allow_nonfinite))

    with writer.create("dense", ".safetensors") as file:
        tensors = write_dense(file, plan.dense, dense_chunks)
    with writer.create("neurons", ".bin") as file:
        layers = write_neurons(file, draft.layers, neuron_chunks)
    dense, neurons = writer.entries
    text = {name: _copy_text(path, name, writer, meter) for name, path in source.text.items()}
    return msgspec.structs.replace(draft, dense=dense, neurons=neurons, tensors=tensors, layers=layers, text=text)


def _copy_text(path: Path, name: str, writer: StoreWriter, meter: Meter) -> FileEntry:
    def chunks() -> Iterator[memoryview]:
        try:
            with path.open("rb") as source:
                while data := source.read(COPY_CHUNK):
                    yield memoryview(data)
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e

    with writer.create("text", f"-{name}") as file:
        for chunk in meter(chunks()):
            file.write(chunk)
    return writer.entries[-1]
