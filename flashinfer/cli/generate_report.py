"""What `flashinfer generate` says about a run: a line for people, an object for programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashinfer.cli.run_options import ADAPTED
from flashinfer.config import RunConfig
from flashinfer.errors import FlashInferError
from flashinfer.units import format_size

if TYPE_CHECKING:
    from flashinfer.bench.basis import Basis
    from flashinfer.generate import Generation, TextModel
    from flashinfer.speed import Prediction

SCHEMA_VERSION = 1
"""Of the object `--json` prints."""


def summary(model: TextModel, result: Generation, predicted: Prediction, basis: Basis) -> str:
    """One line: speed and bytes read per token, actual and predicted, hit rate and peak memory of a run."""
    from flashinfer.backend import has_native
    from flashinfer.machine import peak_resident_bytes

    t, decode = result.timings, model.ledger.decode
    times = "once" if result.context_shifts == 1 else f"{result.context_shifts} times"
    parts = [
        f"{len(result.tokens)} tokens ({result.finish_reason})",
        *([f"context shifted {times}"] if result.context_shifts else []),
        f"first after {t.first_token:.2f} s (predicted {predicted.first_token_seconds:.2f})",
        f"then {t.decode_tokens_per_second:.3g} tokens/s (predicted {predicted.tokens_per_second:.3g})",
        f"{format_size(decode.bytes_per_token)} read per token (predicted {format_size(predicted.flash_bytes)})",
        *([] if model.plan.device is None else [_copied(decode.copied_per_token, predicted)]),
        f"hit rate {decode.hit_rate:.1%}",
        *([model.choice.note] if model.choice.note else []),
        *([ADAPTED] if model.plan.weight_adapter else []),
        *([f"keys and values rounded to {model.plan.kv_type}"] if model.plan.kv_type != "f32" else []),
        f"peak memory {format_size(peak_resident_bytes())}",
    ]
    slower = "" if has_native() else "; computed by torch: the native core, which is faster, was not built"
    return f"{', '.join(parts)}; {_foundation(predicted, basis)}{slower}"


def _copied(size: float, predicted: Prediction) -> str:
    return f"{format_size(size)} copied to the device (predicted {format_size(predicted.pcie_bytes)})"


def _foundation(predicted: Prediction, basis: Basis) -> str:
    """What a prediction rests on."""
    disk = "measured" if basis.disk_measured else "default (`flashinfer plan` measures it)"
    neurons = f", firing {predicted.firing.source}" if predicted.firing.density < 1 else ""
    return f"predicted with the disk curve {disk}{neurons}"


def basis_of(store: Path, run: RunConfig, device: str) -> Basis:
    """What predictions rest on here: figures measured before, or the defaults. Nothing is measured now."""
    from flashinfer.bench.basis import DEFAULT_BASIS, known_basis
    from flashinfer.store import open_store

    try:
        return known_basis(open_store(store), run, device)
    except (FlashInferError, OSError):  # it was there a moment ago: no reason to lose what was generated
        return DEFAULT_BASIS


def place_note(store: Path) -> str:
    """What is to be known of the place the store lies in, if anything is."""
    from flashinfer.bench.place import KINDS, place_of

    try:
        what, advice = KINDS[place_of(store).kind]
    except OSError:
        return ""
    return f"; the store lies on {what}: {advice}" if advice else ""


def report(model: TextModel, result: Generation, predicted: Prediction, basis: Basis) -> dict[str, Any]:
    """The object `--json` prints."""
    from flashinfer.machine import peak_resident_bytes

    return {
        "schema_version": SCHEMA_VERSION,
        **asdict(result),
        "ledger": model.ledger.to_json(),
        "plan": model.plan.to_json(),
        "predictor": {"kind": model.choice.kind, "approximation": model.choice.note or None},
        "effective_window": model.effective_window,
        "peak_memory": peak_resident_bytes(),
        "predicted": predicted.to_json() | {"basis": basis.to_json()},
    }
