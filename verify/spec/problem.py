"""Problem: what is to be computed. A frozen value that validates itself, prints as one short id and
parses back.

With S = scale * Q K^T (softcap: S = softcap * tanh(S / softcap)), S += bias, S = -inf where the
mask hides:

    lse_i = log sum_j exp(s_ij)        out_i = sum_j exp(s_ij - lse_i) v_j

Layout [batch, heads, len, dim]. Query head h uses key head h // (heads_q // heads_kv). A row that
sees no key: out 0, lse -inf.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from verify.errors import VerifyError
from verify.spec.masks import FULL, Mask

DTYPES = ("fp64", "fp32", "fp16", "bf16")
BIASES = ("none", "bhqk", "hqk", "qk", "alibi")
"""Additive float bias by its shape (b, h, q, k; what is missing is broadcast), or ALiBi slopes per
query head.
"""
HANDED = ("rule", "bool", "float", "bool_small", "float_small", "bool_bhqk", "float_bhqk")
"""How the mask reaches the kernel: as it likes, as a boolean tensor (True = take part), or as a
float bias of 0 and -inf. The tensor has all queries and keys, entries and heads only where the mask
differs in them; `small`: queries, too, only where it does; `bhqk`: all of [B,H,Q,K].
"""

_ID = re.compile(
    r"b(?P<batch>-?\d+)\.h(?P<heads_q>-?\d+)(:(?P<heads_kv>-?\d+))?\.q(?P<len_q>-?\d+)\.k(?P<len_k>-?\d+)"
    r"\.d(?P<dim_qk>-?\d+)(:(?P<dim_v>-?\d+))?\.(?P<dtype>[a-z]+\d+)\.(?P<mask>[\w(),&-]+)"
    r"(\.as_(?P<mask_as>\w+))?(\.bias=(?P<bias>\w+))?(\.scale=(?P<scale>[-+.\deinfa]+?))?(\.softcap=(?P<softcap>[-+.\de]+?))?"
    r"(?P<grads>\.grads)?"
)
EXAMPLE = "b2.h8:2.q113.k257.d64.bf16.causal_lower_right"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention problem. Lengths may be 0; scale None means 1/sqrt(dim_qk); softcap 0 means
    none.

    Raises VerifyError where a field makes no sense, naming the field and its value.
    """

    batch: int = 1
    heads_q: int = 1
    heads_kv: int = 1
    len_q: int = 1
    len_k: int = 1
    dim_qk: int = 1
    dim_v: int = 1
    dtype: str = "fp32"
    mask: Mask = FULL
    mask_as: str = "rule"
    bias: str = "none"
    scale: float | None = None
    softcap: float = 0.0
    grads: bool = False

    def __post_init__(self) -> None:
        if not self._fine() and (wrong := next(self._wrong(), None)):
            raise VerifyError(wrong)

    def _fine(self) -> bool:
        """Whether all fields make sense, asked at once: problems are tried by the thousand."""
        return (
            min(self.len_q, self.len_k) >= 0
            and min(self.batch, self.heads_q, self.heads_kv, self.dim_qk, self.dim_v) >= 1
            and not self.heads_q % self.heads_kv
            and self.dtype in DTYPES
            and self.bias in BIASES
            and self.mask_as in HANDED
            and (self.scale is None or math.isfinite(self.scale))
            and 0 <= self.softcap < math.inf
            and not self.mask.batch_sizes - {self.batch}
        )

    def _wrong(self) -> Iterator[str]:
        """What is said of each field that makes no sense."""
        for name in ("len_q", "len_k"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)}: a length is 0 or more"
        for name in ("batch", "heads_q", "heads_kv", "dim_qk", "dim_v"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)}: at least 1"
        if self.heads_q % self.heads_kv:
            heads = f"heads_q={self.heads_q}, heads_kv={self.heads_kv}"
            yield f"{heads}: heads_q must be a multiple of heads_kv"
        for name, known in (("dtype", DTYPES), ("bias", BIASES), ("mask_as", HANDED)):
            if getattr(self, name) not in known:
                yield f"{name}={getattr(self, name)!r}: one of {', '.join(known)}"
        if self.scale is not None and not math.isfinite(self.scale):
            yield f"scale={self.scale}: any finite number, or none"
        if not 0 <= self.softcap < math.inf:
            yield f"softcap={self.softcap}: a finite number >= 0, 0 = none"
        if self.mask.batch_sizes - {self.batch}:
            where = f"mask={self.mask}, batch={self.batch}"
            yield f"{where}: padding takes one length per batch entry"

    @classmethod
    def parse(cls, text: str) -> Problem:
        """Inverse of str(). Raises VerifyError where the text is no id of a problem."""
        found = _ID.fullmatch(text)
        if not found:
            raise VerifyError(f"problem id {text!r} does not parse: write it like {EXAMPLE}")
        f = found.groupdict()
        whole = {n: int(f[n]) for n in ("batch", "heads_q", "len_q", "len_k", "dim_qk")}
        try:
            scale, softcap = float(f["scale"]) if f["scale"] else None, float(f["softcap"] or 0)
        except ValueError as error:
            raise VerifyError(
                f"problem id {text!r}: {error}; write it like {EXAMPLE}.scale=0.5"
            ) from None
        return cls(
            **whole,
            heads_kv=int(f["heads_kv"] or f["heads_q"]),
            dim_v=int(f["dim_v"] or f["dim_qk"]),
            dtype=f["dtype"],
            mask=Mask.parse(f["mask"]),
            mask_as=f["mask_as"] or "rule",
            bias=f["bias"] or "none",
            scale=scale,
            softcap=softcap,
            grads=bool(f["grads"]),
        )

    def __str__(self) -> str:
        heads = f"h{self.heads_q}" + (f":{self.heads_kv}" if self.heads_kv != self.heads_q else "")
        dims = f"d{self.dim_qk}" + (f":{self.dim_v}" if self.dim_v != self.dim_qk else "")
        options = [
            ("as_" + self.mask_as, self.mask_as != "rule"),
            (f"bias={self.bias}", self.bias != "none"),
            (f"scale={self.scale!r}", self.scale is not None),
            (f"softcap={self.softcap!r}", self.softcap != 0),
            ("grads", self.grads),
        ]
        words = [
            f"b{self.batch}",
            heads,
            f"q{self.len_q}",
            f"k{self.len_k}",
            dims,
            self.dtype,
            str(self.mask),
        ]
        return ".".join(words + [word for word, shown in options if shown])

    def but(self, **changes) -> Problem:
        """This problem with some fields changed (and validated again)."""
        if not changes.keys() <= self.__dict__.keys():
            return Problem(**{**self.__dict__, **changes})  # says which there are
        other = object.__new__(Problem)  # a third of the time: problems are tried by the thousand
        other.__dict__.update(self.__dict__, **changes)
        other.__post_init__()
        return other

    @property
    def softmax_scale(self) -> float:
        """The scale in force."""
        return self.dim_qk**-0.5 if self.scale is None else self.scale

    @property
    def mask_is_bias(self) -> bool:
        """Whether the mask is handed over as a float bias."""
        return self.mask_as.startswith("float")

    @property
    def mask_shape(self) -> tuple[int, int, int, int]:
        """Of the tensor that the mask is handed over as: [B|1,H|1,Q|1,K]."""
        sizes = self.batch, self.heads_q, self.len_q, self.len_k
        if self.mask_as.endswith("_bhqk"):
            return sizes
        mask, whole = self.mask, not self.mask_as.endswith("_small")
        differs = mask.per_batch, mask.per_head, whole or mask.per_row, True
        b, h, q, k = (
            n if it_does else min(n, 1) for n, it_does in zip(sizes, differs, strict=True)
        )
        return b, h, q, k

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads_q // self.heads_kv

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor; `bias` and `slopes` only where the problem has them."""
        b, h, hk, q, k = self.batch, self.heads_q, self.heads_kv, self.len_q, self.len_k
        sizes = {"b": b, "h": h, "q": q, "k": k}
        shapes: dict[str, tuple[int, ...]] = {
            "q": (b, h, q, self.dim_qk),
            "k": (b, hk, k, self.dim_qk),
            "v": (b, hk, k, self.dim_v),
        }
        shapes |= {"out": (b, h, q, self.dim_v), "lse": (b, h, q), "do": (b, h, q, self.dim_v)}
        if self.bias == "alibi":
            shapes["slopes"] = (h,)
        elif self.bias != "none":
            shapes["bias"] = tuple(sizes[letter] if letter in self.bias else 1 for letter in "bhqk")
        return shapes
