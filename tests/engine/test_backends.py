"""What computes and how keys and values are kept: the same bits where that is promised, near ones elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashinfer
from flashinfer.backend import has_native, open_backend
from flashinfer.config import KV_CODECS, BackendName, Cap, KvType, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import DeviceError
from flashinfer.generate import load
from flashinfer.quant import codec_named

TOKENS = [int(t) for t in np.random.default_rng(8).integers(3, 96, 150)]
CONTEXT = 192
FAMILIES = ["llama", "llama-silu", "llama-biases", "opt", "opt-projections"]
BACKENDS: list[BackendName] = ["torch", *(["native"] if has_native() else [])]
needs_native = pytest.mark.skipif(not has_native(), reason="the native core is not built here")


def logits(store: Path, backend: BackendName, kv_type: KvType = "f32", *, steps: list[int]) -> np.ndarray:
    """All logits, the tokens being given in steps of so many; little memory, so that weights are streamed."""
    run = RunConfig(backend=backend, kv_type=kv_type, threads=2, prefill_chunk=40, staging=64 * 1024, ring=1 << 18)
    with Model.open(store, Cap(weight_memory=1_000_000), context=CONTEXT, run=run) as model:
        session = model.session()
        out = [model.logits(session, TOKENS[session.length : session.length + count]) for count in steps]
        assert session.length == len(TOKENS)
    return np.concatenate(out)


@needs_native
@pytest.mark.parametrize("kv_type", ["f32", "f16", "int8"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_decode_is_prefill_bit_for_bit(packed, variant: str, kv_type: KvType) -> None:
    """The native backend's sums do not depend on how many tokens are computed together."""
    store = packed(variant).store
    whole = logits(store, "native", kv_type, steps=[150])
    for steps in ([1] * 150, [37, *[1] * 20, 60, 33]):
        assert np.array_equal(logits(store, "native", kv_type, steps=steps), whole)


@needs_native
@pytest.mark.parametrize("kv_type", ["f32", "f16", "int8"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_the_backends_agree(packed, variant: str, kv_type: KvType) -> None:
    store = packed(variant).store
    for steps in ([150], [20, *[1] * 130]):
        native, torch = (logits(store, backend, kv_type, steps=steps) for backend in ("native", "torch"))
        assert (
            np.abs(native - torch).max() <= {"f32": 1e-4, "f16": 2e-3, "int8": 2e-2}[kv_type]
        )  # a value may round to either side


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounded_keys_and_values_are_near_the_exact_ones(packed, backend: BackendName) -> None:
    exact, *rounded = (logits(packed("llama").store, backend, kv, steps=[150]) for kv in ("f32", "f16", "int8"))
    half, integers = (np.abs(exact - other).max() for other in rounded)
    assert 0 < half <= 0.01
    assert half < integers <= 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cap", [Cap(), Cap(weight_memory=1_000_000)])
def test_rounded_keys_and_values_take_less_memory(packed, backend: BackendName, cap: Cap) -> None:
    sizes = []
    kinds: tuple[KvType, ...] = ("f32", "f16", "int8")
    for kv_type in kinds:
        run = RunConfig(backend=backend, kv_type=kv_type)
        with Model.open(packed("llama").store, cap, context=CONTEXT, run=run) as model:
            caches = model.session().cache_of(model)
            sizes.append((model.plan.kv_cache, sum(t.nbytes for kv in caches for t in kept(kv))))
            assert sizes[-1][1] <= model.plan.kv_cache
            rows = codec_named(KV_CODECS[kv_type]).row_bytes(model.facts.head_dim)
            sizes[-1] = tuple(size / rows for size in sizes[-1])
    assert sizes[0] == sizes[1] == sizes[2]


def kept(kv: Any) -> tuple[Any, Any]:
    """The buffers of keys and values."""
    return kv.raw if hasattr(kv, "raw") else (kv.k, kv.v)


# -- text


PROMPT = "Once upon a time, there was a dog. One day, he"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.flash"
    flashinfer.pack(Path(flashinfer.__file__).parent / "_demo", path)
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_type", ["f16", "int8"])
def test_a_session_with_rounded_keys_and_values_goes_on_the_same(
    demo: Path, tmp_path: Path, backend: str, kv_type: str
) -> None:
    file = tmp_path / "chat.session"
    how = {"context": 256, "backend": backend, "kv_type": kv_type}
    with load(demo, **how) as model:
        whole = model.generate(PROMPT, max_new_tokens=40, temperature=0)
        assert len(whole.tokens) == 40
    with load(demo, **how) as model:
        first = model.generate(PROMPT, max_new_tokens=15, temperature=0, session=file)
    with load(demo, **how, weight_memory="5MiB") as model:
        second = model.generate("", max_new_tokens=25, temperature=0, session=file)
    assert first.tokens + second.tokens == whole.tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_type", ["f16", "int8"])
def test_saved_keys_and_values_are_restored_bit_for_bit(packed, backend: BackendName, kv_type: KvType) -> None:
    run = RunConfig(backend=backend, kv_type=kv_type)
    with Model.open(packed("llama").store, context=CONTEXT, run=run) as model:
        session = model.session()
        model.step(session, TOKENS[:70])
        other = model.restore(list(model.save(session)), CONTEXT)
        assert other.length == 70
        for count in (1, 1, 30, 1):
            tokens = TOKENS[session.length : session.length + count]
            assert np.array_equal(model.logits(other, tokens), model.logits(session, tokens))


# -- an installation without the core


def test_without_the_native_core_it_is_an_error_to_ask_for_it(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flashinfer.backend.native_backend", raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer.native._kernels", None)
    with pytest.raises(DeviceError, match=r"native core cannot be used .*use torch"):
        Model.open(packed("llama").store, context=CONTEXT, run=RunConfig(backend="native"))
    assert not has_native()
    assert open_backend("cpu", 1).name == "torch-cpu"
    with Model.open(packed("llama").store, context=CONTEXT) as model:
        assert model.step(model.session(), [5]).shape == (96,)
