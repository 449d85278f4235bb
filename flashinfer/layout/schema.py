"""What a layout file says, as frozen structs: every key known or an error. `docs/layouts.md` explains each."""

from __future__ import annotations

import msgspec

EXPERT, LATENT = "expert_", "latent_"
"""Before the name of a fact of experts, or of latent attention, in expressions."""

Scalar = bool | int | float | str


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frozen, and an unknown key is an error."""


class Source(_Strict, frozen=True):
    """Where a value comes from: config key `key` (of several the first that is there), translated by `map`; `default`
    or `expr` where it is absent.

    A null in config.json counts as absent. `expr` alone (no `key`) is always computed; `when` alone is true where
    all its conditions hold. In a list of sources `when` says where one counts. `power`: the value to that power.
    `times`: multiplied by that. `rounded`: to the type that config.json says the weights have. `optional`: there need
    be no value, and a null says that there is none.
    """

    key: str | tuple[str, ...] | None = None
    default: Scalar | None = None
    expr: str | None = None
    map: dict[str, Scalar] | None = None
    when: tuple[str, ...] | None = None
    power: float | None = None
    times: Source | None = None
    rounded: bool = False
    optional: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys, in the order in which they count."""
        return () if self.key is None else (self.key,) if isinstance(self.key, str) else self.key


class RotatedLayers(_Strict, frozen=True):
    """Layers that use rotary positions: config key `flags` lists one flag for each.

    Without it, every `interval`-th layer uses none.
    """

    flags: str
    interval: Source


class Condition(_Strict, frozen=True):
    """A yes or no: a config key (with a default) that is boolean, `equals` that, or is `there` and not null; or whether
    two facts differ."""

    key: str | None = None
    default: Scalar | None = None
    equals: Scalar | None = None
    there: bool = False
    differ: tuple[str, str] | None = None


class RopeSource(_Strict, frozen=True):
    """Rotary positions: `parameters` lists the config keys of scaling tables, the first one present counts.

    Where not all of `when` hold there are none. Of `rotary_dim` values a share `partial` is turned, where it is given
    here or in the table. `local_theta`: layers with a window have a rope of their own (Gemma 3), unscaled unless the
    table says so. `mscale`: the table's `mscale_all_dim` scales attention, too (DeepSeek).
    `reversed`: pairs are turned the other way.
    """

    theta: Source
    rotary_dim: str | Source
    parameters: tuple[str, ...] = ()
    partial: Source | None = None
    layers: RotatedLayers | None = None
    local_theta: Source | None = None
    mscale: bool = False
    reversed: bool = False
    when: tuple[str, ...] = ()


class WindowSource(_Strict, frozen=True):
    """How far attention looks back: `size` positions, where there is a size and all of `when` hold.

    `layers` is the config key of a list with `sliding_attention` or `full_attention` for each layer. Where it is
    absent, layers before `first` and every `interval`-th layer see all.
    """

    size: Source
    when: tuple[str, ...] = ()
    layers: str | None = None
    first: Source | None = None
    interval: Source | None = None


class Alternative(_Strict, frozen=True):
    """A tensor that plays a role where the one before it does not."""

    name: str
    when: tuple[str, ...] = ()


class TensorPattern(_Strict, frozen=True):
    """The checkpoint's name for a role, its shape there, and when it must be there.

    `when` names conditions that must all hold (`not X` for the opposite); where they do not, the first tensor of
    `otherwise` whose own conditions hold plays the role, if there is one. `optional` tensors may be absent.
    The rest says what is taken of tensors of the shape `of`: `transposed` ones are `[in, out]`; `rows` (start, stop)
    of each of `groups` equal parts; `interleaved` rows of heads, of `head` rows each (None: `head_dim`), are put in
    halves, and come first where they were the last (`turned_last`); `plus` is added to vectors; `each` is how many
    vectors `{h}` in the name stands for.
    """

    name: str
    shape: tuple[str, ...]
    when: tuple[str, ...] = ()
    otherwise: tuple[Alternative, ...] = ()
    optional: bool = False
    of: tuple[str, ...] | None = None
    transposed: bool = False
    rows: tuple[str, str] | None = None
    groups: str = "1"
    interleaved: bool = False
    turned_last: bool = False
    head: str | None = None
    plus: float = 0.0
    each: str | None = None

    @property
    def candidates(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Names of tensors that may play the role, with their conditions: the first whose conditions hold does."""
        return ((self.name, self.when), *((other.name, other.when) for other in self.otherwise))

    @property
    def plain(self) -> bool:
        """Whether the role is the checkpoint's tensor as it is."""
        taken = self.transposed or self.rows is not None or self.interleaved or self.plus != 0.0
        return not taken and self.of is None and self.each is None


class ExpertPattern(_Strict, frozen=True):
    """What a role of a layer of experts is made of: a tensor for each (`{e}` in the name counts them), or one for all,
    whose first axis they are.

    `shape` is what one expert gives, a matrix or a vector. The rest says how, of a tensor of the shape `of` for each: a
    `transposed` one is `[in, out]`; `rows` (start, stop), and of these each `every`-th one. `shared` is the tensor of
    the shared experts, where there are any. `otherwise` is what counts where there is no tensor of that name.
    """

    name: str
    shape: tuple[str, ...]
    of: tuple[str, ...] | None = None
    transposed: bool = False
    rows: tuple[str, str] | None = None
    every: int = 1
    shared: str | None = None
    otherwise: ExpertPattern | None = None

    @property
    def candidates(self) -> tuple[ExpertPattern, ...]:
        """This, and what counts in its place: the first whose tensors are there does."""
        return (self, *(() if self.otherwise is None else self.otherwise.candidates))


class ExpertLayers(_Strict, frozen=True):
    """Which layers are dense: those that config key `dense` lists, those before `first`, and of the others all but
    each `step`-th one, counted from the beginning."""

    dense: str | None = None
    first: Source = Source(default=0)
    step: Source = Source(default=1)


class ExpertsSource(_Strict, frozen=True):
    """A mixture of experts: its facts, and the roles that its layers have beside those of `Layout.tensors`, or in
    place of them: `tensors` as there, and `neurons`, which experts have each for themselves."""

    facts: dict[str, Scalar | Source | tuple[Source, ...]]
    tensors: dict[str, TensorPattern]
    neurons: dict[str, ExpertPattern]
    layers: ExpertLayers = ExpertLayers()


class Ignored(_Strict, frozen=True):
    """Tensors that may be in a checkpoint and carry nothing the model needs; `{any}` stands for any text, `{n}` for the
    number of the layer that would come after the last."""

    name: str
    when: tuple[str, ...] = ()


class Layout(_Strict, frozen=True):
    """A model family, as its file states it. `{prefix}` and `{i}` stand in names for a prefix and a layer.

    `table`: the table of config.json that is about the text model, where there is one: what it says comes before what
    is said beside it.
    """

    schema: int
    family: str
    architectures: tuple[str, ...]
    facts: dict[str, Scalar | Source | tuple[Source, ...]]
    tensors: dict[str, TensorPattern]
    prefixes: tuple[str, ...] = ("",)
    table: str | None = None
    supported: dict[str, tuple[Scalar, ...]] = {}
    conditions: dict[str, Condition] = {}
    ignored: tuple[Ignored, ...] = ()
    rope: RopeSource | None = None
    window: WindowSource | None = None
    experts: ExpertsSource | None = None
    latent: dict[str, Scalar | Source] | None = None
