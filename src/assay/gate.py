"""The gate: same work, or no ratio.

Pure functions over tensors and numbers; torch is imported where it is used. Tolerances are fixed here,
beside what they judge, and no flag or variable loosens them.

Two tiers. *Meaning*: the arm in float32 against the oracle one precision above, with a tight absolute
tolerance; this catches a wrong mask, scale or rotation. *Precision*: the arm in the case's dtype; its error
may be at most K times the error that the reference implementation makes in that dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from assay.measure.record import Figure, Spread

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ROUNDING",
    "Departure",
    "compare",
    "errors",
    "explain",
    "first_departing",
    "gradient_norm",
    "is_real_or_complex",
    "judge_outputs",
    "probe_figure",
    "worst",
]

# Meaning: float32 arithmetic of a whole model stays well under these, and the mildest mutant well above.
MEANING_LIMIT = {"loss": 1e-5, "logits": 2e-4, "grad": 1e-3, "output": 1e-4}
NO_LIMIT = 1.0  # the error of an answer of zeros
K = 3.0  # precision tier: outputs, loss and gradients alike
# A reference can land closer to the oracle than its own rounding by luck; one unit of rounding is allowed.
ROUNDING = {
    "fp64": 2.0**-52,
    "fp32": 2.0**-23,
    "bf16": 2.0**-8,
    "fp16": 2.0**-11,
    "bf16-autocast": 2.0**-8,
    "as given": 0.0,  # opaque functions: their own response and their output's rounding decide
}
LOSS_REDUCTION = 4 * 2.0**-23  # a mean over tokens in float32, whatever the dtype, summed in another order
GRAD_SHARE = 1e-3  # a gradient is scaled by at least this share of the whole gradient's norm
EXTRA_ZEROS = 0.01  # share of entries that may be exactly zero beyond the oracle's own zeros
PROBE_LIMIT = 1e-4  # relative, in float32

_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")  # its number, the first in the name of a parameter


class Departure(NamedTuple):
    """How far one tensor is from the oracle's, where, and what disqualifies it outright."""

    error: float
    where: str
    fault: str


def kind(quantity: str) -> str:
    """`grad:model.norm.weight` -> `grad`: the row of the tolerance tables."""
    name = quantity.partition(":")[0]
    return name if name in MEANING_LIMIT else "output"


def compare(out: Tensor, ref: Tensor, scale: float | None = None) -> Departure:
    """Departure of `out` from `ref`, same shape, any dtypes; computed in float64.

    Outputs are judged row by row (last dimension), each row's L2 distance over the root mean square of the
    reference rows' norms, and the worst row counts: one wrong position cannot hide among good ones.
    Gradients are judged whole, over max(norm, share of the whole gradient's norm) = `scale`.
    """
    if tuple(out.shape) != tuple(ref.shape):
        return Departure(math.inf, "", f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}")
    if not is_real_or_complex(out):
        return _compare_integers(out, ref)
    target = _double(ref)
    delta = _double(out) - target
    finite = bool(delta.sum().isfinite())  # then every entry of both is, and there is nothing to look for
    fault = _counts(out, ref, finite=finite)
    if not finite:
        delta = delta.masked_fill(_same(out, ref), 0.0)  # equal infinities do not differ
        target = target.masked_fill(~target.isfinite(), 0.0)  # nor do they widen the scale of the others
    if scale is not None:
        error, where = float(delta.norm()) / max(float(target.norm()), scale, 1e-300), ""
    else:
        rows = delta.reshape(-1, delta.shape[-1]) if delta.dim() > 1 else delta.reshape(-1, 1)
        size = target.reshape(rows.shape).norm(dim=1).square().mean().sqrt()
        errors = rows.norm(dim=1) / size.clamp_min(1e-300)
        error = float(errors.max()) if errors.numel() else 0.0
        where = _place(errors, error, tuple(delta.shape))
    return Departure(math.inf if math.isnan(error) else error, where, fault)


def _same(out: Tensor, ref: Tensor) -> Tensor:
    return (out == ref) | (out.isnan() & ref.isnan())


def is_real_or_complex(t: Tensor) -> bool:
    """Whether its entries are real or complex numbers, which rounding may move; integers must agree."""
    return t.is_floating_point() or t.is_complex()


def _double(t: Tensor) -> Tensor:
    """In float64, or complex128."""
    import torch

    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def _compare_integers(out: Tensor, ref: Tensor) -> Departure:
    wrong = (out != ref).reshape(-1)
    first = int(wrong.nonzero()[0]) if bool(wrong.any()) else -1
    where = f"first at {_index(first, tuple(out.shape))}" if first >= 0 and out.dim() else ""
    return Departure(float(wrong.double().mean()) if wrong.numel() else 0.0, where, "")


def _counts(out: Tensor, ref: Tensor, *, finite: bool) -> str:
    """Non-finite and exactly-zero entries against the oracle's own counts; nothing is masked first.

    `finite` says that neither has an entry that is not, which spares counting them.
    """
    if out.numel() == 0:
        return ""
    bad, ref_bad = (0, 0) if finite else (int((~t.isfinite()).sum()) for t in (out, ref))
    if bad != ref_bad:
        return f"{bad} non-finite entries of {out.numel()}, the oracle has {ref_bad}"
    if ref_bad == ref.numel():
        return "the oracle has no finite value: nothing was compared"
    zeros, ref_zeros = (t.numel() - int(t.count_nonzero()) for t in (out, ref))
    if ref_zeros == ref.numel():
        return "the oracle's values are all zero: nothing was compared"
    if zeros > ref_zeros + EXTRA_ZEROS * out.numel() + 1:
        return f"{zeros} zero entries of {out.numel()}, the oracle has {ref_zeros}"
    return ""


def _index(flat: int, shape: tuple[int, ...]) -> str:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return "[" + ", ".join(map(str, reversed(index))) + "]"


def _place(errors: Tensor, worst_error: float, shape: tuple[int, ...]) -> str:
    """The first row whose error is a tenth of the worst or more: where the departure begins."""
    if errors.numel() < 2 or worst_error == 0 or math.isnan(worst_error):
        return ""
    first = int((errors >= worst_error / 10).nonzero()[0])
    name = "position" if len(shape) > 1 else "element"
    return f"first at {name} {_index(first, shape[:-1] if len(shape) > 1 else shape)}"


def judge_outputs(
    tier: str,
    stage: str,
    outputs: Mapping[str, Tensor | None],
    oracle: Mapping[str, Tensor],
    *,
    dtype: str,
    reference: Mapping[str, float] | None = None,
    grad_norm: float | None = None,
    spreads: bool = False,
) -> list[Figure]:
    """One figure for every quantity of the oracle; a quantity that the arm lacks, or has too much, fails.

    `reference` holds the reference implementation's own errors at this dtype (precision tier only);
    `grad_norm` is the norm of the oracle's whole gradient, where it is known already; `spreads` asks for
    further error figures of each. An oracle that holds
    nothing proves nothing: that is one failed figure.
    """
    if not oracle:
        note = "nothing to compare: the oracle gives no output"
        return [
            Figure(
                tier=tier, stage=stage, quantity="outputs", error=None, limit=None, passed=False, note=note
            )
        ]
    grad_norm = gradient_norm(oracle) if grad_norm is None else grad_norm
    limits = {name: MEANING_LIMIT[kind(name)] for name in oracle}
    if reference is not None:
        limits = _limits(reference, {name: tuple(t.shape) for name, t in oracle.items()}, dtype)
    figures = [
        _figure(
            tier,
            stage,
            name,
            outputs.get(name),
            ref,
            grad_norm,
            limit=limits[name],
            ref_error=reference[name] if reference is not None else None,
            spreads=spreads,
        )
        for name, ref in oracle.items()
    ]
    extra = [name for name in outputs if name not in oracle and outputs[name] is not None]
    for name in extra:
        note = "the oracle has no such quantity"
        figures.append(
            Figure(tier=tier, stage=stage, quantity=name, error=None, limit=None, passed=False, note=note)
        )
    return figures


def _figure(
    tier: str,
    stage: str,
    name: str,
    out: Tensor | None,
    ref: Tensor,
    grad_norm: float,
    *,
    limit: float,
    ref_error: float | None,
    spreads: bool,
) -> Figure:
    if out is None:
        note = "missing: the arm gives no such quantity"
        return Figure(tier=tier, stage=stage, quantity=name, error=None, limit=limit, passed=False, note=note)
    departure = compare(out, ref.to(out.device), _scale(name, grad_norm))
    if not (departure.fault or limit < NO_LIMIT):
        departure = departure._replace(
            fault="the reference itself is off by as much: nothing bounds the error"
        )
    return Figure(
        tier=tier,
        stage=stage,
        quantity=name,
        error=departure.error if math.isfinite(departure.error) else None,
        limit=limit if math.isfinite(limit) else None,
        passed=not departure.fault and math.isfinite(departure.error) and departure.error <= limit,
        reference_error=ref_error,
        where=departure.where,
        note=departure.fault,
        spread=_spread(out, ref.to(out.device)) if spreads else None,
    )


def _spread(out: Tensor, ref: Tensor) -> Spread | None:
    """Further error figures of one tensor of numbers of the oracle's shape; nothing is masked."""
    if out.shape != ref.shape or out.numel() == 0 or not is_real_or_complex(out):
        return None
    target = _double(ref)
    off = (_double(out) - target).abs().masked_fill(_same(out, ref), 0.0)
    size = target.abs()
    mse, scale = float(off.square().mean()), float(size.square().mean())
    relative = off[size > 0] / size[size > 0]
    rows = out.reshape(-1, out.shape[-1]) if out.dim() else out.reshape(1, 1)
    return Spread(
        mse=mse if math.isfinite(mse) else None,
        nrmse=math.sqrt(mse / scale) if math.isfinite(mse) and 0 < scale < math.inf else None,
        max_relative=float(relative.max()) if relative.numel() and bool(relative.isfinite().all()) else None,
        nonfinite=int((~out.isfinite()).sum()),
        zero_rows=int((rows == 0).all(dim=1).sum()),
        rows=rows.shape[0],
    )


def gradient_norm(oracle: Mapping[str, Tensor]) -> float:
    """Norm of all gradients together, computed where they lie."""
    return math.sqrt(sum(float(_double(t).norm()) ** 2 for n, t in oracle.items() if kind(n) == "grad"))


def _scale(name: str, grad_norm: float) -> float | None:
    return GRAD_SHARE * grad_norm if kind(name) == "grad" else None


def _rounding(name: str, dtype: str) -> float:
    """What rounding alone may do to a quantity, however close the reference came by luck."""
    return max(ROUNDING[dtype], LOSS_REDUCTION) if kind(name) == "loss" else ROUNDING[dtype]


def _limits(
    reference: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> dict[str, float]:
    """K times what the reference may be off by, of every quantity; its own luck does not set a limit.

    A gradient counts as off by at least the median of all, and as the worst of the same parameter's in all
    blocks, of the same name but for the block's number and of the same shape: where one has rank one, as that
    of a bias before a projection to one number, its error is a single draw.
    """
    grads = {name: error for name, error in reference.items() if kind(name) == "grad"}
    median = sorted(grads.values())[len(grads) // 2] if grads else 0.0
    alike = {name: (_BLOCK.sub("*", name, count=1), shapes.get(name)) for name in grads}
    families: dict[object, float] = {}
    for name, error in grads.items():
        families[alike[name]] = max(error, families.get(alike[name], median))
    return {
        name: K * max(error, families[alike[name]] if name in grads else 0.0, _rounding(name, dtype))
        for name, error in reference.items()
    }


def probe_figure(name: str, departure: float, scale: float, where: str, *, expects_change: bool) -> Figure:
    """A property of one system. Where a change is expected, none is the failure; elsewhere any is."""
    error = departure / max(scale, 1e-300)
    passed = error > PROBE_LIMIT if expects_change else error <= PROBE_LIMIT
    note = "" if passed else ("the output did not move" if expects_change else "the output moved")
    return Figure(
        tier="probe",
        stage="before",
        quantity=name,
        error=error if math.isfinite(error) else None,
        limit=PROBE_LIMIT,
        passed=passed and math.isfinite(error),
        where=where,
        note=note,
    )


def worst(figures: Iterable[Figure]) -> list[Figure]:
    """Every failure, of the rest the one nearest its limit in each (tier, stage, kind), and every spread."""
    kept: dict[tuple[str, str, str], Figure] = {}
    whole: list[Figure] = []
    for f in figures:
        if not f.passed or f.spread is not None:
            whole.append(f)
            continue
        key = (f.tier, f.stage, f.quantity if f.tier == "probe" else kind(f.quantity))
        if key not in kept or _closeness(f) > _closeness(kept[key]):
            kept[key] = f
    return [*whole, *kept.values()]


def _closeness(f: Figure) -> float:
    return (f.error or 0.0) / f.limit if f.limit else 0.0


def explain(figures: Sequence[Figure], layer: str = "") -> str:
    """One line for a failed gate: what differs, by how much, and where it begins."""
    failed = [f for f in figures if not f.passed]
    if not failed:
        return ""
    order = {"probe": 0, "meaning": 1, "precision": 2}
    first = min(failed, key=lambda f: (order[f.tier], kind(f.quantity) == "grad"))
    size = f"error {first.error:.2g}, limit {first.limit:.2g}" if first.error is not None else ""
    parts = [p for p in (first.note, size, first.where, layer) if p]
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"{first.tier} gate: {first.quantity} differs: {', '.join(parts)}{more}"


def errors(
    outputs: Mapping[str, Tensor], oracle: Mapping[str, Tensor], grad_norm: float | None = None
) -> dict[str, float]:
    """Error of every quantity that both hold, on the scales of `compare`; `grad_norm` as in judge_outputs."""
    grad_norm = gradient_norm(oracle) if grad_norm is None else grad_norm
    return {
        name: compare(out, oracle[name].to(out.device), _scale(name, grad_norm)).error
        for name, out in outputs.items()
        if name in oracle
    }


def first_departing(layers: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> str:
    """`first in model.layers.0 at position [0, 1]`, or an empty string where no layer can be named.

    Layers are compared over the positions that both saw: an incremental pass starts with the prompt only.
    """
    for name, out in layers.items():
        ref = oracle.get(f"layer:{name}")
        if ref is None or ref.dim() != out.dim():
            continue
        if out.dim() == 3:
            seen = min(out.shape[1], ref.shape[1])
            out, ref = out[:, :seen], ref[:, :seen]
        departure = compare(out, ref)
        if departure.fault or departure.error > MEANING_LIMIT["logits"]:
            return f"first layer that departs is {name}, {departure.where.removeprefix('first ')}".rstrip(
                ", "
            )
    return ""
