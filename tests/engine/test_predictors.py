"""Predictors in the engine: certified is exact, and an approximation is one and the same however bytes come."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer import pack
from flashinfer.backend import has_native
from flashinfer.choice import parse_predictor
from flashinfer.config import BackendName, CacheConfig, Cap, IoConfig, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError, PredictorError
from flashinfer.model.observe import Seen
from flashinfer.quant import CODECS
from tests.calibrated import calibrate_plainly
from tests.checkpoints import make_llama, make_opt
from tests.twin import Twin

PROMPT = [int(t) for t in np.random.default_rng(5).integers(3, 96, 29)]
DECODED = [int(t) for t in np.random.default_rng(6).integers(3, 96, 8)]
CONTEXT = 192
BACKENDS: list[BackendName] = ["torch", *(["native"] if has_native() else [])]
CASES = [("llama", "float16"), ("llama", "float32"), ("opt", "bfloat16")]
QUANTISED = [("llama", "int4g32z"), ("opt", "int8")]
"""Packed in a codec of no more than eight bits: a decision matrix is its own sketch."""
PACKINGS = [(0, 1), (1, 1), (2, 4)]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Made:
    checkpoint: Path
    separate: Path
    bundled: dict[tuple[int, int], Path]
    """(permutation seed, bundles per record) -> store with predictors; seed 0 is the original order."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    out = {}
    for family, dtype in CASES + QUANTISED:
        root = tmp_path_factory.mktemp("predictors")
        make = make_opt if family == "opt" else make_llama
        size = {"ffn_dim" if family == "opt" else "intermediate_size": 330}
        quant = dtype if dtype in CODECS else None
        kept = "float16" if quant else dtype
        checkpoint = make(root / "checkpoint", dtype=kept, max_position_embeddings=256, **size)
        pack(checkpoint, root / "separate", quant=quant)
        bundled = {}
        for seed, bundles in PACKINGS:
            order = [np.random.default_rng(seed * 10 + i).permutation(330) for i in range(3)] if seed else None
            path = root / f"bundled-{seed}-{bundles}"
            pack(checkpoint, path, quant=quant, decision="bundled", permutation=order, bundles_per_record=bundles)
            bundled[seed, bundles] = calibrate_plainly(path)
        out[f"{family}-{dtype}"] = Made(checkpoint, root / "separate", bundled)
    return out


@pytest.fixture(scope="module")
def silu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SwiGLU model with thresholds that keep some of its neurons."""
    root = tmp_path_factory.mktemp("silu")
    make_llama(root / "checkpoint", dtype="float16", max_position_embeddings=256, intermediate_size=330,
               hidden_act="silu")  # fmt: skip
    pack(root / "checkpoint", root / "store", bundles_per_record=1)
    return calibrate_plainly(root / "store")


def run(store: Path, config: RunConfig, share: float | None = None, mode: str = "cached") -> list[Floats]:
    """Logits of the prompt and of the decoded tokens, at that share of the weights."""
    cap = Cap()
    if share is not None:
        with Model.open(store, run=config, context=CONTEXT) as model:
            cap = Cap(weight_memory=int(share * model.store.manifest.weight_bytes()))
    try:
        model = Model.open(store, cap, run=config, context=CONTEXT, mode=mode)  # type: ignore[arg-type]
    except CapTooSmallError as e:
        model = Model.open(store, Cap(weight_memory=e.floor), run=config, context=CONTEXT, mode=mode)  # type: ignore[arg-type]
    with model:
        session = model.session()
        return [model.logits(session, PROMPT), *(model.step(session, [t]) for t in DECODED)]


@cache
def exact(store: Path, backend: BackendName) -> list[Floats]:
    return run(store, RunConfig(backend=backend))


def same(a: list[Floats], b: list[Floats], backend: BackendName) -> None:
    for x, y in zip(a, b, strict=True):
        if backend == "native":
            assert np.array_equal(x, y)
        else:  # torch sums tile by tile, and tiles of a larger set hold other neurons
            np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4)


KNOBS = {
    "packing": st.sampled_from(PACKINGS),
    "share": st.floats(0, 1.2),
    "window": st.integers(0, 6),
    "threads": st.sampled_from([1, 2]),
    "chunk": st.integers(1, 40),
    "mode": st.sampled_from(["cached", "cached", "always-miss"]),
    "lookahead": st.booleans(),
    "objective": st.sampled_from(["time", "bytes"]),
}


def config_of(predictor: str, backend: BackendName, **knobs: object) -> RunConfig:
    return RunConfig(
        predictor=predictor, backend=backend, threads=knobs["threads"], prefill_chunk=knobs["chunk"],
        lookahead=knobs["lookahead"], cache=CacheConfig(window=knobs["window"]),
        io=IoConfig(objective=knobs["objective"]),
    )  # type: ignore[arg-type]  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from([f"{f}-{d}" for f, d in CASES + QUANTISED]), backend=st.sampled_from(BACKENDS), **KNOBS)
def test_certified_is_exact(made: dict[str, Made], case: str, backend: BackendName, **knobs) -> None:
    config = config_of("certified", backend, **knobs)
    found = run(made[case].bundled[knobs["packing"]], config, knobs["share"], knobs["mode"])
    same(found, exact(made[case].separate, backend), backend)


@pytest.mark.parametrize("case", [f"{f}-{d}" for f, d in CASES + QUANTISED])
def test_exact_is_the_default_of_a_bundled_store_too(made: dict[str, Made], case: str) -> None:
    store, backend = made[case].bundled[0, 1], BACKENDS[-1]
    with Model.open(store) as model:
        assert model.choice.kind == "certified"
        assert not model.choice.note
    same(run(store, RunConfig(backend=backend)), exact(made[case].separate, backend), backend)
    same(run(store, RunConfig(backend=backend, predictor="all")), exact(made[case].separate, backend), backend)
    same(run(store, RunConfig(backend=backend), mode="naive"), exact(made[case].separate, backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_certified_reads_fewer_than_all(made: dict[str, Made], backend: BackendName) -> None:
    seen: list[float] = []

    class Count:
        def seen(self, layer: int, step: Seen) -> None:
            assert step.needed is not None
            assert step.needed[step.active].all()
            assert step.x.shape[0] == step.gate.shape[0] == len(step.active)
            seen.append(step.needed.mean() / max(step.active.mean(), 1e-9))

    with Model.open(made["llama-float16"].bundled[0, 1], run=RunConfig(backend=backend)) as model:
        model.observe(Count())
        model.step(model.session(), PROMPT)
    assert len(seen) == 3
    assert max(seen) < 1.6


# -- approximations


def approximate_twin(made: Made, predictor: str, backend: BackendName) -> list[Floats]:
    """The same approximation with no store of neurons, slots or plan: who is not named is multiplied with zero."""
    with Model.open(made.bundled[0, 1], run=RunConfig(predictor=predictor)) as model:
        twin = Twin(
            made.checkpoint, model.facts, context=CONTEXT, backend=backend, choice=model.choice, store=model.store
        )
    return [twin.logits(PROMPT), *(twin.logits([t])[0] for t in DECODED)]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from([f"{f}-{d}" for f, d in CASES]), backend=st.sampled_from(BACKENDS),
    level=st.sampled_from(["low-rank", "low-rank:0.99"]), **KNOBS,
)  # fmt: skip
def test_low_rank_is_its_twin(made: dict[str, Made], case: str, backend: BackendName, level: str, **knobs) -> None:
    config = config_of(level, backend, **knobs)
    found = run(made[case].bundled[knobs["packing"]], config, knobs["share"], knobs["mode"])
    same(found, cached_twin(made, case, level, backend), backend)


TWINS: dict[tuple[str, str, str], list[Floats]] = {}


def cached_twin(made: dict[str, Made], case: str, level: str, backend: BackendName) -> list[Floats]:
    key = (case, level, backend)
    if key not in TWINS:
        TWINS[key] = approximate_twin(made[case], level, backend)
    return TWINS[key]


def test_low_rank_is_not_exact_and_says_so(made: dict[str, Made]) -> None:
    store = made["llama-float32"].bundled[0, 1]
    found = run(store, RunConfig(predictor="low-rank"))
    assert any(not np.array_equal(a, b) for a, b in zip(found, run(store, RunConfig()), strict=True))
    with Model.open(store, run=RunConfig(predictor="low-rank")) as model:
        assert "low-rank" in model.choice.note
        assert "perplexity +1.00%" in model.choice.note


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(backend=st.sampled_from(BACKENDS), **KNOBS)
def test_thresholds_do_not_depend_on_how_bytes_come(silu: Path, backend: BackendName, **knobs) -> None:
    config = config_of("threshold", backend, **knobs)
    found = run(silu, config, knobs["share"], knobs["mode"])
    same(found, run(silu, RunConfig(predictor="threshold", backend=backend)), backend)


def test_thresholds_read_less_and_differ(silu: Path) -> None:
    read = {}
    for predictor in ("exact", "threshold", "threshold:0.7"):
        with Model.open(silu, run=RunConfig(predictor=predictor), mode="always-miss") as model:
            session = model.session()
            model.step(session, PROMPT)
            for token in DECODED:
                model.step(session, [token])
            read[predictor] = model.ledger.decode.useful_bytes
    assert read["threshold"] < read["threshold:0.7"] < read["exact"]
    exact_, found = run(silu, RunConfig()), run(silu, RunConfig(predictor="threshold"))
    assert any(not np.array_equal(a, b) for a, b in zip(exact_, found, strict=True))


# -- what a store does not have


@pytest.mark.parametrize("predictor", ["certified", "low-rank", "threshold", "low-rank:0.95"])
def test_a_store_that_was_not_calibrated_says_how(made: dict[str, Made], predictor: str) -> None:
    with pytest.raises(PredictorError, match="flashinfer calibrate"):
        Model.open(made["llama-float16"].separate, run=RunConfig(predictor=predictor))


def test_a_level_that_is_not_there_names_those_that_are(made: dict[str, Made]) -> None:
    with pytest.raises(PredictorError, match=r"low-rank:0\.95, low-rank:0\.99"):
        Model.open(made["llama-float16"].bundled[0, 1], run=RunConfig(predictor="low-rank:0.5"))


def test_no_such_predictor() -> None:
    with pytest.raises(ValueError, match="certified, low-rank, threshold"):
        parse_predictor("magic")


@pytest.mark.parametrize(("allowed", "kinds"), [(0.0, {"certified"}), (0.005, {"certified", "low-rank"})])
def test_auto_stays_within_what_it_may_cost(made: dict[str, Made], allowed: float, kinds: set[str]) -> None:
    run_ = RunConfig(predictor="auto", max_ppl_increase=allowed)
    with Model.open(made["llama-float16"].bundled[0, 1], run=run_) as model:
        assert model.choice.kind in kinds
        if model.choice.level is not None:
            assert model.choice.level.target == 0.99
