"""What the doors of model libraries leave to the library's own attention, and that they say so."""

import logging
from functools import lru_cache

import torch

from varlen_fa import _gradients
from varlen_fa._errors import DTypeError

# What a call raises for which the device has no kernel.
NO_KERNEL = (NotImplementedError, DTypeError)


def why_not(query, key, value, dropout):
    """Why a call is none of ours, or None. Of query, key and value [B, H, S, D] or [B, S, H, D]."""
    if dropout:
        return "it has dropout"
    if _gradients.may_be_needed(query, key, value):
        return _gradients.WANTED
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        return "keys and values differ in shape, or queries and keys in their last dimension"
    if query.shape[0] != key.shape[0]:
        return "queries and keys differ in their batch"
    return None


def slow_bias(query, bias):
    """Why a call with a bias is none of ours, though we compute it, or None."""
    if bias is not None and query.is_cuda:
        return "its mask is a bias, which PyTorch's own attention adds in a fourth of the time on CUDA"
    return None


@lru_cache
def _say_once(own, reason):
    logging.getLogger("varlen_fa").warning("%s attention is used: %s", own, reason)


# In a compiled graph it is said while the graph is traced.
@torch.compiler.assume_constant_result
def say(own, reason):
    """Logs once that `own` attention computes what ours does not."""
    _say_once(own, reason)
