"""What a step launched: kernels by name, how often each, and microseconds in all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

Kernels = Mapping[str, tuple[int, float]]
KINDS = {  # by what their names say; the first that fits
    "attention": r"flash|fmha|sdpa|attention|attn",
    "convolutions": r"conv|fprop|dgrad|wgrad|nhwc|nchw",
    "matrix products": r"gemm|nvjet|cutlass|cublas|splitK|matmul|_mm_",
    "fused reductions": r"^triton_(red|per)",
    "fused element by element": r"^triton_poi",
}


def launches(found: Kernels) -> int:
    """How many kernels were launched."""
    return sum(count for count, _ in found.values())


def plain_names(found: Kernels) -> Counter[str]:
    """How often each kernel is launched, without the running numbers of their names."""
    names: Counter[str] = Counter()
    for name, (times, _) in found.items():
        names[re.sub(r"_\d+(?=$|_)", "", name)] += times
    return names


def kinds(found: Kernels) -> str:
    """Which share of the time in kernels each kind takes."""
    spent: Counter[str] = Counter()
    for name, (_, microseconds) in found.items():
        kind = next((k for k, pattern in KINDS.items() if re.search(pattern, name)), "others")
        spent[kind] += microseconds
    total = sum(spent.values())
    shares = ", ".join(f"{kind} {part / total:.1%}" for kind, part in spent.most_common())
    return f"{total / 1000:.1f} ms in kernels: {shares}"
