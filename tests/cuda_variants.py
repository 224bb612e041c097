"""Variants of the CUDA kernels that are compiled in tests, and their limits."""

from __future__ import annotations

from subgen_cupy.absorb import absorb_module
from subgen_cupy.append import append_module
from subgen_cupy.attend import attention_module
from subgen_cupy.launch import Module
from subgen_cupy.leaders import leaders_module
from subgen_cupy.merging import MERGING, matching_module

__all__ = ["ARCHITECTURES", "REGISTERS", "SHARED", "VARIANTS"]

ARCHITECTURES = (75, 80, 86, 90, 100, 120)
REGISTERS = 65536  # of a multiprocessor, on all of them

#: Variants, and the registers that each kernel may take: a few more than it takes today.
VARIANTS: dict[str, tuple[Module, dict[str, int]]] = {
    **{
        f"{dtype}_{head_dim}_{rows}": (
            attention_module(dtype, variance, head_dim, head_dim, rows, 4),
            {"attend_split": registers, "attend_join": 64},
        )
        for dtype, variance, head_dim, rows, registers in [
            ("bfloat16", "bfloat16", 128, 4, 168),
            ("bfloat16", "bfloat16", 64, 1, 128),
            ("float16", "float16", 256, 2, 168),
            ("float32", "float16", 128, 4, 168),
        ]
    },
    # A decoding step: queries as they came, answers in the dtype of the input.
    "token_bfloat16": (
        attention_module("bfloat16", "bfloat16", 128, 128, 4, 4, "bfloat16", "bfloat16"),
        {"attend_split": 168, "attend_join": 64},
    ),
    # With int8 means.
    "quantized_bfloat16": (
        attention_module("bfloat16", "bfloat16", 128, 128, 4, 4, "bfloat16", "bfloat16", True),
        {"attend_split": 168, "attend_join": 64},
    ),
    "quantized_float16": (
        attention_module("float16", "float16", 64, 64, 1, 4, "float16", "float16", True),
        {"attend_split": 152, "attend_join": 64},
    ),
    "append": (append_module("bfloat16", "bfloat16"), {"count_tokens": 16, "append_token": 48, "quantize_queries": 48}),
    "append_float16": (
        append_module("float16", "float16"),
        {"count_tokens": 16, "append_token": 48, "quantize_queries": 48},
    ),
    "leaders": (leaders_module("float16"), {"nearest_centres": 128, "open_leaders": 64}),
    **{
        f"absorb_{stored}_{quantized}": (
            absorb_module(stored, quantized),
            {
                "gather": 64,
                "angles": 64,
                "weigh": 40,
                "query_moment": 96,
                "store": 64,
            },
        )
        for stored, quantized in [("bfloat16", False), ("float16", True), ("float32", False)]
    },
    "merge": (
        MERGING,
        {
            "weighted_mean": 64,
            "make_points": 160,
            "pair_costs": 128,
            "merge_pairs": 80,
        },
    ),
    "match": (matching_module(1, 4), {"match_pairs": 64}),
    "match_many": (matching_module(1, 1), {"match_pairs": 64}),
}
SHARED = {
    "attend_split": 34 << 10,
    "nearest_centres": 17 << 10,
    "query_moment": 17 << 10,
    "weighted_mean": 5 << 10,
    "make_points": 17 << 10,
    "pair_costs": 45 << 10,
    "match_pairs": 256,
}
