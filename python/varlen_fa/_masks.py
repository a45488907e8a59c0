"""Masks as PyTorch's models have them: what of a mask says which keys count, and what is a bias."""

import math

import torch

# As KeyMask reads floating-point masks: from here down a number drops its key.
_DROPS = -1000.0


def _says_the_same(mask, dimension):
    return mask.shape[dimension] == 1 or mask.stride(dimension) == 0


def _rows_of(mask, batch, seq_k):
    """A mask that says the same of every head and query, as [B, Sk]; None if it does not."""
    if mask.dim() == 2 and mask.shape == (batch, seq_k):
        return mask
    if mask.dim() == 4 and _says_the_same(mask, 1) and _says_the_same(mask, 2) and mask.shape[3] == seq_k:
        return mask[:, 0, 0].expand(batch, seq_k)
    return None


def key_mask_and_bias(mask, batch, seq_k, dtype):
    """What attention of `dtype` takes for a mask as SDPA takes it, or None, or a key mask [B, Sk]: the
    keys that count, [B, Sk] booleans or integers, and a bias of 4 dimensions. Either may be None.

    No value is looked at, so that this works in a compiled graph and waits for no GPU. A key mask of
    floating-point numbers is therefore a bias, and in host memory both: it drops keys, and what it
    holds for others is added."""
    if mask is None:
        return None, None
    rows = _rows_of(mask, batch, seq_k)
    if not mask.is_floating_point():
        # Rows are taken from the mask as it came: what is computed from it is expanded no more.
        if rows is not None:
            return rows, None
        keep = mask if mask.dtype == torch.bool else mask != 0
        bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~keep, -math.inf)
        return None, _four_dimensions(bias)
    key_mask = None
    if rows is not None:
        mask = rows[:, None, None]
        key_mask = rows > _DROPS if rows.device.type == "cpu" else None
    return key_mask, _four_dimensions(mask if mask.dtype in (dtype, torch.float32) else mask.float())


def _four_dimensions(bias):
    return bias[(None,) * (4 - bias.dim())]
