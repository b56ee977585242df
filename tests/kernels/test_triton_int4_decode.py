"""The PTX that turns codes into numbers, run by a few lines of Python: the interpreter knows no assembler."""

import re
import struct
from collections.abc import Callable

import pytest
import torch


pytest.importorskip("triton", reason="triton is not installed")

ALL = 0xFFFFFFFF


def permute(low: int, high: int, selector: int) -> int:
    """`prmt.b32`: each nibble of the selector names one of eight bytes."""
    data = low | high << 32
    return sum((data >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))


OPERATIONS: dict[str, Callable[..., int]] = {
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, b: a >> b,
    "mov.b32": lambda a: a,
    "prmt.b32": permute,
}


def run(program: str, outputs: int, word: int) -> list[int]:
    """The output registers `$0`.. of a program whose one input is the next."""
    registers = {f"${outputs}": word}
    for statement in re.sub(r"\.reg[^;]*;", "", program.strip("{}\n ")).split(";"):
        if statement.strip():
            name, arguments = statement.strip().split(maxsplit=1)
            target, *operands = (operand.strip() for operand in arguments.split(","))
            values = [registers[x] if x in registers else int(x, 0) for x in operands]
            registers[target] = OPERATIONS[name](*values) & ALL
    return [registers[f"${i}"] for i in range(outputs)]


def numbers(registers: list[int], dtype: torch.dtype) -> list[float]:
    return torch.frombuffer(bytearray(struct.pack(f"<{len(registers)}I", *registers)), dtype=dtype).tolist()


WORDS = [struct.unpack("<I", bytes((i, 255 - i, (i + 77) % 256, (i * 3) % 256)))[0] for i in range(256)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nibbles(dtype: torch.dtype):
    """Negative control: the offset of the other dtype."""
    from trl_selfspec.kernels.triton import int4_decode

    program = int4_decode.BF16_NIBBLES if dtype is torch.bfloat16 else int4_decode.FP16_NIBBLES
    offset = 128 if dtype is torch.bfloat16 else 1024
    for word in WORDS:
        data = struct.pack("<I", word)
        expected = [*(offset + (byte & 15) for byte in data), *(offset + (byte >> 4) for byte in data), *[1] * 4]
        assert numbers(run(program.value, 6, word), dtype) == expected
        other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
        assert numbers(run(program.value, 6, word), other) != expected
