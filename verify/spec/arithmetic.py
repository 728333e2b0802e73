"""Arithmetic: the numerics that a kernel declares. Its error bound and its expected error follow
from it (verify/bounds/BOUNDS.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from verify.errors import VerifyError

SPLIT = {"bf16x3": ("bf16", 2), "bf16x6": ("bf16", 3), "tf32x3": ("tf32", 2)}
"""Products of FP32 on tensor cores: each factor is a sum of so many parts in a narrow format, each
part what the ones before leave; products of parts i and j are added up in FP32 where i + j is less
than the number of parts (Triton's `input_precision`; Henry et al. 2019, arXiv 1904.06376)."""
ACCUMULATORS = ("input", "fp64", "fp32", "tf32", "fp22", "fp16", "bf16", *SPLIT)
"""Formats that products are added up in."""
SHORT = ("fp16", "bf16")
"""Those of 16 bits."""
FORMATS = ("input", "fp64", "fp32", "tf32", "fp22", "fp16", "bf16", "e4m3", "e5m2", "e2m1")
"""Names of formats; `input` is the dtype of the problem. fp22: FP32 with 13 stored bits of
significand, the accumulator of Hopper's FP8 tensor cores (SageAttention2, arXiv 2411.10958, section
3.2; DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
"""
CODES = ("e4m3", "e5m2", "e2m1", "int8", "int4")
"""Formats that inputs are quantised to; e2m1: 4 bits, 0 to 6 (OCP MX specification 1.0, section
5.3.3)."""
SCALES = ("fp32", "ue8m0", "ue8m0_floor", "e4m3")
"""Formats of their scales."""
FARTHEST = 16.0
"""Nats: beyond, flushed exponentials of FP32 would be seen in the row sum."""
NARROW = ("fp16", "bf16", "tf32", "e4m3", "e5m2", "e2m1", *SPLIT)
"""Formats of operands that tensor cores multiply."""


@dataclass(frozen=True)
class Quantisation:
    """Q, K and V as the kernel narrows them by itself: each divided by amax / largest of its group
    and rounded to `format`. Keys that no query sees are in no group.

    `rows`: how many rows of one head share a scale; 0 a whole head, None the whole tensor.
    `block`: instead, so many columns of one row share a scale (MXFP8: 32; NVFP4: 16). `values`: in
    V, as `rows` says, or a `head`, or each of its `columns`, or so many keys of a column as `block`
    says (`blocks`); `given`: V is multiplied as it comes (SageAttention), and not centred.
    `queries`: Q likewise, or `given` (a cache of K and V in 8 bits). `rotated`: Q and K are
    first padded to a power of two of columns and multiplied by signs times Hadamard
    (verify/spec/quantization.py). `centred`: K and V are first freed of their mean over the keys of
    a head; V's is added to the output, K's to the LSE (out does not depend on it: SageAttention,
    arXiv 2410.02367, section 4.2). `fitted`: each row of Q, once rounded, is multiplied by what
    makes its product with the row as it was the row's square, within 1 +- FIT
    (verify/spec/quantization.py): a key along the query has no error from Q. `balanced`: what
    rounding took from V, its mean over the keys of a head, is added to the output.
    """

    format: str = "e4m3"
    """e4m3, e5m2, e2m1, or whole numbers of 8 or 4 bits, int8 (-127 to 127) and int4 (-7 to 7)."""
    rows: int | None = None
    block: int = 0
    scales: str = "fp32"
    """`fp32`; a power of two, `ue8m0` the next one up, so that nothing saturates (arXiv 2506.08027,
    section 3), `ue8m0_floor` the one below the largest, which may saturate (OCP MX specification
    1.0, section 6.3); `e4m3`, itself times the tensor's largest over 448 in FP32 (NVFP4, arXiv
    2509.25149, appendix B)."""
    rotated: bool = False
    values: str = "rows"
    queries: str = "rows"
    centred: bool = False
    fitted: bool = False
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.format not in CODES:
            raise VerifyError(f"quantisation format={self.format!r}: one of {', '.join(CODES)}")
        if self.values not in ("rows", "head", "columns", "blocks", "given"):
            raise VerifyError(
                f"quantisation values={self.values!r}: rows, head, columns or blocks share a scale "
                "of V, or it is multiplied as given"
            )
        if self.scales not in SCALES:
            raise VerifyError(f"quantisation scales={self.scales!r}: one of {', '.join(SCALES)}")
        if self.queries not in ("rows", "given"):
            raise VerifyError(
                f"quantisation queries={self.queries!r}: rows share a scale of Q, or it is "
                "multiplied as given"
            )
        if self.queries == "given" and (self.rotated or self.fitted):
            raise VerifyError(
                "quantisation queries='given' beside rotated or fitted: Q is not rounded"
            )
        if self.block < 0 or (self.block and self.rows is not None):
            raise VerifyError(
                f"quantisation block={self.block} beside rows={self.rows}: so many columns of one "
                "row share a scale, or so many rows"
            )
        if (self.values == "blocks" and not self.block) or (self.block and self.values == "rows"):
            raise VerifyError(
                f"quantisation values={self.values!r} beside block={self.block}: V has one scale "
                "for `block` keys of a column where values='blocks', and none by rows beside block"
            )
        if self.values == "given" and self.balanced:
            raise VerifyError(
                "quantisation balanced=True beside values='given': nothing is rounded"
            )
        if self.rows is not None and self.rows < 0:
            raise VerifyError(
                f"quantisation rows={self.rows}: rows of a head that share a scale, 0 for all, "
                "None for the tensor"
            )


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Where a kernel rounds, and to which format. The defaults are FlashAttention-2's (arXiv
    2307.08691, Algorithms 1 and 2).

    FP64 problems are computed in FP64 throughout, whatever is declared as FP32.
    """

    quantised: Quantisation | None = None
    """How the kernel quantises its inputs; None: it multiplies them as they come."""
    scaled_query: bool = False
    """True: scale * Q is stored in the input's dtype before Q K^T."""
    scores: str = "fp32"
    """Products and accumulation of Q K^T and dO V^T."""
    stored_scores: str = "fp32"
    """S (and dP) after each step: product, scale, softcap, bias; `input` for a kernel that writes
    each to memory in its dtype.
    """
    stored_exponents: bool = False
    """True: s - max is a step of its own, stored as S is (`s - s.amax(-1)` before a softmax)."""
    exp: str = "natural"
    """`natural`: exp(s - max); `binary`: exp2(t - max t) of t = s log2(e), the scale and log2(e)
    one factor; `fused`: the same with t unrounded, its product fused with the subtraction of the
    rounded maximum (may overflow where u(fp32) |s| is large)."""
    exp_ulp: float = 2.0
    """Units in the last place of FP32 by which an exponential may be off; 2: CUDA's ex2.approx (PTX
    ISA, ex2).
    """
    tanh_ulp: float = 4.0
    """Units in the last place of FP32, relative to 1, by which the softcap's tanh may be off; 4:
    formed from exp; 4096: CUDA's tanh.approx (PTX ISA, tanh: 2^-11)."""
    tile: int = 0
    """Keys between two updates of the running maximum; 0: the maximum of the whole row."""
    maximum: float = 0.0
    """Nats by which what exponents are relative to may lie above or below the largest score so far:
    a bound of it, or a maximum that is followed late (FlashAttention-4, conditional rescaling: 8 ln
    2)."""
    splits: int = 1
    """Parts of the keys, of whole tiles, that are attended to apart and merged through their LSE in
    FP32 (FlashDecoding).
    """
    partials: str = "fp32"
    """out of each split, divided by its row sum, as it is stored before splits are merged."""
    rounding: str = "nearest"
    """How numbers are stored in formats of 16 and 8 bits: `nearest`, whatever becomes of ties;
    towards `zero`; `stochastic`, up or down with the probability that makes it right on average."""
    probs: str = "input"
    """P as the operand of P V and P^T dO."""
    probs_scale: float = 1.0
    """P is multiplied by this before it is rounded, so that a narrow format does not flush it."""
    normalized_probs: bool = False
    """True: P is divided by its row sum before it is rounded (a softmax function); False: after P V
    (FlashAttention).
    """
    rowsum: str = "unrounded"
    """Which P the row sum adds up: `unrounded` or `rounded`."""
    accumulate: str = "fp32"
    """Products and accumulation of P V and of the gradients."""
    summation: str = "hardware"
    """How products are added: `nearest`; `truncated`, as tensor cores do (Fasi et al. 2021, PeerJ
    Comput. Sci. 7:e330); `hardware`: truncated on a GPU where the operands are narrow, to nearest
    elsewhere."""
    promoted: int = 0
    """Products that are added up in fp22, fp16 or bf16 before their sum is added to one in FP32
    (DeepSeek-V3, arXiv 2412.19437, section 3.3.2: 128); 0: all of them."""
    output: str = "input"
    """out, dq, dk, dv as they are stored."""
    dscores: str = "input"
    """dS as the operand of dS K and dS^T Q."""
    scaled_dscores: bool = False
    """True: scale * dS is that operand; False: dS, and the products are scaled."""
    ds_probs: str = "fp32"
    """P as the factor of dS = P * (dP - delta); `input` for a kernel that reuses the P it rounded
    for P^T dO.
    """
    delta: str = "out"
    """How it is formed in the backward: `out` = rowsum(dO * stored out); `probs` = rowsum(P * dP);
    `product` = rowsum(R) of R = P * dP stored in the input's dtype, and then dS = R - P delta
    (torch's softmax backward on CUDA)."""
    group_sum: str = "fp32"
    """dk, dv of a group of query heads as they are added up (GQA)."""
    batch_sum: str = "fp32"
    """dbias of each batch entry as it is stored before the entries are added up (a bias that is
    broadcast over the batch).
    """
    spill: tuple[int, int] | None = None
    """(query rows, keys) after which the running sums dk, dv and dq are stored in the output format
    and read back; or None.
    """
    atomic: bool = False
    """True: what is added to these sums is itself stored in the output format first (16-bit
    atomics), in any order."""
    deterministic: bool = False
    """True: a second call gives the same bits, forward and backward; judged where it is
    declared.
    """

    def __post_init__(self) -> None:
        choices = {
            **dict.fromkeys(ROUNDED, FORMATS),
            **dict.fromkeys(("scores", "accumulate"), ACCUMULATORS),
            "rowsum": ("unrounded", "rounded"),
            "delta": ("out", "probs", "product"),
            "exp": ("natural", "binary", "fused"),
            "summation": ("hardware", "nearest", "truncated"),
            "rounding": ("nearest", "zero", "stochastic"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise VerifyError(f"{name}={getattr(self, name)!r}: one of {', '.join(allowed)}")
        short = [name for name in ("scores", "accumulate") if getattr(self, name) in SHORT]
        if self.quantised and short:
            raise VerifyError(
                f"{short[0]}={getattr(self, short[0])!r} beside quantised inputs: sums of 8-bit "
                "codes in 16 bits are not emulated; declare fp32 or fp22"
            )
        if self.partials != "fp32" and self.normalized_probs:
            raise VerifyError(
                f"partials={self.partials!r} beside normalized_probs: P is divided by the sum of "
                "the whole row, so no split has a row sum of its own"
            )
        if self.atomic and self.spill is None:
            raise VerifyError(
                "atomic=True beside spill=None: atomics add partial sums, so say after how many "
                "(query rows, keys) they are stored"
            )
        if self.spill is not None and min(self.spill) < 1:
            raise VerifyError(f"spill={self.spill!r}: (query rows, keys), each at least 1, or None")
        numbers = {
            "tile": self.tile >= 0,
            "splits": self.splits >= 1,
            "probs_scale": self.probs_scale > 0,
            "exp_ulp": self.exp_ulp > 0,
            "tanh_ulp": self.tanh_ulp > 0,
            "promoted": self.promoted >= 0,
            "maximum": 0 <= self.maximum <= FARTHEST,
        }
        if wrong := [name for name, fine in numbers.items() if not fine]:
            raise VerifyError(
                f"{wrong[0]}={getattr(self, wrong[0])!r}: tile and promoted from 0, splits from "
                f"1, probs_scale, exp_ulp and tanh_ulp above 0, maximum from 0 to {FARTHEST}"
            )

    def format(self, field: str, dtype: str) -> str:
        """The format in force for this field in a problem of this dtype."""
        declared = getattr(self, field)
        if dtype == "fp64":
            return "fp64"
        return dtype if declared == "input" else declared

    def truncates(self, field: str, dtype: str, device: str) -> bool:
        """Whether products accumulated under this field ("scores", "accumulate") are truncated, on
        "cuda" or "cpu".
        """
        if self.summation != "hardware":
            return self.summation == "truncated"
        narrow = (
            dtype in NARROW or self.quantised is not None or self.format(field, dtype) in NARROW
        )
        return device == "cuda" and narrow

    def __str__(self) -> str:
        """The line that declares it: what differs from the defaults."""
        given = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"Arithmetic({given})"


ROUNDED = (
    "scores",
    "stored_scores",
    "partials",
    "probs",
    "accumulate",
    "output",
    "dscores",
    "ds_probs",
    "group_sum",
    "batch_sum",
)
"""The fields that name a format."""
FLASH = Arithmetic()
EAGER = Arithmetic(stored_scores="input", normalized_probs=True, delta="probs", group_sum="input")
"""softmax(q @ k.T * scale + bias) @ v as PyTorch's own functions compute it, every step stored."""
