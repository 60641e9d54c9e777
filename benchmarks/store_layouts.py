"""Two older layouts of a teacher's top entries, and what a target costs in gradient.

The original's: 100 int32 ids and fp16 raw logits a token, one Parquet file an optimizer step of
4 x 1024 tokens, whole arrays in one cell, zstd. No normaliser and no tail is stored, so a user can
only renormalise over the 100. Its router logits, which it also stores, are counted apart.

A polynomial one: 128 ids of 18 bits, the first 16 log-probabilities in bf16, and for ranks 17 to
128 the 6 fp32 coefficients of ``1, t, t^2, t^3, t^4, sqrt t``; lists of bytes in Parquet, snappy.
The tail is dropped. The fit is in float64 over ``t`` from 0 to 1, which is the best it can do: on
``t`` from 0 to 111 in float32 the same fit is ill-conditioned.

Token ids of the text itself are in neither count.
"""

# ruff: noqa: N803, N806, N815 - the names of arrays end with their shapes

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

# Shape letters in this file: N positions in all, C of them at a time, V vocabulary, K entries,
# R bytes of a record, P coefficients.

ORIGINAL_K, STEP_TOKENS, ROW_TOKENS = 100, 4 * 1024, 1024
ROUTER_BYTES = 36 * 128 * 2  # fp16 logits of 128 experts in 36 layers, a token, before zstd
POLYNOMIAL_K, EXACT, ID_BITS = 128, 16, 18
ID_BYTES = POLYNOMIAL_K * ID_BITS // 8


@dataclass(frozen=True)
class Target:
    """A store's view of the teacher at some positions.

    Attributes:
        ids_CK: int64 ids; the first of a row is in use.
        p_CK: their probabilities, float32; 0 marks an entry that is not used.
        tail_C: the mass of all other ids, float32; 0 where the store drops it.
    """

    ids_CK: Tensor
    p_CK: Tensor
    tail_C: Tensor

    @classmethod
    def top(cls, p_CV: Tensor, count: int) -> Target:
        """The likeliest ``count`` ids at their exact probabilities, and the rest as a tail."""
        p_CK, ids_CK = p_CV.topk(count)
        # summed over the tail itself: one minus the head loses what is left of a certain position
        return cls(ids_CK, p_CK, p_CV.scatter(1, ids_CK, 0).sum(-1))

    def renormalised(self) -> Target:
        """The entries scaled to a sum of 1, without a tail."""
        p_CK = self.p_CK / self.p_CK.sum(-1, keepdim=True)
        return Target(self.ids_CK, p_CK, torch.zeros_like(self.tail_C))

    def with_samples(self, ids_CM: Tensor) -> Target:
        """The tail as ``M`` ids drawn from it, each with its share; an id may come twice."""
        share_CM = (self.tail_C[:, None] / ids_CM.shape[1]).expand(ids_CM.shape)
        ids_CK, p_CK = torch.cat((self.ids_CK, ids_CM), 1), torch.cat((self.p_CK, share_CM), 1)
        return Target(ids_CK, p_CK, torch.zeros_like(self.tail_C))


def sparse_gradient(q_CV: Tensor, target: Target) -> Tensor:
    """``q - target``, for targets whose entries are all there is, float32 ``[C, V]``."""
    return q_CV.scatter_add(1, target.ids_CK, -target.p_CK)


def bucket_gradient(q_CV: Tensor, target: Target) -> Tensor:
    """The gradient if all other ids are one bucket, float32 ``[C, V]``.

    ``q_j - p_j`` at the entries and ``q_j (1 - P / Q)`` elsewhere, with the tail's mass ``P`` by
    the teacher and ``Q`` by the student.
    """
    used_CK = target.p_CK > 0
    ids_CK = torch.where(used_CK, target.ids_CK, target.ids_CK[:, :1])
    rest_CV = q_CV.scatter(1, ids_CK, 0)
    student_tail_C = rest_CV.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    rest_CV *= (1 - target.tail_C / student_tail_C)[:, None]
    return rest_CV.scatter_add_(1, ids_CK, (q_CV.gather(1, ids_CK) - target.p_CK) * used_CK)


class GradientError:
    """Relative error of a gradient with respect to the student's logits, over all positions.

    It is measured against ``q - p``, the gradient of KL(teacher || student) over the full
    vocabulary. Arrays are float32; sums over positions are float64.
    """

    def __init__(self) -> None:
        """Start without positions."""
        self._error, self._exact = 0.0, 0.0
        self._sum_V, self._exact_sum_V = torch.zeros(()), torch.zeros(())

    def add(self, q_CV: Tensor, p_CV: Tensor, dz_CV: Tensor) -> None:
        """Count some positions: the student's and teacher's probabilities, and the gradient."""
        exact_CV = q_CV - p_CV
        self._exact += _squares(exact_CV)
        self._exact_sum_V = self._exact_sum_V + exact_CV.sum(0, dtype=torch.float64)
        self._sum_V = self._sum_V + dz_CV.sum(0, dtype=torch.float64)
        self._error += _squares(exact_CV.sub_(dz_CV))

    @property
    def value(self) -> float:
        """``||g - g*|| / ||g*||``."""
        return math.sqrt(self._error / self._exact)

    @property
    def cosine(self) -> float:
        """Between the means of both gradients over the positions."""
        return float(torch.cosine_similarity(self._sum_V, self._exact_sum_V, dim=0))


def gradient_error(
    teacher_logits_CV: Tensor,
    student_logits_CV: Tensor,
    target: Target,
    gradient: Callable[[Tensor, Target], Tensor] = bucket_gradient,
) -> float:
    """The error of one chunk; for more, and for many targets, add to a :class:`GradientError`."""
    p_CV, q_CV = torch.softmax(teacher_logits_CV, -1), torch.softmax(student_logits_CV, -1)
    error = GradientError()
    error.add(q_CV, p_CV, gradient(q_CV, target))
    return error.value


def original_target(top_ids_CK: Tensor, top_logits_CK: Tensor) -> Target:
    """What the original's layout says: its first 100 entries, in fp16, renormalised.

    Args:
        top_ids_CK: at least 100 likeliest ids in falling order, any integer type.
        top_logits_CK: their raw logits, float32.
    """
    logits_CK = top_logits_CK[:, :ORIGINAL_K].half().float()
    ids_CK = top_ids_CK[:, :ORIGINAL_K].long()
    return Target(ids_CK, torch.softmax(logits_CK, -1), torch.zeros(len(ids_CK)))


def original_bytes(top_ids_NK: Tensor, top_logits_NK: Tensor, folder: Path) -> float:
    """Bytes a token on disk in the original's layout, without routers; files stay in ``folder``."""
    for start in range(0, len(top_ids_NK), STEP_TOKENS):
        step = slice(start, start + STEP_TOKENS)
        ids_CK, logits_CK = top_ids_NK[step, :ORIGINAL_K], top_logits_NK[step, :ORIGINAL_K]
        cells = {"ids": ids_CK.int().numpy(), "logits": logits_CK.half().numpy()}
        table = pa.table({name: [cell.tobytes()] for name, cell in cells.items()})
        pq.write_table(table, folder / f"step_{start // STEP_TOKENS:06d}.parquet", **_ZSTD)
    return _bytes(folder) / len(top_ids_NK)


def polynomial_encode(top_ids_CK: Tensor, top_logprobs_CK: Tensor) -> NDArray[np.uint8]:
    """Records of the polynomial layout, uint8 ``[C, 344]``.

    Args:
        top_ids_CK: the 128 likeliest ids in falling order, any integer type.
        top_logprobs_CK: their log-probabilities over the whole vocabulary, float32.
    """
    ids_CK = top_ids_CK.numpy().astype(">u4")
    bits_CKB = np.unpackbits(ids_CK[..., None].view(np.uint8), axis=-1)[..., -ID_BITS:]
    packed_CR = np.packbits(bits_CKB.reshape(len(ids_CK), -1), axis=-1)
    exact_CK = top_logprobs_CK[:, :EXACT].bfloat16().contiguous()
    fit_CP = top_logprobs_CK[:, EXACT:].double() @ torch.linalg.pinv(_basis()).T
    values = (exact_CK.view(torch.uint8), fit_CP.float().view(torch.uint8))
    return np.concatenate([packed_CR, *(value_CR.numpy() for value_CR in values)], axis=1)


def polynomial_target(records_CR: NDArray[np.uint8]) -> Target:
    """What the records of :func:`polynomial_encode` say, renormalised over the 128."""
    bits_CKB = np.unpackbits(records_CR[:, :ID_BYTES], axis=-1).reshape(-1, POLYNOMIAL_K, ID_BITS)
    ids_CK = torch.from_numpy(bits_CKB @ (1 << np.arange(ID_BITS - 1, -1, -1, dtype=np.int64)))
    values_CR = torch.from_numpy(records_CR[:, ID_BYTES:].copy())
    exact_CK = values_CR[:, : 2 * EXACT].contiguous().view(torch.bfloat16).double()
    fit_CP = values_CR[:, 2 * EXACT :].contiguous().view(torch.float32).double()
    logprobs_CK = torch.cat((exact_CK, fit_CP @ _basis().T), 1)
    return Target(ids_CK, torch.softmax(logprobs_CK, -1).float(), torch.zeros(len(ids_CK)))


def polynomial_bytes(records_NR: NDArray[np.uint8], folder: Path) -> float:
    """Bytes a token on disk in the polynomial layout; the file stays in ``folder``."""
    offsets = np.arange(len(records_NR) + 1, dtype=np.int32) * records_NR.shape[1]
    records = pa.ListArray.from_arrays(offsets, pa.array(records_NR.ravel()))
    rows = [*range(0, len(records_NR), ROW_TOKENS), len(records_NR)]
    table = pa.table({"compressed": pa.ListArray.from_arrays(pa.array(rows, pa.int32()), records)})
    pq.write_table(table, folder / "polynomial.parquet", compression="snappy")
    return _bytes(folder) / len(records_NR)


_ZSTD = {"compression": "zstd", "compression_level": 1}


def _basis() -> Tensor:
    """The functions of rank that the polynomial layout adds up, float64 ``[112, 6]``."""
    t_K = torch.linspace(0, 1, POLYNOMIAL_K - EXACT, dtype=torch.float64)
    return torch.stack([*(t_K**power for power in range(5)), t_K.sqrt()], 1)


def _squares(values_CV: Tensor) -> float:
    """The sum of squares: float32 along a row, float64 over rows."""
    return float(torch.linalg.vector_norm(values_CV, dim=-1).double().square().sum())


def _bytes(folder: Path) -> int:
    """Size of the Parquet files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.parquet"))
