"""Which arms are measured together: the first with each other one, or those of an attribution.

An attribution asks of two recipes, BASE and BEST, what each ingredient gives: added to BASE on its own, and
left out of BEST on its own. In every pair the baseline is without the ingredient and the other arm with it,
so that a ratio above 1 always speaks for the ingredient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from assay import plugins
from assay.config import spelled
from assay.contracts import Ingredient, Variant
from assay.errors import UsageError
from assay.measure.record import Arm, Attribution, Case, Record, Scalar, spelled_scalar

__all__ = ["Pair", "attribution_pairs", "plain_pairs"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two arms in one case, or one arm alone. Their names tell them from the case's other pairs."""

    case: Case
    baseline: Arm
    other: Arm
    attribution: Attribution | None = None  # what they stand for in one

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Baseline first; an arm without another once."""
        return (self.baseline,) if self.alone else (self.baseline, self.other)

    def turns(self, launch: int) -> tuple[Arm, ...]:
        """The arms in the order in which a launch prepares them: each is first in every other launch."""
        return self.arms[:: -1 if launch % 2 else 1]

    @property
    def alone(self) -> bool:
        """Whether this is one arm: gated, measured and kept like any, and compared with none."""
        return self.baseline.name == self.other.name

    def holds(self, record: Record) -> bool:
        """Whether a record belongs to this pair."""
        return (record.case, record.baseline, record.other) == (
            self.case,
            self.baseline.name,
            self.other.name,
        )

    def place(self, launch: int) -> tuple[str, str, str, int]:
        """The unit of resuming."""
        return (self.case.id, self.baseline.name, self.other.name, launch)


def plain_pairs(cases: Sequence[Case], arms: Sequence[Arm]) -> list[Pair]:
    """In every case the first arm with each other one; a single arm alone."""
    others = arms[1:] or arms
    return [Pair(case=case, baseline=arms[0], other=other) for case in cases for other in others]


def attribution_pairs(cases: Sequence[Case], arms: Sequence[Arm], texts: Sequence[str]) -> list[Pair]:
    """In every case BASE with BEST, then each ingredient added to BASE and left out of BEST.

    `texts` are the two arms as they were typed. Raises UsageError where an arm is no recipe, or where the
    two have the same ingredients in every case and nothing else can be tried.
    """
    pairs: list[Pair] = []
    for case in cases:
        base, best = (_Recipe(case=case, arm=arm, text=text) for arm, text in zip(arms, texts, strict=True))
        pairs += _case_pairs(base, best)
    if len(pairs) == len(cases):
        why = pairs[0].attribution
        raise UsageError(
            f"--attribute has nothing to tell apart between '{arms[0].name}' and '{arms[1].name}'",
            expected="arms that differ in an ingredient",
            got="; ".join(why.left_out) if why else None,
        )
    return pairs


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """An arm in a case, with what its ingredients come to there."""

    case: Case
    arm: Arm
    text: str

    @property
    def ingredients(self) -> Mapping[str, Ingredient]:
        """Raises UsageError for an arm that declares none."""
        return self._resolved(self.arm.options)

    def _resolved(self, options: Mapping[str, Scalar]) -> Mapping[str, Ingredient]:
        variant: Variant | None = None
        if not plugins.is_target(self.arm.target):
            variant = plugins.find("variants", self.arm.target)
        if variant is None or variant.ingredients is None:
            raise UsageError(
                f"--attribute cannot take '{self.arm.name}' apart",
                expected="two arms that are recipes of ingredients, such as eager and fused",
            )
        return variant.ingredients(self.case, options)

    def but(self, changes: Mapping[str, Scalar]) -> Arm:
        """The arm with some ingredients changed and no other: what `auto` would now choose anew is pinned."""
        if not changes:
            return self.arm
        before = {name: ingredient.value for name, ingredient in self.ingredients.items()}
        options = {**self.arm.options, **changes}
        after = {name: ingredient.value for name, ingredient in self._resolved(options).items()}
        wanted = {**before, **changes}
        pins = {name: value for name, value in wanted.items() if after[name] != value}
        name = spelled(self.text, {**changes, **pins})
        return msgspec.structs.replace(self.arm, name=name, options={**options, **pins})

    def given(self, wanted: Ingredient) -> dict[str, Scalar]:
        """What an ingredient needs and this recipe has not."""
        mine = self.ingredients
        return {name: value for name, value in wanted.needs.items() if mine[name].value != value}

    def along(self, name: str, value: Scalar) -> dict[str, Scalar]:
        """Ingredients of this recipe that cannot stay as they are with `name` at another value."""
        return {n: i.plain for n, i in self.ingredients.items() if i.needs.get(name, value) != value}


def _case_pairs(base: _Recipe, best: _Recipe) -> list[Pair]:
    """The total first, which also says what is not tried."""
    found: list[Pair] = []
    same: dict[str, list[str]] = {}  # reason -> ingredients
    in_base, in_best = base.ingredients, best.ingredients
    for name in (n for n in in_base if n in in_best):
        before, after = in_base[name], in_best[name]
        if before.value != after.value:
            found += [_added(base, name, after), _left_out(best, name, before)]
        elif after.trial is not None:
            found += [_swapped("add", base, name), _swapped("leave", best, name)]
        else:
            reason = f"{spelled_scalar(after.value)} in both" + (
                f"; {after.why_not}" if after.why_not else ""
            )
            same.setdefault(reason, []).append(name)
    left_out = [f"{', '.join(names)}: {reason}" for reason, names in same.items()]
    total = Attribution(kind="total", left_out=left_out)
    return _told_apart([Pair(case=base.case, baseline=base.arm, other=best.arm, attribution=total), *found])


def _added(base: _Recipe, name: str, wanted: Ingredient) -> Pair:
    """BASE, and BASE with one ingredient of BEST."""
    given, along = base.given(wanted), base.along(name, wanted.value)
    return Pair(
        case=base.case,
        baseline=base.but(given),
        other=base.but({**given, name: wanted.value, **along}),
        attribution=Attribution(
            kind="add",
            ingredient=name,
            before=base.ingredients[name].value,
            after=wanted.value,
            given=given,
            along=list(along),
        ),
    )


def _left_out(best: _Recipe, name: str, plain: Ingredient) -> Pair:
    """BEST with one ingredient as BASE has it, and BEST."""
    given, along = best.given(plain), best.along(name, plain.value)
    return Pair(
        case=best.case,
        baseline=best.but({**given, name: plain.value, **along}),
        other=best.but(given),
        attribution=Attribution(
            kind="leave",
            ingredient=name,
            before=plain.value,
            after=best.ingredients[name].value,
            given=given,
            along=list(along),
        ),
    )


def _swapped(kind: str, recipe: _Recipe, name: str) -> Pair:
    """A recipe, and the recipe with an ingredient that neither BASE nor BEST has."""
    mine = recipe.ingredients[name]
    assert mine.trial is not None
    return Pair(
        case=recipe.case,
        baseline=recipe.arm,
        other=recipe.but({name: mine.trial}),
        attribution=Attribution(
            kind=kind, ingredient=name, before=mine.value, after=mine.trial, swapped=True
        ),
    )


def _told_apart(pairs: Sequence[Pair]) -> list[Pair]:
    """Where BEST is BASE with one ingredient changed, that pair is the total once more: it gets a number."""
    total = [arm.name for arm in pairs[0].arms]
    found = [pairs[0]]
    for pair in pairs[1:]:
        if [arm.name for arm in pair.arms] != total:
            found.append(pair)
        elif pair.attribution and pair.attribution.kind == "add":
            found.append(replace(pair, other=_second(pair.other)))
        else:
            found.append(replace(pair, baseline=_second(pair.baseline)))
    return found


def _second(arm: Arm) -> Arm:
    return msgspec.structs.replace(arm, name=f"{arm.name}#2")
