"""What becomes of the Triton kernels on Hopper, without a GPU: `python -m
verify.studies.hopper_compile`.

Every kind of kernel is compiled for sm_90 and assembled; a line says its registers per thread, what
spills, its shared memory and whether the assembler runs its products one after the other (warning
C75xx). Triton can be switched to compiling only before it is imported, so this is a program and not
a function.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from verify.kernels.triton import fp8, fp8_quantize, launch
from verify.kernels.triton.fa2 import _forward
from verify.kernels.triton.fa2_backward import _by_keys, _by_rows
from verify.kernels.triton.fp8 import Fp8Launch
from verify.kernels.triton.launch import Launch, Shape
from verify.spec.masks import FULL, Mask

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.uint8: "u8",
}
TYPES |= {torch.float8_e4m3fn: "fp8e4nv"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
setattr(launch, "has_tma", lambda device: True)  # noqa: B010 - mypy


class Noted:
    """In a kernel's place: keeps what it would have been launched with, each time."""

    def __init__(self, function: Any) -> None:
        self.function, self.launches = function, list[dict[str, Any]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        names = self.function.arg_names
        return lambda *given, **named: self.launches.append(
            dict(zip(names, given, strict=False)) | named
        )


def _launch(of: type[Launch], dtype: torch.dtype, dim: int, kind: str) -> Launch:
    rules = Mask.parse("causal_lower_right") if kind == "rules" else FULL
    t, softcap = torch.zeros(1, 2, 128, dim, dtype=dtype), 20.0 if kind == "general" else 0.0
    return of(t, Shape(1, 2, 1, 128, 128, dim, dim), rules, None, None, None, 0.1, softcap)


def launches(dtype: torch.dtype, dim: int, kind: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(pass, kernel, arguments) of one call of attention and its backward."""
    launch, row = _launch(Launch, dtype, dim, kind), torch.zeros(1, 2, 128)
    t = launch.q
    loads = {"q": t, "do": t, "k": t, "v": t}
    found: dict[str, torch.Tensor | float] = {"lse2": row, "delta": row, "scale": 0.1}
    passes: list[
        tuple[
            str,
            Any,
            dict[str, torch.Tensor],
            dict[str, torch.Tensor],
            dict[str, Any],
            dict[str, bool],
        ]
    ] = [("forward", _forward, {"q": t, "k": t, "v": t}, {"out": t}, {"lse": row}, {})]
    passes += [
        (name, _by_keys, loads, {"dk": t, "dv": t}, found, chosen)
        for name, chosen in launch.passes()
    ]
    passes += [("rows", _by_rows, loads, {"dq": t}, found | {"dbias": t}, {})]
    for name, function, operands, stores, others, chosen in passes:
        noted = Noted(function)
        launch.run(noted, name, operands, stores, others, **chosen)
        yield name, function, noted.launches[0]


def fp8_launches(
    dtype: torch.dtype, dim: int, kind: str
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The same of FP8 attention: the narrowing of Q, K and V, then the forward."""
    launch = _launch(Fp8Launch, dtype, dim, kind)
    t = launch.q
    places = [(fp8_quantize, "_largest"), (fp8_quantize, "_narrow"), (fp8, "_forward")]
    noted = [Noted(getattr(module, name)) for module, name in places]
    with ExitStack() as patches:
        for (module, name), one in zip(places, noted, strict=True):
            patches.enter_context(patch.object(module, name, one))
        operands = fp8_quantize.quantise(t, t, t, fp8.BEST, dim, None)
        fp8.attend(launch, operands, *launch.results())
    for (_, name), one in zip(places, noted, strict=True):
        for arguments in one.launches:
            yield "fp8" + name, one.function, arguments


def compile_for_hopper(function: Any, arguments: dict[str, Any]) -> Any:
    """The compiled kernel of such a launch. Raises what Triton raises."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for n, name in enumerate(function.arg_names):
        value = arguments[name]
        if name.isupper():
            signature[name], constants[(n,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, tuple):
            signature[name] = ("constexpr",) * len(value)
            constants |= {(n, i): item for i, item in enumerate(value)}
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    return triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants),
        target=HOPPER,
        options=options,
    )


def resources(kernel: Any) -> list[str]:
    """Registers, bytes spilled, shared memory in KiB, the assembler's warning."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [
            get_ptxas(HOPPER.arch).path,
            "-v",
            "--gpu-name",
            "sm_90a",
            file.name,
            "-o",
            os.devnull,
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr  # noqa: S603 - Triton's own assembler
    registers, spilled = (
        re.search(r"Used (\d+) registers", said),
        re.search(r"(\d+) bytes spill stores", said),
    )
    warning = re.search(r"C75\d\d", said)
    found = [match[1] if match else "?" for match in (registers, spilled)]
    return [*found, f"{kernel.metadata.shared / 1024:.0f}", warning[0] if warning else ""]


def main() -> None:
    """Print the table."""
    table = Table(title=f"sm_90, Triton {triton.__version__}", title_justify="left")
    for heading in (
        "dtype",
        "dim",
        "kind",
        "pass",
        "registers",
        "bytes spilled",
        "shared KiB",
        "warning",
    ):
        table.add_column(
            heading,
            justify="right"
            if heading in ("dim", "registers", "bytes spilled", "shared KiB")
            else "left",
        )
    wanted = [(torch.bfloat16, dim, kind) for dim in (64, 128, 256) for kind in ("rules", "whole")]
    wanted += [(torch.bfloat16, dim, "general") for dim in (128, 256)] + [
        (torch.float32, dim, "general") for dim in (64, 256)
    ]
    for dtype, dim, kind in track(wanted, transient=True):
        found = [*launches(dtype, dim, kind)] + (
            [*fp8_launches(dtype, dim, kind)] if dtype == torch.bfloat16 else []
        )
        for name, function, arguments in found:
            row = resources(compile_for_hopper(function, arguments))
            table.add_row(TYPES[dtype], str(arguments["BLOCK_D"]), kind, name, *row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
