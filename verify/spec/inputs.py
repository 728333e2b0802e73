"""Every input family: ``recipe(rng, problem, *params) -> (q, k, v)`` in float64. An adversary is
added here and nowhere else.

The first line of a docstring says what the family is for. Values are drawn by NumPy's Philox
generator from the case's seed, so a case is the same tensors on every machine. They are rounded to
the problem's dtype later, never here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from verify.errors import VerifyError
from verify.spec.distribution import DISTRIBUTIONS, Distribution, Triple, distribution
from verify.spec.masks import FULL
from verify.spec.problem import Problem

BLOCK = 64
"""Rows that a scale is often of."""


def _each(problem: Problem, draw: Callable[[tuple[int, ...]], np.ndarray]) -> Triple:
    shapes = problem.shapes
    return draw(shapes["q"]), draw(shapes["k"]), draw(shapes["v"])


@distribution({"integers": 1}, whole=True)
def integers(rng: np.random.Generator, problem: Problem) -> Triple:
    """Whole numbers -3 ... 3: exact in every format; the family a failing case shrinks to, so that
    it can be checked by hand.
    """
    return _each(problem, lambda shape: rng.integers(-3, 4, shape).astype(np.float64))


@distribution({"normal": 5, "normal(5)": 2, "normal(0.1)": 1})
def normal(rng: np.random.Generator, problem: Problem, sigma: float = 1.0) -> Triple:
    """N(0, sigma^2): what everybody tests with. sigma 5 sharpens the softmax, 0.1 flattens it."""
    return _each(problem, lambda shape: sigma * rng.standard_normal(shape))


@distribution({"uniform": 2})
def uniform(rng: np.random.Generator, problem: Problem) -> Triple:
    """U(0, 1): PyTorch's own tests; the softmax is nearly flat and V has one sign."""
    return _each(problem, rng.random)


@distribution({"outliers(0.01,10)": 2})
def outliers(
    rng: np.random.Generator, problem: Problem, probability: float = 0.001, sigma: float = 10.0
) -> Triple:
    """N(0,1) + N(0, sigma^2) Bernoulli(probability): FlashAttention-3's Table 3 (arXiv 2407.08608,
    section 4.3).
    """
    return _each(
        problem,
        lambda s: (
            rng.standard_normal(s)
            + (rng.random(s) < probability) * (sigma * rng.standard_normal(s))
        ),
    )


@distribution({"shift(90)": 1, "shift(-90)": 1, "shift(1e4)": 1})
def shift(rng: np.random.Generator, problem: Problem, c: float = 90.0) -> Triple:
    """Every score of a row moves by c (one feature column with q = 1, k = c / scale): O the same,
    LSE moved.
    """
    q, k, v = normal(rng, problem)
    q[..., 0], k[..., 0] = 1.0, c / (problem.softmax_scale or 1.0)
    return q, k, v


@distribution({"rising(30)": 1, "rising(-30)": 1})
def rising(rng: np.random.Generator, problem: Problem, span: float = 20.0) -> Triple:
    """Scores rise along the keys by about `span` in all (fall if negative): a new maximum in every
    tile, or never again.
    """
    q, k, v = normal(rng, problem)
    ramp = np.linspace(0.0, span, max(problem.len_k, 1))[: problem.len_k]
    q[..., 0], k[..., 0] = 1.0, ramp / (problem.softmax_scale or 1.0)
    return q, k, v


@distribution({"apart(131072)": 1}, says=lambda problem: problem.len_k > 2)
def apart(rng: np.random.Generator, problem: Problem, c: float = 131072.0) -> Triple:
    """Scores of every third key lie c below the others', half above 0 and half below: farther apart
    than FP16 has numbers, while V varies among the keys that count.
    """
    q, k, v = normal(rng, problem)
    below = np.arange(problem.len_k) % 3 == 2
    high = c / (problem.softmax_scale or 1.0) / 2.0
    q[..., 0], k[..., 0] = abs(high) ** 0.5, np.where(below, -high, high) / abs(high) ** 0.5
    return q, k, v


@distribution({"peak_row(1e4)": 1}, says=lambda problem: problem.len_q > 1 <= problem.len_k)
def peak_row(rng: np.random.Generator, problem: Problem, c: float = 1e4) -> Triple:
    """One query's scores lie c above all others': what a maximum of a tile, not of each row, cannot
    take.
    """
    q, k, v = normal(rng, problem)
    high = c / (problem.softmax_scale or 1.0)
    q[..., 0], k[..., 0] = 0.0, high / abs(high) ** 0.5
    row = int(rng.integers(max(1, problem.len_q)))
    q[:, :, row : row + 1, 0] = abs(high) ** 0.5
    return q, k, v


@distribution(
    {"sunken(3e4)": 2, "sunken(15000)": 2},
    stresses={"range": 5},
    says=lambda problem: problem.mask != FULL and problem.len_k > 1,
)
def sunken(rng: np.random.Generator, problem: Problem, c: float = 3e4) -> Triple:
    """Every score lies c below 0: what a finite mask value, such as -1e4, lets through."""
    q, k, v = normal(rng, problem)
    low = -c / (problem.softmax_scale or 1.0)
    q[..., 0], k[..., 0] = abs(low) ** 0.5, low / abs(low) ** 0.5
    return q, k, v


@distribution(
    {"cancelling(1e9)": 1},
    stresses={"range": 40},
    says=lambda problem: problem.dim_qk > 2 < problem.len_k,
)
def cancelling(rng: np.random.Generator, problem: Problem, c: float = 1e9) -> Triple:
    """Every third key's score is c, minus c, minus 60: far below the others', where the sum of the
    first two is 0 as it should be.
    """
    q, k, v = normal(rng, problem)
    low = (np.arange(problem.len_k) % 3 == 2).astype(np.float64)
    q[..., :3] = 1.0
    for column, far in enumerate((c, -c, -60.0 / (problem.softmax_scale or 1.0))[: k.shape[-1]]):
        k[..., column] = far * low
    return q, k, v


@distribution({"vast(1e38)": 1}, stresses={"range": 20})
def vast(rng: np.random.Generator, problem: Problem, size: float = 1e38) -> Triple:
    """V near the largest numbers, of one sign: a sum of P V that is not divided yet overflows."""
    q, k, v = normal(rng, problem)
    return q, k, size * (1 + rng.random(v.shape))


@distribution({"faint(1e38)": 1, "faint(1e4)": 1, "faint(1e-4)": 1}, stresses={"range": 20})
def faint(rng: np.random.Generator, problem: Problem, size: float = 1e38) -> Triple:
    """Q small by a factor and K large by it: products are usual, but Q, or scale times Q, is
    subnormal, and 0 where that is flushed; below 1, it overflows.
    """
    q, k, v = normal(rng, problem)
    return q / size, k * size, v


@distribution({"ties": 1, "ties(3)": 1})
def ties(rng: np.random.Generator, problem: Problem, keys: float = 1.0) -> Triple:
    """So many different keys, again and again: scores of a row tie, with one key all of them, P is
    exactly 1 before normalising; O is a mean of the visible V.
    """
    q, k, v = normal(rng, problem)
    return q, k[..., np.arange(problem.len_k) % max(1, int(keys)), :], v


@distribution({"sink": 2})
def sink(rng: np.random.Generator, problem: Problem, strength: float = 8.0) -> Triple:
    """Key 0 draws every query (Xiao et al. 2023, attention sinks): one large P, the rest small."""
    q, k, v = normal(rng, problem)
    q[..., 0] = 1.0
    k[..., :1, 0] += strength / (problem.softmax_scale or 1.0)
    return q, k, v


@distribution({"one_sign": 5}, stresses={"delta": 4}, one_sign=True)
def one_sign(rng: np.random.Generator, problem: Problem) -> Triple:
    """V = |N(0,1)|: a biased P V product shows, which zero-mean V averages away."""
    q, k, v = normal(rng, problem)
    return q, k, np.abs(v)


@distribution({"hot_channel(30)": 2}, stresses={"scales": 2})
def hot_channel(rng: np.random.Generator, problem: Problem, factor: float = 30.0) -> Triple:
    """One feature column of Q and K is `factor` times larger: what quantisation per tensor cannot
    take.
    """
    q, k, v = normal(rng, problem)
    channel = int(rng.integers(problem.dim_qk))
    q[..., channel] *= factor
    k[..., channel] *= factor
    return q, k, v


@distribution({"uneven_entries": 2}, stresses={"scales": 2}, says=lambda problem: problem.batch > 1)
def uneven_entries(rng: np.random.Generator, problem: Problem, factor: float = 64.0) -> Triple:
    """Batch entries from 1 to `factor` times as large in K and V: what a scale, a maximum or an
    index shared among entries cannot take.
    """
    q, k, v = normal(rng, problem)
    size = factor ** np.linspace(0.0, 1.0, problem.batch).reshape(-1, 1, 1, 1)
    return q, k * size / factor**0.5, v * size


@distribution(
    {"uneven_blocks": 1}, stresses={"scales": 2}, says=lambda problem: problem.len_k > BLOCK
)
def uneven_blocks(rng: np.random.Generator, problem: Problem, factor: float = 64.0) -> Triple:
    """Blocks of 64 rows from 1 to `factor` times as large in V, in any order, less so in K and Q:
    what the scale of another block cannot take.
    """
    q, k, v = normal(rng, problem)
    of_q, of_k = (
        factor ** rng.random((problem.heads_kv, -(-n // BLOCK))).repeat(BLOCK, -1)[:, :n, None]
        for n in (problem.len_q, problem.len_k)
    )
    return q * of_q.repeat(problem.group, 0) ** 0.25, k * of_k**0.5, v * of_k


@distribution(
    {"uneven_heads": 2}, stresses={"scales": 2}, says=lambda problem: problem.heads_kv > 1
)
def uneven_heads(rng: np.random.Generator, problem: Problem, factor: float = 64.0) -> Triple:
    """Heads from 1 to `factor` times as large in K and V: what a scale or an index shared among
    heads cannot take.
    """
    q, k, v = normal(rng, problem)
    size = factor ** np.linspace(0.0, 1.0, problem.heads_kv).reshape(-1, 1, 1)
    return q, k * size / factor**0.5, v * size


@distribution({"growing": 1}, stresses={"scales": 4})
def growing(rng: np.random.Generator, problem: Problem, factor: float = 8.0) -> Triple:
    """Rows from 1 to `factor` times as large along the sequence: what a scale or a maximum of the
    first tile cannot take.
    """
    q, k, v = normal(rng, problem)
    of_q, of_k = (
        factor ** np.linspace(0.0, 1.0, n).reshape(-1, 1) for n in (problem.len_q, problem.len_k)
    )
    return q * of_q / factor**0.5, k * of_k / factor**0.5, v * of_k


@distribution({"constant(1000)": 1, "constant(133120)": 1}, stresses={"range": 4})
def constant(rng: np.random.Generator, problem: Problem, value: float = 1000.0) -> Triple:
    """Every element the same large value (clamped to the dtype's range): score overflow, exact
    ties.
    """
    return _each(problem, lambda shape: np.full(shape, value))


@distribution({"tiny": 3, "tiny(2e-4)": 1}, stresses={"range": 30})
def tiny(rng: np.random.Generator, problem: Problem, size: float = 1e-6) -> Triple:
    """N(0, size^2) for all three: subnormal in FP16; V must survive, the softmax is flat."""
    return normal(rng, problem, size)


def _shortest(number: float) -> str:
    """The text of a number that parses back to it: six digits where they are enough."""
    short = f"{number:g}"
    return short if float(short) == number else f"{number:.17g}"


@dataclass(frozen=True)
class Recipe:
    """A named input family and its parameters, e.g. ``Recipe.parse("outliers(0.001,10)")``. Prints
    as it parses.
    """

    name: str
    params: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in DISTRIBUTIONS:
            raise VerifyError(f"recipe {self.name!r} is unknown: one of {', '.join(DISTRIBUTIONS)}")
        takes = list(inspect.signature(DISTRIBUTIONS[self.name].values).parameters)[2:]
        if len(self.params) > len(takes) or not all(np.isfinite(self.params)):
            raise VerifyError(
                f"recipe {self}: takes at most {len(takes)} finite numbers "
                f"({', '.join(takes) or 'none'})"
            )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Inverse of str(). Raises VerifyError where the text is no recipe."""
        found = re.fullmatch(r"(\w+)(?:\(([-+.\de,]+)\))?", text)
        try:
            params = tuple(float(p) for p in found[2].split(",")) if found and found[2] else ()
        except ValueError:
            found, params = None, ()
        if not found:
            raise VerifyError(f"recipe {text!r} does not parse: write it like outliers(0.001,10)")
        return cls(found[1], params)

    def __str__(self) -> str:
        if not self.params:
            return self.name
        return f"{self.name}({','.join(map(_shortest, self.params))})"

    @property
    def family(self) -> Distribution:
        """Of which it is one."""
        return DISTRIBUTIONS[self.name]

    def draw(self, rng: np.random.Generator, problem: Problem) -> Triple:
        """(q, k, v) in float64."""
        return DISTRIBUTIONS[self.name].values(rng, problem, *self.params)


NORMAL = Recipe("normal")
