"""Torch's global settings and its random state: what a kernel must leave as it found it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _attribute(module: Any, name: str) -> Setting:
    return lambda: getattr(module, name), lambda value: setattr(module, name, value)


_SUBNORMAL = 2.0**-1060
_cuda, _cudnn = torch.backends.cuda, torch.backends.cudnn
SETTINGS: dict[str, Setting] = {
    "float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "FP16 reduced-precision reductions": _attribute(
        _cuda.matmul, "allow_fp16_reduced_precision_reduction"
    ),
    "BF16 reduced-precision reductions": _attribute(
        _cuda.matmul, "allow_bf16_reduced_precision_reduction"
    ),
    "flash attention": (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    "memory-efficient attention": (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    "math attention": (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    "cuDNN attention": (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    "cuDNN benchmark": _attribute(_cudnn, "benchmark"),
    "cuDNN deterministic": _attribute(_cudnn, "deterministic"),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (
        lambda: torch.empty(0).device,
        lambda was: torch.set_default_device(None if was.type == "cpu" else was),
    ),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "denormal flushing": (lambda: _SUBNORMAL * 1.0 == 0.0, torch.set_flush_denormal),
}


class Settings:
    """As they are now."""

    def __init__(self, device: str, *, draws: bool) -> None:
        """`draws`: random numbers are the kernel's to use."""
        self._settings = dict(SETTINGS)
        if not draws:
            self._settings["random state"] = (
                lambda: _bytes(torch.get_rng_state()),
                lambda b: torch.set_rng_state(_tensor(b)),
            )
            if device == "cuda":
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                self._settings["random state of the GPU"] = (
                    lambda: (generator.initial_seed(), generator.get_offset()),
                    lambda state: (generator.manual_seed(state[0]), generator.set_offset(state[1])),
                )
        self._were = {name: get() for name, (get, _) in self._settings.items()}

    def restore(self) -> str:
        """Put all back; say which were others, and what; empty where none was."""
        changed = []
        for name, (get, put) in self._settings.items():
            was = self._were[name]
            try:
                now = get()
                if now != was:
                    put(was)
                    changed.append(
                        name if isinstance(was, bytes) else f"{name} from {was} to {now}"
                    )
            except RuntimeError:  # of a GPU that the kernel has lost, which is a finding already
                continue
        return ", ".join(changed)


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
