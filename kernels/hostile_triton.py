"""What hostile.py launches on a GPU: a loop without an end, addresses that are nobody's."""

import triton
import triton.language as tl


@triton.jit
def _endless(out):
    n = tl.load(out).to(tl.float32)
    while n < float("inf"):
        n = tl.load(out, volatile=True).to(tl.float32)


@triton.jit
def _illegal(out):
    tl.store(out + (1 << 44), 1.0)


@triton.jit
def _misaligned(out):
    address = out.to(tl.uint64, bitcast=True) + 1
    tl.store(address.to(tl.pointer_type(tl.int32), bitcast=True), 1)


@triton.jit
def _too_far(out):
    tl.store(out - 1, 1.0)


KERNELS = {
    "endless_on_gpu": _endless,
    "illegal_address": _illegal,
    "misaligned_address": _misaligned,
    "store_too_far": _too_far,
}
