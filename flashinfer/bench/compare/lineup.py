"""Who can run, on what; and who is left out, with what would let them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashinfer.bench.compare.contenders import (
    LADDER,
    LLAMA,
    NAMES,
    OTHERS,
    PEERS,
    QUANTISED,
    Contender,
    Peer,
    Rung,
)
from flashinfer.bench.compare.gguf_files import GgufFiles, best_that_fits, quant_of
from flashinfer.bench.compare.launch import OUR_PYTHON
from flashinfer.choice import Kind, has, parse_predictor
from flashinfer.errors import PeerError
from flashinfer.store import Manifest
from flashinfer.units import format_size

KINDS: tuple[Kind, ...] = ("certified", "low-rank", "threshold", "router")
INSTALL = "pip install 'flashinfer-offload[bench]', and --peer-python where that is another Python"


@dataclass(frozen=True)
class Carries:
    """What of a store decides who can run on it. sparse: its activation is exactly zero for some neurons. bundled: its
    decision matrix lies in the bundles, so that exact selection needs another predictor."""

    path: Path
    kinds: frozenset[str]
    sparse: bool
    bundled: bool

    @property
    def routed(self) -> bool:
        """Whether it is a mixture of experts."""
        return "router" in self.kinds

    def can(self, predictor: str) -> bool:
        """Whether it has what that predictor needs."""
        name = parse_predictor(predictor)[0]
        return name in self.kinds or name in ("all", "auto") or (name == "exact" and not (self.bundled and self.sparse))

    def selects(self, predictor: str) -> bool:
        """Whether that predictor leaves out neurons at all."""
        return predictor != "all" and (predictor != "exact" or self.sparse)


def carries(path: Path, m: Manifest) -> Carries:
    """What the store at that path, of that manifest, has."""
    bundled = any(layer.decision == "bundled" for layer in m.layers)
    return Carries(path, frozenset(k for k in KINDS if has(m, k)), m.facts.sparse, bundled)


@dataclass(frozen=True)
class Given:
    """What the command was given. sizes: bytes of the GGUF files that are there. stand_in: the peers' checkpoint is
    another one of the same shape. modules: what the peers' Python has; native: ours was built with its native core.
    room: bytes of memory that could hold a file outside any cap."""

    store: Carries
    packed: Carries | None
    caps: tuple[int, ...]
    predictor: str
    python: str
    checkpoint: Path | None = None
    stand_in: bool = False
    gguf: GgufFiles = field(default_factory=lambda: GgufFiles(None, (), ()))
    sizes: Mapping[Path, int] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    native: bool = True
    room: int = 0
    only: tuple[str, ...] = ()


@dataclass
class Lineup:
    """Contenders in the order of a round; who is left out and why; what else is to be said."""

    contenders: list[Contender] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def default_predictor(store: Carries) -> str:
    """The ladder's predictor, where nobody says: low-rank, as in the paper, where the store has it."""
    if store.routed:
        return "router"
    if "low-rank" in store.kinds:
        return "low-rank"
    return "certified" if store.bundled and "certified" in store.kinds else "exact"


def line_up(given: Given) -> Lineup:
    """Everybody who can run, of those asked for.

    Raises:
        PeerError: a name of `only` is none, or nobody can run.
    """
    if unknown := [name for name in given.only if name not in NAMES]:
        raise PeerError(f"there is no contender {unknown[0]!r}; there are {', '.join(NAMES)}")
    out = Lineup()
    for rung in (*LADDER, *OTHERS):
        _settle(out, given, rung.name, _ours(rung, given))
    for peer in PEERS:
        _settle(out, given, peer.name, _peer(peer, given))
    _quantised(out, given)
    out.notes += [*_moved(out, given), *_not_compared(out, given)]
    if not out.contenders:
        reasons = "; ".join(f"{name}: {why}" for name, why in out.left_out.items())
        raise PeerError(f"nobody can run ({reasons})")
    return out


def _settle(out: Lineup, given: Given, name: str, found: Contender | str) -> None:
    if given.only and name not in given.only:
        return
    if isinstance(found, str):
        out.left_out[name] = found
    else:
        out.contenders.append(found)


def _ours(rung: Rung, given: Given) -> Contender | str:
    """The rung on its store, or why not."""
    predictor = _predictor(rung, given.predictor)
    if misfit := _misfit(rung, given.store.routed):
        return misfit
    if rung.packed and given.packed is None:
        return "give --packed, the same model as `flashinfer pack` wrote it"
    if rung.name != "native" and predictor != "all" and not given.store.selects(predictor):
        return f"the {predictor} predictor leaves out no neuron of this model"
    if rung in OTHERS and predictor == given.predictor and not rung.lookahead:
        return "it is `native` here"
    where = _place(rung, predictor, given)
    if where is None:
        if predictor == "exact":
            return "its decision matrix lies in the bundles: give --packed, or compare certified, which is exact, too"
        return f"this store has no {predictor} predictor: run `flashinfer calibrate` on it"
    if rung.backend == "native" and not given.native:
        return "this installation has no native core"
    what = rung.what if rung.predictor else f"{rung.what} ({predictor})"
    return Contender(rung.name, what, "ours", where.path, OUR_PYTHON, rung, predictor)


def _misfit(rung: Rung, routed: bool) -> str:
    """Why a rung is none for mixtures of experts, or for dense models; else an empty text."""
    if not routed:
        return "this model is dense: it has no router" if rung.predictor == "router" else ""
    if rung.apart:
        return "neurons of an expert are needed together: nobody reads their parts one by one"
    if rung.predictor not in (None, "all", "router"):
        return f"{rung.predictor} is for dense models: of a mixture of experts the router says who is needed"
    return ""


def _place(rung: Rung, predictor: str, given: Given) -> Carries | None:
    """The store of the rung where that has the predictor; else for the lower rungs the calibrated one, for exact
    selection the packed one, which has the decision matrix apart; else none."""
    tried = [given.packed, given.store] if rung.packed else [given.store]
    tried += [given.packed] if rung.name == "exact" else []
    return next((store for store in tried if store is not None and store.can(predictor)), None)


def _moved(out: Lineup, given: Given) -> list[str]:
    """Which of the lower rungs run on the calibrated store, for want of the predictor in the other."""
    names = [c.name for c in out.contenders if c.rung and c.rung.packed and c.model == given.store.path]
    if given.packed is None or not names or given.packed.path == given.store.path:
        return []
    return [
        f"{', '.join(names)}: on the calibrated store, read part by part; the packed one has no {given.predictor} "
        "predictor."
    ]


def _predictor(rung: Rung, ladder: str) -> str:
    """The rung's own, or the ladder's; with lookahead at the ladder's level, where that has one."""
    if rung.predictor is None or (rung.lookahead and ladder.startswith(f"{rung.predictor}:")):
        return ladder
    return rung.predictor


def _peer(peer: Peer, given: Given) -> Contender | str:
    """The program on its model, or why not."""
    model = given.gguf.full if peer.takes == "gguf" else given.checkpoint
    if model is None:
        return "give --checkpoint" + (", or a --gguf of full precision" if peer.takes == "gguf" else "")
    if lacking := _lacking(peer, model, given):
        return f"no {lacking} in that Python: {INSTALL}"
    size = given.sizes.get(model, 0)
    if not peer.capped and size > given.room:
        return f"{format_size(size)} do not fit the {format_size(given.room)} of memory that are free"
    return Contender(
        peer.name, peer.what, peer.module, model, given.python, comparable=_comparable(peer, given), capped=peer.capped
    )


def _comparable(peer: Peer, given: Given) -> bool:
    """Whether it computes the function of the store's weights: llama.cpp has no llama with ReLU."""
    return not given.stand_in and not (peer.takes == "gguf" and given.store.sparse)


def _not_compared(out: Lineup, given: Given) -> list[str]:
    """Whose logits and perplexity are left out, and why."""
    names = ", ".join(c.name for c in out.contenders if not c.comparable)
    if not names:
        return []
    why = (
        "another checkpoint of the same shape stands in"
        if given.stand_in
        else "llama.cpp has no llama with ReLU, and computes SiLU with the same weights"
    )
    return [f"{names}: {why}. Time can be compared; logits and perplexity cannot, and are left out."]


def _lacking(peer: Peer, model: Path, given: Given) -> str:
    """The first module that its Python has not, or an empty text."""
    needs = (*peer.needs, "gguf") if model in given.gguf.missing else peer.needs
    return next((name for name in needs if name not in given.modules), "")


def _quantised(out: Lineup, given: Given) -> None:
    """For every cap llama.cpp with the best quantisation that fits it."""
    if given.only and QUANTISED not in given.only:
        return
    llama = next(peer for peer in PEERS if peer.name == LLAMA)
    if not given.gguf.quantised:
        out.left_out[QUANTISED] = "give quantised files with --gguf, or --gguf-quant q4_0 and --checkpoint"
        return
    if lacking := _lacking(llama, given.gguf.quantised[0], given):
        out.left_out[QUANTISED] = f"no {lacking} in that Python: {INSTALL}"
        return
    sizes = {path: size for path, size in given.sizes.items() if path in given.gguf.quantised}
    for path, caps in _caps_by_file(sizes, given.caps).items():
        name = f"llama.cpp-{quant_of(path)}"
        what = f"llama.cpp with {path.name} ({format_size(sizes[path])}), the best of those given that fits"
        out.contenders.append(
            Contender(
                name, what, llama.module, path, given.python, comparable=_comparable(llama, given), caps=frozenset(caps)
            )
        )
    small = [cap for cap in given.caps if best_that_fits(sizes, cap) is None]
    if small:
        out.notes.append(f"No quantised file given fits {', '.join(f'{cap / 1e9:.3g} GB' for cap in small)}.")


def _caps_by_file(sizes: Mapping[Path, int], caps: Sequence[int]) -> dict[Path, list[int]]:
    found: dict[Path, list[int]] = {}
    for cap in caps:
        if (path := best_that_fits(sizes, cap)) is not None:
            found.setdefault(path, []).append(cap)
    return found
