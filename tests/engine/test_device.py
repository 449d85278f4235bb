"""A device with memory of its own: the same bits as without, nothing beyond its cap, every byte counted.

The device is the CPU (`backend.APART`), which has only what was copied to it, by an engine that copies as late as it
may and leaves garbage until then.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer import backend as backends
from flashinfer import pack
from flashinfer.backend import APART, has_native, torch_backend
from flashinfer.config import BackendName, CacheConfig, Cap, RunConfig
from flashinfer.engine import Model, Session
from flashinfer.errors import CapTooLargeError, CapTooSmallError, DeviceError, StoreError
from flashinfer.memory import Mode
from flashinfer.store import open_store
from tests.backend.late_copies import LateCopies
from tests.checkpoints import make_llama, make_opt, save
from tests.engine.strict_reader import StrictReader
from tests.families import SIZES

PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 89, 37)]
DECODED = [int(t) for t in np.random.default_rng(4).integers(3, 89, 7)]
CONTEXT = 96
BACKENDS: list[BackendName] = ["torch", *(["native"] if has_native() else [])]
CASES = ["sparse", "records", "dense", "opt", "experts"]
LARGE = 1 << 30


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "HostCopies", LateCopies)
    monkeypatch.setattr(torch_backend, "PARALLEL_WORK", 0)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("device")
    sizes: dict[str, Any] = {"intermediate_size": 330, "vocab_size": 97, "max_position_embeddings": CONTEXT}
    sparse = make_llama(root / "relu", dtype="float16", hidden_act="relu", mlp_bias=True, **sizes)
    dense = make_llama(root / "silu", dtype="bfloat16", hidden_act="silu", tie_word_embeddings=True, **sizes)
    opt = make_opt(root / "opt", dtype="float32", ffn_dim=200, vocab_size=97, max_position_embeddings=CONTEXT)
    config = AutoConfig.for_model("mixtral", **(SIZES | {"num_local_experts": 6, "num_experts_per_tok": 2}))
    experts = save(AutoModelForCausalLM.from_config, config, root / "mixtral", "float16")
    made = {name: root / f"{name}.flash" for name in CASES}
    order = [np.random.default_rng(i).permutation(330) for i in range(3)]
    pack(sparse, made["sparse"], bundles_per_record=1)
    pack(sparse, made["records"], bundles_per_record=7, permutation=order)
    pack(dense, made["dense"], bundles_per_record=3)
    pack(opt, made["opt"], quant="int8")
    pack(experts, made["experts"])
    return made


def logits(
    store: Path, cap: Cap, run: RunConfig, device: str = APART, mode: Mode = "cached"
) -> list[npt.NDArray[np.float32]]:
    with Model.open(store, cap, context=CONTEXT, run=run, device=device, mode=mode) as model:
        session = model.session()
        assert (model.plan.device is None) == (device == "cpu")
        assert model.plan.device is None or model.plan.device.total <= model.plan.device.cap
        return [model.logits(session, PROMPT), *(model.step(session, [token]) for token in DECODED)]


def decode(model: Model, session: Session) -> None:
    for token in DECODED:
        model.step(session, [token])


@cache
def expected(store: Path, backend: BackendName, mode: Mode) -> list[npt.NDArray[np.float32]]:
    return logits(store, Cap(weight_memory=LARGE), RunConfig(backend=backend), "cpu", mode)


@cache
def floors(store: Path, run: RunConfig, mode: Mode) -> tuple[int, int]:
    """Of the host, and of the device."""
    found = []
    for cap in (Cap(weight_memory=1, vram=LARGE), Cap(weight_memory=LARGE, vram=1)):
        with pytest.raises(CapTooSmallError) as e:
            Model.open(store, cap, context=CONTEXT, run=run, mode=mode, device=APART)
        found.append(e.value.floor)
    return found[0], found[1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(CASES),
    backend=st.sampled_from(BACKENDS),
    mode=st.sampled_from(["cached", "cached", "cached", "always-miss", "naive"]),
    host=st.floats(0, 1.1),
    there=st.floats(0, 1.1),
    chunk=st.integers(1, 40),
    window=st.integers(0, 6),
    retention=st.sampled_from(["frequency", "window"]),
    ring=st.sampled_from([0, 50_000]),
    staging=st.sampled_from([0, 100_000]),
    lookahead=st.booleans(),
)
def test_bit_for_bit(
    stores, case, backend, mode, host, there, chunk, window, retention, ring, staging, lookahead
) -> None:
    run = RunConfig(
        backend=backend, prefill_chunk=chunk, cache=CacheConfig(window=window, retention=retention), ring=ring,
        staging=staging, threads=1, lookahead=lookahead,
    )  # fmt: skip
    size = open_store(stores[case]).manifest.weight_bytes()
    dram, vram = (
        floor + int(share * size) for floor, share in zip(floors(stores[case], run, mode), (host, there), strict=True)
    )
    found = logits(stores[case], Cap(weight_memory=dram, vram=vram), run, mode=mode)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected(stores[case], backend, mode), strict=True))


@pytest.mark.parametrize("case", ["sparse", "dense"])
def test_every_weight_that_is_not_there_is_copied_and_counted(stores, case: str) -> None:
    """With nothing resident on the device: all matrices, and the bundles of the neurons needed, for each token."""
    run = RunConfig(threads=1)
    vram = floors(stores[case], run, "cached")[1]
    with Model.open(stores[case], Cap(weight_memory=LARGE, vram=vram), context=CONTEXT, run=run, device=APART) as model:
        m, session = model.store.manifest, model.session()
        assert model.plan.device is not None
        assert not model.plan.device.resident
        assert not any(model.plan.device.slots)
        model.step(session, PROMPT)
        assert model.ledger.load.copied_bytes == 0
        decode(model, session)
        account = model.ledger.decode
        table = "embed.weight" if not m.facts.tied_head else ""
        matrices = sum(t.bytes for name, t in m.tensors.items() if len(t.shape) == 2 and name != table)
        layer, tokens = m.layers[0], len(DECODED)
        neurons = account.copied_bytes - tokens * matrices
        assert neurons % layer.bundle_bytes == 0
        whole = tokens * sum(n.neurons for n in m.layers) * layer.bundle_bytes
        assert neurons == whole if case == "dense" else 0 < neurons == account.hits * layer.bundle_bytes < whole
        assert account.copied_per_token == account.copied_bytes / tokens
        assert 0 < account.copies <= account.copied_bytes


def test_what_is_there_is_copied_once(stores) -> None:
    with Model.open(stores["dense"], Cap(weight_memory=LARGE, vram=LARGE), context=CONTEXT, device=APART) as model:
        m, plan = model.store.manifest, model.plan
        assert plan.device is not None
        assert plan.device.resident == {name for name, t in m.tensors.items() if len(t.shape) == 2}
        assert not plan.resident
        assert plan.device.slots == tuple(layer.records for layer in m.layers)
        matrices = sum(m.tensors[name].bytes for name in plan.device.resident)
        assert model.ledger.load.copied_bytes == matrices + sum(layer.bytes for layer in m.layers)
        model.step(model.session(), PROMPT)
        assert model.ledger.prefill.copied_bytes == 0


def test_records_change_tiers_without_a_read(stores) -> None:
    """All are in some slot: what is needed rises to the device, what makes room for it falls to DRAM."""
    run, store = RunConfig(threads=1), stores["sparse"]
    vram = floors(store, run, "cached")[1]
    while True:
        vram += 60_000
        with Model.open(store, Cap(weight_memory=LARGE, vram=vram), context=CONTEXT, run=run, device=APART) as model:
            near, far, m = model.plan.near, model.plan.slots, model.store.manifest
            if not all(near) or sum(near) < 50:
                continue
            assert [a + b for a, b in zip(near, far, strict=True)] == [layer.records for layer in m.layers]
            session = model.session()
            model.step(session, PROMPT)
            decode(model, session)
            account, size = model.ledger.decode, m.layers[0].record_bytes
            assert account.bytes_read == account.misses == 0
            assert account.copied_back_bytes > 0
            assert account.copied_back_bytes % size == 0
            assert model.effective_window == run.cache.window
            return


@pytest.mark.parametrize(("room", "fits"), [(200_000, True), (0, False)])
def test_who_is_needed_stays_on_the_device(stores, monkeypatch: pytest.MonkeyPatch, room: int, fits: bool) -> None:
    """In decode only what changes comes to the host, unless what must be read does not fit the buffers at once."""
    run, store = RunConfig(backend="torch", threads=1), stores["sparse"]
    host, there = floors(store, run, "cached")
    asked: list[int] = []

    def noted(self: torch_backend.TorchBackend, flags: Any) -> Any:
        asked.append(len(flags))
        return flags.numpy()

    monkeypatch.setattr(torch_backend.TorchBackend, "marks", noted)
    cap = Cap(weight_memory=host + room, vram=there + 460_000)
    with Model.open(store, cap, context=CONTEXT, run=run, device=APART) as model:
        assert all(model.plan.near)
        session = model.session()
        model.step(session, PROMPT)
        assert asked
        asked.clear()
        found = [model.step(session, [token]) for token in DECODED]
        assert (not asked) == fits
        account = model.ledger.decode
        assert account.misses > 0
        assert account.copied_back_bytes > 0
    whole = expected(store, "torch", "cached")
    assert all(np.array_equal(a, b) for a, b in zip(found, whole[1:], strict=True))


def test_what_the_window_had_is_brought_back(stores) -> None:
    """A session that is restored goes on with the same bits; its records come back to slots of both tiers."""
    run, store = RunConfig(threads=1, prefill_chunk=16), stores["records"]
    vram = floors(store, run, "cached")[1] + 400_000
    cap = Cap(weight_memory=floors(store, run, "cached")[0] + 250_000, vram=vram)
    with Model.open(store, cap, context=CONTEXT, run=run, device=APART) as model:
        assert any(model.plan.near)
        session = model.session()
        model.step(session, PROMPT)
        saved, window = list(model.save(session)), model.window()
        expected = [model.step(session, [token]) for token in DECODED]
    with Model.open(store, cap, context=CONTEXT, run=run, device=APART) as model:
        session = model.restore(saved, CONTEXT, window)
        assert all(np.array_equal(model.step(session, [t]), e) for t, e in zip(DECODED, expected, strict=True))


@pytest.mark.parametrize("at", range(6))
def test_a_step_that_was_interrupted_can_be_made_again(stores, at: int) -> None:
    """Ctrl-C at a wait for reads: what was being copied is awaited, and the layer starts again, empty."""
    readers: list[StrictReader] = []

    def opened(paths: list[Path]) -> StrictReader:
        readers.append(StrictReader([path.read_bytes() for path in paths]))
        return readers[-1]

    run, store = RunConfig(threads=1, staging=0, ring=0), stores["sparse"]
    host, there = floors(store, run, "cached")
    cap = Cap(weight_memory=host + 20_000, vram=there + 300_000)
    with Model.open(store, cap, context=CONTEXT, run=run, device=APART, reader_of=opened) as model:
        assert any(model.plan.near)
        session = model.session()
        whole = expected(store, run.backend, "cached")
        readers[0].interrupt_at = at
        with pytest.raises(KeyboardInterrupt):
            model.logits(session, PROMPT)
        assert np.array_equal(model.logits(session, PROMPT), whole[0])
        readers[0].interrupt_at = at
        with pytest.raises(KeyboardInterrupt):
            decode(model, session)
        done = session.length - len(PROMPT)
        readers[0].interrupt_at = None
        for token, logits in zip(DECODED[done:], whole[1 + done :], strict=True):
            assert np.array_equal(model.step(session, [token]), logits)


@pytest.mark.parametrize(("case", "share"), [("dense", 0.0), ("dense", 0.4), ("dense", 1.0), ("sparse", 0.0)])
def test_copies_are_predicted(stores, case: str, share: float) -> None:
    """But for who fires, which one assumes."""
    run, store = RunConfig(threads=1), stores[case]
    vram = floors(store, run, "cached")[1] + int(share * open_store(store).manifest.weight_bytes())
    with Model.open(store, Cap(weight_memory=LARGE, vram=vram), context=CONTEXT, run=run, device=APART) as model:
        session = model.session()
        model.step(session, PROMPT)
        decode(model, session)
        found = model.predict(run.io.disk, run.rates, prompt_tokens=8)
        account, layers = model.ledger.decode, model.store.manifest.layers
        fired = account.hits / len(DECODED) * layers[0].bundle_bytes
        assumed = found.firing.density * sum(n.neurons * n.bundle_bytes for n in layers)
        more = 0.0 if case == "dense" else fired - assumed
        assert account.copied_per_token == pytest.approx(found.pcie_bytes + more)
        assert found.vram_bytes > found.pcie_bytes


def test_a_damaged_matrix_is_found_on_its_way_to_the_device(stores, tmp_path: Path) -> None:
    import shutil

    store = tmp_path / "damaged.flash"
    shutil.copytree(stores["dense"], store)
    opened = open_store(store)
    role = "layers.1.attn.q.weight"
    file, tensor = opened.path_of(opened.manifest.dense), opened.manifest.tensors[role]
    data = bytearray(file.read_bytes())
    data[tensor.offset + tensor.bytes // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=rf"{role} of .* does not match its checksum"):
        Model.open(store, Cap(weight_memory=LARGE), context=CONTEXT, device=APART)


def test_the_device_has_no_byte_beyond_its_cap(stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """What weights take there is allocated at once, and the engine is told the limit before."""
    asked: list[tuple[str, int]] = []

    class Noting(LateCopies):
        def limit(self, size: int) -> None:
            asked.append(("limit", size))
            super().limit(size)

        def allocate(self, size: int) -> Any:
            asked.append(("allocate", size))
            return super().allocate(size)

    monkeypatch.setattr(backends, "HostCopies", Noting)
    vram = floors(stores["sparse"], RunConfig(threads=1), "cached")[1] + 150_000
    asked.clear()
    with Model.open(stores["sparse"], Cap(weight_memory=LARGE, vram=vram), context=CONTEXT, device=APART) as model:
        plan = model.plan.device
        assert plan is not None
        assert asked == [("limit", vram), ("allocate", plan.weight_staging + plan.weight_resident + plan.weight_slots)]
        assert (
            plan.weight_total + plan.kv_cache + plan.activations + plan.bookkeeping + plan.overhead
            == plan.total
            <= vram
        )


def test_vram_without_a_device_of_its_own(stores) -> None:
    with pytest.raises(DeviceError, match=r"^--vram .* leave it out, or add --device cuda$"):
        Model.open(stores["dense"], Cap(vram=1 << 30), context=CONTEXT)


def test_vram_below_the_floor_says_what_to_do(stores) -> None:
    with pytest.raises(CapTooSmallError, match=r"below the floor of .* raise --vram.*--device cpu") as e:
        Model.open(stores["dense"], Cap(vram=1000), context=CONTEXT, device=APART)
    floor = e.value.floor
    with Model.open(stores["dense"], Cap(vram=floor), context=CONTEXT, device=APART) as model:
        assert model.plan.device is not None
        assert model.plan.device.total == model.plan.device.cap == floor
    with pytest.raises(CapTooSmallError):
        Model.open(stores["dense"], Cap(vram=floor - 1), context=CONTEXT, device=APART)


def test_a_long_context_is_named_as_the_reason(tmp_path: Path) -> None:
    pack(make_llama(tmp_path / "long", max_position_embeddings=100_000), tmp_path / "long.flash")
    with pytest.raises(CapTooSmallError, match=r"lower --context \(now 100000\)"):
        Model.open(tmp_path / "long.flash", Cap(vram=1000), context=100_000, device=APART)


def test_more_vram_than_is_free(stores) -> None:
    with pytest.raises(CapTooLargeError, match=r"--vram cap .* only .* are free") as e:
        Model.open(stores["dense"], Cap(vram=1 << 60), context=CONTEXT, device=APART)
    assert e.value.usable < 1 << 60
