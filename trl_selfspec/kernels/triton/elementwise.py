"""What lies between the matrix products of a decoder layer, in Triton. Eager twins: `kernels/elementwise.py`.

Values are rounded where transformers' modules round them: a norm's to the dtype of its input and again after its
weight, a rotation's products and their sum. A program takes whole rows or heads of one token, so a token's result
depends on no other's.

This module imports triton; import it only inside functions.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl_selfspec.kernels.layer_interface import Pages
from trl_selfspec.kernels.norm import FastRMSNorm
from trl_selfspec.kernels.triton.attention import storage, triton_dtype
from trl_selfspec.kernels.triton.launch import launch


HEADS_AT_ONCE = 4  # of one token: 16 bytes per lane
ACTIVATIONS_AT_ONCE = 1024


@triton.jit
def _add_rms_norm(
    x, residual, weight, total, normed, x_row, residual_row, eps,
    RESIDUAL: tl.constexpr, TOTAL: tl.constexpr, RESULT: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    mask = column < SIZE
    value = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + row * residual_row + column, mask=mask, other=0.0).to(tl.float32)
        value = value.to(TOTAL).to(tl.float32)
        tl.store(total + row * SIZE + column, value, mask=mask)
    scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    value = ((value * scale).to(TOTAL).to(tl.float32) * factor).to(RESULT)
    tl.store(normed + row * SIZE + column, value, mask=mask)


def add_rms_norm(
    x: Tensor,  # (..., hidden)
    residual: Tensor | None,  # shape of x
    norm: FastRMSNorm,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`residual + x`, and its norm in `dtype`; by default in the one to which those of sum and weight promote."""
    return _add_and_norm(x, residual, norm.weight, norm.eps, dtype)


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,), contiguous
    eps: float,
) -> Tensor:  # (..., D), the dtype to which those of x and weight promote
    """Llama's norm: fp32 statistics, a cast back to x's dtype, then the weight."""
    return _add_and_norm(x, None, weight, eps, None)[1]


def _add_and_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    flat = _rows(x)
    other = flat if residual is None else _rows(residual)
    sum_dtype = torch.promote_types(flat.dtype, other.dtype)
    promoted = torch.promote_types(sum_dtype, weight.dtype)
    total = x if residual is None else torch.empty(x.shape, dtype=sum_dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=dtype or promoted, device=x.device)
    columns = triton.next_power_of_2(size)
    launch(
        _add_rms_norm, (len(flat),),
        flat, other, weight, total, normed, flat.stride(0), other.stride(0), eps,
        residual is not None, triton_dtype(sum_dtype), triton_dtype(promoted), size, columns,
        num_warps=min(16, max(1, columns // 512)),
    )  # fmt: skip
    return total, normed


@triton.jit
def _halves(source, weight, cos, sin, eps, mask, half, NORM: tl.constexpr, ROTARY: tl.constexpr, DIM: tl.constexpr,
            RESULT: tl.constexpr, ROTATED: tl.constexpr):  # fmt: skip
    """Both halves of heads, `(heads, DIM / 2)` each, after norm and rotation, in fp32."""
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + DIM // 2, mask=mask, other=0.0).to(tl.float32)
    real = half < DIM // 2
    if NORM:
        DTYPE: tl.constexpr = source.dtype.element_ty
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / DIM + eps)[:, None]
        for_first = tl.load(weight + half, mask=real, other=0.0).to(tl.float32)
        for_second = tl.load(weight + half + DIM // 2, mask=real, other=0.0).to(tl.float32)
        first = ((first * scale).to(DTYPE).to(tl.float32) * for_first).to(RESULT).to(tl.float32)
        second = ((second * scale).to(DTYPE).to(tl.float32) * for_second).to(RESULT).to(tl.float32)
    if ROTARY:
        cos_1 = tl.load(cos + half, mask=real, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos + half + DIM // 2, mask=real, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin + half, mask=real, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin + half + DIM // 2, mask=real, other=0.0).to(tl.float32)
        turned = (first * cos_1).to(ROTATED).to(tl.float32) - (second * sin_1).to(ROTATED).to(tl.float32)
        second = (second * cos_2).to(ROTATED).to(tl.float32) + (first * sin_2).to(ROTATED).to(tl.float32)
        first, second = turned.to(ROTATED).to(tl.float32), second.to(ROTATED).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize=["num_steps"])
def _rotate_and_write(
    query, key, value, cos, sin, query_weight, key_weight, out, addresses, write_index,
    query_token, key_token, value_token, angle_row, num_steps, query_eps, key_eps,
    QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr, ROTARY: tl.constexpr, STORED: tl.constexpr,
    QUERY_RESULT: tl.constexpr, QUERY_ROTATED: tl.constexpr, KEY_RESULT: tl.constexpr, KEY_ROTATED: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A few heads of one token: of the query, of the key, or of the value."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, HALF)[None, :]
    QUERY_BLOCKS: tl.constexpr = (HEADS + AT_ONCE - 1) // AT_ONCE
    KV_BLOCKS: tl.constexpr = (KV_HEADS + AT_ONCE - 1) // AT_ONCE
    angles = token // num_steps * angle_row + token % num_steps * DIM
    if block < QUERY_BLOCKS:
        head = block * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
        mask = (head < HEADS) & (half < DIM // 2)
        source = query + token * query_token + head * DIM + half
        first, second = _halves(source, query_weight, cos + angles, sin + angles, query_eps, mask, half,
                                QUERY_NORM, ROTARY, DIM, QUERY_RESULT, QUERY_ROTATED)  # fmt: skip
        place = out + (token * HEADS + head) * DIM + half
    else:
        block -= QUERY_BLOCKS
        head = block % KV_BLOCKS * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
        mask = (head < KV_HEADS) & (half < DIM // 2)
        state = (tl.load(write_index + token) * KV_HEADS + head) * DIM + half
        if block < KV_BLOCKS:
            source = key + token * key_token + head * DIM + half
            first, second = _halves(source, key_weight, cos + angles, sin + angles, key_eps, mask, half,
                                    KEY_NORM, ROTARY, DIM, KEY_RESULT, KEY_ROTATED)  # fmt: skip
            place = storage(addresses, 0, STORED) + state
        else:
            source = value + token * value_token + head * DIM + half
            first = tl.load(source, mask=mask).to(tl.float32)
            second = tl.load(source + DIM // 2, mask=mask).to(tl.float32)
            place = storage(addresses, 1, STORED) + state
    tl.store(place, first, mask=mask)
    tl.store(place + DIM // 2, second, mask=mask)


def rotate_and_write(
    query: Tensor,  # (B, T, H, D)
    key: Tensor,  # (B, T, K, D)
    value: Tensor,  # (B, T, K, D)
    angles: tuple[Tensor, Tensor] | None,  # cosines and sines, (B or 1, T, D) each
    norms: Sequence[FastRMSNorm | None],  # of the query's and the key's heads
    pages: Pages,
) -> Tensor:  # (B, H, T, D), dtype of the pages
    """Norms and rotates the heads, writes keys and values to their slots and hands the queries back."""
    num_rows, num_steps, num_heads, dim = query.shape
    num_kv_heads, stored = key.shape[2], pages.keys.dtype
    out = torch.empty(query.shape, dtype=stored, device=query.device)
    cos, sin = (query, query) if angles is None else map(Tensor.contiguous, angles)
    angle_row = 0 if len(cos) == 1 else num_steps * dim
    query, key, value = (_rows(states.flatten(2)) for states in (query, key, value))
    weights, dtypes = [], []
    for states, norm in zip((query, key), norms, strict=True):
        weights.append(states if norm is None else norm.weight)
        dtypes.append(torch.promote_types(states.dtype, weights[-1].dtype))
        dtypes.append(torch.promote_types(dtypes[-1], cos.dtype))
    blocks = triton.cdiv(num_heads, HEADS_AT_ONCE) + 2 * triton.cdiv(num_kv_heads, HEADS_AT_ONCE)
    launch(
        _rotate_and_write, (num_rows * num_steps, blocks),
        query, key, value, cos, sin, *weights, out, pages.addresses, pages.owner.write_index,
        query.stride(0), key.stride(0), value.stride(0), angle_row, num_steps,
        *(0.0 if norm is None else norm.eps for norm in norms),
        *(norm is not None for norm in norms), angles is not None, *map(triton_dtype, (stored, *dtypes)),
        num_heads, num_kv_heads, dim, triton.next_power_of_2(dim // 2), HEADS_AT_ONCE, num_warps=1,
    )  # fmt: skip
    return out.transpose(1, 2)


@triton.jit
def _silu_mul(gate, up, out, gate_row, up_row, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < SIZE
    x = tl.load(gate + row * gate_row + column, mask=mask, other=0.0)
    activation = (x.to(tl.float32) / (1 + tl.exp(-x.to(tl.float32)))).to(x.dtype).to(tl.float32)
    factor = tl.load(up + row * up_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, activation * factor, mask=mask)


def silu_mul(
    gate: Tensor,  # (..., inner)
    up: Tensor,  # shape and dtype of gate
) -> Tensor:  # the same
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    size = gate.shape[-1]
    gate, up = _rows(gate), _rows(up)
    launch(
        _silu_mul, (len(gate), triton.cdiv(size, ACTIVATIONS_AT_ONCE)),
        gate, up, out, gate.stride(0), up.stride(0), size, ACTIVATIONS_AT_ONCE, num_warps=4
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """All but the last dimension as one; without a copy where rows lie at equal distances."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])
