"""A text through a model layer by layer is what the model makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.backend import open_backend
from flashinfer.engine import Model
from flashinfer.errors import StoreError
from flashinfer.pack.recipe import Recipe
from flashinfer.store import open_store
from flashinfer.tune.gather import Source
from flashinfer.tune.layerwise import Layer, States, run_layer
from flashinfer.tune.perplexity import Protocol, perplexity
from flashinfer.tune.quantising import QuantJob, QuantOptions, codecs_of, matrices_of, walk
from flashinfer.tune.recode import Recoded
from flashinfer.tune.work import Work
from tests.families import make
from tests.tune.calibrating import KINDS, copy_of, make_store, token_ids

WINDOWS = [40, 17, 1, 2]


@contextmanager
def job_of(store: Path, windows: list[list[int]]) -> Iterator[QuantJob]:
    backend, opened = open_backend("cpu", 1), open_store(store)
    ids = [np.array(some, dtype=np.int64) for some in windows]
    work = Work(store, "test")
    try:
        yield QuantJob(
            opened, work, QuantOptions("f16"), backend, [], ids, max(map(len, ids)), lambda what, done, total: None
        )
    finally:
        work.remove()
        backend.close()


@pytest.mark.parametrize("packing", [{}, {"decision": "bundled", "permutation": [range(191, -1, -1)] * 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_the_model(kind: str, packing: dict, text: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path, kind, **packing)
    ids, bos = token_ids(store, text)[:70], 2 if kind == "opt" else 1
    with Model.open(store, context=32) as model:
        expected = perplexity(model, np.array(ids), Protocol(32, 31, bos))
    with job_of(store, [[bos, *ids[i : i + 31]] for i in range(0, 70, 31)]) as job:
        found = walk(job, Source(job.store), job.judge, "judging")
        assert not list(job.work.path.glob("*.states"))
    assert found.tokens == expected.tokens == 70
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)


@pytest.mark.parametrize("case", ["gemma3", "smollm3", "granite", "bamboo", "falcon-rw", "bloom", "minicpm"])
def test_every_layer_has_its_own_facts(case: str, tmp_path: Path) -> None:
    """Windows and ropes differ by layer, and only what comes into the first layer is an embedding."""
    pack(make(case, tmp_path / "checkpoint"), tmp_path / "store")
    ids = np.random.default_rng(1).integers(3, 89, 70)
    with Model.open(tmp_path / "store") as model:
        expected = perplexity(model, ids, Protocol(71, 70, 1))
    with job_of(tmp_path / "store", [[1, *ids.tolist()]]) as job:
        found = walk(job, Source(job.store), job.judge, "judging")
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_heard_makes_what_comes_out(kind: str, packed: dict[str, Path], tmp_path: Path) -> None:
    """Both blocks add a matrix's product with what is said to come into it."""
    store = copy_of(packed[kind], tmp_path / "store")
    rng = np.random.default_rng(3)
    with job_of(store, [[1] * n for n in WINDOWS]) as job, Source(job.store) as source:
        layer, heard = Layer(source, 1), dict[str, list[np.ndarray]]()
        before, after = job.states("before").restart(), job.states("after").restart()
        before.append(rng.standard_normal((sum(WINDOWS), 64)).astype(np.float32))
        run_layer(
            layer, job.facts, job.backend, WINDOWS, before, after,
            lambda part, x: heard.setdefault(part, []).append(x.copy()),
        )  # fmt: skip
        expected = before.read(0, sum(WINDOWS))
        for part in ("attn.o", "ffn.down"):
            inputs, weights = np.concatenate(heard[f"{part}.weight"]), layer.matrix(f"{part}.weight")
            expected += inputs @ (weights if part == "ffn.down" else weights.T)
            if (bias := layer.get(f"{part}.bias")) is not None:
                expected += bias
        np.testing.assert_allclose(after.read(0, sum(WINDOWS)), expected, atol=1e-4)
        decision = f"ffn.{job.facts.decision}.weight"
        assert {"attn.q.weight", decision} <= {*heard}
        assert all(sum(map(len, some)) == sum(WINDOWS) for some in heard.values())


def test_a_layer_is_run_with_what_it_was_changed_to(packed: dict[str, Path], tmp_path: Path) -> None:
    store = copy_of(packed["silu"], tmp_path / "store")
    with job_of(store, [[1] * 5]) as job, Source(job.store) as source:
        layer, states = Layer(source, 0), job.states("before").restart()
        states.append(np.ones((5, 64), dtype=np.float32))
        layer.matrix("ffn.down.weight")[:] = 0
        layer.matrix("attn.o.weight")[:] = 0
        run_layer(layer, job.facts, job.backend, [5], states, out := job.states("after").restart())
        bias = layer.get("ffn.down.bias")
        assert bias is not None
        np.testing.assert_allclose(out.read(0, 5), states.read(0, 5) + bias, atol=1e-6)


def test_recoded_weights_are_those_of_the_codec(packed: dict[str, Path], tmp_path: Path) -> None:
    """Wherever they lie, and by whatever way they are asked for."""
    store = open_store(packed["relu"])
    codecs = codecs_of(store.manifest, Recipe((("attn", "int4g32"), ("ffn", "nf4"), ("embed", "int8"))))
    assert {*codecs} == {*matrices_of(store.manifest)} - {"head.weight"}
    with Source(store) as plain, Recoded(store, codecs) as source:
        one, other = Layer(plain, 1), Layer(source, 1)
        for role, name in codecs.items():
            if role.startswith("layers.1."):
                part = role.removeprefix("layers.1.")
                a, b = one.matrix(part), other.matrix(part)
                assert not np.array_equal(a, b)
                assert source.codec(role).name == name
                assert np.abs(a - b).max() < 0.2 * np.abs(a).max()
        whole = b"".join(bytes(piece) for piece in source.tensor_chunks("embed.weight"))
        assert whole == b"".join(rows.tobytes() for _, rows in source.row_blocks("embed.weight"))


class TestStates:
    def test_there_and_back(self, tmp_path: Path) -> None:
        states = States(tmp_path / "s", 3).restart()
        values = np.arange(12, dtype=np.float32).reshape(4, 3)
        states.append(values[:1])
        states.append(values[1:])
        assert np.array_equal(states.read(1, 3), values[1:])
        states.remove()
        states.remove()
        assert not (tmp_path / "s").exists()

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        states = States(tmp_path / "s", 3).restart()
        with pytest.raises(StoreError, match="calibrate again"):
            states.read(0, 1)
        states.remove()
        with pytest.raises(StoreError, match="calibrate again"):
            states.read(0, 1)
