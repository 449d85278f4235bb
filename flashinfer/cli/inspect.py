"""`flashinfer inspect`: what is in a weight store, from its manifest alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flashinfer.store import Level, Manifest, NeuronLayer, Store


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
    """Everything `inspect` tells, as plain values. Sizes in bytes.

    Raises:
        StoreError: the calibration is damaged.
    """
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
        "dense_bytes": m.weight_bytes() - neuron_weights,
        "neuron_bytes": neuron_weights,
        "neuron_padding": 1 - neuron_weights / m.neurons.bytes,
        "codecs": _codecs(m),
        "origins": _origins(m),
        "alignment": m.alignment,
        "layers": [_layer(m, n) for n in m.layers],
        "predictors": _predictors(m),
        "calibration": _calibration(store),
        "files": [{"name": f.name, "bytes": f.bytes, "xxh3": f.xxh3} for f in m.files()],
    }


def _parameters(m: Manifest) -> int:
    """Values of the model, a tied head counted once."""
    dense = sum(math.prod(t.shape) for t in m.tensors.values() if t.codec != "i32" and t.file == "dense")
    return dense + sum(n.neurons * p.elements for n in m.layers for p in n.parts)


def _codecs(m: Manifest) -> dict[str, int]:
    """Bytes of the model's matrices by codec; vectors, which are always f32, and permutations are left out."""
    from flashinfer.quant import codec_named

    sizes: dict[str, int] = {}
    for t in m.tensors.values():
        if len(t.shape) == 2 and t.file == "dense":
            sizes[t.codec] = sizes.get(t.codec, 0) + t.bytes
    for n in m.layers:
        for p in n.parts:
            if p.elements > 1:
                sizes[p.codec] = sizes.get(p.codec, 0) + n.neurons * codec_named(p.codec).row_bytes(p.elements)
    return sizes


def _origins(m: Manifest) -> list[dict[str, Any]]:
    """What came quantised: matrices alike in all layers together, where they had one scheme and have one codec."""
    codecs = {role: t.codec for role, t in m.tensors.items()}
    for i, layer in enumerate(m.layers):
        codecs |= {f"layers.{i}.ffn.{p.role}": p.codec for p in layer.parts}
    found: dict[tuple[str, bool, str], dict[str, int]] = {}
    for role, origin in m.origins.items():
        alike = re.sub(r"^layers\.\d+\.", "layers.*.", role)
        counts = found.setdefault((origin.scheme, origin.kept, codecs[role]), {})
        counts[alike] = counts.get(alike, 0) + 1
    return [
        {"scheme": scheme, "kept": kept, "codec": codec, "matrices": counts}
        for (scheme, kept, codec), counts in found.items()
    ]


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


def _predictors(m: Manifest) -> dict[str, Any]:
    """What each predictor adds to the model: bytes, layers, and codec of its matrices (rank of low-rank factors)."""
    from flashinfer.store.roles import PREDICTORS, predictor_of

    found: dict[str, Any] = {}
    for name in PREDICTORS:
        tensors = {role: t for role, t in m.tensors.items() if predictor_of(role) == name}
        if tensors:
            matrices = [t for t in tensors.values() if len(t.shape) == 2]
            found[name] = {
                "bytes": sum(t.bytes for t in tensors.values()),
                "layers": len({role.split(".")[1] for role in tensors}),
                "codecs": sorted({t.codec for t in matrices}),
                "ranks": sorted({t.shape[0] for role, t in tensors.items() if role.endswith(".a.weight")}),
            }
    return found


def _calibration(store: Store) -> dict[str, Any] | None:
    """What was measured on a text; None where nothing was."""
    calibration = store.calibration()
    if calibration is None:
        return None
    densities = {
        selection: sum(layer.density for layer in layers) / len(layers)
        for selection, layers in calibration.statistics.items()
    }
    return {
        "generator": calibration.generator,
        "text_xxh3": calibration.text_xxh3,
        "tokens": calibration.tokens,
        "held_out": calibration.held_out,
        "mean_density": densities,
        "levels": [_level(level, calibration.chosen.get(level.predictor) == i) for i, level in
                   enumerate(calibration.levels)],
    }  # fmt: skip


def _level(level: Level, chosen: bool) -> dict[str, Any]:
    names = ("predictor", "target", "recall", "density", "perplexity", "exact_perplexity")
    return {name: getattr(level, name) for name in names} | {"chosen": chosen}


def _lines(s: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary for people: (name, text)."""
    from flashinfer.store.facts import SPARSE_ACTIVATIONS
    from flashinfer.units import format_size

    f = s["facts"]
    heads = f"{f['num_heads']} heads" + (f" ({f['num_kv_heads']} kv)" if f["num_kv_heads"] != f["num_heads"] else "")
    heads += f", keys and values by way of {f['latent']['kv_rank']} values" if f["latent"] else ""
    sparse = "sparse: neurons are skipped" if f["activation"] in SPARSE_ACTIVATIONS else "dense: every neuron is read"
    sparse = "experts that are not chosen are skipped" if f["experts"] else sparse
    codecs = ", ".join(f"{name} {format_size(size)}" for name, size in s["codecs"].items())
    return [
        ("store", f"{s['path']} (version {s['store_version']}, by {s['generator']})"),
        ("family", f"{f['family']}, {_count(s['parameters'])} parameters"),
        ("shape", f"{f['num_layers']} layers, hidden {f['hidden_size']}, FFN {f['intermediate_size']}, {heads}"),
        *_expert_lines(f),
        ("vocabulary", f"{f['vocab_size']} tokens, {'tied' if f['tied_head'] else 'separate'} head"),
        ("context", f"{f['context_length']} tokens, {_positions(f)} positions"
                    + _window(f)),
        ("activation", f"{f['activation']}{', gated' if f['gated'] else ''} ({sparse})"),
        ("weights", f"{format_size(s['weight_bytes'])}: {format_size(s['dense_bytes'])} dense, "
                    f"{format_size(s['neuron_bytes'])} neurons"),
        ("codecs", codecs),
        *_origin_lines(s["origins"]),
        ("neuron padding", f"{100 * s['neuron_padding']:.1f} % of the neuron file, alignment {s['alignment']} B"),
        *_layer_lines(s["layers"]),
        *_predictor_lines(s),
        *(("file", f"{x['name']} ({format_size(x['bytes'])})") for x in s["files"]),
    ]  # fmt: skip


def _window(facts: dict[str, Any]) -> str:
    if not facts["window"]:
        return ""
    count = facts["num_layers"] - len(facts["global_layers"])
    where = "" if count == facts["num_layers"] else f" in {count} of {facts['num_layers']} layers"
    return f", attention window {facts['window']}{where}"


def _positions(facts: dict[str, Any]) -> str:
    return "rotary" if facts["rope"] else "ALiBi" if facts.get("alibi") else "learned"


def _origin_lines(origins: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One line for each scheme and what became of its codes."""
    lines = []
    for o in origins:
        became = f"codes kept as {o['codec']}" if o["kept"] else f"rounded again, to {o['codec']}"
        names = ", ".join(f"{count} {name}" for name, count in o["matrices"].items())
        lines.append(("quantised before", f"{o['scheme']}; {became}: {names}"))
    return lines


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


def _expert_lines(f: dict[str, Any]) -> list[tuple[str, str]]:
    """Of a mixture of experts, how many and how large."""
    if (e := f["experts"]) is None:
        return []
    shared = f", {e['shared_size']} neurons shared by all" if e["shared_size"] else ""
    dense = f"; {len(e['dense'])} of {f['num_layers']} layers are dense" if e["dense"] else ""
    return [("experts", f"{e['per_token']} of {e['count']} for each token, {e['size']} neurons each{shared}{dense}")]


def _predictor_lines(s: dict[str, Any]) -> list[tuple[str, str]]:
    """One line for each predictor, then the calibration with a line for each level."""
    from flashinfer.units import format_size

    lines = []
    for name, p in s["predictors"].items():
        rank = f"rank {', '.join(map(str, p['ranks']))}, " if p["ranks"] else ""
        codecs = f" ({rank}{', '.join(p['codecs'])})" if p["codecs"] else ""
        lines.append((f"predictor {name}", f"{format_size(p['bytes'])} in {p['layers']} layers{codecs}"))
    c = s["calibration"]
    if c is None:
        return lines
    fires = ", ".join(f"{name} {100 * density:.1f} %" for name, density in c["mean_density"].items())
    lines.append(("calibration", f"{c['tokens']} tokens, {c['held_out']} held out; neurons a token needs: {fires}"))
    for n in c["levels"]:
        text = (
            f"recall {100 * n['recall']:.1f} %, names {100 * n['density']:.1f} %, "
            f"perplexity {n['perplexity']:.4g} (exact {n['exact_perplexity']:.4g})"
        )
        default = ", the default" if n["chosen"] else ""
        lines.append((f"{n['predictor']}:{n['target']:g}", text + default))
    return lines


def _count(n: int) -> str:
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= scale:
            return f"{n / scale:.3g}{unit}"
    return str(n)
