"""The four functions of sglang's pull request 26318, with the same names and meanings, for PyTorch
tensors in host memory and on CUDA devices.

The tensors that `build_varlen_mask_meta` returns carry their metadata with them, so that the other
functions neither read them nor wait for a GPU. Tensors from elsewhere are read and checked at their
first use, which waits for a GPU once. Do not change them in place under `torch.inference_mode()`,
where PyTorch counts no versions.
"""

import torch

import varlen_fa as _fa
from varlen_fa._by_tensor import ByTensor
from varlen_fa._errors import InvalidValueError, ShapeError

__all__ = ["build_inv_indices", "build_varlen_mask_meta", "fused_pack_qkv", "fused_scatter_to_padded"]

# Metadata of tensors of indices, by the size of the padded batch.
_metas = ByTensor(of_inference=True)


def _integers(data, device):
    # PyTorch takes no empty buffer, and makes tensors on its default device unless told.
    made = torch.frombuffer(bytearray(data), dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32, device="cpu")
    return made.to(device, non_blocking=True)


def _copied_as(rows):
    """The same bytes in a type that every device copies."""
    return rows.view(torch.bfloat16) if rows.is_cuda else rows


def build_varlen_mask_meta(key_mask):
    """Where the valid tokens of a [B, S] mask lie; booleans or integers, what is not 0 is valid.

    Returns a dictionary: `indices` int64 [n], flat positions b * S + s of the valid tokens, ascending;
    `cu_seqlens` int32 [B + 1]; `inv_indices` int32 [B * S], the packed row of each token, -1 where it
    is masked; `max_seqlen`, S. The tensors are on the mask's device. A mask on a GPU is read once:
    how long `indices` is depends on what it holds. Raises ShapeError and DTypeError."""
    if key_mask.dim() != 2:
        raise ShapeError(f"`key_mask`: expected [B, S], got {list(key_mask.shape)}")
    size = tuple(key_mask.shape)
    meta = _fa.Meta(key_mask.cpu())
    made = {
        "indices": _integers(meta.indices_bytes(), key_mask.device).to(torch.int64),
        "cu_seqlens": torch.tensor(meta.cu_seqlens.tolist(), dtype=torch.int32, device=key_mask.device),
        "inv_indices": _integers(meta.inv_indices_bytes(), key_mask.device),
        "max_seqlen": size[1],
    }
    _metas.put((made["indices"],), meta, size)
    _metas.put((made["inv_indices"],), meta, size)
    return made


def build_inv_indices(indices, total_rows):
    """The packed row of each of `total_rows` = B * S tokens, int32 [total_rows], -1 where it is masked; of the
    flat positions of the valid tokens. Nothing is read from a GPU."""
    inv = torch.full((total_rows,), -1, dtype=torch.int32, device=indices.device)
    inv[indices.long()] = torch.arange(indices.numel(), dtype=torch.int32, device=indices.device)
    return inv


def fused_pack_qkv(q, k, v, indices):
    """Rows of q [B, S, H, D], k and v [B, S, Hkv, D] at the flat positions `indices` [n], ascending:
    packed tensors [n, H, D] and [n, Hkv, D], bit for bit, in one launch on a GPU. Without an index there
    is no launch. Raises InvalidValueError for indices that do not ascend or lie outside."""
    if q.dim() != 4:
        raise ShapeError(f"`q`: expected 4 dimensions, [B, S, H, D], got {list(q.shape)}")
    size = tuple(q.shape[:2])

    def make():
        positions = indices.cpu().long()
        total = size[0] * size[1]
        inside = positions.numel() == 0 or (int(positions[0]) >= 0 and int(positions[-1]) < total)
        if not inside or bool((positions[1:] <= positions[:-1]).any()):
            raise InvalidValueError(f"`indices`: expected ascending positions from 0 to {total - 1}")
        keep = torch.zeros(total, dtype=torch.bool, device="cpu")
        keep[positions] = True
        return _fa.Meta(keep.view(size))

    packed = _fa.pack_qkv(*map(_copied_as, (q, k, v)), _metas.get((indices,), make, size))
    return tuple(rows.view(of.dtype) for rows, of in zip(packed, (q, k, v)))


def fused_scatter_to_padded(out_unpad, inv_indices, batch_size, seqlen):
    """Packed rows [n, H, D] in a padded tensor [batch_size, seqlen, H, D], bit for bit, and zeros
    where `inv_indices` [batch_size * seqlen] is negative, in one launch on a GPU. Raises
    InvalidValueError unless the others count up from 0."""
    size = (batch_size, seqlen)

    def make():
        rows = inv_indices.cpu().long()
        if rows.dim() != 1 or rows.numel() != batch_size * seqlen:
            raise ShapeError(f"`inv_indices`: expected [{batch_size * seqlen}], got {list(rows.shape)}")
        keep = rows >= 0
        if not torch.equal(rows[keep], torch.arange(int(keep.sum()), device="cpu")):
            raise InvalidValueError("`inv_indices`: expected -1 or packed rows that count up from 0")
        return _fa.Meta(keep.view(size))

    return _fa.scatter_to_padded(_copied_as(out_unpad), _metas.get((inv_indices,), make, size)).view(out_unpad.dtype)
