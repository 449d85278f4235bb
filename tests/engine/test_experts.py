"""A mixture of experts is its twin, bit for bit, whatever room there is; and only misses are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer import pack
from flashinfer.backend import has_native, torch_backend
from flashinfer.bench.cache import geometries, settings_for, study
from flashinfer.config import BackendName, CacheConfig, Cap, DiskCurve, IoConfig, Rates, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError, PredictorError
from flashinfer.memory import conditions_of
from flashinfer.model.neurons import NEURON_FILE
from flashinfer.recording import Recorder as Recorded
from flashinfer.recording import header_of, open_recording
from flashinfer.speed import predict
from flashinfer.store import open_store
from flashinfer.tune.candidates import Candidates
from flashinfer.tune.candidates import candidates as choose
from flashinfer.tune.greedy import prompts_of
from flashinfer.tune.judge import Setup, judge
from flashinfer.tune.perplexity import Protocol
from tests.checkpoints import save
from tests.engine.test_prefill_reads import Recorder
from tests.families import DEEPSEEK, SIZES
from tests.twin import Twin

RESOLVER = import_module("flashinfer.memory.resolve")  # a function of the package hides it
PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 89, 37)]
DECODED = [int(t) for t in np.random.default_rng(4).integers(3, 89, 9)]
CONTEXT = 96
BACKENDS: list[BackendName] = ["torch", *(["native"] if has_native() else [])]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "float16", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "shared": ("qwen2_moe", "bfloat16", {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 72, "shared_expert_intermediate_size": 96,
        "decoder_sparse_step": 2}),
    "mixed": ("qwen3_moe", "float32", {
        "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 130, "mlp_only_layers": [1],
        "norm_topk_prob": True, "head_dim": 12}),
    "biases": ("gpt_oss", "bfloat16", {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 72, "head_dim": 12,
        "sliding_window": 24}),
    "latent": ("deepseek_v3", "bfloat16", DEEPSEEK | {
        "moe_intermediate_size": 72, "num_key_value_heads": 4, "q_lora_rank": 24, "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    checkpoint: Path
    stores: tuple[Path, ...]
    """With as many neurons in a record as there can be, and with fewer."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    from transformers import AutoConfig, AutoModelForCausalLM

    out = {}
    for name, (model_type, dtype, config) in CASES.items():
        root = tmp_path_factory.mktemp(name)
        config = AutoConfig.for_model(model_type, **(SIZES | config))
        checkpoint = save(AutoModelForCausalLM.from_config, config, root / "checkpoint", dtype)
        stores = []
        for bundles in (None, 1, {"mixtral": 107, "shared": 4, "mixed": 26, "biases": 8, "latent": 9}[name]):
            stores.append(root / f"store-{bundles}")
            pack(checkpoint, stores[-1], bundles_per_record=bundles)
        out[name] = Made(checkpoint, tuple(stores))
    return out


@cache
def twin_logits(checkpoint: Path, store: Path, backend: BackendName) -> tuple[npt.NDArray[np.float32], ...]:
    with Model.open(store) as model:
        twin = Twin(checkpoint, model.facts, context=CONTEXT, backend=backend, choice=model.choice)
    return twin.logits(PROMPT), *(twin.logits([t])[0] for t in DECODED)


def floor_of(store: Path, **options: Any) -> int:
    with pytest.raises(CapTooSmallError) as e:
        Model.open(store, Cap(weight_memory=1), **options)
    return e.value.floor


def quarter_of(store: Path, **options: Any) -> Cap:
    """The least in which routers stay, and a quarter of the experts has a slot."""
    low, high = floor_of(store, **options), 10**7
    while high - low > 1000:
        middle = (low + high) // 2
        with Model.open(store, Cap(weight_memory=middle), **options) as model:
            m, plan = model.store.manifest, model.plan
            routers = {r for r, t in m.tensors.items() if len(t.shape) == 2 and ("router" in r or "shared_gate" in r)}
            enough = 4 * sum(plan.slots) >= sum(n.records for n in m.layers) and routers <= plan.resident
        low, high = (low, middle) if enough else (middle, high)
    return Cap(weight_memory=high)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(list(CASES)),
    packing=st.sampled_from([0, 1, 2]),
    share=st.floats(0, 1.2),
    window=st.integers(0, 8),
    retention=st.sampled_from(["frequency", "window"]),
    objective=st.sampled_from(["time", "bytes"]),
    threads=st.sampled_from([1, 2]),
    chunk=st.integers(1, 40),
    mode=st.sampled_from(["cached", "cached", "cached", "always-miss", "naive"]),
    backend=st.sampled_from(BACKENDS),
    ring=st.sampled_from([0, 50_000, 1 << 20]),
    lookahead=st.booleans(),
)
def test_bit_for_bit(
    made, monkeypatch, case, packing, share, window, retention, objective, threads, chunk, mode, backend, ring,
    lookahead,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch_backend, "PARALLEL_WORK", 0)
    monkeypatch.setattr(RESOLVER, "GUESS_SHARE", 4)  # in a model so small
    checkpoint, store = made[case].checkpoint, made[case].stores[packing]
    expected = twin_logits(checkpoint, made[case].stores[0], backend)
    run = RunConfig(
        io=IoConfig(objective=objective, threads=4), cache=CacheConfig(window=window, retention=retention),
        threads=threads, prefill_chunk=chunk, staging=128 * 1024, ring=ring, backend=backend, lookahead=lookahead,
    )  # fmt: skip
    options: dict[str, Any] = {"context": CONTEXT, "run": run, "mode": mode}
    floor = floor_of(store, **options)
    with Model.open(store, Cap(weight_memory=10**9), **options) as model:
        everything = model.plan.weight_total
    cap = max(floor, int(floor + share * (everything - floor)))
    with Model.open(store, Cap(weight_memory=cap), **options) as model:
        session = model.session()
        assert model.plan.total <= cap
        assert np.array_equal(model.logits(session, PROMPT), expected[0])
        for token, logits in zip(DECODED, expected[1:], strict=True):
            assert np.array_equal(model.step(session, [token]), logits)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lookahead", [False, True])
def test_a_quarter_of_the_experts(made, monkeypatch, case: str, lookahead: bool) -> None:
    """The bits of the twin; of the experts nothing is read but misses, and what was guessed in vain."""
    monkeypatch.setattr(RESOLVER, "GUESS_SHARE", 4)
    store = made[case].stores[0]
    expected = twin_logits(made[case].checkpoint, store, "auto")
    run = RunConfig(io=IoConfig(objective="bytes"), staging=64 * 1024, ring=0, lookahead=lookahead)
    cap, readers = quarter_of(store, run=run, context=CONTEXT), []

    def recorded(paths: list[Path]) -> Recorder:
        readers.append(Recorder(paths))
        return readers[-1]

    with Model.open(store, cap, run=run, context=CONTEXT, reader_of=recorded) as model:
        layers, session = model.store.manifest.layers, model.session()
        assert 0.25 <= sum(model.plan.slots) / sum(n.records for n in layers) < 0.5
        assert np.array_equal(model.logits(session, PROMPT), expected[0])
        readers[0].read.clear()
        for token, logits in zip(DECODED, expected[1:], strict=True):
            assert np.array_equal(model.step(session, [token]), logits)
        account = model.ledger.decode
    read = sum(end - start for file, start, end in readers[0].read if file == NEURON_FILE)
    sizes = {n.record_bytes for n in layers}
    assert account.hits > 0
    assert (account.guessed_bytes > 0) == lookahead
    if len(sizes) == 1:
        assert read == account.misses * sizes.pop() + account.guessed_bytes - account.guessed_useful
    else:  # dense layers between, whose records are of another size
        assert read <= account.misses * max(sizes) + account.guessed_bytes - account.guessed_useful


def test_records_are_whole_experts(made) -> None:
    """Or an even share of them where they are large, in whole pages."""
    for case in CASES:
        for store in made[case].stores:
            with Model.open(store) as model:
                experts = model.facts.experts
                layers = [n for n in model.store.manifest.layers if n.experts is not None]
            assert experts is not None
            assert layers
            for n in layers:
                assert n.record_bytes % 4096 == 0
                assert experts.size % n.bundles_per_record == 0
                assert n.experts == tuple(
                    (e * experts.size // n.bundles_per_record, size // n.bundles_per_record)
                    for e, size in enumerate([experts.size] * experts.count + [experts.shared_size] * (
                        experts.shared_size > 0))
                )  # fmt: skip


def test_fewer_experts_are_another_model(made) -> None:
    """An approximation that says so; as many as the model was made for is none."""
    store = made["mixtral"].stores[0]
    logits = {}
    for count in (None, 1, 2, 8):
        with Model.open(store, run=RunConfig(predictor=f"router:{count}" if count else "exact")) as model:
            logits[count] = model.logits(model.session(), PROMPT)
            assert ("experts for each token" in model.choice.note) == (count in (1, 8))
            model.step(model.session(), [5])
            assert model.ledger.decode.hits == (count or 2) * 3
    assert np.array_equal(logits[None], logits[2])
    assert np.abs(logits[1] - logits[2]).max() > 1e-3


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (RunConfig(predictor="router:9"), r"9 experts for each token is not in 1\.\.8"),
        (RunConfig(predictor="certified"), "the router says who is needed"),
        (RunConfig(predictor="low-rank"), "the router says who is needed"),
        (RunConfig(predictor="threshold"), "the router says who is needed"),
    ],
)
def test_refused(made, run: RunConfig, message: str) -> None:
    with pytest.raises(PredictorError, match=message):
        Model.open(made["mixtral"].stores[0], run=run)


@pytest.mark.parametrize("name", ["router", "auto", "exact"])
def test_the_router_under_every_name(made, name: str) -> None:
    with Model.open(made["mixtral"].stores[0], run=RunConfig(predictor=name)) as model:
        assert model.choice.kind == "router"


def test_a_window_comes_back(made) -> None:
    """What was saved of the cache's window is in slots again, in a model that has room for a quarter."""
    store = made["mixtral"].stores[2]
    with Model.open(store, quarter_of(store, context=CONTEXT), context=CONTEXT) as model:
        session = model.session()
        model.step(session, PROMPT)
        kept, window, next_logits = list(model.save(session)), model.window(), model.step(session, DECODED[:1])
        length = session.length
    with Model.open(store, quarter_of(store, context=CONTEXT), context=CONTEXT) as model:
        session = model.restore(kept, CONTEXT, window)
        assert model.window() == window
        assert np.array_equal(model.step(session, DECODED[:1]), next_logits)
        assert session.length == length


def test_who_looks_on_sees_the_chosen(made, tmp_path: Path) -> None:
    """A recording has the neurons of chosen experts, and replays with the records of the store."""
    store = made["mixed"].stores[0]
    with Model.open(store) as model, Recorded(tmp_path / "run", header_of(model.store.manifest, "router")) as recorder:
        session = model.session()
        model.observe(recorder)
        for tokens in (PROMPT, *([t] for t in DECODED)):
            model.step(session, tokens)
        model.observe(None)
        facts, needed = model.facts, model.ledger.decode.hits
    found = open_recording(tmp_path / "run")
    assert facts.experts is not None
    for layer in range(3):
        experts = facts.routed(layer)
        for token in [sets[-1] for sets in found.layer(layer)]:
            units = np.unique(token // experts.size) if experts else np.arange(0)
            assert len(token) == (facts.experts.per_token * experts.size if experts else facts.intermediate_size)
            assert len(units) == (facts.experts.per_token if experts else 0)
    curves = study(found, geometries(found, store, 1), shares=(1.0,), settings=settings_for([5]))
    assert curves.needed == needed


def test_quality_of_fewer_experts(made) -> None:
    """Scoring works, held against all the experts of the model; what one expert loses shows."""
    store, protocol = open_store(made["mixtral"].stores[0]), Protocol(24, 24, None)
    ids = np.array(PROMPT * 2)
    names = choose(store.manifest, None, ["router:1", "exact"], against=None, sweep=False, max_ppl_increase=0.01)
    assert names == Candidates("exact", ("router:1",))
    setup = Setup(protocol, prompts_of(ids, protocol, 4), Cap(), RunConfig())
    exact, one = (judge(store, ids, name, setup, progress=lambda done, total: None) for name in ("exact", "router:1"))
    assert exact.named[0].density == pytest.approx(2 / 8)
    assert exact.named[0].recall == 1.0
    assert one.named[0].density == pytest.approx(1 / 8)
    assert one.named[0].recall is None
    assert one.score.perplexity != exact.score.perplexity


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_bytes_are_predicted(made, share: float) -> None:
    """Given what is found in slots, the predicted bytes of a token are those of the ledger."""
    store, run = made["mixtral"].stores[0], RunConfig(io=IoConfig(objective="bytes"), staging=64 * 1024, ring=0)
    floor = floor_of(store, run=run, context=CONTEXT)
    with Model.open(store, Cap(weight_memory=10**9), run=run, context=CONTEXT) as model:
        cap = int(floor + share * (model.plan.weight_total - floor))
    with Model.open(store, Cap(weight_memory=cap), run=run, context=CONTEXT) as model:
        session = model.session()
        model.step(session, PROMPT)
        for token in DECODED:
            model.step(session, [token])
        account = model.ledger.decode
        conditions = conditions_of(model._settled.subject.manifest, model._settled.request, DiskCurve(), Rates())
        firing = tuple(replace(f, hit_rate=account.hit_rate) for f in conditions.firing)
        found = predict(replace(conditions, firing=firing), model.plan, prompt_tokens=len(PROMPT))
    assert found.flash_bytes == pytest.approx(account.bytes_per_token, rel=0.05)
