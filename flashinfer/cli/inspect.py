"""`flashinfer inspect`: what is in a weight store, from its manifest alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flashinfer.store import Manifest, NeuronLayer, Store


def command(
    store: Annotated[Path, typer.Argument(help="Directory `flashinfer pack` made.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is in a weight store."""
    from flashinfer.store import open_store

    summary = summarize(open_store(store))
    if as_json:
        print(json.dumps({"schema_version": 1, **summary}))
        return
    for name, text in _lines(summary):
        print(f"{name:<20} {text}")


def summarize(store: Store) -> dict[str, Any]:
    """Everything `inspect` tells, as plain values. Sizes in bytes."""
    import msgspec

    m = store.manifest
    neuron_weights = sum(n.neurons * n.bundle_bytes for n in m.layers)
    return {
        "path": str(store.root),
        "store_version": m.version,
        "generator": m.generator,
        "facts": msgspec.to_builtins(m.facts),
        "parameters": _parameters(m),
        "weight_bytes": m.weight_bytes(),
        "dense_bytes": sum(t.bytes for t in m.tensors.values()),
        "neuron_bytes": neuron_weights,
        "neuron_padding": 1 - neuron_weights / m.neurons.bytes,
        "codecs": _codecs(m),
        "alignment": m.alignment,
        "layers": [_layer(m, n) for n in m.layers],
        "files": [{"name": f.name, "bytes": f.bytes, "xxh3": f.xxh3} for f in m.files()],
    }


def _parameters(m: Manifest) -> int:
    """Values of the model, a tied head counted once."""
    dense = sum(math.prod(t.shape) for t in m.tensors.values() if t.codec != "i32")
    return dense + sum(n.neurons * p.elements for n in m.layers for p in n.parts)


def _codecs(m: Manifest) -> dict[str, int]:
    """Bytes of matrices by codec; vectors, which are always f32, and permutations are left out."""
    from flashinfer.quant import codec_named

    sizes: dict[str, int] = {}
    for t in m.tensors.values():
        if len(t.shape) == 2:
            sizes[t.codec] = sizes.get(t.codec, 0) + t.bytes
    for n in m.layers:
        for p in n.parts:
            if p.elements > 1:
                sizes[p.codec] = sizes.get(p.codec, 0) + n.neurons * codec_named(p.codec).row_bytes(p.elements)
    return sizes


def _layer(m: Manifest, n: NeuronLayer) -> dict[str, Any]:
    return {
        "neurons": n.neurons,
        "decision": n.decision,
        "decision_matrix": m.facts.decision,
        "parts": [p.role for p in n.parts],
        "bundle_bytes": n.bundle_bytes,
        "bundles_per_record": n.bundles_per_record,
        "record_bytes": n.record_bytes,
        "records": n.records,
        "permuted": n.permutation is not None,
    }


def _lines(s: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary for people: (name, text)."""
    from flashinfer.units import format_size

    f = s["facts"]
    heads = f"{f['num_heads']} heads" + (f" ({f['num_kv_heads']} kv)" if f["num_kv_heads"] != f["num_heads"] else "")
    sparse = "sparse: neurons are skipped" if f["activation"] in ("relu", "relu2") else "dense: every neuron is read"
    codecs = ", ".join(f"{name} {format_size(size)}" for name, size in s["codecs"].items())
    return [
        ("store", f"{s['path']} (version {s['store_version']}, by {s['generator']})"),
        ("family", f"{f['family']}, {_count(s['parameters'])} parameters"),
        ("shape", f"{f['num_layers']} layers, hidden {f['hidden_size']}, FFN {f['intermediate_size']}, {heads}"),
        ("vocabulary", f"{f['vocab_size']} tokens, {'tied' if f['tied_head'] else 'separate'} head"),
        ("context", f"{f['context_length']} tokens, {'rotary' if f['rope'] else 'learned'} positions"),
        ("activation", f"{f['activation']}{', gated' if f['gated'] else ''} ({sparse})"),
        ("weights", f"{format_size(s['weight_bytes'])}: {format_size(s['dense_bytes'])} dense, "
                    f"{format_size(s['neuron_bytes'])} neurons"),
        ("codecs", codecs),
        ("neuron padding", f"{100 * s['neuron_padding']:.1f} % of the neuron file, alignment {s['alignment']} B"),
        *_layer_lines(s["layers"]),
        *(("file", f"{x['name']} ({format_size(x['bytes'])})") for x in s["files"]),
    ]  # fmt: skip


def _layer_lines(layers: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One line for each run of layers that look the same."""
    from itertools import groupby

    lines = []
    for layer, run in groupby(enumerate(layers), key=lambda item: item[1]):
        numbers = [i for i, _ in run]
        span = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}-{numbers[-1]}"
        text = (
            f"{layer['neurons']} neurons of {layer['bundle_bytes']} B ({' + '.join(layer['parts'])}), "
            f"{layer['bundles_per_record']} to a record of {layer['record_bytes']} B; decision matrix "
            f"{layer['decision_matrix']} {'in the bundles' if layer['decision'] == 'bundled' else 'in the dense file'}"
            f"{', permuted' if layer['permuted'] else ''}"
        )
        lines.append((span, text))
    return lines


def _count(n: int) -> str:
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= scale:
            return f"{n / scale:.3g}{unit}"
    return str(n)
