"""What a TensorStats measures of a model, and what it is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lipcore.capture.outputs import hookable, is_called
from lipcore.metric.columns import Places
from lipcore.metric.values import Level
from lipcore.models.names import listed, named_modules, with_prefix
from lipcore.tensor_stats.attention import AttentionChoice, find_attention
from lipcore.tensor_stats.block import Size
from lipcore.tensor_stats.extra import ROOT, Extra
from lipcore.tensor_stats.logits import find_logits
from lipcore.tensor_stats.router import RouterChoice, find_routers
from lipcore.trajectory.groups import Groups, group_names
from lipcore.trajectory.parameters import WatchedParameter, trainable

#: True for all, False for none, or patterns of names as in the shell ("blocks.*.mlp").
Names = bool | str | Sequence[str]

#: The quantities in the order of their places.
QUANTITIES = ("parameter", "gradient", "output")


@dataclass(frozen=True)
class Wishes:
    """What the user has asked for."""

    parameters: Names
    gradients: Names
    outputs: Names
    exclude: Sequence[str]
    groups: Groups
    attention: AttentionChoice | str | None
    router: RouterChoice | str | None
    logits: bool | str


class Watched:
    """Places of all that is measured: parameters, then gradients, then outputs, each a row.

    Attributes:
        parameters, gradients: where they are looked up.
        prefix: before all names, of a stage of a pipeline.
        outputs: canonical names of modules, "" for the model.
        unseen: why the outputs of modules that were asked for are not seen, by name.
        extras: what else is watched, and `refused` why it is not, by kind and module.
    """

    def __init__(self, model: nn.Module, wishes: Wishes, prefix: str) -> None:
        self.prefix = prefix
        found = [WatchedParameter(owner, key, name, "") for owner, key, name in trainable(model)]
        self.parameters = _chosen(found, wishes.parameters, wishes.exclude, "parameters")
        self.gradients = _chosen(found, wishes.gradients, wishes.exclude, "gradients")
        self.modules, unseen = hookable(model)
        kinds = {name: module for name, module in named_modules(model) if is_called(module)}
        names = _matching(list(kinds), wishes.outputs, wishes.exclude, "outputs")
        if wishes.outputs is True:
            names = [name for name in names if not (name and isinstance(kinds[name], nn.Sequential))]
        self.outputs = [name for name in names if name in self.modules]
        self.unseen = {name: unseen[name] for name in names if name in unseen}
        self.extras, refused = self._find_extras(model, wishes, unseen)
        for extra in self.extras:
            extra.place = self.place_of(extra.place)
        self.refused = {kind: {self.place_of(n): why for n, why in each.items()} for kind, each in refused.items()}
        name_group = group_names(wishes.groups)
        for parameter in found:
            parameter.prefix = f"{prefix}." if prefix else ""
            parameter.name = parameter.prefix + parameter.name
            parameter.group = name_group(parameter.name)
        self.size = Size(
            len(self.parameters) + len(self.gradients) + len(self.outputs),
            sum(extra.sums for extra in self.extras),
            sum(extra.most for extra in self.extras),
        )
        begin = len(self.parameters) + len(self.gradients)
        self.row_of_output = {name: begin + i for i, name in enumerate(self.outputs)}
        self.slices: list[tuple[Extra, slice, slice]] = []  #: where the sums and maxima of each extra stand
        self.readers: dict[str, list[tuple[Extra, slice, slice]]] = {}
        sums = most = 0
        for extra in self.extras:
            entry = extra, slice(sums, sums + extra.sums), slice(most, most + extra.most)
            sums, most = sums + extra.sums, most + extra.most
            self.slices.append(entry)
            for name in extra.modules:
                self.readers.setdefault(name, []).append(entry)

    def _find_extras(
        self, model: nn.Module, wishes: Wishes, unseen: Mapping[str, str]
    ) -> tuple[list[Extra], dict[str, dict[str, str]]]:
        bounds, no_bounds = find_attention(model, wishes.attention)
        shares, no_shares = find_routers(model, wishes.router)
        refused = {"attention": no_bounds, "router": no_shares, "logits": {}}
        extras: list[Extra] = []
        for extra in (*bounds, *shares, *find_logits(model, wishes.logits)):
            hidden = [name for name in extra.modules if name not in self.modules]
            if hidden:
                refused[extra.kind][extra.place] = f"{hidden[0]!r} {unseen.get(hidden[0], 'has no forward pass')}"
            else:
                extras.append(extra)
        return extras, {kind: reasons for kind, reasons in refused.items() if reasons}

    def place_of(self, name: str) -> str:
        """Return what a module, or what the model itself returns, is called in results."""
        if not self.prefix:
            return name or ROOT
        return self.prefix if name in ("", ROOT) else with_prefix(self.prefix, name)

    @property
    def places_of_outputs(self) -> list[str]:
        """What the outputs are called in results."""
        return [self.place_of(name) for name in self.outputs]

    @property
    def hooked(self) -> list[str]:
        """Names of the modules whose outputs are wanted."""
        return list(dict.fromkeys([*self.outputs, *self.readers]))

    @property
    def rows(self) -> list[tuple[str, str, str, Level]]:
        """Quantity, place, group and level of every row."""
        return [
            *(("parameter", p.name, p.group, "tensor") for p in self.parameters),
            *(("gradient", p.name, p.group, "tensor") for p in self.gradients),
            *(("output", place, "", "group") for place in self.places_of_outputs),
        ]


def with_groups(names: Sequence[str], groups: Sequence[str], level: Level) -> tuple[Places, list[list[int]]]:
    """Return the places of one quantity (rows, groups of these, and the total), and the rows that each group and the
    total are made of. A group with the name of a row is that row alone."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if group and group not in names:
            members.setdefault(group, []).append(i)
    places = [*names, *members, "total"]
    levels: list[Level] = [*[level] * len(names), *["group"] * len(members), "total"]  # type: ignore[list-item]
    return Places(places, levels), [*members.values(), list(range(len(names)))]


def _chosen(
    found: Sequence[WatchedParameter], wish: Names, exclude: Sequence[str], argument: str
) -> list[WatchedParameter]:
    names = set(_matching([parameter.name for parameter in found], wish, exclude, argument))
    return [parameter for parameter in found if parameter.name in names]


def _matching(names: Sequence[str], wish: Names, exclude: Sequence[str], argument: str) -> list[str]:
    """Return the names that are asked for; ValueError for a pattern that matches none."""
    if wish is False:
        return []
    patterns = ["*"] if wish is True else [wish] if isinstance(wish, str) else list(wish)
    for pattern in patterns if wish is not True else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument}: nothing in the model is called {pattern!r}; there is {listed([n for n in names if n])}"
            )
    return [
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]


def checked_names(argument: str, value: object) -> Names:
    """Return a choice of names; TypeError for what is none."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, Iterable):
        names = list(value)
        if all(isinstance(name, str) for name in names):
            return names
    raise TypeError(f"{argument}: expected True, False, a pattern of names or a list of them, got {value!r}")
