"""The commands of `benchmarks/synthetic.py`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.errors import FlashInferError
from flashinfer.store import open_store
from flashinfer.text import load_tokenizer
from flashinfer.units import format_size

from .build import write_planted
from .measure import Layer, measure_checkpoint, measure_store, record_store
from .shapes import SHAPES, shape_named
from .statistics import FIRED, LOADED, Statistics, like_trained
from .text import ids_of
from .write import write_random


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="synthetic.py", description="Synthetic checkpoints with planted statistics.")
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("make", help="write a checkpoint")
    make.add_argument("shape", choices=sorted(SHAPES))
    make.add_argument("out", type=Path)
    make.add_argument("--activation", choices=("relu", "silu"), default="relu")
    make.add_argument("--layers", type=int, help="fewer (or more) than the model has")
    make.add_argument("--as-loaded", action="store_true", help="plant what the paper's predictor loads for OPT-6.7B")
    make.add_argument("--sparsity", type=float, help="share of the FFN that does not fire for a token")
    make.add_argument("--window-share", type=float, help="share of the FFN that fires in 5 consecutive tokens")
    make.add_argument("--new-share", type=float, help="share that fires for a token and none of the 5 before")
    make.add_argument("--reuse", type=float, default=1.0, help="share of that reuse to plant: 0.5 is half-way to none")
    make.add_argument("--seed", type=int, default=0)
    make.set_defaults(run=_make)
    measure = commands.add_parser("measure", help="what fires over a text, in a checkpoint or (by the engine) a store")
    measure.add_argument("path", type=Path)
    measure.add_argument("--text", type=Path, help="UTF-8 text whose words are forced; default: a made-up one")
    measure.add_argument("--tokens", type=int, default=200, help="tokens that count")
    measure.add_argument("--sample", type=int, default=1024, help="tokens before them, on which predictors are fit")
    measure.add_argument("--predictors", type=int, default=3, help="layers in which predictors are tried")
    measure.add_argument("--json", action="store_true")
    measure.set_defaults(run=_measure)
    record = commands.add_parser("record", help="record what a store needs over a text, for `flashinfer bench cache`")
    record.add_argument("path", type=Path, help="a store")
    record.add_argument("out", type=Path, help="the recording")
    record.add_argument("--text", type=Path, help="UTF-8 text whose words are forced; default: a made-up one")
    record.add_argument("--tokens", type=int, default=200, help="tokens run one by one")
    record.add_argument("--prompt", type=int, default=64, help="tokens before them")
    record.add_argument("--tokenizer", action="store_true", help="a real model: read --text with the store's tokenizer")
    record.set_defaults(run=_record)
    ids = commands.add_parser("ids", help="the token ids that `measure` forces, for other programs")
    ids.add_argument("path", type=Path, help="a checkpoint or a store, for the size of its vocabulary")
    ids.add_argument("--text", type=Path, help="UTF-8 text; default: a made-up one")
    ids.add_argument("--tokens", type=int, default=200)
    ids.set_defaults(run=_ids)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (OSError, ValueError, FlashInferError) as e:
        parser.exit(1, f"error: {e}\n")


def _asked(args: argparse.Namespace, family: str) -> Statistics:
    asked = LOADED if args.as_loaded else FIRED[family]
    if args.sparsity is not None:
        asked = like_trained(args.sparsity, args.window_share, args.new_share)
    else:
        asked = Statistics(asked.density, args.window_share or asked.window_share, args.new_share or asked.new_share)
    return asked.with_reuse(args.reuse)


def _make(args: argparse.Namespace) -> None:
    shape, begin = shape_named(args.shape, layers=args.layers, activation=args.activation), time.perf_counter()
    if args.activation == "relu":
        asked = _asked(args, shape.family)
        total = write_planted(args.out, shape, asked, args.seed)
        (args.out / "planted.json").write_text(json.dumps(vars(asked)))
    else:
        total = write_random(args.out, shape, args.seed)
    seconds = time.perf_counter() - begin
    print(f"{args.out}: {format_size(total)} in {seconds:.1f} s, {total / seconds / 1e6:.0f} MB/s")


def _dimensions(path: Path) -> tuple[int, int, bool]:
    """Vocabulary, layers, and whether it is a checkpoint; else it is a store."""
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text())
        return config["vocab_size"], config["num_hidden_layers"], True
    facts = open_store(path).manifest.facts
    return facts.vocab_size, facts.num_layers, False


def _ids(args: argparse.Namespace) -> None:
    print(*ids_of(args.text, _dimensions(args.path)[0], args.tokens))


def _record(args: argparse.Namespace) -> None:
    vocab, _, checkpoint = _dimensions(args.path)
    if checkpoint:
        raise ValueError(f"{args.path} is a checkpoint; pack it and give the store")
    count = args.prompt + args.tokens
    ids = _own_ids(args.path, args.text, count) if args.tokenizer else ids_of(args.text, vocab, count)
    record_store(args.path, args.out, ids, args.tokens)


def _own_ids(path: Path, text: Path | None, count: int) -> list[int]:
    """The first tokens of the text as the model of that store reads it."""
    if text is None:
        raise ValueError("--tokenizer needs a --text")
    store = open_store(path)
    tokenizer = load_tokenizer({name: store.path_of(entry) for name, entry in store.manifest.text.items()})
    ids = list(tokenizer.encode(text.read_text(encoding="utf-8")))[:count]
    if len(ids) < count:
        raise ValueError(f"{text} has only {len(ids)} of the {count} tokens asked for; give a longer text")
    return ids


def _measure(args: argparse.Namespace) -> None:
    vocab, layers, checkpoint = _dimensions(args.path)
    ids = ids_of(args.text, vocab, args.sample + args.tokens)
    predicted = sorted({int(i) for i in np.linspace(0, layers - 1, args.predictors)})
    seen = (measure_checkpoint if checkpoint else measure_store)(args.path, ids, args.tokens, predicted)
    planted = args.path / "planted.json"
    asked = json.loads(planted.read_text()) if planted.is_file() else None
    if args.json:
        print(json.dumps({"schema_version": 1, "asked": asked, "layers": [layer.summary() for layer in seen]}))
    else:
        _print(seen, asked)


def _print(seen: list[Layer], asked: dict[str, Any] | None) -> None:
    summaries = [layer.summary() for layer in seen]
    mean: dict[str, Any] = {k: np.mean([s[k] for s in summaries], axis=0) for k in summaries[0] if k != "predictors"}
    print("layer  sparse  window of 5  new  hottest tenth")
    rows = [(str(n), s) for n, s in enumerate(summaries)] + [("mean", mean)]
    for name, s in rows:
        print(
            f"{name:>5} {s['sparsity']:7.1%} {s['window_shares'][4]:9.1%} {s['new_share']:8.2%} {s['hot_share']:8.0%}"
        )
    if asked:
        print(
            f"asked {1 - asked['density']:7.1%} {asked['window_share']:9.1%} {asked['new_share']:8.2%} "
            f"{asked['hot_share']:8.0%}"
        )
    print("windows of 1 to 10:", " ".join(f"{s:.1%}" for s in mean["window_shares"]))
    for n, s in enumerate(summaries):
        for rank, p in s["predictors"].items():
            print(
                f"layer {n}, rank {rank}: at {p['recall']:.0%} recall names {p['named_share']:.1%} (precision "
                f"{p['precision']:.0%}, false positives {p['false_positives']:.1%}), which hold "
                f"{p['named_window_share']:.1%} in a window of 5 and add {p['named_new_share']:.2%}; at its own zero "
                f"{p['recall_at_zero']:.0%} recall, {p['precision_at_zero']:.0%} precision"
            )
