"""Causal attention with sinks, a sliding window and packed documents, without a mask in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Shape letters: B batch, S sequence, D head size, Hq query heads, Hkv key and value heads,
# G = Hq / Hkv query heads that share one key head. qkv_BSD is [B, S, (Hq + 2 Hkv) D]: query
# heads, key heads, value heads; out_BSD is [B, S, Hq D].

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_HEAD_SIZES = (16, 32, 64, 128)


def attention_starts(position_ids_BS: Tensor, window: int | None) -> Tensor:
    """The first position that each position sees: of its document, or of the window.

    ``start = max(document start, s - window + 1)`` for position s of a row. Keys j with
    ``start[s] <= j <= s`` are seen, so this vector is the whole mask.

    Args:
        position_ids_BS: integers ``[B, S]`` that count up by one within a document and restart
            at 0 at the next one's first token; padding may hold anything that never rises faster.
        window: keys that a query sees, itself among them; ``None`` for all of its document.

    Returns:
        int32 ``[B, S]``, never decreasing within a row.

    Raises:
        ValueError: if the window is not positive.
    """
    if window is not None and window < 1:
        raise ValueError(f"the attention window is {window}, but must be at least 1")
    index_S = torch.arange(position_ids_BS.shape[1], device=position_ids_BS.device)
    start_BS = index_S - position_ids_BS
    lowest_S = torch.zeros_like(index_S) if window is None else index_S - window + 1
    return start_BS.maximum(lowest_S.clamp(min=0)).int()


def last_query(start_BS: Tensor) -> Tensor:
    """The last position that sees each key, for the backward pass.

    Args:
        start_BS: of :func:`attention_starts`.

    Returns:
        int32 ``[B, S]``: the greatest s with ``start[s] <= j``, never decreasing within a row.
    """
    key_BS = torch.arange(start_BS.shape[1], dtype=start_BS.dtype, device=start_BS.device)
    key_BS = key_BS.expand_as(start_BS).contiguous()
    count_BS = torch.searchsorted(start_BS.contiguous(), key_BS, right=True, out_int32=True)
    return count_BS - 1


def sink_attention(
    qkv_BSD: Tensor,
    sinks: Tensor,
    start_BS: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum_j exp(l_j) v_j / (sum_j exp(l_j) + exp(sink))`` over the keys a query sees.

    The softmax runs in float32. Neither a mask nor the logits exist in memory on a GPU.

    Args:
        qkv_BSD: queries, keys and values ``[B, S, (Hq + 2 Hkv) D]``, contiguous, rotated
            already.
        sinks: one logit a query head ``[Hq]``, any float dtype.
        start_BS: int32 ``[B, S]`` of :func:`attention_starts`.
        num_heads: Hq.
        num_kv_heads: Hkv; query head h reads key head ``h // (Hq / Hkv)``.
        head_dim: D; on a GPU 16, 32, 64 or 128.
        scale: of the logits, positive.
        window: what ``start_BS`` was made with. It changes no result beyond rounding: it lets a
            GPU choose how to work.

    Returns:
        The heads' outputs ``[B, S, Hq D]`` in the input's dtype, and float32 ``[B, Hq, S]``: the
        logarithm of the denominator, sink included.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit together.
    """
    heads = _Heads(num_heads, num_kv_heads, head_dim, scale)
    _check(heads, qkv_BSD, start_BS)
    if sinks.shape != (num_heads,):
        raise ValueError(f"sinks is {tuple(sinks.shape)}, but there are {num_heads} query heads")
    if qkv_BSD.device.type == "cpu":
        return sink_attention_torch(
            qkv_BSD,
            sinks,
            start_BS,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=scale,
        )
    _check_kernel(heads, qkv_BSD, (sinks, start_BS))
    from nexus_cli.core.kernels.triton.attention import attention_forward

    return attention_forward(
        qkv_BSD,
        sinks.contiguous(),
        start_BS.contiguous(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
    )


def sink_attention_backward(
    grad_out_BSD: Tensor,
    qkv_BSD: Tensor,
    out_BSD: Tensor,
    lse_BHS: Tensor,
    start_BS: Tensor,
    last_BS: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Gradient of :func:`sink_attention` to queries, keys and values; the sinks are frozen.

    Deterministic: every number is written once, by one program.

    Args:
        grad_out_BSD: gradient of the output ``[B, S, Hq D]``, in the input's dtype.
        qkv_BSD: as in the forward.
        out_BSD: its output.
        lse_BHS: its logarithms, float32 ``[B, Hq, S]``.
        start_BS: as in the forward.
        last_BS: :func:`last_query` of ``start_BS``.
        num_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: D.
        scale: as in the forward.
        window: as in the forward.

    Returns:
        ``[B, S, (Hq + 2 Hkv) D]``, the layout and dtype of ``qkv_BSD``.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit together.
    """
    heads = _Heads(num_heads, num_kv_heads, head_dim, scale)
    _check(heads, qkv_BSD, start_BS)
    _check_backward(heads, grad_out_BSD, qkv_BSD, out_BSD, lse_BHS, last_BS)
    if qkv_BSD.device.type == "cpu":
        return sink_attention_backward_torch(
            grad_out_BSD,
            qkv_BSD,
            out_BSD,
            lse_BHS,
            start_BS,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=scale,
        )
    _check_kernel(heads, qkv_BSD, (grad_out_BSD, out_BSD, lse_BHS, start_BS, last_BS))
    from nexus_cli.core.kernels.triton.attention_backward import attention_backward

    return attention_backward(
        grad_out_BSD.contiguous(),
        qkv_BSD,
        out_BSD.contiguous(),
        lse_BHS.contiguous(),
        start_BS.contiguous(),
        last_BS.contiguous(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
    )


def sink_attention_torch(
    qkv_BSD: Tensor,
    sinks: Tensor,
    start_BS: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """:func:`sink_attention` written out with dense logits: any device, any float dtype.

    Computes in float32, in float64 if the input is float64; the logarithms come back in the same.
    """
    heads = _Heads(num_heads, num_kv_heads, head_dim, scale)
    q_BHGSD, k_BHSD, v_BHSD = _split(heads, qkv_BSD)
    logits_BHGSN = _logits(heads, q_BHGSD, k_BHSD, start_BS)
    sink_HG11 = sinks.to(logits_BHGSN.dtype).reshape(num_kv_heads, -1, 1, 1)
    most_BHGS1 = logits_BHGSN.amax(dim=-1, keepdim=True).maximum(sink_HG11)
    weight_BHGSN = torch.exp(logits_BHGSN - most_BHGS1)
    total_BHGS1 = weight_BHGSN.sum(dim=-1, keepdim=True) + torch.exp(sink_HG11 - most_BHGS1)
    out_BHGSD = torch.einsum("bhgsn,bhnd->bhgsd", weight_BHGSN / total_BHGS1, v_BHSD)
    lse_BHGS1 = total_BHGS1.log() + most_BHGS1
    return _merge(out_BHGSD).to(qkv_BSD.dtype), lse_BHGS1.flatten(1, 2).squeeze(-1)


def sink_attention_backward_torch(
    grad_out_BSD: Tensor,
    qkv_BSD: Tensor,
    out_BSD: Tensor,
    lse_BHS: Tensor,
    start_BS: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
) -> Tensor:
    """:func:`sink_attention_backward` written out with dense logits: any device and float dtype.

    With ``p = exp(l - lse)``, ``dv = p^T do``, ``dl = p (do v^T - delta)`` where ``delta`` is the
    row sum of ``do * out``, ``dq = scale dl k`` and ``dk = scale dl^T q``. The sink only lowers
    p: it has no value, so its share of the row sum is zero.
    """
    heads = _Heads(num_heads, num_kv_heads, head_dim, scale)
    q_BHGSD, k_BHSD, v_BHSD = _split(heads, qkv_BSD)
    batch, seq, _ = qkv_BSD.shape
    grad_BHGSD, out_BHGSD = (
        x_BSD.to(q_BHGSD.dtype).view(batch, seq, *heads.query_shape).permute(0, 2, 3, 1, 4)
        for x_BSD in (grad_out_BSD.contiguous(), out_BSD.contiguous())
    )
    logits_BHGSN = _logits(heads, q_BHGSD, k_BHSD, start_BS)
    lse_BHGS1 = lse_BHS.to(q_BHGSD.dtype).reshape(*q_BHGSD.shape[:-1], 1)
    p_BHGSN = torch.exp(logits_BHGSN - lse_BHGS1)
    dv_BHSD = torch.einsum("bhgsn,bhgsd->bhnd", p_BHGSN, grad_BHGSD)
    dp_BHGSN = torch.einsum("bhgsd,bhnd->bhgsn", grad_BHGSD, v_BHSD)
    delta_BHGS1 = (grad_BHGSD * out_BHGSD).sum(dim=-1, keepdim=True)
    dl_BHGSN = p_BHGSN * (dp_BHGSN - delta_BHGS1) * scale
    dq_BHGSD = torch.einsum("bhgsn,bhnd->bhgsd", dl_BHGSN, k_BHSD)
    dk_BHSD = torch.einsum("bhgsn,bhgsd->bhnd", dl_BHGSN, q_BHGSD)
    parts = (_merge(dq_BHGSD), _merge(dk_BHSD.unsqueeze(2)), _merge(dv_BHSD.unsqueeze(2)))
    return torch.cat(parts, dim=-1).to(qkv_BSD.dtype)


@dataclass(frozen=True)
class _Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float

    @property
    def query_shape(self) -> tuple[int, int, int]:
        return self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of the queries, the keys and the values."""
        keys = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, keys, keys


def _split(heads: _Heads, qkv_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, Hkv, G, S, D]``, keys and values ``[B, Hkv, S, D]``, float32 or float64."""
    wide = qkv_BSD.dtype if qkv_BSD.dtype == torch.float64 else torch.float32
    batch, seq, _ = qkv_BSD.shape
    q_BSD, k_BSD, v_BSD = torch.split(qkv_BSD.to(wide), list(heads.sizes), dim=-1)
    q_BHGSD = q_BSD.reshape(batch, seq, *heads.query_shape).permute(0, 2, 3, 1, 4)
    k_BHSD, v_BHSD = (
        x_BSD.reshape(batch, seq, heads.num_kv_heads, heads.head_dim).transpose(1, 2)
        for x_BSD in (k_BSD, v_BSD)
    )
    return q_BHGSD, k_BHSD, v_BHSD


def _logits(heads: _Heads, q_BHGSD: Tensor, k_BHSD: Tensor, start_BS: Tensor) -> Tensor:
    """Scaled products ``[B, Hkv, G, S, S]``, minus infinity where a key is not seen."""
    logits_BHGSN = torch.einsum("bhgsd,bhnd->bhgsn", q_BHGSD, k_BHSD) * heads.scale
    index_S = torch.arange(start_BS.shape[1], device=start_BS.device)
    seen_BSN = (index_S >= start_BS[..., None]) & (index_S <= index_S[:, None])
    return logits_BHGSN.masked_fill_(~seen_BSN[:, None, None], float("-inf"))


def _merge(x_BHGSD: Tensor) -> Tensor:
    return x_BHGSD.permute(0, 3, 1, 2, 4).flatten(2)


def _check(heads: _Heads, qkv_BSD: Tensor, start_BS: Tensor) -> None:
    if heads.num_heads % heads.num_kv_heads:
        raise ValueError(
            f"{heads.num_heads} query heads cannot share {heads.num_kv_heads} key heads evenly"
        )
    if heads.scale <= 0:
        raise ValueError(f"the scale of the logits is {heads.scale:g}, but must be positive")
    if qkv_BSD.dim() != 3 or qkv_BSD.shape[2] != sum(heads.sizes):
        raise ValueError(f"qkv is {tuple(qkv_BSD.shape)}, but must be [B, S, {sum(heads.sizes)}]")
    if not qkv_BSD.is_contiguous():
        raise ValueError("qkv is not contiguous")
    _check_shape("start", start_BS, tuple(qkv_BSD.shape[:2]), torch.int32)


def _check_backward(
    heads: _Heads,
    grad_out_BSD: Tensor,
    qkv_BSD: Tensor,
    out_BSD: Tensor,
    lse_BHS: Tensor,
    last_BS: Tensor,
) -> None:
    batch, seq, _ = qkv_BSD.shape
    _check_shape("grad_out", grad_out_BSD, (batch, seq, heads.sizes[0]), qkv_BSD.dtype)
    _check_shape("out", out_BSD, (batch, seq, heads.sizes[0]), qkv_BSD.dtype)
    _check_shape("lse", lse_BHS, (batch, heads.num_heads, seq), None)
    _check_shape("last", last_BS, (batch, seq), torch.int32)


def _check_shape(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but must be {shape}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, but must be {dtype}")


def _check_kernel(heads: _Heads, qkv_BSD: Tensor, others: tuple[Tensor, ...]) -> None:
    """What only the GPU kernels demand."""
    if qkv_BSD.device.type != "cuda":
        raise ValueError(f"attention runs on cuda and cpu, not on {qkv_BSD.device.type}")
    devices = {str(tensor.device) for tensor in (qkv_BSD, *others)}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on different devices: {sorted(devices)}")
    if qkv_BSD.dtype not in KERNEL_DTYPES:
        raise ValueError(f"attention on a GPU takes 16 and 32 bit floats, not {qkv_BSD.dtype}")
    if heads.head_dim not in KERNEL_HEAD_SIZES:
        raise ValueError(
            f"attention on a GPU takes head sizes {KERNEL_HEAD_SIZES}, not {heads.head_dim}"
        )
    if qkv_BSD.shape[0] > 65535 or qkv_BSD.shape[1] * qkv_BSD.shape[2] >= 2**31:
        raise ValueError(f"qkv is {tuple(qkv_BSD.shape)}: too many rows for one launch")
