"""sentence-transformers without padding.

    varlen_fa.transformers.register()
    model = SentenceTransformer(name, model_kwargs={"attn_implementation": "varlen_fa"})
    varlen_fa.sentence_transformers.unpad_inputs(model)
"""

from transformers import DataCollatorWithFlattening

from varlen_fa._errors import InvalidValueError
from varlen_fa.transformers import NAME

__all__ = ["unpad_inputs"]

_LENGTHS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def unpad_inputs(model):
    """Lets a SentenceTransformer put the texts of a batch after one another in one row, so that its
    linear layers compute no padding either. It does so by itself for implementations of
    flash-attention; this is the same for "varlen_fa". `model[0].unpad_inputs = False` undoes it.

    Raises InvalidValueError for a model of another attention, or one that takes more than text."""
    transformer = model[0]
    if getattr(transformer.config, "_attn_implementation", None) != NAME:
        raise InvalidValueError(f'`model`: expected model_kwargs={{"attn_implementation": "{NAME}"}}')
    takes = {kind: call["method"] for kind, call in transformer.modality_config.items()}
    if takes != {"text": "forward"} or transformer.transformer_task != "feature-extraction":
        raise InvalidValueError("`model`: expected one that takes text alone and gives the features of its tokens")
    transformer.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    if transformer.model_forward_params is not None:
        transformer.model_forward_params |= _LENGTHS
    transformer._flatten_position_offset = transformer._infer_flatten_position_offset()
    transformer.can_flatten_inputs = True
