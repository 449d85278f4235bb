"""`calibrate --quant`: the store that packing so would have made, GPTQ, and what is kept in more bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer.cli import main
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError, DiskFullError, QuantError, TextError
from flashinfer.store import StoreUpdate, open_store, verify
from flashinfer.tune.perplexity import Protocol, Score, perplexity
from flashinfer.tune.quantise import QuantReport, quantise
from flashinfer.tune.quantising import QuantJob, QuantOptions, matrices_of
from flashinfer.tune.sensitive import Group, after, groups_of
from flashinfer.tune.work import NAME
from tests.tune.calibrating import CONTEXT, KINDS, QUICK, calibrated, contents, copy_of, make_store, token_ids

pytestmark = pytest.mark.usefixtures("quick_collections")

OPTIONS = QuantOptions("int4g32", tokens=160, held_out=48, context=CONTEXT)
GPTQ = replace(OPTIONS, gptq=True)


def quantised(
    store: Path,
    text: Path,
    options: QuantOptions = OPTIONS,
    *,
    cap: Cap | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> QuantReport:
    return quantise(store, text, options, cap=cap or Cap(), run=RunConfig(), device="cpu", progress=progress)


class TestNearest:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_the_store_that_packing_makes(self, kind: str, text: Path, tmp_path: Path) -> None:
        """Byte for byte, records of the size that suits smaller bundles among it."""
        path, recipe = make_store(tmp_path, kind), "ffn=int4,attn=nf4,layers.1.ffn.up.weight=int8"
        records = open_store(path).manifest.layers[0].bundles_per_record
        quantised(path, text, replace(OPTIONS, recipe=recipe))
        assert open_store(path).manifest.layers[0].bundles_per_record != records
        (tmp_path / "again").mkdir()
        assert contents(path) == contents(make_store(tmp_path / "again", kind, quant=recipe))
        assert not (path / NAME).exists()

    @pytest.mark.parametrize("recipe", ["int8g32,embed=int8g32,head=int8g32", "int4g32", "nf4"])
    def test_perplexity_is_that_of_the_store(
        self, recipe: str, packed: dict[str, Path], text: Path, tmp_path: Path
    ) -> None:
        """But for the rounding of activations that some kernels do."""
        path = copy_of(packed["silu"], tmp_path / "store")
        report = quantised(path, text, replace(OPTIONS, recipe=recipe))
        ids = np.array(token_ids(path, text)[: OPTIONS.held_out])
        for store, expected in ((packed["silu"], report.before), (path, report.after)):
            with Model.open(store, context=CONTEXT) as model:
                found = perplexity(model, ids, Protocol(CONTEXT, CONTEXT - 1, 1)).perplexity
            assert found == pytest.approx(expected, rel=1e-4)
        assert abs(report.before / report.after - 1) > 2e-4
        assert report.manifest.weight_bytes() < 0.6 * report.old.weight_bytes()

    def test_order_stays_and_predictors_go(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["relu"], tmp_path / "store")
        calibrated(path, text, QUICK)
        before = open_store(path)
        orders = [before.read_tensor(n.permutation) for n in before.manifest.layers if n.permutation]
        assert orders
        assert quantised(path, text, replace(OPTIONS, recipe="attn=int8g32,ffn=int8g32")).dropped
        after_ = open_store(path)
        assert verify(after_) == []
        found = [after_.read_tensor(n.permutation) for n in after_.manifest.layers if n.permutation]
        assert all(np.array_equal(a, b) for a, b in zip(orders, found, strict=True))
        assert {n.decision for n in after_.manifest.layers} == {"separate"}
        assert (after_.manifest.predictors, after_.calibration()) == (None, None)
        calibrated(path, text, QUICK)  # and can be made again
        assert verify(open_store(path)) == []


class TestGptq:
    @pytest.mark.parametrize("kind", KINDS)
    def test_bytes_are_those_of_the_codec(self, kind: str, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        """Same sizes, same scales where they are static; other codes."""
        ours, plain = copy_of(packed[kind], tmp_path / "ours"), copy_of(packed[kind], tmp_path / "plain")
        report = quantised(ours, text, GPTQ)
        quantised(plain, text)
        one, other = open_store(ours), open_store(plain)
        assert verify(one) == []
        assert matrices_of(one.manifest) == matrices_of(other.manifest)
        assert one.manifest.dense.bytes == other.manifest.dense.bytes
        role = "layers.1.attn.o.weight"
        a, b = (s.read_tensor(role) for s in (one, other))
        assert not np.array_equal(a, b)
        assert np.abs(a - b).max() < 1.0
        assert report.tokens == pytest.approx(OPTIONS.held_out, abs=1)

    def test_without_act_order(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        found = []
        for act_order in (True, False):
            path = copy_of(packed["opt"], tmp_path / str(act_order))
            quantised(path, text, replace(GPTQ, act_order=act_order))
            found.append(open_store(path).manifest.dense.xxh3)
        assert found[0] != found[1]

    def test_too_few_tokens(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["opt"], tmp_path / "store")
        with pytest.raises(TextError, match=r"takes 128 at least.*--tokens"):
            quantised(path, text, replace(GPTQ, tokens=90))

    @pytest.mark.parametrize("step", ["GPTQ", "judging the quantised store", "writing the weights"])
    def test_interrupted(self, step: str, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path, whole = copy_of(packed["relu"], tmp_path / "store"), copy_of(packed["relu"], tmp_path / "whole")
        before = contents(path)

        def stop(what: str, done: int, total: int) -> None:
            if what == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantised(path, text, GPTQ, progress=stop)
        assert contents(path) == before
        steps = []
        report = quantised(path, text, GPTQ, progress=lambda what, done, total: steps.append(what))
        assert report.resumed
        assert "judging the store as it is" not in steps
        assert not quantised(whole, text, GPTQ).resumed
        assert contents(path) == contents(whole)


class TestRefusals:
    @pytest.mark.parametrize(
        ("recipe", "said"),
        [
            ("int5", "choose one of"),
            ("layers.7.*=int4", "fits no matrix"),
            ("f16", "nothing to quantise"),
        ],
    )
    def test_recipes(self, recipe: str, said: str, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["silu"], tmp_path / "store")
        with pytest.raises(QuantError, match=said):
            quantised(path, text, replace(OPTIONS, recipe=recipe))
        assert contents(path) == contents(packed["silu"])

    def test_twice(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["silu"], tmp_path / "store")
        quantised(path, text, replace(OPTIONS, recipe="ffn=int8"))
        quantised(path, text, replace(OPTIONS, recipe="attn=int8"))
        with pytest.raises(QuantError, match=r"is int8 already.*pack the checkpoint again"):
            quantised(path, text)

    def test_a_cap_below_a_layer(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path = copy_of(packed["silu"], tmp_path / "store")
        with pytest.raises(CapTooSmallError, match="raise --memory") as plain:
            quantised(path, text, cap=Cap(memory=1 << 20))
        with pytest.raises(CapTooSmallError, match="GPTQ knows") as hessians:
            quantised(path, text, GPTQ, cap=Cap(memory=1 << 20))
        assert hessians.value.floor > plain.value.floor

    @pytest.mark.parametrize("options", [OPTIONS, GPTQ])
    def test_room_is_asked_for_before_anything_is_run(
        self, options: QuantOptions, packed: dict[str, Path], text: Path, tmp_path: Path, monkeypatch
    ) -> None:
        path, wanted = copy_of(packed["silu"], tmp_path / "store"), list[int]()

        def full(update: StoreUpdate, need: int) -> None:
            wanted.append(need)
            if need:
                raise DiskFullError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(StoreUpdate, "require", full)
            with pytest.raises(DiskFullError):
                quantised(path, text, options, progress=lambda what, done, total: pytest.fail(what))
        files = quantised(path, text, options).manifest
        assert wanted[-1] > (files.dense.bytes + files.neurons.bytes) * (2 if options.gptq else 1)


class TestSensitive:
    def test_within_what_is_allowed(self, packed: dict[str, Path], text: Path, tmp_path: Path) -> None:
        path, plain = copy_of(packed["silu"], tmp_path / "store"), copy_of(packed["silu"], tmp_path / "plain")
        lost = quantised(plain, text).after
        options = replace(OPTIONS, max_ppl_increase=1e-4)
        report = quantised(path, text, options)
        assert report.after <= report.before * (1 + 1e-4) < lost
        assert report.kept
        now = matrices_of(open_store(path).manifest)
        assert {role: now[role] for role in report.codecs} == dict(report.codecs)
        own = matrices_of(open_store(packed["silu"]).manifest)
        assert all(now[role] == (codec or own[role]) for role, codec in report.kept.items())

    def test_all_that_is_asked_for_where_that_is_allowed(self, packed: dict[str, Path], text: Path, tmp_path: Path):
        path = copy_of(packed["silu"], tmp_path / "store")
        report = quantised(path, text, replace(OPTIONS, recipe="int8", max_ppl_increase=0.5))
        assert not report.kept

    def test_nothing_is_allowed(self, packed: dict[str, Path], text: Path, tmp_path: Path, monkeypatch) -> None:
        """Where all that is rounded at all loses: as if each byte that is saved cost something."""
        path = copy_of(packed["silu"], tmp_path / "store")
        monkeypatch.setattr(QuantJob, "score", lambda job, source, what: Score(1.0 + bool(source.codecs), 1))
        with pytest.raises(QuantError, match=r"nothing can be quantised.*layers.*it is 7\.3891; allow more"):
            quantised(path, text, replace(OPTIONS, recipe="attn=int4", max_ppl_increase=0.1))
        assert contents(path) == contents(packed["silu"])

    def test_groups(self) -> None:
        roles = ["embed.weight", "layers.0.attn.q.weight", "layers.0.ffn.up.weight", "layers.0.attn.k.weight"]
        assert groups_of(roles) == [
            Group("embed.weight", ("embed.weight",), None),
            Group("layers.0.attn", ("layers.0.attn.q.weight", "layers.0.attn.k.weight"), 0),
            Group("layers.0.ffn", ("layers.0.ffn.up.weight",), 0),
        ]

    def test_moves_one_after_the_other(self) -> None:
        asked = {"a": "int4g32", "b": "nf4"}
        assert after(asked, [{"a": "int8"}]) == {"a": "int8", "b": "nf4"}
        assert after(asked, [{"a": "int8"}, {"b": None}, {"a": None}]) == {}


def test_the_command(packed: dict[str, Path], text: Path, tmp_path: Path, capsys: Any) -> None:
    path = copy_of(packed["opt"], tmp_path / "store")
    arguments = ["calibrate", str(path), "--text", str(text), "--context", "32", "--held-out", "48"]
    assert main([*arguments, "--gptq"]) == 2
    assert main([*arguments, "--quant", "int4", "--predictor", "certified"]) == 2
    assert contents(path) == contents(packed["opt"])
    capsys.readouterr()
    assert main([*arguments, "--quant", "int4", "--gptq", "--tokens", "160", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["weight_bytes"] == open_store(path).manifest.weight_bytes() < said["original_weight_bytes"]
    assert {*said["codecs"].values()} == {"int4g64", "int8"}
    assert main([*arguments, "--quant", "int4"]) == 1
    assert "already" in capsys.readouterr().err
