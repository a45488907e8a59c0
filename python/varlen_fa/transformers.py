"""The attention implementation "varlen_fa" of transformers, and with it of sentence-transformers.

    varlen_fa.transformers.register()
    model = AutoModel.from_pretrained(name, attn_implementation="varlen_fa")

Padding stays a key mask [B, Sk], and causal masks and windows are ranges of keys, so that what they
drop costs nothing; other patterns become a bias. What varlen_fa does not compute (dropout, gradients,
devices and element types without a kernel), and a bias on CUDA, goes to transformers' SDPA; the logger
"varlen_fa" says why, once.
"""

import functools
import inspect
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import prepare_padding_mask, sdpa_mask

from varlen_fa import _gradients, _metadata
from varlen_fa import torch as _operators
from varlen_fa._by_tensor import ByTensor
from varlen_fa._errors import InvalidValueError, NotApplicableError
from varlen_fa._fallback import NO_KERNEL, say, slow_bias, why_not
from varlen_fa._masks import key_mask_and_bias

__all__ = ["register"]

NAME = "varlen_fa"

# What `forward` of a self-attention module takes. Where it takes anything else, keys may be those of
# other tokens than queries.
_OF_SELF_ATTENTION = {
    "self", "hidden_states", "attention_mask", "cache", "cu_seqlens", "kwargs", "layer_idx", "layer_past",
    "max_seqlen", "output_attentions", "past_key_values", "position_embeddings", "position_ids", "use_cache",
}  # fmt: skip


def register(*, zero_masked=True, read_mask="first"):
    """Makes "varlen_fa" an `attn_implementation` of every model that takes transformers' attention
    interface. A second call replaces the first.

    `zero_masked`: queries of padding are zeros, and cost nothing, in modules whose `forward` shows
    that they are self-attention. Otherwise they are computed like any other, as SDPA does. Results of
    other tokens do not depend on it. `read_mask`: when the host reads a mask on a GPU beside a causal mask
    or a window. "first": once a pass, for which it waits, so that newer kernels than `sm80` take part.
    "never": the GPU builds the metadata in each layer, as for other masks and in compiled graphs, so that a
    pass can be captured.

    Raises InvalidValueError for another `read_mask`."""
    if read_mask not in (_metadata.FIRST, _metadata.NEVER):
        expected = f"{_metadata.FIRST} or {_metadata.NEVER}"
        raise InvalidValueError(f"`read_mask`: expected {expected}, got {read_mask!r}")
    AttentionInterface.register(NAME, functools.partial(_attention, zero_masked=zero_masked))
    AttentionMaskInterface.register(NAME, functools.partial(_mask, is_read=read_mask == _metadata.FIRST))


class _Pattern(NamedTuple):
    """A mask that is no tensor of every query and key: the keys that are no padding, [B, Sk] booleans or
    None; and the last query level with the last key, whether queries see what comes after them, and how
    many keys before and after them they see, -1 for no limit."""

    key_mask: torch.Tensor | None
    causal: bool
    window: tuple[int, int]

    def dense(self, query, key):
        """The same as SDPA takes it: booleans that broadcast to [B, H, Sq, Sk]."""
        seq_q, seq_k = query.shape[2], key.shape[2]
        place = torch.arange(seq_k - seq_q, seq_k, device=query.device)[:, None]
        other = torch.arange(seq_k, device=query.device)
        left, right = self.window
        seen = (other <= place) if self.causal else torch.ones_like(other <= place)
        if left >= 0:
            seen = seen & (other >= place - left)
        if right >= 0:
            seen = seen & (other <= place + right)
        return seen if self.key_mask is None else seen & self.key_mask.to(query.device)[:, None, None]


def _mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, local_size=None,
    allow_is_causal_skip=True, allow_is_bidirectional_skip=False, config=None, *, is_read, **others,
):  # fmt: skip
    """The mask of a model: None, a _Pattern, or what transformers makes for SDPA where the pattern is
    neither causal nor a window nor padding alone."""
    causal = allow_is_causal_skip
    # transformers forbids to leave a mask out where it is more than its kind says.
    plain = causal or allow_is_bidirectional_skip
    if local_size is not None:
        # Chunks have a size too.
        window = local_size == getattr(config, "sliding_window", None)
        plain = plain and window and getattr(config, "attention_chunk_size", None) is None
    # The last query has the place of the last key. Static caches have places in tensors.
    level = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    level = level or (not causal and local_size is None)
    if not plain or not level or (attention_mask is not None and attention_mask.dim() != 2):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, local_size=local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, config=config, **others,
        )  # fmt: skip
    left, right = -1, -1
    if local_size is not None and kv_length > local_size:
        left, right = (local_size - 1, -1) if causal else (local_size, local_size)
    # One query sees all that comes before it.
    causal = causal and q_length > 1
    keep = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keep is not None:
        keep = keep[:, kv_offset : kv_offset + kv_length]
        if is_read and (causal or left >= 0) and _may_wait_for(keep):
            # Once for all layers.
            keep = keep.cpu()
        if not keep.is_cuda and not torch.compiler.is_compiling() and bool(keep.all()):
            keep = None
    if keep is None and left < 0 and (not causal or q_length == kv_length):
        # The module says whether it is causal.
        return None
    return _Pattern(keep, causal, (left, right))


def _may_wait_for(mask):
    return mask.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=None)
def _takes_own_tokens_alone(module):
    names = inspect.signature(module.forward).parameters.keys()
    return "hidden_states" in names and names <= _OF_SELF_ATTENTION


@torch.compiler.assume_constant_result
def _is_self_attention(module):
    return _takes_own_tokens_alone(module)


def _is_causal(module, is_causal):
    return is_causal if is_causal is not None else getattr(module, "is_causal", True)


# Of cumulative lengths, which are the same tensor in all layers of a pass, whatever mode it runs in.
_on_host = ByTensor(of_inference=True)


def _in_host_memory(lengths):
    if not lengths.is_cuda or torch.compiler.is_compiling():
        return lengths
    return _on_host.get((lengths,), lengths.cpu)


# Of attention sinks, which are weights.
_numbers = ByTensor()


def _listed(sinks):
    if sinks is None:
        return None
    return sinks.tolist() if torch.compiler.is_compiling() else _numbers.get((sinks,), sinks.tolist)


def _packed_attention(
    module, query, key, value, cu_seq_lens_q, cu_seq_lens_k, dropout=0.0, scaling=None, is_causal=None,
    position_bias=None, softcap=None, s_aux=None, sliding_window=None, **_others,
):  # fmt: skip
    """Texts after one another in one row, query [1, H, total_q, D], which cumulative lengths tell apart, as
    transformers has it for flash-attention. Nothing of PyTorch computes that."""
    reason = why_not(query, key, value, dropout)
    if reason is None and (position_bias is not None or s_aux is not None):
        reason = "there is a position bias, or sinks"
    if reason is not None:
        raise NotApplicableError(f"`cu_seq_lens_q`: SDPA takes no packed texts, and varlen_fa not this call: {reason}")
    reach = -1 if sliding_window is None else sliding_window - 1
    out = _operators.varlen_attention(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)), _in_host_memory(cu_seq_lens_q),
        _in_host_memory(cu_seq_lens_k), scale=scaling, causal=_is_causal(module, is_causal), window=(reach, reach),
        softcap=softcap or 0.0,
    )  # fmt: skip
    return out[None], None


def _attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None,
    softcap=None, s_aux=None, *, zero_masked, **others,
):  # fmt: skip
    """Of query [B, H, Sq, D], key and value [B, Hkv, Sk, D]: out [B, Sq, H, D], and no weights."""
    if others.get("cu_seq_lens_q") is not None:
        return _packed_attention(
            module, query, key, value, dropout=dropout, scaling=scaling, is_causal=is_causal,
            position_bias=position_bias, softcap=softcap, s_aux=s_aux, **others,
        )  # fmt: skip
    seq_q, seq_k = query.shape[2], key.shape[2]
    reason = why_not(query, key, value, dropout)
    if reason is None and _gradients.may_be_needed(position_bias):
        reason = _gradients.WANTED
    pattern, bias = attention_mask, position_bias
    if attention_mask is None:
        causal = _is_causal(module, is_causal) and seq_q > 1
        pattern = _Pattern(None, causal, (-1, -1))
        if causal and seq_q != seq_k:
            reason = reason or "the module is causal, has no mask, and its queries and keys differ in number"
    elif not isinstance(attention_mask, _Pattern):
        key_mask, bias = key_mask_and_bias(attention_mask, query.shape[0], seq_k, query.dtype)
        pattern = _Pattern(key_mask, False, (-1, -1))
        if position_bias is not None:
            reason = reason or "there is a position bias beside a mask of every query and key"
    if softcap is None and s_aux is None:
        # SDPA has neither.
        reason = reason or slow_bias(query, bias)
    if reason is None:
        own = zero_masked and seq_q == seq_k and _is_self_attention(type(module))
        try:
            out = _operators.attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), pattern.key_mask, bias,
                zero_masked=own, scale=scaling, causal=pattern.causal, window=pattern.window, softcap=softcap or 0.0,
                sinks=_listed(s_aux),
            )  # fmt: skip
            return out, None
        except NO_KERNEL as error:
            reason = str(error)
    if s_aux is not None:
        raise NotApplicableError(f"`s_aux`: SDPA has no attention sinks, and varlen_fa not this call: {reason}")
    say("transformers' SDPA", reason)
    if isinstance(attention_mask, _Pattern):
        attention_mask = attention_mask.dense(query, key)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
        position_bias=position_bias, softcap=softcap, **others,
    )  # fmt: skip
