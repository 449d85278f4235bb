"""What `calibrate` measured on a text, kept in the store: statistics of who fires, and what each predictor costs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import msgspec
import xxhash

from flashinfer.errors import StoreError
from flashinfer.store.facts import Facts
from flashinfer.store.manifest import Manifest

SECTION = "calibration"
"""Name of the section, and of its file."""
WINDOWS = 17
"""Points of `new`: 0 to 16 tokens before."""
UNIONS = 8
"""Points of `union`: 1, 2, 4, .., 128 tokens."""
SHARES = 17
"""Points of `missing`: 0 to 16 sixteenths of the records in slots."""
HOTTEST = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50)
"""Shares of the neurons at the points of `hot`."""

Selection = Literal["exact", "certified", "low-rank", "threshold", "router"]
"""What chose the neurons that were counted. Of a `router` experts are counted, in place of neurons and of records."""
Approximate = Literal["low-rank", "threshold"]
"""Predictors that may change the output."""
_HASH = re.compile(r"[0-9a-f]{32}")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frozen, and an unknown key is an error."""


class LayerStatistics(_Strict, frozen=True):
    """One layer's firing: means over tokens; shares of its neurons, for `missing` of its records.

    Attributes:
        density: what a token needs.
        new: `new[k]`, k = 0..16: needed by a token and by none of the k tokens before it; `new[0]` is the density.
        union: what 1, 2, 4, .., 128 tokens in a row need together.
        missing: records read per token when slots hold i/16 of the records, i = 0..16, as the cache's default
            window and retention keep them, the first tokens left out.
        hot: share of all firings that fall on the hottest 1, 2, 5, 10, 20 and 50 % of the neurons.
    """

    density: float
    new: tuple[float, ...]
    union: tuple[float, ...]
    missing: tuple[float, ...]
    hot: tuple[float, ...]


class Level(_Strict, frozen=True):
    """One setting of a predictor, with what it was measured to cost on held-out text.

    Attributes:
        predictor: whose setting it is.
        target: what was asked for: a recall (low-rank), a density (threshold).
        adjust: per layer, what is added to the score (low-rank), or the factor on the thresholds (threshold).
        recall: share of the truly active neurons that are named; of a threshold, the share of what all neurons add
            to the output, by size, that the kept ones add.
        density: share of all neurons that are named.
        perplexity: on the held-out text.
        exact_perplexity: of exact selection, on the same text.
    """

    predictor: Approximate
    target: float
    adjust: tuple[float, ...]
    recall: float
    density: float
    perplexity: float
    exact_perplexity: float


class Calibration(_Strict, frozen=True):
    """Everything `calibrate` learnt.

    Attributes:
        generator: the program that measured.
        text_xxh3: XXH3-128 of the calibration text, 32 hex digits.
        tokens: tokens used to fit.
        held_out: tokens used to judge.
        statistics: per layer, of each way to select that was measured.
        levels: settings of predictors, measured.
        chosen: index into `levels` of what a predictor uses when nobody says.
        weights: `weights_id` of the store it belongs to.
    """

    generator: str
    text_xxh3: str
    tokens: int
    held_out: int
    statistics: dict[Selection, tuple[LayerStatistics, ...]]
    levels: tuple[Level, ...] = ()
    chosen: dict[Approximate, int] = {}
    weights: str = ""


def weights_id(manifest: Manifest) -> str:
    """Names the weights of a store as they lie in it: 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(f"{manifest.dense.xxh3} {manifest.neurons.xxh3}".encode())


def encode_calibration(calibration: Calibration) -> bytes:
    """Canonical JSON: two-space indent, keys in declaration order, a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n"


def decode_calibration(data: bytes, facts: Facts, where: str) -> Calibration:
    """Parse and check a calibration of a model of these facts; `where` names its file in errors.

    Raises:
        StoreError: not a calibration, an unknown key, another number of layers, or a value that cannot be.
    """
    try:
        calibration = msgspec.json.decode(data, type=Calibration)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise StoreError(f"{where}: {e}; the calibration is damaged: run `flashinfer calibrate` again") from e
    check_calibration(calibration, facts, where)
    return calibration


def check_calibration(c: Calibration, facts: Facts, where: str) -> None:
    """Hold every invariant of a calibration of a model of these facts; `where` names it in errors.

    Raises:
        StoreError: names the first one broken.
    """

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise StoreError(f"{where}: {what}; the calibration is damaged: run `flashinfer calibrate` again")

    need(_HASH.fullmatch(c.text_xxh3) is not None, "the text has no checksum of 32 hex digits")
    need(c.tokens > 0 and c.held_out >= 0, f"{c.tokens} tokens to fit and {c.held_out} held out")
    for selection, layers in c.statistics.items():
        need(len(layers) == facts.num_layers, f"{selection} statistics of {len(layers)} layers, not {facts.num_layers}")
        for i, layer in enumerate(layers):
            fault = _layer_fault(layer)
            need(not fault, f"{selection} statistics of layer {i}: {fault}")
    for n, level in enumerate(c.levels):
        fault = _level_fault(level, facts.num_layers)
        need(not fault, f"level {n}: {fault}")
    for predictor, index in c.chosen.items():
        need(0 <= index < len(c.levels), f"{predictor} chose level {index} of {len(c.levels)}")
        need(c.levels[index].predictor == predictor, f"{predictor} chose level {index}, which is another predictor's")


def _layer_fault(layer: LayerStatistics) -> str:
    """What is wrong with a layer's statistics, empty where nothing is."""
    points = {"new": WINDOWS, "union": UNIONS, "missing": SHARES, "hot": len(HOTTEST)}
    for name, count in points.items():
        values = getattr(layer, name)
        if len(values) != count:
            return f"{name} has {len(values)} points, not {count}"
        if not _shares(values):
            return f"{name} has a value that is no share from 0 to 1"
    if not _shares((layer.density,)):
        return f"a density of {layer.density}"
    if abs(layer.new[0] - layer.density) > 1e-6:
        return f"new begins with {layer.new[0]}, the density is {layer.density}"
    return ""


def _level_fault(level: Level, layers: int) -> str:
    """What is wrong with a level, empty where nothing is."""
    if not _shares((level.target, level.recall, level.density)):
        return f"target {level.target}, recall {level.recall} or density {level.density} is no share from 0 to 1"
    if len(level.adjust) != layers:
        return f"adjusts {len(level.adjust)} layers, not {layers}"
    if not all(map(math.isfinite, level.adjust)):
        return "an adjustment is no finite number"
    if level.predictor == "threshold" and min(level.adjust) < 0:
        return "a factor on thresholds is negative"
    if not all(math.isfinite(p) and p > 0 for p in (level.perplexity, level.exact_perplexity)):
        return f"perplexity {level.perplexity} or {level.exact_perplexity} is no finite number above 0"
    return ""


def _shares(values: Sequence[float]) -> bool:
    """Whether all are numbers from 0 to 1 (NaN is not)."""
    return all(0 <= v <= 1 for v in values)
