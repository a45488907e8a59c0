"""Metadata of key masks of PyTorch: in host memory by what they hold, on a GPU read by the host once or
built by the GPU in each call."""

import threading
from collections import OrderedDict
from functools import lru_cache

import torch

import varlen_fa as _fa
from varlen_fa._by_tensor import ByTensor
from varlen_fa._errors import InvalidValueError, ShapeError

# When the host reads a mask on a GPU, for which it waits. What it has read it keeps for as long as the
# mask is not changed. A GPU builds metadata for the other calls, in each of them, where nobody notices a
# mask that keeps all.
#   NEVER   nothing waits
#   SECOND  when the same mask comes again, so that masks that are made for one call cause no wait
#   FIRST   at once
NEVER, SECOND, FIRST = "never", "second", "first"
READINGS = (NEVER, SECOND, FIRST)


class ByContent:
    """The last things that were made, by what they were made of."""

    def __init__(self, size):
        self._size, self._kept, self._lock = size, OrderedDict(), threading.Lock()

    def get(self, key, make):
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return made


_metas, _read, _seen = ByContent(32), ByTensor(), ByTensor()
# Those that captured graphs use are kept for good.
_rooms, _rooms_of_graphs = ByContent(64), {}


def of_host(mask):
    """Metadata of a [B, S] mask in host memory."""
    keep = mask if mask.dtype == torch.bool else mask != 0
    keep = keep.contiguous()
    key = (tuple(keep.shape), keep.numpy().tobytes())
    return _metas.get(key, lambda: _fa.Meta(keep))


@lru_cache(maxsize=32)
def of_all(batch, seq):
    """Metadata that keeps every token."""
    return _fa.Meta(_fa.KeyMask.all(batch, seq))


def of_keys(masks, lengths, queries, *, zero_masked, reading):
    """What `varlen_fa.attention` takes as (mask, meta). `masks`: one [B, Sk], or one for each segment of the
    keys, [B, S_i] or None, which keeps all; `lengths` are those of the segments. `queries`: batch rows,
    tokens and the device of queries."""
    given = masks if len(masks) == 1 else tuple(mask for mask in masks if mask is not None)
    if not _is_on_gpu(given[0]):
        meta = of_host(concatenated(masks, queries[0], lengths))
    elif _is_read(given, lengths, reading):
        meta = _read_by_host(masks, given, queries[0], lengths)
        # A graph that is captured after this call, which warms up for it, can make none.
        _room("keys", (queries[0], sum(lengths)), given[0].device)
        if not zero_masked:
            _every_query(*queries)
    else:
        meta = _built_by_gpu(concatenated(masks, queries[0], lengths))
        # Its queries are computed like any other unless they are to be zeros.
        return None, meta if zero_masked else (_every_query(*queries), meta)
    return (None, meta) if zero_masked else (meta.key_mask, None)


def concatenated(masks, batch, lengths):
    """One mask [B, Sk] of those of all segments."""
    if len(masks) == 1:
        return masks[0]
    if len(masks) != len(lengths):
        expected = f"a mask, or a list of {len(lengths)}, one for each segment of `k`"
        raise ShapeError(f"`key_mask`: expected {expected}, got {len(masks)}")
    for at, (mask, length) in enumerate(zip(masks, lengths)):
        if mask is not None and mask.shape != (batch, length):
            raise ShapeError(f"`key_mask[{at}]`: expected [{batch}, {length}], got {list(mask.shape)}")
    like = next(mask for mask in masks if mask is not None)
    every = lambda length: like.new_ones((batch, length), dtype=torch.bool)  # noqa: E731
    return torch.cat([every(length) if mask is None else mask != 0 for mask, length in zip(masks, lengths)], dim=1)


def _is_read(given, lengths, reading):
    """Whether the host reads these masks."""
    if reading == NEVER or not _read.keeps(*given) or _is_captured():
        return False
    if reading == FIRST:
        return True
    seen = _seen.get(given, lambda: [False], lengths)
    is_second, seen[0] = seen[0], True
    return is_second


def _read_by_host(masks, given, batch, lengths):
    def make():
        return of_host(concatenated([None if mask is None else mask.cpu() for mask in masks], batch, lengths))

    return _read.get(given, make, (lengths, tuple(mask is None for mask in masks)))


def _built_by_gpu(mask):
    """Metadata of the keys of a mask on a GPU."""
    meta = _room("keys", tuple(mask.shape), mask.device)
    meta.rebuild(mask)
    return meta


def _every_query(batch, seq, device):
    """Metadata on a GPU that keeps every query."""
    return _room("queries", (batch, seq), device)


def _room(role, size, device):
    """Metadata in a GPU's memory, of keys or of queries; at first it keeps all. There is one of each size and
    stream: later calls on the stream build that of keys anew. A captured graph may use it for as long as the
    program runs, but cannot make it."""
    key = (role, device, _stream(device), size)
    meta = _rooms_of_graphs.get(key)
    if meta is not None:
        return meta
    if not _is_captured():
        return _rooms.get(key, lambda: _new_room(size, device))
    meta = _rooms_of_graphs[key] = _rooms.get(key, _refuse_capture)
    return meta


def _new_room(size, device):
    every = torch.ones(size, dtype=torch.bool, device=device)
    meta = _fa.DeviceMeta(_fa.Device.of(every), *size)
    meta.rebuild(every)
    return meta


def _refuse_capture():
    raise InvalidValueError(
        "`key_mask`: expected a call of these sizes on this stream before its capture, which makes no room for "
        "metadata; a mask that the host has read for it does not count"
    )


# What tests on the CPU put others in the place of.


def _is_on_gpu(mask):
    return mask.is_cuda


def _is_captured():
    return torch.cuda.is_current_stream_capturing()


def _stream(device):
    return torch.cuda.current_stream(device).cuda_stream
