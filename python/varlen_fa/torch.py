"""PyTorch operators: `torch.ops.varlen_fa.*`, and functions with the signatures of SDPA and
flash-attention.

The operators work under `torch.compile(fullgraph=True)` and `torch.export`: they take tensors, lists
of them and numbers alone. On the CPU the metadata of a mask is looked up by what the mask holds. On a
GPU the device builds it anew in each call, without a wait of the host, so that a captured graph
follows the mask; or the host reads a mask once, where `read_mask` says so.

Inference only: inputs that require gradients are refused.
"""

from functools import lru_cache

import torch

import varlen_fa as _fa
from varlen_fa import _gradients, _metadata
from varlen_fa._errors import InvalidValueError, ShapeError
from varlen_fa._masks import key_mask_and_bias

__all__ = [
    "attention", "flash_attn_varlen_func", "prepare_qk", "scaled_dot_product_attention", "varlen_attention",
]  # fmt: skip

# What `causal` of the operators means: none, query i level with key i, or the last query with the
# last key.
_NOT_CAUSAL, _TOP_LEFT, _BOTTOM_RIGHT = 0, 1, 2

_library = torch.library.Library("varlen_fa", "DEF")
_OPTIONS = (
    "Tensor? bias=None, *, bool zero_masked=False, float? scale=None, int causal=0, int window_left=-1, "
    'int window_right=-1, float softcap=0.0, float[]? alibi=None, float[]? sinks=None, str read_mask="never"'
)
_library.define(f"attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"attention_of_segments(Tensor[] q, Tensor[] k, Tensor[] v, Tensor(a!)[] out, Tensor?[] key_mask, {_OPTIONS}) "
    "-> Tensor"
)
_library.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, float? scale=None, "
    "bool causal=False, int window_left=-1, int window_right=-1, float softcap=0.0, float[]? alibi=None) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "prepare_qk(Tensor(a!)[] q, Tensor(b!)[] k, Tensor?[] q_weight, Tensor?[] k_weight, float[] eps, Tensor?[] cos, "
    "Tensor?[] sin, str pairing) -> ()"
)


_sequences, _packed_ranges = _metadata.ByContent(32), _metadata.ByContent(32)


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


def _attend(q, k, v, out, lse, key_masks=(), bias=None, *, zero_masked=False, scale=None, causal=_NOT_CAUSAL,
            window_left=-1, window_right=-1, softcap=0.0, alibi=None, sinks=None,
            read_mask=_metadata.NEVER):  # fmt: skip
    """Attention of tensors or lists of segments into `out`, and into `lse` unless it is None. `key_masks`: none,
    one, or one or None for each segment of k."""
    batch, seq_q, lengths_q = _sizes(q)
    _, seq_k, lengths_k = _sizes(k)
    ranges = None
    if causal or window_left >= 0 or window_right >= 0:
        ranges = _padded_ranges(batch, seq_q, seq_k, causal, window_left, window_right)
    mask = meta = None
    if any(key_mask is not None for key_mask in key_masks):
        queries = (batch, seq_q, _first(q).device)
        mask, meta = _metadata.of_keys(
            key_masks, lengths_k or (seq_k,), queries, zero_masked=zero_masked, reading=read_mask
        )
    elif (lengths_q or lengths_k) and bias is None:
        # Some kernels take segments where they lie if there is metadata.
        meta = tuple(_metadata.of_all(batch, seq) for seq in (seq_q, seq_k))
    modifiers = None
    if softcap or alibi is not None or sinks is not None:
        modifiers = _modifiers(softcap, _tuple(alibi), _tuple(sinks))
    _fa.attention(
        q, k, v, mask, meta=meta, scale=scale, bias=bias, out=out, lse=lse, ranges=ranges, modifiers=modifiers
    )  # fmt: skip


def _first(x):
    """A tensor, or the first of segments."""
    return x[0] if isinstance(x, (list, tuple)) else x


def _sizes(x):
    """Batch rows and tokens of a tensor, or of a list of segments and the tokens of each."""
    if isinstance(x, (list, tuple)):
        lengths = tuple(segment.shape[1] for segment in x)
        return x[0].shape[0], sum(lengths), lengths
    return *x.shape[:2], ()


def _attention(q, k, v, key_mask=None, bias=None, *, sinks=None, **options):
    out, lse = _outputs(q, sinks)
    key_masks = () if key_mask is None else (key_mask,)
    _attend(q, k, v, out, lse if sinks is None else None, key_masks, bias, sinks=sinks, **options)
    return out, lse


def _attention_of_segments(q, k, v, out, key_mask, bias=None, *, sinks=None, **options):
    lse = _lse_of(q, sinks)
    _attend(q, k, v, out, lse if sinks is None else None, key_mask, bias, sinks=sinks, **options)
    return lse


def _varlen_attend(q, k, v, cu_seqlens_q, cu_seqlens_k, lse=None, *, scale=None, causal=False, window_left=-1,
                   window_right=-1, softcap=0.0, alibi=None):  # fmt: skip
    """Attention over packed rows into a new tensor, and into `lse` unless it is None."""
    (key_q, of_q), (key_k, of_k) = _sequences_of(cu_seqlens_q), _sequences_of(cu_seqlens_k)
    left, right = (None if side < 0 else side for side in (window_left, window_right))
    right = 0 if causal else right
    ranges = None
    if left is not None or right is not None:
        make = lambda: _fa.KeyRanges.window((of_q, of_k), left, right)  # noqa: E731
        ranges = _packed_ranges.get((key_q, key_k, left, right), make)
    modifiers, out = _modifiers(softcap, _tuple(alibi), None), _new(q)
    _fa.varlen_attention(q, k, v, of_q, of_k, scale=scale, ranges=ranges, modifiers=modifiers, out=out, lse=lse)
    return out


def _varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    lse = _packed_lse_of(q)
    return _varlen_attend(q, k, v, cu_seqlens_q, cu_seqlens_k, lse, **options), lse


def _prepare_qk(q, k, q_weight, k_weight, eps, cos, sin, pairing):
    """In place; None in the place of a weight or a table says that there is none."""
    _fa.prepare_qk([
        _fa.QkSegment(
            q[at], k[at], norm=None if q_weight[at] is None else (q_weight[at], k_weight[at], eps[at]),
            rotary=None if cos[at] is None else (cos[at], sin[at]), pairing=pairing,
        )
        for at in range(len(q))
    ])  # fmt: skip


def _packed_lse_of(q):
    return q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _new(q):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _outputs(q, sinks):
    return _new(q), _lse_of(q, sinks)


def _lse_of(q, sinks):
    """Room for the log-sum-exp of a tensor or a list of segments. There is none beside sinks."""
    batch, seq, _ = _sizes(q)
    like = _first(q)
    return like.new_empty((batch, like.shape[2], seq) if sinks is None else (0,), dtype=torch.float32)


def _fake_attention(q, k, v, key_mask=None, bias=None, *, sinks=None, **_):
    return _outputs(q, sinks)


def _fake_attention_of_segments(q, k, v, out, key_mask, bias=None, *, sinks=None, **_):
    return _lse_of(q, sinks)


def _fake_prepare_qk(*_):
    return None


def _fake_varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **_):
    return _new(q), _packed_lse_of(q)


for _key in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _key)
    _library.impl("attention_of_segments", _attention_of_segments, _key)
    _library.impl("varlen_attention", _varlen_attention, _key)
    _library.impl("prepare_qk", _prepare_qk, _key)
torch.library.register_fake("varlen_fa::attention", _fake_attention, lib=_library)
torch.library.register_fake("varlen_fa::attention_of_segments", _fake_attention_of_segments, lib=_library)
torch.library.register_fake("varlen_fa::varlen_attention", _fake_varlen_attention, lib=_library)
torch.library.register_fake("varlen_fa::prepare_qk", _fake_prepare_qk, lib=_library)


def _autocast(*tensors):
    """As SDPA under autocast: floating-point inputs in autocast's type; tensors or lists of them."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    kind = _first(tensors[0]).device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    cast = lambda x: [y.to(dtype) for y in x] if isinstance(x, (list, tuple)) else x.to(dtype)  # noqa: E731
    return tuple(map(cast, tensors))


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def _is_plain(*tensors):
    """Whether a call is about memory that is there, rather than traced, faked or transformed: then it needs no
    dispatcher of operators, which takes as long as the rest of a small call."""
    return (
        not torch.compiler.is_compiling()
        and _PLAIN.issuperset(map(type, tensors))
        and (tensors[0].is_cpu or tensors[0].is_cuda)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def attention(q, k, v, key_mask=None, bias=None, *, zero_masked=False, scale=None, causal=False, window=(-1, -1),
              softcap=0.0, alibi=None, sinks=None, return_lse=False, out=None, read_mask="never"):  # fmt: skip
    """Attention of q [B, Sq, H, D] to k and v [B, Sk, Hkv, D], as an operator of PyTorch. q, k, v and `out` may
    each be a list of 1 to 8 segments [B, S_i, H, D] that follow one another along S.

    `key_mask`: [B, Sk], booleans or integers; what is not 0 is kept. Where k is a list it may be one
    too: [B, S_i] for each segment, or None, which keeps all. `zero_masked`: the queries that the mask
    drops are zeros (self-attention alone); else they are computed like any other, as in SDPA. `bias`:
    added to the scores, broadcast to [B, H, Sq, Sk]. `causal`: the last query is level with the last
    key. `window`: keys before and after a query's place, -1 for no limit. `alibi`, `sinks`: a number
    for each head. `out`: where the result goes; a new tensor otherwise.

    `read_mask`: when the host reads a mask on a GPU, and waits for it. "never": the GPU builds the metadata
    in each call. "first": in the first call with this mask. "second": in the second one. What was read is
    kept until PyTorch counts a change of the mask, and saves the work of building it. In captured graphs,
    in compiled ones and for inference tensors, whose changes nobody counts, the GPU builds it.

    Returns out [B, Sq, H, D], with `return_lse` also the log-sum-exp [B, H, Sq] f32, which there is
    not beside sinks. Raises what `varlen_fa.attention` does, and GradientError."""
    if return_lse and sinks is not None:
        raise InvalidValueError(f"`return_lse`: expected False beside `sinks`, got {return_lse}")
    if read_mask not in _metadata.READINGS:
        raise InvalidValueError(f"`read_mask`: expected one of {', '.join(_metadata.READINGS)}, got {read_mask!r}")
    _gradients.refuse(q=q, k=k, v=v, bias=bias)
    q, k, v = _autocast(q, k, v)
    if bias is not None and bias.dtype not in (_first(q).dtype, torch.float32):
        bias = bias.float()
    options = {
        "zero_masked": zero_masked, "scale": scale, "causal": _BOTTOM_RIGHT if causal else _NOT_CAUSAL,
        "window_left": window[0], "window_right": window[1], "softcap": softcap, "alibi": alibi, "sinks": sinks,
        "read_mask": _metadata.NEVER if torch.compiler.is_compiling() else read_mask,
    }  # fmt: skip
    return _called(q, k, v, out, key_mask, bias, options, return_lse)


def _called(q, k, v, out, key_mask, bias, options, return_lse):
    """Attention by the function itself where there are but tensors, else by an operator."""
    if out is None and not any(isinstance(x, (list, tuple)) for x in (q, k, v, key_mask)):
        if _is_plain(q, k, v, key_mask, bias):
            out, lse = _new(q), _lse_of(q, None) if return_lse else None
            _attend(q, k, v, out, lse, () if key_mask is None else (key_mask,), bias, **options)
        else:
            out, lse = torch.ops.varlen_fa.attention(q, k, v, key_mask, bias, **options)
        return (out, lse) if return_lse else out
    q, k, v = map(_listed, (q, k, v))
    if out is None:
        batch, seq, _ = _sizes(q)
        out = q[0].new_empty((batch, seq, *q[0].shape[2:]))
    outs, masks = _listed(out), [] if key_mask is None else _listed(key_mask)
    if len(masks) > 1 and torch.compiler.is_compiling():
        # What a compiler fuses, for all layers together.
        masks = [_metadata.concatenated(masks, q[0].shape[0], _sizes(k)[2])]
    if _is_plain(*q, *k, *v, *outs, *masks, bias):
        lse = _lse_of(q, None) if return_lse else None
        _attend(q, k, v, outs, lse, masks, bias, **options)
    else:
        lse = torch.ops.varlen_fa.attention_of_segments(q, k, v, outs, masks, bias, **options)
    return (out, lse) if return_lse else out


def _listed(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


def prepare_qk(q, k, *, norm=None, rotary=None, pairing="interleaved"):
    """QK-norm and rotary embedding of q [B, S, H, D] and k [B, S, Hkv, D] in place, as an operator of PyTorch; or
    of lists of 1 to 8 segments.

    `norm`: (q_weight, k_weight, eps), weights of [D]. `rotary`: (cos, sin), tables of [S, R/2] or
    [B, S, R/2]. Either may be None; for lists it is a list with one or None for each segment. `pairing`:
    "interleaved", elements 2i and 2i + 1, or "halves", elements i and i + R/2.

    Raises what `varlen_fa.prepare_qk` does, ShapeError and GradientError."""
    if not isinstance(q, (list, tuple)):
        q, k, norm, rotary = [q], [k], [norm], [rotary]
    norms, tables = ([None] * len(q) if x is None else list(x) for x in (norm, rotary))
    for name, given in (("k", k), ("norm", norms), ("rotary", tables)):
        if len(given) != len(q):
            raise ShapeError(f"`{name}`: expected {len(q)} of them, one for each segment of `q`, got {len(given)}")
    q_weight, k_weight, eps = zip(*(norm or (None, None, 0.0) for norm in norms))
    _gradients.refuse(q=q, k=k, norm=(*q_weight, *k_weight))
    cos, sin = zip(*(table or (None, None) for table in tables))
    prepare = _prepare_qk if _is_plain(*q, *k, *q_weight, *k_weight, *cos, *sin) else torch.ops.varlen_fa.prepare_qk
    prepare(list(q), list(k), list(q_weight), list(k_weight), list(eps), list(cos), list(sin), pairing)


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *, scale=None, causal=False, window=(-1, -1), softcap=0.0,
                     alibi=None, return_lse=False):  # fmt: skip
    """Attention over packed rows as an operator of PyTorch: q [total_q, H, D], k and v
    [total_k, Hkv, D], cu_seqlens [B + 1] integers, in host memory or on the GPU, from which reading
    them waits. Returns out, with `return_lse` also the log-sum-exp [H, total_q] f32."""
    _gradients.refuse(q=q, k=k, v=v)
    q, k, v = _autocast(q, k, v)
    given = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    options = {
        "scale": scale, "causal": causal, "window_left": window[0], "window_right": window[1], "softcap": softcap,
        "alibi": alibi,
    }  # fmt: skip
    if _is_plain(*given):
        lse = _packed_lse_of(q) if return_lse else None
        out = _varlen_attend(*given, lse, **options)
    else:
        out, lse = torch.ops.varlen_fa.varlen_attention(*given, **options)
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
    _gradients.refuse(query=query, key=key, value=value, attn_mask=attn_mask)
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
    options = {"scale": scale, "causal": _TOP_LEFT if is_causal else _NOT_CAUSAL}
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = _called(q, k, v, None, key_mask, bias, options, False)
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
