"""How int4 codes become numbers in registers: device functions for `int4_linear`.

A code is put into the mantissa of a power of two by instructions that treat several codes at a time; GPUs convert
integers at a sixteenth of the rate. The programs are PTX, as Triton does not put bytes together; beside each stands
what it computes, which the interpreter runs.

This module imports triton; import it only inside functions.
"""

import triton
import triton.language as tl


# Bytes 0x43 and code make the bf16 number 128 + code, 0x64 and code the fp16 number 1024 + code. Four bytes come in;
# two registers of low codes leave, two of high ones, two of ones.
_NIBBLES = """{
    .reg .b32 low, high;
    and.b32 low, $6, 0x0F0F0F0F;
    shr.b32 high, $6, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, EXPONENT, 0x4140;
    prmt.b32 $1, low, EXPONENT, 0x4342;
    prmt.b32 $2, high, EXPONENT, 0x4140;
    prmt.b32 $3, high, EXPONENT, 0x4342;
    mov.b32 $4, ONES;
    mov.b32 $5, ONES;
}"""
BF16_NIBBLES = tl.constexpr(_NIBBLES.replace("EXPONENT", "0x43434343").replace("ONES", "0x3F803F80"))
FP16_NIBBLES = tl.constexpr(_NIBBLES.replace("EXPONENT", "0x64646464").replace("ONES", "0x3C003C00"))
SIX_FROM_ONE = tl.constexpr("=r,=r,=r,=r,=r,=r,r")

TWO_23 = tl.constexpr(0x4B000000)  # bits of 2 ** 23 in fp32, whose last bit is worth one


@triton.jit
def nibbles(byte, DTYPE: tl.constexpr, ASSEMBLER: tl.constexpr):
    """Low and high code of each byte, plus 128 (bf16), 1024 (fp16) or nothing (fp32); and as many ones, in the layout
    of the codes: Triton lays a constant out in its own way, and then cannot copy the other operand of both ahead.
    """
    if ASSEMBLER and tl.bfloat16 == DTYPE:
        low, high, ones = tl.inline_asm_elementwise(
            BF16_NIBBLES, SIX_FROM_ONE, [byte], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif ASSEMBLER and tl.float16 == DTYPE:
        low, high, ones = tl.inline_asm_elementwise(
            FP16_NIBBLES, SIX_FROM_ONE, [byte], dtype=(tl.float16, tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        ones = tl.full(byte.shape, 1.0, DTYPE)
        if tl.float32 == DTYPE:
            low = ((byte & 15).to(tl.int32) | TWO_23).to(tl.float32, bitcast=True) - 8388608.0
            high = ((byte >> 4).to(tl.int32) | TWO_23).to(tl.float32, bitcast=True) - 8388608.0
        else:
            exponent: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
            low = ((byte & 15).to(tl.int16) | exponent).to(DTYPE, bitcast=True)
            high = ((byte >> 4).to(tl.int16) | exponent).to(DTYPE, bitcast=True)
    return low, high, ones


@triton.jit
def scale_and_shift(pair, DTYPE: tl.constexpr):
    """Two neighbours that were read as one integer, in fp32."""
    if tl.float32 == DTYPE:
        scale, shift = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    elif tl.bfloat16 == DTYPE:
        scale, shift = pair << 16, pair & -65536
    else:
        scale = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
        shift = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    return scale.to(tl.float32, bitcast=True), shift.to(tl.float32, bitcast=True)
