"""PyTorch operators: `torch.ops.varlen_fa.*`, and functions with the signatures of SDPA and
flash-attention.

The operators work under `torch.compile(fullgraph=True)` and `torch.export`: they take tensors and
numbers alone, and keep nothing between calls that a mask could outdate. On the CPU the metadata of a
mask is looked up by what the mask holds. On a GPU the device builds it anew in each call, without a
wait of the host, so that a captured graph follows the mask.

Inference only: inputs that require gradients are refused.
"""

import threading
from collections import OrderedDict
from functools import lru_cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

import varlen_fa as _fa
from varlen_fa._errors import GradientError, InvalidValueError, ShapeError
from varlen_fa._masks import key_mask_and_bias

__all__ = ["attention", "flash_attn_varlen_func", "scaled_dot_product_attention", "varlen_attention"]

# What `causal` of the operators means: none, query i level with key i, or the last query with the
# last key.
_NOT_CAUSAL, _TOP_LEFT, _BOTTOM_RIGHT = 0, 1, 2

_library = torch.library.Library("varlen_fa", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? bias=None, *, bool zero_masked=False, "
    "float? scale=None, int causal=0, int window_left=-1, int window_right=-1, float softcap=0.0, "
    "float[]? alibi=None, float[]? sinks=None) -> (Tensor, Tensor)"
)
_library.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, float? scale=None, "
    "bool causal=False, int window_left=-1, int window_right=-1, float softcap=0.0, float[]? alibi=None) "
    "-> (Tensor, Tensor)"
)


class _ByContent:
    """The last values that were made, by what they were made of."""

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


_device_metas, _whole_metas = {}, {}
_read_metas, _read_lock = WeakTensorKeyDictionary(), threading.Lock()
_metas, _sequences, _packed_ranges = _ByContent(32), _ByContent(32), _ByContent(32)


def _meta_of(mask):
    """Metadata of a [B, S] mask in host memory."""
    keep = mask if mask.dtype == torch.bool else mask != 0
    key = (tuple(keep.shape), keep.contiguous().numpy().tobytes())
    return _metas.get(key, lambda: _fa.Meta(keep.contiguous()))


def _read_meta(mask):
    """Metadata of a mask on a GPU that the host reads, which waits: once for what of a tensor it shows, and
    each version."""
    whole = mask if mask._base is None else mask._base
    shown = (mask.storage_offset(), mask.shape, mask.stride())
    version = None if mask.is_inference() else mask._version
    with _read_lock:
        kept = _read_metas.setdefault(whole, {})
        of, meta = kept.get(shown, (None, None))
    if meta is None or version is None or of != version:
        if torch.cuda.is_current_stream_capturing():
            raise InvalidValueError(
                "`key_mask`: expected one in host memory, or one that an earlier call has read: beside `causal`, a "
                "window or a bias the host reads it, which a captured graph cannot"
            )
        meta = _meta_of(mask.cpu())
        with _read_lock:
            kept[shown] = version, meta
    return meta


def _sequences_of(cu_seqlens):
    # `tolist` waits for a GPU.
    key = tuple(cu_seqlens.tolist())
    return key, _sequences.get(key, lambda: _fa.CuSeqlens(list(key)))


@lru_cache(maxsize=64)
def _padded_ranges(batch, seq_q, seq_k, causal, left, right):
    of = (batch, seq_q, seq_k)
    left, right = (None if side < 0 else side for side in (left, right))
    if causal == _TOP_LEFT and seq_q != seq_k:
        ends = [[0, min(query + 1, seq_k)] for query in range(seq_q)] * batch
        ranges = _fa.KeyRanges.from_ranges(of, ends)
        return ranges if left is right is None else ranges.intersect(_fa.KeyRanges.window(of, left, right))
    if causal:
        right = 0
    return None if left is right is None else _fa.KeyRanges.window(of, left, right)


@lru_cache(maxsize=64)
def _modifiers(softcap, alibi, sinks):
    if softcap == 0.0 and alibi is None and sinks is None:
        return None
    return _fa.ScoreModifiers(softcap=softcap, alibi=alibi, sinks=sinks)


def _tuple(numbers):
    return None if numbers is None else tuple(numbers)


def _attention(q, k, v, key_mask=None, bias=None, *, zero_masked=False, scale=None, causal=0, window_left=-1,
               window_right=-1, softcap=0.0, alibi=None, sinks=None):  # fmt: skip
    (batch, seq_q), seq_k = q.shape[:2], k.shape[1]
    out, lse = _outputs(q, sinks)
    ranges = _padded_ranges(batch, seq_q, seq_k, causal, window_left, window_right)
    mask = meta = None
    if key_mask is not None:
        # Metadata that a GPU builds takes neither ranges nor a bias.
        if key_mask.is_cuda and ranges is None and bias is None:
            # Its queries are computed like any other unless they are to be zeros.
            meta = _device_meta(key_mask, "keys")
            if not zero_masked:
                meta = (_every_query(q), meta)
        else:
            meta = _read_meta(key_mask) if key_mask.is_cuda else _meta_of(key_mask)
            if not zero_masked:
                mask, meta = meta.key_mask, None
    _fa.attention(
        q, k, v, mask, meta=meta, scale=scale, bias=bias, out=out, lse=lse if sinks is None else None, ranges=ranges,
        modifiers=_modifiers(softcap, _tuple(alibi), _tuple(sinks)),
    )  # fmt: skip
    return out, lse


def _device_meta(mask, role):
    """Metadata of a mask on a GPU, of queries or of keys. There is one of each size and stream: later
    calls on the stream build it anew, and a captured graph may use it for as long as it lives."""
    device = _fa.Device.of(mask)
    key = (mask.device.index, torch.cuda.current_stream(mask.device).cuda_stream, tuple(mask.shape), role)
    meta = _device_metas.get(key)
    if meta is None:
        meta = _device_metas.setdefault(key, _fa.DeviceMeta(device, *mask.shape))
    meta.rebuild(mask)
    return meta


def _every_query(q):
    """Metadata that keeps every query. It never changes: made once, but again in each captured graph until a
    call outside of one has made it."""
    key = (q.device.index, tuple(q.shape[:2]))
    meta = _whole_metas.get(key)
    if meta is None:
        every = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        if torch.cuda.is_current_stream_capturing():
            return _device_meta(every, "queries")
        meta = _fa.DeviceMeta(_fa.Device.of(every), *every.shape)
        meta.rebuild(every)
        # Other streams may use it next.
        torch.cuda.current_stream(q.device).synchronize()
        meta = _whole_metas.setdefault(key, meta)
    return meta


def _varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *, scale=None, causal=False, window_left=-1,
                      window_right=-1, softcap=0.0, alibi=None):  # fmt: skip
    (key_q, of_q), (key_k, of_k) = _sequences_of(cu_seqlens_q), _sequences_of(cu_seqlens_k)
    left, right = (None if side < 0 else side for side in (window_left, window_right))
    right = 0 if causal else right
    ranges = None
    if left is not None or right is not None:
        make = lambda: _fa.KeyRanges.window((of_q, of_k), left, right)  # noqa: E731
        ranges = _packed_ranges.get((key_q, key_k, left, right), make)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    modifiers = _modifiers(softcap, _tuple(alibi), None)
    _fa.varlen_attention(q, k, v, of_q, of_k, scale=scale, ranges=ranges, modifiers=modifiers, out=out, lse=lse)
    return out, lse


def _outputs(q, sinks):
    batch, seq, heads, _dim = q.shape
    # There is no log-sum-exp beside sinks.
    return q.new_empty(q.shape), q.new_empty((batch, heads, seq) if sinks is None else (0,), dtype=torch.float32)


def _fake_attention(q, k, v, key_mask=None, bias=None, *, sinks=None, **_):
    return _outputs(q, sinks)


def _fake_varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **_):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


for _key in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _key)
    _library.impl("varlen_attention", _varlen_attention, _key)
torch.library.register_fake("varlen_fa::attention", _fake_attention, lib=_library)
torch.library.register_fake("varlen_fa::varlen_attention", _fake_varlen_attention, lib=_library)


def _refuse_gradients(**tensors):
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise GradientError(
                f"`{name}` requires a gradient, and varlen_fa computes none: call it under torch.no_grad() or "
                f"torch.inference_mode(), or give `{name}.detach()`"
            )


def _autocast(*tensors):
    """As SDPA under autocast: floating-point inputs in autocast's type."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def attention(q, k, v, key_mask=None, bias=None, *, zero_masked=False, scale=None, causal=False, window=(-1, -1),
              softcap=0.0, alibi=None, sinks=None, return_lse=False):  # fmt: skip
    """Attention of q [B, Sq, H, D] to k and v [B, Sk, Hkv, D], as an operator of PyTorch.

    `key_mask`: [B, Sk], booleans or integers; what is not 0 is kept. `zero_masked`: the queries that
    the mask drops are zeros (self-attention alone); else they are computed like any other, as in
    SDPA. `bias`: added to the scores, broadcast to [B, H, Sq, Sk]. `causal`: the last query is level
    with the last key. `window`: keys before and after a query's place, -1 for no limit. `alibi`,
    `sinks`: a number for each head.

    Returns out [B, Sq, H, D], with `return_lse` also the log-sum-exp [B, H, Sq] f32, which there is
    not beside sinks. Raises what `varlen_fa.attention` does, and GradientError."""
    if return_lse and sinks is not None:
        raise InvalidValueError(f"`return_lse`: expected False beside `sinks`, got {return_lse}")
    _refuse_gradients(q=q, k=k, v=v, bias=bias)
    q, k, v = _autocast(q, k, v)
    if bias is not None and bias.dtype not in (q.dtype, torch.float32):
        bias = bias.float()
    out, lse = torch.ops.varlen_fa.attention(
        q, k, v, key_mask, bias, zero_masked=zero_masked, scale=scale, causal=_BOTTOM_RIGHT if causal else _NOT_CAUSAL,
        window_left=window[0], window_right=window[1], softcap=softcap, alibi=alibi, sinks=sinks,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *, scale=None, causal=False, window=(-1, -1), softcap=0.0,
                     alibi=None, return_lse=False):  # fmt: skip
    """Attention over packed rows as an operator of PyTorch: q [total_q, H, D], k and v
    [total_k, Hkv, D], cu_seqlens [B + 1] integers, in host memory or on the GPU, from which reading
    them waits. Returns out, with `return_lse` also the log-sum-exp [H, total_q] f32."""
    _refuse_gradients(q=q, k=k, v=v)
    q, k, v = _autocast(q, k, v)
    out, lse = torch.ops.varlen_fa.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, causal=causal, window_left=window[0], window_right=window[1],
        softcap=softcap, alibi=alibi,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False):  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention` of query [B, H, Sq, D], key and value
    [B, Hkv, Sk, D].

    `attn_mask`: a key mask [B, Sk] or [B, 1, 1, Sk] of booleans or integers, which costs what it
    keeps; or as SDPA takes it, booleans or numbers to add that broadcast to [B, H, Sq, Sk]. A [B, Sk]
    mask is a key mask here also where B is Sq. Rows of queries that a key mask drops are computed
    like any other. A query that sees no key gives zeros, where SDPA gives NaN or zeros.

    Raises InvalidValueError for dropout, and for `is_causal` beside a mask that is no key mask."""
    _refuse_gradients(query=query, key=key, value=value, attn_mask=attn_mask)
    if dropout_p:
        raise InvalidValueError(f"`dropout_p`: expected 0, got {dropout_p}: varlen_fa is for inference")
    if query.dim() != 4:
        raise ShapeError(f"`query`: expected 4 dimensions, [B, H, S, D], got {list(query.shape)}")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ShapeError(f"`key`: expected {query.shape[1]} heads without enable_gqa, got {key.shape[1]}")
    query, key, value = _autocast(query, key, value)
    key_mask, bias = key_mask_and_bias(attn_mask, query.shape[0], key.shape[2], query.dtype)
    if is_causal and bias is not None and key_mask is None:
        raise InvalidValueError("`is_causal`: expected False beside a mask that is no key mask")
    out, _ = torch.ops.varlen_fa.attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), key_mask, bias, scale=scale,
        causal=_TOP_LEFT if is_causal else _NOT_CAUSAL,
    )  # fmt: skip
    return out.transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
    """flash-attention's function of this name: q [total_q, H, D], k and v [total_k, Hkv, D].

    `max_seqlen_q` and `max_seqlen_k` are not needed, and results are always deterministic.
    `alibi_slopes`: [H]. With `return_attn_probs` it returns (out, log-sum-exp [H, total_q], None).

    Raises InvalidValueError for dropout and for paged keys (`block_table`)."""
    if dropout_p:
        raise InvalidValueError(f"`dropout_p`: expected 0, got {dropout_p}: varlen_fa is for inference")
    if block_table is not None:
        raise InvalidValueError("`block_table`: expected None; varlen_fa has no paged keys")
    alibi = alibi_slopes
    if alibi is not None:
        if alibi.dim() != 1:
            raise ShapeError(f"`alibi_slopes`: expected [H], got {list(alibi.shape)}")
        alibi = alibi.tolist()
    out, lse = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale, causal=causal, window=tuple(window_size),
        softcap=softcap, alibi=alibi, return_lse=True,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out
