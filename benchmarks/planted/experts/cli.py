"""The commands of `benchmarks/mixture.py`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flashinfer.errors import FlashInferError
from flashinfer.pack import pack
from flashinfer.store import open_store
from flashinfer.text import load_tokenizer
from flashinfer.units import format_size

from ..text import pseudo_text
from .measure import POLICIES, SHARES, Routed, measure_mixture
from .shape import SHAPES, shape_named
from .source import PlantedMixture
from .to_gguf import write_gguf

CODEC = "q4_0"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="mixture.py", description="Synthetic mixtures of experts, in 4 bits.")
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("make", help="write a store, and the same model for llama.cpp")
    make.add_argument("shape", choices=sorted(SHAPES))
    make.add_argument("--layers", type=int, help="fewer (or more) than the model has")
    make.add_argument("--store", type=Path, help=f"the store to write, in {CODEC}")
    make.add_argument("--gguf", type=Path, help="the GGUF file to write, in Q4_0; name it x-q4_0.gguf")
    make.add_argument("--seed", type=int, default=0)
    make.set_defaults(run=_make)
    text = commands.add_parser("text", help="print a made-up text of words that the tokenizer knows")
    text.add_argument("words", type=int)
    text.add_argument("--seed", type=int, default=1)
    text.set_defaults(run=_text)
    measure = commands.add_parser("measure", help="which experts a store's router chooses over a text")
    measure.add_argument("store", type=Path)
    measure.add_argument("--text", type=Path, help="UTF-8 text; default: a made-up one")
    measure.add_argument("--tokens", type=int, default=256, help="tokens that count")
    measure.add_argument("--prompt", type=int, default=64, help="tokens before them")
    measure.add_argument("--json", action="store_true")
    measure.set_defaults(run=_measure)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (OSError, ValueError, FlashInferError) as e:
        parser.exit(1, f"error: {e}\n")


def _make(args: argparse.Namespace) -> None:
    if args.store is None and args.gguf is None:
        raise ValueError("nothing to write; give --store, --gguf or both")
    shape = shape_named(args.shape, args.layers)
    for out, write in ((args.store, _write_store), (args.gguf, write_gguf)):
        if out is None:
            continue
        begin, source = time.perf_counter(), PlantedMixture(shape, seed=args.seed)
        try:
            size = write(source, out)
        finally:
            source.close()
        print(f"{out}: {format_size(size)} in {time.perf_counter() - begin:.0f} s")


def _write_store(source: PlantedMixture, out: Path) -> int:
    return pack(source, out, quant=CODEC).bytes


def _text(args: argparse.Namespace) -> None:
    print(f" {pseudo_text(args.words, args.seed)}")  # a word is one token behind a space


def _measure(args: argparse.Namespace) -> None:
    count = args.prompt + args.tokens
    text = f" {pseudo_text(count)}" if args.text is None else args.text.read_text(encoding="utf-8")
    store = open_store(args.store)
    tokenizer = load_tokenizer({name: store.path_of(entry) for name, entry in store.manifest.text.items()})
    ids = list(tokenizer.encode(text))[:count]
    if len(ids) < count:
        raise ValueError(f"{args.text} has only {len(ids)} of the {count} tokens asked for; give a longer text")
    layers = measure_mixture(args.store, ids, args.tokens)
    if args.json:
        print(json.dumps({"schema_version": 1, "layers": [layer.summary() for layer in layers]}))
    else:
        _print(layers)


def _print(layers: Sequence[Routed]) -> None:
    found = [layer.summary() for layer in layers]
    chance = float(np.mean([layer.chosen.mean() for layer in layers]))
    print(f"Of a token's experts, by chance {chance:.1%} were another's, too.")
    print("layer  of the token before  of the eight before  busiest quarter's")
    rows = [(str(n), s) for n, s in enumerate(found)]
    mean = {key: np.mean([s[key] for s in found]) for key in ("repeated", "within", "busiest")}
    for name, s in [*rows, ("mean", mean)]:
        print(f"{name:>5} {s['repeated']:20.1%} {s['within']:20.1%} {s['busiest']:18.1%}")
    for share in SHARES:
        rates = (f"{p.name} {np.mean([s['hits'][f'{share:g}'][p.name] for s in found]):.1%}" for p in POLICIES)
        print(f"slots for {share:.0%} of the experts, hits: {', '.join(rates)}")
