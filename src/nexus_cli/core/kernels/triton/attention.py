"""Triton forward of :func:`nexus_cli.core.kernels.attention.sink_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape letters: B batch, S sequence, Hq query heads, Hkv key and value heads, D head size.
# Inside kernels: r query rows of a tile (heads x positions), n its keys, d the head size.

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tile:
    """What one program works on.

    Attributes:
        heads: query heads of one group side by side; fewer where the group is smaller (and then
            more positions). Short tiles of several heads waste less on the diagonal and on the
            edge of the window, and share the keys.
        positions: query positions; powers of two, as all of these.
        keys: keys at a time.
        warps: of the program.
        stages: of software pipelining.
    """

    heads: int
    positions: int
    keys: int
    warps: int
    stages: int

    def fit(self, group: int) -> Tile:
        """The same number of rows, with as many heads as divide ``group`` query heads."""
        heads = min(self.heads, group & -group)
        positions = self.positions * self.heads // heads
        return Tile(heads, positions, self.keys, self.warps, self.stages)


@dataclass(frozen=True)
class Tiles:
    """The tiles of one kernel. Re-tune with ``benchmarks/gpu/attention.py --tune``.

    Attributes:
        full: whole documents are seen.
        narrow: the window is at most ``NARROW`` keys.
        large: heads of more than 64 numbers.
        old: cards but Hopper and data centre Blackwell: products take their operands from
            registers there, and a block has less shared memory.
    """

    full: Tile
    narrow: Tile
    large: Tile
    old: Tile


NARROW = 512
FORWARD_TILES = Tiles(
    full=Tile(2, 64, 64, 4, 3),
    narrow=Tile(2, 64, 64, 4, 2),
    large=Tile(2, 64, 64, 8, 2),
    old=Tile(2, 64, 64, 8, 2),
)
# float32 products run on the ordinary cores: for checks, not for speed.
FLOAT32_TILE = Tile(1, 16, 16, 4, 1)


@triton.jit(do_not_specialize=["seq"])
def forward_kernel(
    qkv_ptr,
    sink_ptr,
    start_ptr,
    out_ptr,
    lse_ptr,
    seq,
    scale_log2,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One tile of queries against every key they see, softmax updated block by block.

    Grid: (Hq / HEADS, blocks of positions, B). The longest rows of a sequence come first.
    """
    ROW: tl.constexpr = (HQ + 2 * HKV) * D
    first_head = tl.program_id(0) * HEADS
    block = (tl.num_programs(1) - 1 - tl.program_id(1)) * POSITIONS
    batch = tl.program_id(2).to(tl.int64)
    qkv_ptr += batch * seq * ROW
    start_ptr += batch * seq
    k_ptr = qkv_ptr + (HQ + first_head // (HQ // HKV)) * D
    v_ptr = k_ptr + HKV * D

    r = tl.arange(0, HEADS * POSITIONS)
    d = tl.arange(0, D)
    head_r = first_head + r // POSITIONS
    row_r = block + r % POSITIONS
    pos_r = tl.minimum(row_r, seq - 1)  # rows past the end repeat the last one, and are not kept
    q_rd = tl.load(qkv_ptr + (pos_r * ROW + head_r * D)[:, None] + d[None, :])
    start_r = tl.load(start_ptr + pos_r)

    # The sink is the first "key": the maximum is finite from the beginning, so a block of which
    # a row sees nothing needs no special case.
    m_r = tl.maximum(tl.load(sink_ptr + head_r).to(tl.float32), -1e30) * _LOG2E
    l_r = tl.full([HEADS * POSITIONS], 1.0, tl.float32)
    acc_rd = tl.zeros([HEADS * POSITIONS, D], tl.float32)

    # One loop whose mask stands behind a branch. With a second loop for the edges the assembler
    # runs out of ways to keep the accumulators in place, and waits for every single product.
    low, inner_low, inner_high, high = key_ranges(start_ptr, block, seq, POSITIONS, KEYS)
    for n0 in range(low, high, KEYS):
        k_nd = load_rows(k_ptr, n0, seq, ROW, D, KEYS)
        v_nd = load_rows(v_ptr, n0, seq, ROW, D, KEYS)
        s_rn = tl.dot(q_rd, tl.trans(k_nd), input_precision="ieee")
        if (n0 < inner_low) | (n0 >= inner_high):
            s_rn = tl.where(between(start_r, pos_r, n0, KEYS), s_rn, float("-inf"))
        new_r = tl.maximum(m_r, tl.max(s_rn, 1) * scale_log2)
        p_rn = tl.exp2(s_rn * scale_log2 - new_r[:, None])
        fade_r = tl.exp2(m_r - new_r)
        l_r = l_r * fade_r + tl.sum(p_rn, 1)
        acc_rd = acc_rd * fade_r[:, None]
        acc_rd = tl.dot(p_rn.to(v_nd.dtype), v_nd, acc_rd, input_precision="ieee")
        m_r = new_r

    kept_r = row_r < seq
    lse_ptr += (batch * HQ + head_r) * seq + row_r
    tl.store(lse_ptr, m_r * _LN2 + tl.log(l_r), mask=kept_r)
    out_ptr += batch * seq * HQ * D
    out_ptrs = out_ptr + (row_r * (HQ * D) + head_r * D)[:, None] + d[None, :]
    out_rd = acc_rd * (1.0 / l_r)[:, None]
    tl.store(out_ptrs, out_rd.to(out_ptr.dtype.element_ty), mask=kept_r[:, None])


@triton.jit
def key_ranges(start_ptr, block, seq, POSITIONS: tl.constexpr, KEYS: tl.constexpr):
    """Blocks of keys that a block of positions sees: ``low <= inner_low <= inner_high <= high``.

    Every row sees every key of ``[inner_low, inner_high)``; the rest has an edge in it. All but
    ``high`` are multiples of ``KEYS``.
    """
    high = tl.minimum(block + POSITIONS, seq)
    low = tl.load(start_ptr + block) // KEYS * KEYS
    inner_high = (block + 1) // KEYS * KEYS
    inner_low = tl.cdiv(tl.load(start_ptr + high - 1), KEYS) * KEYS
    return low, tl.minimum(inner_low, inner_high), inner_high, high


@triton.jit
def between(first_r, last_r, n0, N: tl.constexpr):
    """Whether ``first_r <= n <= last_r`` for ``n0 <= n < n0 + N``: ``[R, N]``."""
    n = n0 + tl.arange(0, N)[None, :]
    return (n >= first_r[:, None]) & (n <= last_r[:, None])


@triton.jit
def load_rows(ptr, n0, seq, ROW: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """``[N, D]`` rows from ``n0`` on; past the end the last one again."""
    n = tl.minimum(n0 + tl.arange(0, N), seq - 1)
    return tl.load(ptr + (n * ROW)[:, None] + tl.arange(0, D)[None, :])


def attention_forward(
    qkv_BSD: Tensor,
    sinks: Tensor,
    start_BS: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward; arguments are checked by the caller.

    Args:
        qkv_BSD: see ``sink_attention``, as all others.
        sinks: in any float dtype.
        start_BS: int32.
        num_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: D.
        scale: of the logits.
        window: chooses the tile.
        tile: in place of the table's, for tuning.
    """
    batch, seq, _ = qkv_BSD.shape
    out_BSD = qkv_BSD.new_empty(batch, seq, num_heads * head_dim)
    lse_BHS = torch.empty(batch, num_heads, seq, dtype=torch.float32, device=qkv_BSD.device)
    if tile is None:
        tile = choose_tile(FORWARD_TILES, qkv_BSD.dtype, head_dim, window, generation(qkv_BSD))
    tile = tile.fit(num_heads // num_kv_heads)
    grid = (num_heads // tile.heads, triton.cdiv(seq, tile.positions), batch)
    forward_kernel[grid](
        qkv_BSD,
        sinks,
        start_BS,
        out_BSD,
        lse_BHS,
        seq,
        scale * LOG2E,
        HQ=num_heads,
        HKV=num_kv_heads,
        D=head_dim,
        **tile_arguments(tile),
    )
    return out_BSD, lse_BHS


def choose_tile(
    tiles: Tiles, dtype: torch.dtype, head_dim: int, window: int | None, capability: int
) -> Tile:
    """The tile for this dtype, head size, window, and major capability of the card."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    if capability not in (9, 10):
        return tiles.old
    if head_dim > 64:
        return tiles.large
    return tiles.narrow if window is not None and window <= NARROW else tiles.full


def generation(tensor: Tensor) -> int:
    """Major capability of the card that holds it: 8 before Hopper, 9 Hopper, 10 and 12 after."""
    return torch.cuda.get_device_capability(tensor.device)[0]


def tile_arguments(tile: Tile) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    return {
        "HEADS": tile.heads,
        "POSITIONS": tile.positions,
        "KEYS": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
