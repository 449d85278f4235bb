"""From what the user gave to what the line-up is made of: stores opened, GGUF files made, the peers' Python asked."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from flashinfer.backend import has_native
from flashinfer.bench.compare.contenders import LLAMA
from flashinfer.bench.compare.gguf_files import GgufFiles, make_files, plan_files
from flashinfer.bench.compare.launch import find_python, modules_of
from flashinfer.bench.compare.lineup import Carries, Given, carries, default_predictor
from flashinfer.bench.compare.task import Wanted
from flashinfer.errors import StoreError
from flashinfer.store import Store, open_store

FREE_SHARE = 0.9
"""Of the free memory, what a file may take that is to stay in it."""


def prepare(wanted: Wanted, *, make: bool, say: Callable[[str], None]) -> tuple[Store, Given]:
    """The store, and what decides who runs; with `make`, GGUF files that are missing are made first.

    Raises:
        StoreError: a store cannot be opened, or the two are not the same model.
        PeerError: a GGUF file cannot be made, or the Python of the peers does not run.
    """
    store = open_store(wanted.store)
    packed = open_store(wanted.packed) if wanted.packed else None
    if packed is not None and packed.manifest.facts != store.manifest.facts:
        raise StoreError(f"{wanted.packed} is not the model of {wanted.store}: another shape; pack the same checkpoint")
    files = plan_files(wanted.gguf, wanted.checkpoint, wanted.quants, wanted.folder)
    python = find_python(wanted.python)
    modules = modules_of(python) if wanted.checkpoint or files.full or files.quantised else frozenset()
    if make and _wants_llama(wanted) and _can_make(files, modules):
        make_files(files, wanted.checkpoint, python, say)
        files = plan_files(wanted.gguf, wanted.checkpoint, wanted.quants, wanted.folder)
    there = [path for path in (files.full, *files.quantised) if path is not None and path.exists()]
    found = carries(wanted.store, store.manifest)
    return store, Given(
        store=found,
        packed=_packed(wanted, found, packed),
        caps=wanted.caps,
        predictor=wanted.predictor or default_predictor(found),
        python=python,
        checkpoint=wanted.checkpoint,
        stand_in=wanted.stand_in,
        gguf=files,
        sizes={path: path.stat().st_size for path in there},
        modules=modules,
        native=has_native(),
        room=int(psutil.virtual_memory().available * FREE_SHARE),
        only=wanted.only,
    )


def _packed(wanted: Wanted, found: Carries, packed: Store | None) -> Carries | None:
    """The store as `pack` wrote it: the one given; of a mixture of experts, which nothing calibrates, the store."""
    if wanted.packed and packed:
        return carries(wanted.packed, packed.manifest)
    return found if found.routed else None


def _wants_llama(wanted: Wanted) -> bool:
    return not wanted.only or any(name.startswith(LLAMA) for name in wanted.only)


def _can_make(files: GgufFiles, modules: frozenset[str]) -> bool:
    return "llama_cpp" in modules and (files.full not in files.missing or "gguf" in modules)
