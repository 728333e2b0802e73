"""The evidence in verify/BOUNDS.md, made again: ``python -m verify.properties.study --help``.

soundness   judge many drawn cases of every kernel without stopping at an alarm; run several at once with different seeds
sharpness   measured/expected and measured/proved from the journals of such runs, by kernel, dtype and tensor
power       the smallest defects that the two rules catch, beside what other suites' tolerances catch on the same outputs
cost        time of the oracle, the proved bound and the emulation on one shape
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from rich.console import Console
from rich.table import Table

from verify import environment, registry
from verify.arithmetic import FLASH
from verify.bounds import ELSEWHERE
from verify.case import Case
from verify.engine import judge
from verify.finding import Finding
from verify.measure import distance
from verify.properties.laws import PROPERTIES, Property
from verify.properties.strategies import cases, options
from verify.properties.truth import truth
from verify.records import JUDGED, Journal, Record, read

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=170, highlight=False)
LAWS = ("oracle", "gradients")
CHUNK = 100


@app.command()
def soundness(
    seconds: Annotated[float, typer.Option(help="time for all kernels together")] = 60.0,
    seed: Annotated[int, typer.Option(help="seed of the drawn cases")] = 0,
    kernel: Annotated[list[str] | None, typer.Option(help="only this kernel; may be repeated")] = None,
    out: Annotated[Path, typer.Option(help="folder for the journal")] = Path("soundness"),
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Judge drawn cases of every kernel, out, LSE and gradients; whatever alarms is printed and counted, and the run goes on."""
    device = environment.prepare(device)
    torch.set_num_threads(1)
    registry.load_bundled()
    kernels = [k for name in kernel for k in registry.find(name)] if kernel else list(registry.REGISTRY.values())
    pairs = [(k, PROPERTIES[n]) for k in kernels for n in LAWS if not options(k, device).refusal(grads=PROPERTIES[n].grads)]
    journal, start, counts, chunk = Journal(out / f"{seed}.jsonl"), time.monotonic(), Counter[str](), 0
    while time.monotonic() - start < seconds:
        for subject, law in pairs:
            for case in drawn(subject, law, device, seed=seed * 1_000_003 + chunk):
                record = judged(subject, law, case, device)
                counts[record.verdict] += 1
                journal.append(record)
                if record.verdict == "failed":
                    console.print(f"ALARM {subject.name} {law.name} {case}: {record.reason}", markup=False, soft_wrap=True)
        chunk += 1
    console.print(f"seed {seed}: {sum(counts[v] for v in JUDGED)} judged on {device}, {dict(counts)}", markup=False)


def drawn(kernel: registry.Kernel, law: Property, device: str, *, seed: int) -> list[Case]:
    """CHUNK cases as the engine draws them."""
    found: list[Case] = []

    @seeded(seed)
    @settings(max_examples=CHUNK, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(cases(kernel, device, full_mask=law.full_mask, grads=law.grads))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def judged(kernel: registry.Kernel, law: Property, case: Case, device: str) -> Record:
    """The record of one case, an alarm among them."""
    try:
        return judge(kernel, law, case, device)
    except Finding as finding:
        return Record(kernel.name, law.name, str(case), "failed", finding.sentence, measured=finding.measured)


@app.command()
def sharpness(folder: Annotated[Path, typer.Argument(help="folder of journals")]) -> None:
    """Quantiles of measured/expected RMSE and of the largest measured/proved, where the statistics apply."""
    ratios: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in read(folder):
        if record.verdict in ("held", "uninformative"):
            dtype = Case.parse(record.case).problem.dtype
            for name, value in record.measured.items():
                tensor, against = name.split("/")
                ratios[record.kernel, dtype, tensor][against].append(value)
    headings = [
        "kernel",
        "dtype",
        "tensor",
        "cases",
        "measured/expected: 5 %",
        "median",
        "95 %",
        "measured/proved: median",
        "max",
    ]
    table = Table(*headings, box=None)
    for key, found in sorted(ratios.items()):
        expected, proved = found["expected"], found["proved"]
        low, middle, high = (f"{x:.3f}" for x in np.quantile(expected, (0.05, 0.5, 0.95))) if expected else ("-",) * 3
        table.add_row(*key, str(len(proved)), low, middle, high, f"{np.median(proved):.3f}", f"{max(proved):.3f}")
    console.print(table)


SCALES = ("softmax scale off by", "output off by a factor 1 +", "noise that raises the RMSE by")
LOSSES = {
    "one tile's accumulator in BF16": {"bf16_tile": 1.0},
    "P truncated instead of rounded": {"cut_p": 1.0},
    "exp off by 1e-3 at random": {"exp_noise": 1e-3},
    "Q scaled in the input's dtype": {"scaled_q": 1.0},
}
WOLF = "rejects all"
STEPS = [m * 10.0**e for e in range(-5, 1) for m in (1, 2, 5)]


@app.command()
def power(
    length: Annotated[int, typer.Option()] = 512,
    seeds: Annotated[int, typer.Option(help="draws of N(0,1); a defect counts as caught where all see it")] = 5,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """The smallest defects of a tiled kernel that each rule rejects in every draw, and which precision losses it rejects."""
    device = environment.prepare(device)
    rules = ("proved", "proved or expected", *ELSEWHERE)
    table = Table("dtype", "defect", "RMSE / honest", *rules, box=None)
    for dtype in ("fp16", "bf16", "fp32"):
        draws = [_Draw(Case.parse(f"b1.h4.q{length}.k{length}.d128.{dtype}.full/normal#{n}"), device) for n in range(seeds)]
        wolf = {rule for rule in rules if all(d.rejects(rule, {}) for d in draws)}
        assert not {"proved", "proved or expected"} & wolf, "the honest kernel is accused"
        for name, kind in zip(SCALES, ("scale_off", "factor", "noise"), strict=True):
            caught = {rule: next((x for x in STEPS if all(d.rejects(rule, {kind: x}) for d in draws)), None) for rule in rules}
            table.add_row(
                dtype, name, "", *(WOLF if r in wolf else f"{100 * x:g} %" if x else "never" for r, x in caught.items())
            )
        for name, loss in LOSSES.items() if dtype != "fp32" else ():
            ratio = sum(d.rmse(loss) / d.rmse({}) for d in draws) / seeds
            seen = {rule: sum(d.rejects(rule, loss) for d in draws) for rule in rules}
            table.add_row(dtype, name, f"{ratio:.2f}", *(WOLF if r in wolf else f"{n}/{seeds}" for r, n in seen.items()))
    console.print(table)


class _Draw:
    """One draw: what is true, what honest kernels give, and whether a rule rejects a kernel with some defect."""

    def __init__(self, case: Case, device: str) -> None:
        self.known = truth.__wrapped__(case, device)
        self.limit = self.known.allowances(FLASH)["out"].limit
        self.expected = self.known.expectation(FLASH)
        q, k, v = (t.double() for t in (self.known.inputs.q, self.known.inputs.k, self.known.inputs.v))
        self.same_dtype = _plain(*(t.to(self.known.inputs.q.dtype) for t in (q, k, v)))
        self.upcast = _plain(q.float(), k.float(), v.float())
        self.outs: dict[tuple[tuple[str, float], ...], torch.Tensor] = {}

    def out(self, defect: dict[str, float]) -> torch.Tensor:
        """The kernel's output with this defect."""
        key = tuple(defect.items())
        if key not in self.outs:
            x = self.known.inputs
            self.outs[key] = tiled(x.q, x.k, x.v, self.known.problem.softmax_scale, **defect)
        return self.outs[key]

    def rmse(self, defect: dict[str, float]) -> float:
        """Against the exact answer."""
        return (self.out(defect).double() - self.known.exact.out).square().mean().sqrt().item()

    def rejects(self, rule: str, defect: dict[str, float]) -> bool:
        """Whether the rule says no."""
        if defect.get("noise"):
            defect = {"noise": self.rmse({}) * math.sqrt((1 + defect["noise"]) ** 2 - 1)}
        out = self.out(defect)
        if rule in ELSEWHERE:
            return not ELSEWHERE[rule](out, self.upcast, self.same_dtype)
        beyond = bool((distance(out, self.known.exact.out) > self.limit).any())
        return beyond or (rule != "proved" and self.expected.surprise("out", out) is not None)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def tiled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    scale_off: float = 0.0,
    factor: float = 0.0,
    noise: float = 0.0,
    bf16_tile: float = 0.0,
    cut_p: float = 0.0,
    exp_noise: float = 0.0,
    scaled_q: float = 0.0,
) -> torch.Tensor:
    """FlashAttention-2's forward in torch, tiles of 64 keys, FP32 sums, switches for defects; written apart from the oracles."""
    generator = torch.Generator(q.device).manual_seed(0)

    def normal(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, device=x.device)

    scale = scale * (1 + scale_off)
    rows = (q.float() * scale).to(q.dtype).float() if scaled_q else q.float()
    top, total, acc = torch.full(q.shape[:3], -torch.inf, device=q.device), torch.zeros(q.shape[:3], device=q.device), 0.0
    for n, (keys, values) in enumerate(zip(k.split(64, 2), v.split(64, 2), strict=True)):
        s = rows @ keys.float().mT * (1.0 if scaled_q else scale)
        old, top = top, torch.maximum(top, s.amax(-1))
        p, decay = torch.exp(s - top[..., None]), torch.exp(old - top)
        p = p * (1 + exp_noise * normal(p)) if exp_noise else p
        held = _cut(p, q.dtype) if cut_p else p.to(q.dtype).float()
        total, acc = total * decay + p.sum(-1), acc * decay[..., None] + held @ values.float()
        acc = acc.bfloat16().float() if bf16_tile and n == 3 else acc
    out = acc / total[..., None]
    return ((out + noise * normal(out)) * (1 + factor)).to(q.dtype)


def _cut(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """P towards zero in this format."""
    bits = {torch.float16: 13, torch.bfloat16: 16}.get(dtype, 0)
    return ((p.view(torch.int32) >> bits) << bits).view(torch.float32)


if __name__ == "__main__":
    app()
