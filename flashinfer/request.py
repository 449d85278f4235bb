"""What the resolver is asked, of this machine and this process as they are now."""

from __future__ import annotations

from flashinfer import machine
from flashinfer.backend import Backend
from flashinfer.config import Cap, RunConfig
from flashinfer.errors import CapTooSmallError, PromptError
from flashinfer.io import Reader
from flashinfer.memory import Mode, Plan, Request, resolve
from flashinfer.store import Facts, Manifest
from flashinfer.units import MIB, format_size

SMALL_MODEL = 64 * MIB
"""Below this many weight bytes a second compute thread costs scratch and saves nothing."""
DEFAULT_CONTEXT = 4096
"""Context of a session when nobody says, if the model's own is not smaller."""
SAFE_SHARE = 0.9
"""Share of the usable memory taken when no cap is given."""
UNCAPPED = Cap()


def threads_for(manifest: Manifest, run: RunConfig) -> int:
    """Compute threads: as asked, else all cores for a model that is worth it."""
    return run.threads or (machine.compute_threads() if manifest.weight_bytes() > SMALL_MODEL else 1)


def request_for(
    manifest: Manifest,
    reader: Reader,
    backend: Backend,
    cap: Cap,
    *,
    context: int | None,
    run: RunConfig,
    mode: Mode = "cached",
) -> Request:
    """What the resolver is asked, of this process as it is now: what it holds already counts against the cap.

    Raises:
        PromptError: a context beyond the model's.
    """
    if cap == UNCAPPED:
        cap = Cap(memory=int(machine.usable_memory() * SAFE_SHARE))
    return Request(
        context=_context(manifest.facts, context),
        threads=threads_for(manifest, run),
        alignment=reader.alignment,
        baseline=machine.resident_bytes(),
        run=run,
        cap=cap,
        mode=mode,
        footprint=backend.footprint,
    )


def resolve_cap(manifest: Manifest, request: Request, *, asked: bool) -> Plan:
    """As `memory.resolve`; where nobody asked for the cap, the error says where it comes from."""
    try:
        return resolve(manifest, request)
    except CapTooSmallError as e:
        if asked:
            raise
        raise CapTooSmallError(
            f"this model needs at least {format_size(e.floor)} ({e.floor} bytes) and {machine.usable_reason()}, "
            f"of which {SAFE_SHARE:.0%} are taken when no cap is given; free memory, or raise the limit",
            e.floor,
        ) from None


def _context(facts: Facts, asked: int | None) -> int:
    if asked is None:
        return min(facts.context_length, DEFAULT_CONTEXT)
    if not 1 <= asked <= facts.context_length:
        raise PromptError(f"a context of {asked} is not in 1..{facts.context_length}, what this model was made for")
    return asked
