"""Case = problem + recipe + seed + layouts: a dozen small values that give the same tensors
everywhere and print as one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from verify.errors import VerifyError
from verify.spec.inputs import NORMAL, Recipe
from verify.spec.layouts import LAYOUTS, laid_out
from verify.spec.problem import EXAMPLE, Problem

TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


ARRANGED = ("q", "k", "v", "do", "bias")
"""The tensors [B,H,L,D] of a case, which may lie in memory in any of verify/spec/layouts.py's
ways.
"""


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv], do [B,H,Q,Dv] (the cotangent
    of out), bias [B|1,H|1,Q,K] or None, slopes [H] (ALiBi, always float32-representable) or
    None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    bias: torch.Tensor | None = None
    slopes: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The same with every tensor changed."""
        present = {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None
        }
        return replace(self, **{name: change(tensor) for name, tensor in present.items()})

    def rounded(self, dtype: str) -> Inputs:
        """Rounded to nearest and clamped to the dtype's finite range. Slopes stay float32, as
        kernels take them.
        """
        kind = TORCH_DTYPES[dtype]
        largest = torch.finfo(kind).max
        narrow = self.map(lambda t: t.clamp(-largest, largest).to(kind))
        return replace(
            narrow, slopes=None if self.slopes is None else self.slopes.to(torch.float32)
        )

    def exact(self, device: str | torch.device = "cpu") -> Inputs:
        """The same values as float64, for an oracle."""
        return self.map(lambda t: t.to(device=device, dtype=torch.float64))


def alibi_slopes(heads: int) -> np.ndarray:
    """2^(-8 (h+1) / heads) rounded to float32 (Press et al. 2022, section 3, for any number of
    heads).
    """
    return (2.0 ** (-8.0 * (np.arange(heads) + 1) / heads)).astype(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Case:
    """What is computed, on which values, and how they lie in memory. Prints and parses as
    ``PROBLEM/RECIPE#SEED``, or ``PROBLEM/RECIPE#SEED@q=bshd,do=expanded``.

    Raises VerifyError for an unknown layout, or of a tensor that has none.
    """

    problem: Problem
    recipe: Recipe = NORMAL
    seed: int = 0
    layouts: tuple[tuple[str, str], ...] = ()
    """(tensor, layout) where it is not contiguous"""

    def __post_init__(self) -> None:
        for tensor, layout in self.layouts:
            if tensor not in ARRANGED or layout not in LAYOUTS:
                raise VerifyError(
                    f"layout {tensor}={layout}: one of {', '.join(ARRANGED)} = one of "
                    f"{', '.join(LAYOUTS)}"
                )

    def __str__(self) -> str:
        arranged = ",".join(f"{tensor}={layout}" for tensor, layout in self.layouts)
        return f"{self.problem}/{self.recipe}#{self.seed}" + (f"@{arranged}" if arranged else "")

    @classmethod
    def parse(cls, text: str) -> Case:
        """Inverse of str(). Raises VerifyError where the text is no id of a case."""
        found = re.fullmatch(r"([^/#\s]+)/([^/#\s]+)#(\d+)(?:@((?:\w+=\w+,?)+))?", text)
        if not found:
            raise VerifyError(
                f"case id {text!r} does not parse: write it like {EXAMPLE}/outliers(0.001,10)#7"
            )
        layouts = (
            tuple(tuple(pair.split("=")) for pair in found[4].strip(",").split(","))
            if found[4]
            else ()
        )
        return cls(Problem.parse(found[1]), Recipe.parse(found[2]), int(found[3]), layouts)

    def draw(self) -> Inputs:
        """The unrounded values, float64 on the CPU. Bias and cotangent are N(0,1); whole numbers
        where the recipe's are, and a cotangent of one sign where V has one, so that delta =
        rowsum(dO * O) is large.
        """
        problem, rng = self.problem, np.random.Generator(np.random.Philox(self.seed))
        q, k, v = self.recipe.draw(rng, problem)
        family = self.recipe.family
        rest: dict[str, torch.Tensor] = {}
        for name in ("do", "bias"):
            if name in problem.shapes:
                drawn = rng.standard_normal(problem.shapes[name])
                drawn = np.abs(drawn) if name == "do" and family.one_sign else drawn
                rest[name] = torch.from_numpy(np.round(drawn) if family.whole else drawn)
        if problem.bias == "alibi":
            rest["slopes"] = torch.from_numpy(alibi_slopes(problem.heads_q))
        return Inputs(torch.from_numpy(q), torch.from_numpy(k), torch.from_numpy(v), **rest)

    def inputs(self, device: str = "cpu") -> Inputs:
        """What the kernel is given: rounded to the problem's dtype, on the device, each tensor in
        its layout; around it NaN, or, where the seed is one short of a multiple of four, huge
        numbers.
        """
        rounded, layouts = (
            self.draw().rounded(self.problem.dtype).map(lambda t: t.to(device)),
            dict(self.layouts),
        )
        around = torch.nan if self.seed % 4 < 3 else torch.finfo(rounded.q.dtype).max / 2
        present = {
            name: tensor for name in ARRANGED if (tensor := getattr(rounded, name)) is not None
        }
        return replace(
            rounded,
            **{
                name: laid_out(tensor, layouts.get(name, "bhsd"), around)
                for name, tensor in present.items()
            },
        )


def part(problem: Problem, x: Inputs, entries: slice, key_heads: slice) -> tuple[Problem, Inputs]:
    """These entries of the batch, and these key heads with their groups of query heads, as a
    problem of its own. Its mask must be the same for all heads.
    """
    batch, kept = range(problem.batch)[entries], range(problem.heads_kv)[key_heads]
    heads = slice(kept.start * problem.group, kept.stop * problem.group)
    bias = x.bias
    if bias is not None:
        bias = bias[entries] if bias.shape[0] > 1 else bias
        bias = bias[:, heads] if bias.shape[1] > 1 else bias
    slopes = None if x.slopes is None else x.slopes[heads]
    inputs = Inputs(
        x.q[entries, heads],
        x.k[entries, key_heads],
        x.v[entries, key_heads],
        x.do[entries, heads],
        bias,
        slopes,
    )
    mask = problem.mask.of_entries(lambda arguments: arguments[entries])
    return problem.but(
        batch=len(batch), heads_q=len(kept) * problem.group, heads_kv=len(kept), mask=mask
    ), inputs


def visibility(problem: Problem, device: torch.device, rows: slice | None = None) -> torch.Tensor:
    """The mask over these query rows (all by default) as booleans, True = take part: [B|1,H|1,n,K].

    One entry serves the whole batch, and one head all query heads, where the mask does not differ
    in them.
    """
    rows, mask = rows or slice(0, problem.len_q), problem.mask
    q = torch.arange(rows.start, rows.stop, device=device)[:, None]
    k = torch.arange(problem.len_k, device=device)[None, :]
    heads = torch.arange(problem.heads_q, device=device)[:, None, None] if mask.per_head else None

    def lift(integers: Sequence[int]) -> torch.Tensor | int:
        if not mask.per_batch:
            return integers[0]
        return torch.tensor(integers, device=device)[:, None, None, None]

    lengths = problem.len_q, problem.len_k
    seen = mask.visible(q, k, *lengths, batch=problem.batch, head=heads, lift=lift)
    entries = problem.batch if mask.per_batch else 1
    return seen.expand(entries, 1 if heads is None else len(heads), len(q), problem.len_k)


def handed_over(problem: Problem, device: torch.device) -> torch.Tensor:
    """The mask as the tensor that a kernel is given, contiguous booleans of problem.mask_shape."""
    shape = problem.mask_shape
    return visibility(problem, device, slice(0, shape[2])).expand(shape).contiguous()


def has_empty_row(problem: Problem) -> bool:
    """Whether some query sees no key at all."""
    return not bool(visibility(problem, torch.device("cpu")).any(-1).all())
