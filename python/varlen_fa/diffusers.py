"""The attention backend "varlen_fa" of diffusers, and a processor for Qwen-Image's joint layers.

    varlen_fa.diffusers.enable(model)

What varlen_fa does not compute (dropout, gradients, context parallelism, devices and element types
without a kernel), and a bias on CUDA, goes to diffusers' native backend; the logger "varlen_fa" says
why, once.
"""

import functools

import torch
from diffusers.models import attention_dispatch as _dispatch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from varlen_fa import _gradients
from varlen_fa import torch as _operators
from varlen_fa._by_tensor import ByTensor
from varlen_fa._fallback import NO_KERNEL, say, slow_bias, why_not
from varlen_fa._masks import key_mask_and_bias

__all__ = ["QwenImageAttnProcessor", "enable", "register"]

NAME = "varlen_fa"


def enable(model):
    """Has `model` compute its attention by varlen_fa: `register()`, unless that was called before;
    `model.set_attention_backend("varlen_fa")`; and QwenImageAttnProcessor in the place of Qwen-Image's own
    processors."""
    if _backend_name() not in _dispatch._AttentionBackendRegistry._backends:
        register()
    for module in model.modules():
        if type(getattr(module, "processor", None)) is QwenDoubleStreamAttnProcessor2_0:
            module.set_processor(QwenImageAttnProcessor())
    model.set_attention_backend(NAME)


def register(*, zero_masked=False, read_mask="second"):
    """Makes "varlen_fa" an attention backend that `model.set_attention_backend` and
    `diffusers.attention_backend` take. A second call replaces the first.

    `zero_masked`: where a boolean mask [B, S] or [B, 1, 1, S] says which of S keys count and there are
    S queries, the queries that it drops are zeros, and cost nothing. Only for models whose attention
    with such masks is self-attention: the dispatcher does not tell it from cross-attention. Otherwise
    they are computed like any other, as the native backend does. `read_mask`: when the host reads a mask
    on a GPU, as in `varlen_fa.torch.attention`."""
    of_backend = _dispatch._AttentionBackendRegistry.register(
        _backend_name(), constraints=[_dispatch._check_device, _dispatch._check_shape]
    )
    of_backend(functools.partial(_attention, zero_masked=zero_masked, read_mask=read_mask))


def _backend_name():
    """The member of diffusers' enumeration of backends, which has no call that adds one."""
    names = _dispatch.AttentionBackendName
    if NAME.upper() in names.__members__:
        return names(NAME)
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    type.__setattr__(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[NAME] = member
    # What `in` looks at from Python 3.13 on.
    getattr(names, "_hashable_values_", []).append(NAME)
    return member


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, return_lse=False,
    _parallel_config=None, *, zero_masked=False, read_mask="second",
):  # fmt: skip
    """Of query [B, Sq, H, D], key and value [B, Sk, Hkv, D]: out [B, Sq, H, D], with `return_lse` also the
    log-sum-exp [B, Sq, H]."""
    reason = why_not(query, key, value, dropout_p)
    if reason is None and _parallel_config is not None:
        reason = "the model runs in parallel over the context"
    if reason is None:
        key_mask, bias = key_mask_and_bias(attn_mask, query.shape[0], key.shape[1], query.dtype)
        if is_causal and (query.shape[1] != key.shape[1] or (bias is not None and key_mask is None)):
            reason = "is_causal beside a mask that is no key mask, or of queries and keys that differ in number"
        reason = reason or slow_bias(query, bias)
    if reason is None:
        try:
            made = _operators.attention(
                query, key, value, key_mask, bias, zero_masked=zero_masked and query.shape[1] == key.shape[1],
                scale=scale, causal=is_causal, return_lse=return_lse, read_mask=read_mask,
            )  # fmt: skip
            return (made[0], made[1].transpose(1, 2)) if return_lse else made
        except NO_KERNEL as error:
            reason = str(error)
    say("diffusers' native", reason)
    return _dispatch._native_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, _parallel_config
    )


class QwenImageAttnProcessor(QwenDoubleStreamAttnProcessor2_0):
    """Attention of `QwenImageTransformer2DModel`: `model.set_attn_processor(QwenImageAttnProcessor())`.

    Norm and rotation of q and k of text and image are one call, in place, and attention takes and writes
    text and image where they lie: nothing is concatenated or split. The rows of masked text are zeros.
    `read_mask`: when the host reads the text's mask on a GPU, as in `varlen_fa.torch.attention`.
    `in_graph`: whether a compiled graph has the processor's operators. It builds the metadata in each
    layer; outside of the graph the mask is read, but each layer breaks the graph twice. What varlen_fa does
    not compute goes to diffusers' own processor."""

    def __init__(self, *, read_mask="first", in_graph=True):
        super().__init__()
        self._read_mask, self._in_graph = read_mask, in_graph

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, attention_mask=None,
        image_rotary_emb=None,
    ):  # fmt: skip
        compute = self._compute
        if not self._in_graph and torch.compiler.is_compiling():
            compute = torch.compiler.disable(compute)
        return compute(
            attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
        )

    def _compute(
        self, attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
    ):  # fmt: skip
        reason = self._why_not(attn, encoder_hidden_states, attention_mask)
        if reason is None:
            try:
                text, image = self._attend(
                    attn, encoder_hidden_states, hidden_states, encoder_hidden_states_mask, image_rotary_emb
                )
            except NO_KERNEL as error:
                reason = str(error)
        if reason is not None:
            say("diffusers' own joint", reason)
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        for layer in attn.to_out:
            image = layer(image)
        return image, attn.to_add_out(text)

    def _why_not(self, attn, text, attention_mask):
        if text is None or attention_mask is not None:
            return "diffusers' processor refuses the call"
        if self._parallel_config is not None:
            return "the model runs in parallel over the context"
        if torch.is_grad_enabled() and _gradients.may_be_needed(*attn.parameters()):
            return _gradients.WANTED
        norms = (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
        if not all(type(norm) is RMSNorm and norm.weight is not None and norm.bias is None for norm in norms):
            return "a norm of q or k is no RMSNorm with weights"
        if attn.norm_q.eps != attn.norm_k.eps or attn.norm_added_q.eps != attn.norm_added_k.eps:
            return "the norms of q and k differ in eps"
        return None

    def _attend(self, attn, text, image, text_mask, rotary):
        """Attention of text and image [B, S_i, E] to both: [B, S_i, H·D] each."""
        head_dim = attn.inner_dim // attn.heads
        of_text = _heads(text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), head_dim)
        of_image = _heads(image, (attn.to_q, attn.to_k, attn.to_v), head_dim)
        norms = [(attn.norm_added_q, attn.norm_added_k), (attn.norm_q, attn.norm_k)]
        tables = None
        if rotary is not None:
            of_image_tokens, of_text_tokens = rotary
            tables = [_cos_and_sin(of_text_tokens), _cos_and_sin(of_image_tokens)]
        q, k, v = zip(of_text, of_image)
        _operators.prepare_qk(
            q, k, norm=[(of_q.weight, of_k.weight, of_q.eps) for of_q, of_k in norms], rotary=tables
        )
        out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in q]
        _operators.attention(
            q, k, v, None if text_mask is None else [text_mask, None], zero_masked=True, out=out,
            read_mask=self._read_mask,
        )  # fmt: skip
        return [x.flatten(2) for x in out]


def _heads(given, projections, head_dim):
    """Projections of [B, S, E] as heads [B, S, H, D], in memory of their own: q and k are changed in place."""
    projected = [(project, project(given)) for project in projections]
    own = [x if _owns(project, x, given) else x.clone() for project, x in projected]
    return [x.unflatten(-1, (-1, head_dim)) for x in own]


def _is_there(tensor):
    """Whether a tensor is memory, rather than a compiler's thought of it."""
    return not torch.compiler.is_compiling() and type(tensor) is torch.Tensor


def _owns(project, projected, given):
    """Whether a projection of a tensor has memory of its own."""
    if _is_there(projected):
        return projected.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
    return isinstance(project, torch.nn.Linear)


# Of rotations, which are the same in every layer of a pass.
_tables = ByTensor(of_inference=True)


def _cos_and_sin(rotations):
    """Tables [S, D / 2] of complex numbers [S, D / 2]."""
    if not _is_there(rotations):
        return rotations.real.contiguous(), rotations.imag.contiguous()
    return _tables.get((rotations,), lambda: (rotations.real.contiguous(), rotations.imag.contiguous()))
