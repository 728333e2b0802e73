"""Both exact oracles against what others have published, documented or can compute on paper.

Two float64 evaluations may differ by twice the proved rounding error of one, a printed figure by
half a unit of its last digit.
"""

import math
from dataclasses import replace
from decimal import Decimal

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from verify.errors import VerifyError
from verify.oracles import float64, mpmath_oracle
from verify.reference.reference import oracle_limit
from verify.spec.case import Case, Inputs
from verify.spec.problem import Problem

both = pytest.mark.parametrize("oracle", [float64, mpmath_oracle], ids=["float64", "mpmath"])
WALK_V = torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
WALK_PRINTED = [["10", "20"], ["22.44", "32.44"], ["28.4", "38.4"]]
WALK_DIGITS = 3  # of the softmax weights that it goes on with: 0.378, 0.622 and 0.360, 0.360, 0.280
BOOK = [
    [0.43, 0.15, 0.89],
    [0.55, 0.87, 0.66],
    [0.57, 0.85, 0.64],
    [0.22, 0.58, 0.33],
    [0.77, 0.25, 0.10],
    [0.05, 0.80, 0.55],
]
BOOK_PRINTED = """0.4421 0.5931 0.5790  0.4419 0.6515 0.5683  0.4431 0.6496 0.5671
                  0.4304 0.6298 0.5510  0.4671 0.5910 0.5266  0.4177 0.6503 0.5645"""


def answer(oracle, problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv, dbias, those that the oracle gives; mpmath's are rounded to float64."""
    if oracle is mpmath_oracle:
        return {
            name: torch.from_numpy(array.astype(float))
            for name, array in mpmath_oracle.exact(problem, inputs).items()
        }
    return {
        name: value
        for name, value in vars(float64.exact(problem, inputs)).items()
        if isinstance(value, Tensor)
    }


def check(oracle, problem: Problem, inputs: Inputs, **wanted: Tensor) -> None:
    """Each element is as wanted within two proved rounding errors. Infinities must be equal; an
    infinite bound allows nothing.
    """
    got, limits = answer(oracle, problem, inputs), oracle_limit(problem, inputs)
    for name, value in wanted.items():
        assert got[name].shape == value.shape, (
            f"{problem}: {name} has shape {tuple(got[name].shape)}"
        )
        near = ((got[name] - value).abs() <= 2 * limits[name]) & limits[name].isfinite()
        for at in torch.nonzero(~near & (got[name] != value)).tolist()[:1]:
            a, b, limit = (t[tuple(at)].item() for t in (got[name], value, limits[name]))
            pytest.fail(
                f"{problem}: {name}{at} is {a!r}, wanted {b!r}: off by {abs(a - b):.3g}, allowed 2 "
                f"x {limit:.3g}"
            )


def drawn(text: str, **given: Tensor) -> tuple[Problem, Inputs]:
    """The problem of this id, and N(0,1) inputs but for those given, each [len, dim]."""
    case = Case.parse(f"{text}/normal#1")
    return case.problem, replace(
        case.inputs(), **{name: t[None, None].double() for name, t in given.items()}
    )


def visible(problem: Problem) -> Tensor:
    """bool [B,1,Q,K], True = takes part."""
    b, q, k = problem.batch, problem.len_q, problem.len_k
    cells = [
        problem.mask.sees(i, j, q, k, batch=b, entry=n)
        for n in range(b)
        for i in range(q)
        for j in range(k)
    ]
    return torch.tensor(cells).view(b, 1, q, k)


def walk(v: Tensor) -> tuple[Problem, Inputs]:
    """Three tokens, scale 1/2, causal: scores 0; 0, 1/2; 1/4, 1/4, 0."""
    q = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0]])
    return drawn(
        f"b1.h1.q3.k3.d4:{v.shape[1]}.fp64.causal_upper_left", q=q, k=torch.eye(4)[:3], v=v
    )


@both
def test_walk_through_has_its_closed_form(oracle):
    a, b = math.exp(0.5), math.exp(0.25)
    column = torch.tensor(
        [10, (10 + 30 * a) / (1 + a), (40 * b + 50) / (2 * b + 1)], dtype=torch.float64
    )
    check(oracle, *walk(WALK_V), out=torch.stack([column, column + 10], -1)[None, None])


@both
def test_walk_through_prints_what_its_rounded_weights_give(oracle):
    """Its 22.44 is 0.378 * 10 + 0.622 * 30; the exact 22.4492 would print as 22.45. V = identity
    shows the weights.
    """
    p = [
        [round(Decimal(w), WALK_DIGITS) for w in row]
        for row in answer(oracle, *walk(torch.eye(3)))["out"][0, 0].tolist()
    ]
    given = [
        [sum(w * int(x) for w, x in zip(row, column, strict=True)) for column in WALK_V.T.tolist()]
        for row in p
    ]
    assert given == [[Decimal(figure) for figure in row] for row in WALK_PRINTED]


@both
def test_a_book_prints_these_contexts(oracle):
    """Q = K = V = six embeddings, scale 1 (Raschka 2024, Build a Large Language Model, 3.3; its
    ch03.ipynb on GitHub).
    """
    x = torch.tensor(BOOK, dtype=torch.float64)
    out = answer(oracle, *drawn("b1.h1.q6.k6.d3.fp64.full.scale=1.0", q=x, k=x, v=x))["out"]
    for value, figure in zip(
        out.flatten().tolist(), map(Decimal, BOOK_PRINTED.split()), strict=True
    ):
        assert (
            abs(Decimal(value) - figure) <= Decimal(1).scaleb(int(figure.as_tuple().exponent)) / 2
        ), f"{value!r} is printed {figure}"


def documented(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):  # noqa: FBT002
    """What the text of torch.nn.functional.scaled_dot_product_attention says, dropout apart (torch
    2.13).
    """
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
    s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones_like(s, dtype=torch.bool).tril()
    if attn_mask is not None:
        s = (
            torch.where(attn_mask, s, -torch.inf)
            if attn_mask.dtype == torch.bool
            else s + attn_mask
        )
    return torch.softmax(s, -1) @ v


@both
@pytest.mark.parametrize("sdpa", [documented, scaled_dot_product_attention])
@pytest.mark.parametrize(
    "mask",
    ["full.scale=-0.7", "full.bias=bhqk", "causal_upper_left", "padding(3,7)", "dense(50,1)"],
)
@pytest.mark.parametrize("sizes", ["b2.h2.q4.k7.d5:3", "b2.h6:2.q9.k7.d4"])
def test_sdpa_means_this(sizes, mask, sdpa, oracle):
    """Causal is upper-left; another mask is boolean, True = take part; a bias is a float mask;
    heads repeat_interleave.
    """
    problem, x = drawn(f"{sizes}.fp64.{mask}")
    words = (
        {"is_causal": True}
        if mask == "causal_upper_left"
        else {"attn_mask": visible(problem) if x.bias is None else x.bias}
    )
    check(
        oracle,
        problem,
        x,
        out=sdpa(x.q, x.k, x.v, **words, scale=problem.scale, enable_gqa=problem.group > 1),
    )


@both
def test_lower_right_is_torchs(oracle):
    problem, x = drawn("b2.h2.q3.k7.d5.fp64.causal_lower_right")
    check(
        oracle,
        problem,
        x,
        out=scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=causal_lower_right(3, 7)),
    )


@both
@pytest.mark.parametrize("heads", [1, 2])
def test_key_padding_mask_is_the_inverse_of_a_boolean_mask(heads, oracle):
    """nn.MultiheadAttention's True = ignore, SDPA's and ours = take part. Its projections here are
    the identity: no rounding.
    """
    problem, x = drawn(f"b2.h{heads}.q4.k5.d3.fp64.padding(3,5)")
    module = torch.nn.MultiheadAttention(
        3 * heads, heads, bias=False, batch_first=True, dtype=torch.float64
    ).eval()
    for weight in module.parameters():  # [3*H*D, H*D] of q, k, v and [H*D, H*D] of out
        weight.data.copy_(torch.eye(3 * heads).repeat(len(weight) // (3 * heads), 1))
    flat = (t.transpose(1, 2).flatten(2) for t in (x.q, x.k, x.v))  # [B,H,len,D] -> [B,len,H*D]
    out, _ = module(*flat, key_padding_mask=~visible(problem)[:, 0, 0], need_weights=False)
    check(oracle, problem, x, out=out.detach().unflatten(-1, (heads, 3)).transpose(1, 2))


@both
@pytest.mark.parametrize(
    "mask", ["full", "causal_lower_right", "window(1,0)&padding(6,2)", "padding(0,4)"]
)
def test_zero_queries_average_what_they_see(mask, oracle):
    """q = 0: out = mean of the visible v, lse = log n; where nothing is visible 0 and -inf."""
    problem, x = drawn(f"b2.h2.q4.k6.d3.fp64.{mask}")
    seen = visible(problem).double()  # [B,1,Q,K]
    mean, lse = (
        seen @ x.v / seen.sum(-1, keepdim=True).clamp(min=1),
        seen.sum(-1).log().expand(problem.shapes["lse"]),
    )
    check(oracle, problem, replace(x, q=torch.zeros_like(x.q)), out=mean, lse=lse)


@both
def test_one_key_is_copied(oracle):
    """p = 1: out = v, lse = s, dv = sum of do over the group and the queries, dq = dk = 0."""
    problem, x = drawn("b2.h4:2.q3.k1.d5:2.fp64.full.grads")
    key, value = (t.repeat_interleave(2, 1) for t in (x.k, x.v))
    wanted = {
        "out": value.expand(problem.shapes["out"]),
        "lse": problem.softmax_scale * (x.q * key).sum(-1),
    }
    wanted["dv"] = (
        x.do.unflatten(1, (2, 2)).sum((2, 3)).unsqueeze(2)
    )  # [B,Hk,G,Q,Dv] -> [B,Hk,1,Dv]
    check(oracle, problem, x, **wanted, dq=torch.zeros_like(x.q), dk=torch.zeros_like(x.k))


@both
@pytest.mark.parametrize(
    "text", ["q3.k4.d2.fp32.dense(0,1)", "q3.k0.d2.bf16.full", "q0.k4.d2.fp16.full"]
)
def test_empty_rows_are_zero(text, oracle):
    problem, inputs = drawn(f"b2.h2:1.{text}.bias=hqk.softcap=3.0.grads")
    for name, value in answer(oracle, problem, inputs).items():
        assert value.shape == problem.shapes[name.removeprefix("d")], name
        assert (value == (-torch.inf if name == "lse" else 0)).all(), name


def plain(problem: Problem, x: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse) as one differentiable expression."""
    seen, k, v = visible(problem), *(t.repeat_interleave(problem.group, 1) for t in (x.k, x.v))
    s = problem.softmax_scale * (x.q @ k.mT)
    s = problem.softcap * torch.tanh(s / problem.softcap) if problem.softcap else s
    if x.slopes is not None:
        distance = (
            torch.arange(problem.len_q)[:, None]
            + problem.len_k
            - problem.len_q
            - torch.arange(problem.len_k)
        ).abs()
        s = s - x.slopes[:, None, None] * distance
    s, empty = (
        (s if x.bias is None else s + x.bias).masked_fill(~seen, -torch.inf),
        ~seen.any(-1, keepdim=True),
    )
    return (torch.softmax(s.masked_fill(empty, 0), -1) * ~empty) @ v, torch.logsumexp(s, -1)


@both
@pytest.mark.parametrize("text", [
    "b2.h2.q4.k5.d3:2.fp64.full",
    "b1.h4:2.q5.k5.d4.fp64.causal_upper_left.scale=-0.8",
    "b2.h4:1.q6.k4.d3.fp64.causal_lower_right.softcap=1.5",
    "b2.h4:2.q4.k6.d3.fp64.padding(6,2).bias=bhqk",
    "b2.h2:1.q4.k6.d3.fp64.window(2,0).bias=hqk.softcap=2.0",
    "b2.h4:2.q3.k7.d3.fp64.prefix_lm(2)&padding(7,0).bias=qk.scale=-1.5",
    "b1.h3.q5.k7.d2.fp64.blocks(2,3).bias=alibi",
    "b1.h2.q5.k7.d2.fp64.dense(40,3).bias=alibi.scale=0.0.softcap=4.0",
])  # fmt: skip
def test_gradients_are_autograds(text, oracle):
    problem, inputs = drawn(f"{text}.grads")
    leaves = inputs.exact().map(lambda t: t.clone().requires_grad_())
    out, lse = plain(problem, leaves)
    (out * inputs.do).sum().backward()
    gradients = {
        f"d{name}": getattr(leaves, name).grad
        for name in ("q", "k", "v", "bias")
        if name in problem.shapes
    }
    check(oracle, problem, inputs, out=out.detach(), lse=lse.detach(), **gradients)


def test_mpmath_refuses_what_it_cannot_do():
    with pytest.raises(VerifyError, match="127744128 multiply-adds"):
        mpmath_oracle.exact(*drawn("b1.h1.q999.k999.d64.fp32.full"))
    with pytest.raises(VerifyError, match="digits=10"):
        mpmath_oracle.exact(*drawn("b1.h1.q2.k2.d2.fp32.full"), digits=10)
