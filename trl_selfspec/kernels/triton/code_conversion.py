"""How codes become numbers in registers: device functions for `linear`.

A code is put into the mantissa of a power of two, or an fp8 number's bits into a wider one's, by instructions that
treat several codes at a time; GPUs convert integers at a sixteenth of the rate, and Ampere converts no fp8. The
programs are PTX, as Triton does not put bytes together; beside each stands what it computes, which the interpreter
runs.

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

# 128 + the lower seven bits, minus 128, or minus 256 where the sign is set: the sign's place is the exponent's last.
INT8_TO_BF16 = tl.constexpr("""{
    .reg .b32 low, sign, less, one;
    mov.b32 one, 0x3F803F80;
    and.b32 low, $2, 0x7F7F7F7F;
    and.b32 sign, $2, 0x80808080;
    prmt.b32 $0, low, 0x43434343, 0x4140;
    prmt.b32 less, sign, 0xC3C3C3C3, 0x4140;
    fma.rn.bf16x2 $0, $0, one, less;
    prmt.b32 $1, low, 0x43434343, 0x4342;
    prmt.b32 less, sign, 0xC3C3C3C3, 0x4342;
    fma.rn.bf16x2 $1, $1, one, less;
}""")
# 1024 + (code + 128), minus 1152.
INT8_TO_FP16 = tl.constexpr("""{
    .reg .b32 code, one, less;
    mov.b32 one, 0x3C003C00;
    mov.b32 less, 0xE480E480;
    xor.b32 code, $2, 0x80808080;
    prmt.b32 $0, code, 0x64646464, 0x4140;
    fma.rn.f16x2 $0, $0, one, less;
    prmt.b32 $1, code, 0x64646464, 0x4342;
    fma.rn.f16x2 $1, $1, one, less;
}""")
# Each byte on top of its half; exponent and mantissa move to their places; times the ratio of the exponents' biases.
_FP8 = """{
    .reg .b32 byte, bits, ratio, zero;
    mov.b32 ratio, RATIO;
    mov.b32 zero, 0x80008000;
    prmt.b32 byte, $2, 0, 0x1404;
    shr.b32 bits, byte, SHIFT;
    and.b32 bits, bits, MASK;
    and.b32 byte, byte, 0x80008000;
    or.b32 $0, byte, bits;
    fma.rn.TYPE $0, $0, ratio, zero;
    prmt.b32 byte, $2, 0, 0x3424;
    shr.b32 bits, byte, SHIFT;
    and.b32 bits, bits, MASK;
    and.b32 byte, byte, 0x80008000;
    or.b32 $1, byte, bits;
    fma.rn.TYPE $1, $1, ratio, zero;
}"""


def _fp8(type_: str, shift: int, mask: int, ratio: int) -> tl.constexpr:
    program = _FP8.replace("TYPE", type_).replace("SHIFT", str(shift))
    return tl.constexpr(program.replace("MASK", f"0x{mask:08X}").replace("RATIO", f"0x{ratio:08X}"))


FP8_TO_BF16 = _fp8("bf16x2", 4, 0x07F007F0, 0x7B807B80)  # 2 ** 120
FP8_TO_FP16 = _fp8("f16x2", 1, 0x3F803F80, 0x5C005C00)  # 2 ** 8

TWO_23 = tl.constexpr(0x4B000000)  # bits of 2 ** 23 in fp32, whose last bit is worth one
E4M3_TO_FP32 = tl.constexpr(2.0**120)


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
def code_8bit(byte, DTYPE: tl.constexpr, FP8: tl.constexpr, ASSEMBLER: tl.constexpr):
    """The number that a byte of int8, or of float8_e4m3fn other than NaN, stands for."""
    if ASSEMBLER and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            FP8_TO_BF16 if FP8 else INT8_TO_BF16, "=&r,=&r,r", [byte], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif ASSEMBLER and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            FP8_TO_FP16 if FP8 else INT8_TO_FP16, "=&r,=&r,r", [byte], dtype=tl.float16, is_pure=True, pack=4
        )
    elif FP8:
        bits = byte.to(tl.int32)
        number = (((bits & 128) << 24) | ((bits & 127) << 20)).to(tl.float32, bitcast=True) * E4M3_TO_FP32
        return number.to(DTYPE)
    else:
        return (((byte ^ 128).to(tl.int32) | TWO_23).to(tl.float32, bitcast=True) - 8388736.0).to(DTYPE)


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
