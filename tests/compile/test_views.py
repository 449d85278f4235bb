"""Tensors that a layout cuts out of a checkpoint's are those that numpy cuts out of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flashinfer import pack
from flashinfer.checkpoint import TensorInfo
from flashinfer.engine import Model
from flashinfer.errors import CheckpointError, LayoutError
from flashinfer.layout.view import Block, Joined, View, in_halves, taken_rows
from flashinfer.pack.views import Views
from tests.families import make


class Memory:
    """A checkpoint of float32 arrays; `most` is the largest number of values that was asked for at once."""

    def __init__(self, **arrays: Any) -> None:
        self.path, self.config, self.text = Path("memory"), {}, {}
        self._arrays = {n: np.ascontiguousarray(a, dtype=np.float32) for n, a in arrays.items()}
        self.tensors = {n: TensorInfo(n, "f32", a.shape) for n, a in self._arrays.items()}
        self.most = 0

    def _words(self, name: str) -> np.ndarray:
        return self._arrays[name].reshape(self.tensors[name].matrix).view(np.uint32)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._counted(self._words(name)[start:stop].copy())

    def read_columns(self, name: str, columns: Any) -> np.ndarray:
        return self._counted(self._words(name)[:, columns].copy())

    def _counted(self, words: np.ndarray) -> np.ndarray:
        self.most = max(self.most, words.size)
        return words

    def will_need(self, name: str) -> None:
        assert name in self.tensors

    def close(self) -> None:
        pass


@st.composite
def cuts(draw: Any) -> tuple[np.ndarray, View, np.ndarray]:
    """A matrix, a view of it, and what the view should be, cut by reshaping."""
    groups, rotary, rest, parts, cols = (draw(st.integers(low, 4)) for low in (1, 1, 0, 1, 1))
    dim, part = 2 * rotary + rest, draw(st.integers(0, parts - 1))
    whole = np.arange(groups * parts * dim * cols, dtype=np.float32).reshape(groups, parts, dim, cols)
    expected = whole[:, part]
    rows = taken_rows(groups * parts * dim, groups, part * dim, (part + 1) * dim)
    if draw(st.booleans()):
        rows = in_halves(rows, dim, 2 * rotary)
        turned = expected[:, : 2 * rotary]
        expected = np.concatenate([turned[:, ::2], turned[:, 1::2], expected[:, 2 * rotary :]], axis=1)
    matrix, transposed = whole.reshape(-1, cols), draw(st.booleans())
    expected = expected.reshape(-1, cols)
    return (matrix.T if transposed else matrix), View(("m",), expected.shape, rows, transposed), expected


@given(cuts(), st.data())
def test_rows_and_columns(cut: tuple[np.ndarray, View, np.ndarray], data: st.DataObject) -> None:
    matrix, view, expected = cut
    views = Views(Memory(m=matrix), {"v": view})
    rows, cols = expected.shape
    assert views.tensors["v"] == TensorInfo("v", "f32", expected.shape)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert (views.read_rows("v", start, stop).view(np.float32) == expected[start:stop]).all()
    chosen = np.array(data.draw(st.lists(st.integers(0, cols - 1), min_size=1, max_size=6)))
    assert (views.read_columns("v", chosen).view(np.float32) == expected[:, chosen]).all()
    assert (views.read_columns("v", slice(0, cols - 1)).view(np.float32) == expected[:, : cols - 1]).all()
    assert (views.read_rows("m", 0, 1).view(np.float32) == matrix[:1]).all()


def test_reads_no_more_than_the_span() -> None:
    source = Memory(m=np.zeros((3000, 10)))
    views = Views(source, {"v": View(("m",), (1000, 10), taken_rows(3000, 100, 10, 20))})
    for start in range(0, 1000, 20):
        views.read_rows("v", start, start + 20)
    assert source.most <= 3 * 20 * 10


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_vectors_one_after_the_other(plus: float) -> None:
    source = Memory(a=[1, 2, 3], b=[4, 5, 6], table=[[1, 2, 3], [4, 5, 6]])
    order = np.array([0, 2, 1, 3, 5, 4])
    for names in (("a", "b"), ("table",)):
        views = Views(source, {"v": View(names, (6,), order, plus=plus)})
        views.will_need("v")
        expected = np.array([[1, 3, 2, 4, 6, 5]], dtype=np.float32) + np.float32(plus)
        assert (views.read_rows("v", 0, 1).view(np.float32) == expected).all()
        assert (views.read_columns("v", slice(1, 4)).view(np.float32) == expected[:, 1:4]).all()


def test_halves_turn_as_pairs_do() -> None:
    """Rotating halves of reordered values is rotating neighbours (arXiv 2104.09864, equation 34)."""
    x, angle = np.random.default_rng(0).normal(size=10), np.array([0.3, 1.1, 2.0])
    pairs = x[:6].reshape(3, 2)
    c, s = np.cos(angle), np.sin(angle)
    turned = np.stack([pairs[:, 0] * c - pairs[:, 1] * s, pairs[:, 1] * c + pairs[:, 0] * s], axis=1).reshape(-1)
    order = in_halves(np.arange(10), 10, 6)
    y = x[order]
    halves = np.concatenate([y[:3] * c - y[3:6] * s, y[3:6] * c + y[:3] * s, y[6:]])
    np.testing.assert_allclose(halves, np.concatenate([turned, x[6:]])[order])


@pytest.mark.parametrize("case", ["gpt2", "phi3", "persimmon"])
def test_other_packings_give_the_same_bits(tmp_path: Path, case: str) -> None:
    """Columns and single rows of views, too: a permuted store that holds its decision matrix in the bundles."""
    checkpoint = make(case, tmp_path / "checkpoint", "bfloat16")
    order = [np.random.default_rng(i).permutation(107) for i in range(3)]
    pack(checkpoint, tmp_path / "plain")
    pack(checkpoint, tmp_path / "other", permutation=order, decision="bundled", bundles_per_record=3)
    logits = []
    for store in ("plain", "other"):
        with Model.open(tmp_path / store) as model:
            logits.append(model.logits(model.session(), list(range(3, 20))))
    assert (logits[0] == logits[1]).all()


@st.composite
def mixtures(draw: Any) -> tuple[dict[str, np.ndarray], Joined, np.ndarray]:
    """Tensors of experts (one each or one for all, fused with others, turned over), a view of them, and what it is."""
    count, size, width, shared = (draw(st.integers(low, 5)) for low in (1, 1, 1, 0))
    columns, stacked, turned, step = (draw(st.booleans()) for _ in range(4))
    rows, every = (width, 1) if columns else (size, 1 + step)
    start, fused = draw(st.integers(0, 2)), rows * every + 3
    whole = np.arange(count * fused * (size if columns else width), dtype=np.float32).reshape(count, fused, -1)
    expected = [e[start : start + rows * every : every] for e in whole]
    stored = whole.transpose(0, 2, 1) if turned else whole
    arrays = {"all": stored} if stacked else {f"e{e}": m for e, m in enumerate(stored)}
    high = stored.shape[1]
    blocks = [
        Block("all" if stacked else f"e{e}", e * high if stacked else 0, high, rows, turned, start, every)
        for e in range(count)
    ]
    sizes = [size] * count
    if shared:
        arrays["shared"] = -np.arange(shared * width, dtype=np.float32).reshape(
            (width, shared)[:: 1 if columns else -1]
        )
        expected.append(arrays["shared"])
        blocks.append(Block("shared", 0, len(arrays["shared"]), len(arrays["shared"])))
        sizes.append(shared)
    total = np.concatenate(expected, axis=1 if columns else 0)
    return arrays, Joined(tuple(blocks), tuple(sizes), total.shape, columns), total


@given(made=mixtures(), data=st.data())
def test_experts_joined(made: Any, data: Any) -> None:
    arrays, view, expected = made
    views = Views(Memory(**arrays), {"view": view})
    assert views.tensors["view"].shape == expected.shape
    start = data.draw(st.integers(0, sum(view.sizes) - 1))
    stop = data.draw(st.integers(start + 1, sum(view.sizes)))
    if view.columns:
        found, wanted = views.read_columns("view", slice(start, stop)), expected[:, start:stop]
    else:
        found, wanted = views.read_rows("view", start, stop), expected[start:stop]
    assert np.array_equal(np.ascontiguousarray(found).view(np.float32), wanted)
    views.will_need("view")


def test_experts_of_one_layer_are_of_one_type() -> None:
    source = Memory(a=np.zeros((2, 3)), b=np.zeros((2, 3)))
    source.tensors["b"] = TensorInfo("b", "f16", (2, 3))
    view = Joined((Block("a", 0, 2, 2), Block("b", 0, 2, 2)), (2, 2), (4, 3), columns=False)
    with pytest.raises(CheckpointError, match="tensors a and b are f32 and f16; experts of one layer"):
        Views(source, {"view": view})


def spoilt(checkpoint: Path, to: Path, change: Any) -> Path:
    """A copy of a checkpoint of one file, its tensors and its config changed."""
    to.mkdir()
    tensors, config = load_file(checkpoint / "model.safetensors"), json.loads((checkpoint / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(config))
    return to


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(EXPERT), rf"tensor {EXPERT} \(role layers\.1\.ffn\.up\.weight\) is missing"),
        (lambda t, c: t.update({EXPERT: t[EXPERT][:20].copy()}), rf"tensor {EXPERT} has shape \[20, 40\], \[24, 40\]"),
        (lambda t, c: c.update(num_local_experts=10**9), "1000000000 experts for"),
        (lambda t, c: c.update(num_local_experts=5), "has shape|no place for tensor"),
        (lambda t, c: c.update(num_experts_per_tok=7), "7 experts a token, of 6"),
        (lambda t, c: c.update(mlp_only_layers=3), "mlp_only_layers = 3, a list was expected"),
        (lambda t, c: c.update(decoder_sparse_step=0), "each 0-th one"),
        (lambda t, c: c.update(num_hidden_layers=10**9), "1000000000 layers"),
    ],
)
def test_a_mixture_that_does_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint = make("qwen3_moe", tmp_path / "checkpoint")
    with pytest.raises(LayoutError, match=message):
        pack(spoilt(checkpoint, tmp_path / "spoilt", change), tmp_path / "store")
