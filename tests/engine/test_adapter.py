"""LoRA at run time: peft's logits, the same bits at every cap, and adapters that cannot be applied."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer import pack
from flashinfer.adapter import read_adapter
from flashinfer.backend import has_native
from flashinfer.config import BackendName, Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError, CheckpointError, PredictorError
from flashinfer.layout import known_layouts
from flashinfer.store import open_store
from tests.adapters import ATTENTION, MODULE, TOKENS, A, B, by_hand, made_by_peft
from tests.calibrated import calibrate_plainly
from tests.checkpoints import make_llama, make_opt
from tests.families import make as make_family
from tests.plain_checkpoint import fill, write_checkpoint
from tests.twin import Twin

Floats = npt.NDArray[np.float32]
BACKENDS: list[BackendName] = ["torch", *(["native"] if has_native() else [])]
FFN = ["gate_proj", "up_proj", "down_proj"]
PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 96, 37)]
DECODED = [int(t) for t in np.random.default_rng(4).integers(3, 96, 5)]

BASES: dict[str, Any] = {
    "llama": (make_llama, {}),
    "llama-biases": (make_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama-silu": (make_llama, {"hidden_act": "silu"}),
    "llama-tied": (make_llama, {"tie_word_embeddings": True}),
    "opt": (make_opt, {"tie_word_embeddings": False}),
    "opt-projections": (make_opt, {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "head": ("llama", {"r": 3, "lora_alpha": 6, "target_modules": ["lm_head"]}),
    "rslora": ("llama", {"r": 9, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION}),
    "patterns": ("llama", {
        "r": 4, "lora_alpha": 2, "target_modules": [*ATTENTION, "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 1}, "alpha_pattern": {r".*\.0\..*v_proj": 5},
    }),
    "up alone": ("llama-biases", {"r": 5, "target_modules": ["up_proj"]}),
    "some layers": ("llama-biases", {"r": 2, "target_modules": FFN, "layers_to_transform": [1]}),
    "silu": ("llama-silu", {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}),
    "tied head": ("llama-tied", {"r": 4, "target_modules": ["lm_head", "o_proj"]}),
    "opt": ("opt", {"r": 3, "lora_alpha": 3, "target_modules": [*ATTENTION, "fc1", "fc2", "lm_head"]}),
    "projections": ("opt-projections", {"r": 2, "target_modules": ["project_in", "project_out", "k_proj", "fc2"]}),
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    checkpoint: Path
    stores: dict[str, Path]
    """By where the decision matrix is: `separate` or `bundled`."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    made = {}
    for name, (make, config) in BASES.items():
        root = tmp_path_factory.mktemp("bases")
        checkpoint = make(root / "checkpoint", max_position_embeddings=128, **config)
        stores = {decision: root / decision for decision in ("separate", "bundled")}
        for decision, store in stores.items():
            order = [np.random.default_rng(i).permutation(160) for i in range(3)]
            pack(checkpoint, store, decision=decision, permutation=order if decision == "bundled" else None)  # type: ignore[arg-type]
        made[name] = Base(checkpoint, stores)
    return made


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Floats]]:
    """By case: the adapter and peft's logits."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: (root / name, made_by_peft(bases[base].checkpoint, root / name, **config))
        for name, (base, config) in CASES.items()
    }


def logits(store: Path, adapter: Path | None, tokens: list[int] = TOKENS, **run: Any) -> Floats:
    with Model.open(store, run=RunConfig(adapter=adapter, **run)) as model:
        return model.logits(model.session(), tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decision", ["separate", "bundled"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(bases, adapters, case: str, decision: str, backend: BackendName) -> None:
    store = bases[CASES[case][0]].stores[decision]
    adapter, expected = adapters[case]
    with Model.open(store, run=RunConfig(adapter=adapter, backend=backend)) as model:
        prefill = model.logits(model.session(), TOKENS)
        session = model.session()
        decode = np.stack([model.step(session, [t]) for t in TOKENS])
    assert np.abs(prefill - expected).max() <= 1e-4
    assert np.abs(decode - expected).max() <= 1e-4
    assert np.array_equal(decode, prefill) or backend == "torch"
    assert np.abs(logits(store, None) - expected).max() > 1e-2


@pytest.mark.parametrize("case", ["all-linear", "silu", "opt"])
def test_merged_is_the_same(bases, adapters, tmp_path: Path, case: str) -> None:
    base, (adapter, expected) = bases[CASES[case][0]], adapters[case]
    pack(base.checkpoint, tmp_path / "merged", merge_adapter=adapter)
    merged = logits(tmp_path / "merged", None)
    assert np.abs(merged - expected).max() <= 1e-4
    assert np.abs(merged - logits(base.stores["separate"], adapter)).max() <= 1e-4


def test_a_store_is_shared(bases, adapters, tmp_path: Path) -> None:
    base, (first, expected) = bases["llama"], adapters["all-linear"]
    other = made_by_peft(base.checkpoint, tmp_path / "other", seed=2, r=4, target_modules=[*ATTENTION, *FFN])
    store = base.stores["separate"]
    assert np.abs(logits(store, tmp_path / "other") - other).max() <= 1e-4
    assert np.abs(logits(store, first) - expected).max() <= 1e-4
    assert np.abs(other - expected).max() > 1e-2
    assert (
        read_adapter(first, open_store(store)).identity != read_adapter(tmp_path / "other", open_store(store)).identity
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quant", ["int8", "nf4", "q4_0", "mxfp4"])
def test_on_a_quantised_store(bases, adapters, tmp_path: Path, quant: str, backend: BackendName) -> None:
    """What the adapter adds to the product of codes is what it adds to the product of the values they stand for."""
    base, (adapter, _) = bases["llama"], adapters["all-linear"]
    pack(base.checkpoint, tmp_path / "codes", quant=quant)
    values = dequantised(tmp_path / "codes", base.checkpoint, tmp_path / "values")
    pack(values, tmp_path / "plain")
    assert np.abs(logits(tmp_path / "codes", None) - logits(base.stores["separate"], None)).max() > 1e-3
    found = logits(tmp_path / "codes", adapter, backend=backend)
    assert np.abs(found - logits(tmp_path / "plain", adapter)).max() <= (1e-4 if backend == "torch" else 2e-3)


def dequantised(store: Path, checkpoint: Path, path: Path) -> Path:
    """The checkpoint with the values that the store's codes stand for."""
    import shutil

    from safetensors.numpy import load_file, save_file

    opened, tensors = open_store(store), load_file(checkpoint / "model.safetensors")
    for role, t in opened.manifest.tensors.items():
        if len(t.shape) == 2:
            tensors[t.source] = np.asarray(opened.read_tensor(role))
    for i, layer in enumerate(opened.manifest.layers):
        for part in layer.parts:
            rows = bundle_rows(store, i, part.role)
            tensors[part.source] = np.ascontiguousarray(rows.T if part.role == "down.weight" else rows)
    shutil.copytree(checkpoint, path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def bundle_rows(store: Path, layer: int, role: str) -> Floats:
    """One part of every bundle of a layer, `[neurons, elements]`."""
    from flashinfer.quant import codec_named

    opened = open_store(store)
    n = opened.manifest.layers[layer]
    part = next(p for p in n.parts if p.role == role)
    data = np.frombuffer(opened.read_range(opened.manifest.neurons, n.offset, n.bytes), np.uint8)
    records = data[: n.records * n.record_bytes].reshape(n.records, n.record_bytes)
    bundles = records[:, : n.bundles_per_record * n.bundle_bytes].reshape(-1, n.bundle_bytes)[: n.neurons]
    codec = codec_named(part.codec)
    raw = bundles[:, part.offset : part.offset + codec.row_bytes(part.elements)]
    return codec.decode(np.ascontiguousarray(raw), part.elements)


# -- the same bits


@cache
def twin_logits(checkpoint: Path, store: Path, adapter: Path, backend: BackendName) -> tuple[Floats, ...]:
    opened = open_store(store)
    changes = read_adapter(adapter, opened).changes()
    twin = Twin(checkpoint, opened.manifest.facts, context=64, backend=backend, changes=changes)
    return twin.logits(PROMPT), *(twin.logits([t])[0] for t in DECODED)


def run_logits(store: Path, cap: Cap, run: RunConfig) -> tuple[Floats, ...]:
    with Model.open(store, cap, context=64, run=run) as model:
        session = model.session()
        return model.logits(session, PROMPT), *(model.step(session, [t]) for t in DECODED)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(["all-linear", "silu", "opt"]),
    decision=st.sampled_from(["separate", "bundled"]),
    share=st.floats(0, 1.1),
    chunk=st.integers(1, 40),
    threads=st.sampled_from([1, 2]),
    backend=st.sampled_from(BACKENDS),
    ring=st.sampled_from([0, 50_000]),
)
def test_bit_for_bit(bases, adapters, case, decision, share, chunk, threads, backend, ring) -> None:
    """From the floor to all of the model: the bits of the twin with the same adapter.

    Torch, which multiplies tiles of neurons, has other tiles where a bundled store reads all: there the twin is the
    store with all of it in memory.
    """
    base, (adapter, _) = bases[CASES[case][0]], adapters[case]
    store, separate = base.stores[decision], base.stores["separate"]
    run = RunConfig(adapter=adapter, prefill_chunk=chunk, threads=threads, backend=backend, ring=ring, staging=0)
    with pytest.raises(CapTooSmallError) as e:
        Model.open(store, Cap(weight_memory=1), context=64, run=run)
    cap = e.value.floor + int(share * open_store(store).manifest.weight_bytes())
    found = run_logits(store, Cap(weight_memory=cap), run)
    expected = twin_logits(base.checkpoint, separate, adapter, backend)
    assert all(np.abs(a - b).max() <= 1e-5 for a, b in zip(found, expected, strict=True))
    if backend == "torch" and decision == "bundled":
        expected = run_logits(store, Cap(weight_memory=10**9), RunConfig(adapter=adapter, backend=backend))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not has_native(), reason="torch has other shapes for the parts of a layer's FFN")
@pytest.mark.parametrize("decision", ["separate", "bundled"])
def test_an_adapter_of_zeros_changes_no_bit(bases, adapters, tmp_path: Path, decision: str) -> None:
    from safetensors.numpy import load_file, save_file

    adapter, _ = adapters["all-linear"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeros = {name: values * np.float32("lora_A" in name) for name, values in tensors.items()}
    (tmp_path / "zeros").mkdir()
    save_file(zeros, tmp_path / "zeros" / "adapter_model.safetensors")
    (tmp_path / "zeros" / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    store = bases["llama"].stores[decision]
    without = logits(store, None, PROMPT, backend="native")
    assert np.array_equal(logits(store, tmp_path / "zeros", PROMPT, backend="native"), without)


# -- memory and predictors


def floor_of(store: Path, adapter: Path | None, kind: str = "weight_memory") -> int:
    with pytest.raises(CapTooSmallError) as e:
        Model.open(store, Cap(**{kind: 1}), context=64, run=RunConfig(adapter=adapter))
    return e.value.floor


def test_its_bytes_are_in_the_plan(bases, adapters) -> None:
    store, (adapter, _) = bases["llama"].stores["separate"], adapters["all-linear"]
    matched = read_adapter(adapter, open_store(store))
    changes = dict(matched.changes())
    held = {
        id(f.raw.base if f.raw.base is not None else f.raw): f.raw.base for c in changes.values() for f in (c.a, c.b)
    }
    assert len(held) == 1  # one piece of memory
    assert next(iter(held.values())).nbytes == matched.needs.bytes
    assert sum(f.raw.nbytes for c in changes.values() for f in (c.a, c.b)) <= matched.needs.bytes
    assert floor_of(store, adapter) == floor_of(store, None) + matched.needs.bytes
    with Model.open(store, Cap(weight_memory=10**8), run=RunConfig(adapter=adapter)) as model:
        assert model.plan.weight_adapter == matched.needs.bytes
        assert model.adapter_id == matched.identity


class TestPredictors:
    @pytest.fixture(scope="class")
    def calibrated(self, bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("calibrated")
        pack(bases["llama"].checkpoint, root / "llama", decision="bundled")
        pack(bases["llama-silu"].checkpoint, root / "silu")
        return {name: calibrate_plainly(root / name) for name in ("llama", "silu")}

    @pytest.mark.parametrize(
        ("name", "case", "predictor"),
        [("llama", "rslora", "low-rank"), ("llama", "all-linear", "certified"), ("silu", "silu", "threshold:0.4")],
    )
    def test_those_of_the_store_are_refused(self, calibrated, adapters, name: str, case: str, predictor: str) -> None:
        logits(calibrated[name], None, predictor=predictor)
        with pytest.raises(PredictorError, match=r"belongs to a store without an adapter; use exact, or make") as e:
            logits(calibrated[name], adapters[case][0], predictor=predictor)
        assert "\n" not in str(e.value)

    @pytest.mark.parametrize("predictor", ["exact", "auto"])
    @pytest.mark.parametrize(("case", "kind"), [("rslora", "certified"), ("all-linear", "all")])
    def test_exact_is_what_can_be_proven(self, calibrated, adapters, case: str, kind: str, predictor: str) -> None:
        """The sketch knows the store's decision matrix: where the adapter changes that, every neuron is read."""
        adapter, expected = adapters[case]
        run = RunConfig(adapter=adapter, predictor=predictor, max_ppl_increase=0.5)
        with Model.open(calibrated["llama"], run=run) as model:
            assert model.choice.kind == kind
            assert np.abs(model.logits(model.session(), TOKENS) - expected).max() <= 1e-4

    def test_auto_is_exact(self, calibrated, adapters) -> None:
        adapter, expected = adapters["silu"]
        found = logits(calibrated["silu"], adapter, predictor="auto", max_ppl_increase=0.5)
        assert np.abs(found - expected).max() <= 1e-4


# -- what cannot be applied


class TestRefused:
    @pytest.fixture(scope="class")
    def store(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("refused")
        pack(write_checkpoint(root / "base"), root / "store")
        return root / "store"

    def refuse(self, store: Path, adapter: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            Model.open(store, run=RunConfig(adapter=adapter))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 900

    def test_it_would_be_applied(self, store: Path, tmp_path: Path) -> None:
        """The one the cases below are made of."""
        adapter = by_hand(tmp_path / "adapter")
        assert np.abs(logits(store, adapter, [1, 5, 7]) - logits(store, None, [1, 5, 7])).max() > 1e-3

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ({A: (2, 17), B: (16, 2)}, r"q_proj.* is \[16, 16\] there and \[16, 17\] in the adapter: .* another"),
            ({A: (2, 16), B: (8, 2)}, r"and \[8, 16\] in the adapter"),
            ({"x_proj.lora_A.weight": (2, 16), "x_proj.lora_B.weight": (16, 2)}, "the store has not: .* another model"),
            ({"q_proj.weight": (16, 16)}, "replaced as a whole, which is not done at run time; merge it"),
            ({A: (2, 16), B: (16, 2), "q_proj.bias": (16,)}, "replaced as a whole"),
            ({A: (2, 16)}, "has lora tensors"),
            ({"base_model.model.lm_head.weight": (20, 16)}, "changes no matrix"),
            (
                {
                    "base_model.model.model.norm.lora_A.weight": (2, 16),
                    "base_model.model.model.norm.lora_B.weight": (16, 2),
                },
                r"is \[16\] there",
            ),
            ({}, "holds no tensors"),
        ],
    )
    def test_tensors(self, store: Path, tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
        tensors = fill({name if name.startswith("base") else MODULE + name: shape for name, shape in shapes.items()})
        self.refuse(store, by_hand(tmp_path / "adapter", tensors), message)

    @pytest.mark.parametrize("module", ["model.embed_tokens", "model.layers.0.mlp.experts.0.up_proj"])
    def test_places(self, store: Path, tmp_path: Path, module: str) -> None:
        parts = ("lora_embedding_A", "lora_embedding_B") if "embed" in module else ("lora_A.weight", "lora_B.weight")
        names = [f"base_model.model.{module}.{part}" for part in parts]
        tensors = fill({names[0]: (2, 20), names[1]: (16, 2)})
        self.refuse(store, by_hand(tmp_path / "adapter", tensors), "is not done at run time; merge it")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"peft_type": "IA3"}, "is of type IA3"),
            ({"use_dora": True}, "is DoRA"),
            ({"r": 3}, r"A \[3, in\] and B \[out, 3\] were expected"),
        ],
    )
    def test_config(self, store: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        self.refuse(store, by_hand(tmp_path / "adapter", **config), message)

    @pytest.mark.parametrize("part", [A, B])
    def test_not_finite(self, store: Path, tmp_path: Path, part: str) -> None:
        tensors = fill({MODULE + A: (2, 16), MODULE + B: (16, 2)})
        tensors[MODULE + part][1, 1] = np.nan
        self.refuse(store, by_hand(tmp_path / "adapter", tensors), rf"tensor .*{part} of .* holds NaN or infinity")

    def test_a_type_that_is_not_read(self, store: Path, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import save_file

        adapter = by_hand(tmp_path / "adapter")
        tensors = {MODULE + A: torch.ones(2, 16, dtype=torch.float64), MODULE + B: torch.ones(16, 2)}
        save_file(tensors, adapter / "adapter_model.safetensors")
        self.refuse(store, adapter, r"is F64; F32, F16 and BF16 can be added")

    def test_no_adapter(self, store: Path, tmp_path: Path) -> None:
        self.refuse(store, tmp_path, r"no adapter_config\.json")
        self.refuse(store, tmp_path / "absent", r"no adapter_config\.json")

    def test_trained_embeddings(self, bases, tmp_path: Path) -> None:
        """What peft saves beside an adapted head is the base's; what it was told to train is not."""
        made_by_peft(
            bases["llama"].checkpoint, tmp_path / "x", r=2, target_modules=ATTENTION, modules_to_save=["lm_head"]
        )
        self.refuse(bases["llama"].stores["separate"], tmp_path / "x", r"lm_head\.weight, which is replaced as a whole")

    def test_parts_cut_by_a_layout_that_is_not_known(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = make_family("gpt2", tmp_path / "base")
        pack(base, tmp_path / "store")
        made_by_peft(base, tmp_path / "fused", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        monkeypatch.setattr("flashinfer.layout.match.known_layouts", lambda: known_layouts()[:1])
        self.refuse(tmp_path / "store", tmp_path / "fused", r"c_attn\.weight, which the store holds in parts or turned")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_adapters_keep_their_type(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = make_llama(tmp_path / "base")
    pack(base, tmp_path / "store")
    made_by_peft(base, tmp_path / "adapter", r=4, target_modules=[*ATTENTION, *FFN])
    file, kind = (
        tmp_path / "adapter" / "adapter_model.safetensors",
        {"f16": torch.float16, "bf16": torch.bfloat16}[dtype],
    )
    rounded = {name: t.to(kind) for name, t in load_file(file).items()}
    save_file({name: t.float() for name, t in rounded.items()}, file)
    expected = logits(tmp_path / "store", tmp_path / "adapter")
    whole = read_adapter(tmp_path / "adapter", open_store(tmp_path / "store")).needs.bytes
    save_file(rounded, file)
    assert read_adapter(tmp_path / "adapter", open_store(tmp_path / "store")).needs.bytes < 0.6 * whole
    for backend in BACKENDS:
        found = logits(tmp_path / "store", tmp_path / "adapter", backend=backend)
        assert np.abs(found - expected).max() <= 1e-4
