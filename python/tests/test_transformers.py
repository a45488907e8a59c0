"""Models of transformers with random weights, unchanged but for the attention implementation."""

import logging

import pytest
from conftest import close, padding

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import varlen_fa as fa  # noqa: E402
import varlen_fa.torch  # noqa: E402
import varlen_fa.transformers  # noqa: E402
from varlen_fa._fallback import _say_once  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")

SEQ = 21
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN3 = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MODERN = {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8, "max_position_embeddings": 64}
MODELS = {
    "BERT": ("BertModel", "BertConfig", SIZES),
    "ModernBERT": ("ModernBertModel", "ModernBertConfig", SIZES | MODERN),
    "XLM-R": ("XLMRobertaModel", "XLMRobertaConfig", SIZES),
    "Qwen3": ("Qwen3Model", "Qwen3Config", SIZES | QWEN3),
    "Qwen3, windows": ("Qwen3Model", "Qwen3Config", SIZES | QWEN3 | SLIDING),
}


@pytest.fixture
def registered(device):
    torch.manual_seed(4)
    varlen_fa.transformers.register()
    with torch.inference_mode():
        yield


def made(name, dtype=None):
    model, config, sizes = MODELS[name]
    model = getattr(transformers, model)(getattr(transformers, config)(**sizes, attn_implementation="sdpa"))
    # Random weights as they are made leave attention nearly uniform.
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.mul_(6.0)
    return model.eval().to(dtype or torch.get_default_dtype())


@pytest.mark.parametrize("zero_masked", [True, False])
@pytest.mark.parametrize("form", ["none", "right", "left", "joint"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, form, zero_masked, calls):
    varlen_fa.transformers.register(zero_masked=zero_masked)
    model = made(name)
    for batch in (1, 3, 8):
        keep = padding(form, batch, SEQ)
        inputs = {"input_ids": torch.randint(3, 60, (batch, SEQ)), "attention_mask": keep.long()}
        model.set_attn_implementation("sdpa")
        expected = model(**inputs).last_hidden_state
        model.set_attn_implementation("varlen_fa")
        close(model(**inputs).last_hidden_state[keep], expected[keep])
    assert len(calls) == 9 and all(call["bias"] is None for call in calls)
    assert all(call["zero_masked"] == zero_masked for call in calls)
    masks = [call["key_mask"] for call in calls[3:]]
    assert all(mask.shape in ((3, SEQ), (8, SEQ)) for mask in masks if mask is not None)
    assert form == "none" or None not in masks


@pytest.mark.parametrize("name", MODELS)
def test_bf16(name):
    # Of some weights SDPA itself is 4 % off what the model is in f32.
    torch.manual_seed(0)
    model = made(name, torch.bfloat16)
    keep = padding("right", 4, SEQ)
    inputs = {"input_ids": torch.randint(3, 60, (4, SEQ)), "attention_mask": keep.long()}
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation("varlen_fa")
    close(model(**inputs).last_hidden_state[keep], expected[keep])


@pytest.mark.parametrize("name", MODELS)
def test_without_a_mask(name):
    model, ids = made(name), torch.randint(3, 60, (2, SEQ))
    expected = model(input_ids=ids).last_hidden_state
    model.set_attn_implementation("varlen_fa")
    close(model(input_ids=ids).last_hidden_state, expected)


def test_windows_are_ranges(calls):
    model = made("ModernBERT")
    model.set_attn_implementation("varlen_fa")
    model(input_ids=torch.randint(3, 60, (2, SEQ)), attention_mask=padding("left", 2, SEQ).long())
    assert [call["window"] for call in calls] == [(-1, -1), (4, 4), (4, 4)]


def test_vit(calls):
    sizes = {name: size for name, size in SIZES.items() if not name.endswith(("_id", "vocab_size"))}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=4)).eval()
    pictures = torch.randn(3, 3, 16, 16)
    model.set_attn_implementation("sdpa")
    expected = model(pictures).last_hidden_state
    model.set_attn_implementation("varlen_fa")
    close(model(pictures).last_hidden_state, expected)
    assert len(calls) == 3 and all(call["key_mask"] is None and not call["causal"] for call in calls)


@pytest.mark.parametrize("name", MODELS)
def test_compiled(compiled, name):
    model, keep = made(name), padding("right", 3, SEQ)
    inputs = {"input_ids": torch.randint(3, 60, (3, SEQ)), "attention_mask": keep.long()}
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation("varlen_fa")
    close(compiled(model)(**inputs).last_hidden_state[keep], expected[keep])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Qwen3", "Qwen3, windows"])
def test_generation(name, cache):
    config = transformers.Qwen3Config(**MODELS[name][2])
    model = transformers.Qwen3ForCausalLM(config).eval()
    keep = padding("left", 3, SEQ)
    inputs = {"input_ids": torch.randint(3, 60, (3, SEQ)), "attention_mask": keep.long()}
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = []
    for implementation in ("sdpa", "varlen_fa"):
        model.set_attn_implementation(implementation)
        made.append(model.generate(**inputs, **options, cache_implementation=cache, disable_compile=True))
    for got, expected in zip(made[1].logits, made[0].logits):
        close(got, expected)
    assert torch.equal(made[0].sequences, made[1].sequences)


def test_packed_texts_stay_apart(calls):
    """Texts in one row, which position_ids tell apart: a bias says it."""
    model, ids = made("Qwen3"), torch.randint(3, 60, (1, SEQ))
    places = torch.cat([torch.arange(9), torch.arange(SEQ - 9)])[None]
    expected = model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
    model.set_attn_implementation("varlen_fa")
    close(model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state, expected)
    assert all(call["bias"] is not None for call in calls)


def test_cross_attention_is_computed_for_all_queries(calls):
    """As many keys as queries, and a mask of keys that says nothing of queries."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "pad_token_id": 0}
    model = transformers.BartModel(transformers.BartConfig(**sizes, **heads, attn_implementation="sdpa")).eval()
    keep = padding("right", 3, SEQ)
    ids = torch.randint(3, 60, (2, 3, SEQ))
    inputs = {"input_ids": ids[0], "attention_mask": keep.long(), "decoder_input_ids": ids[1]}
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation("varlen_fa")
    close(model(**inputs).last_hidden_state, expected)
    assert len(calls) == 3


def test_position_bias(calls, device):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes, attn_implementation="sdpa")).eval()
    keep = padding("right", 3, SEQ)
    inputs = {"input_ids": torch.randint(3, 60, (3, SEQ)), "attention_mask": keep.long()}
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation("varlen_fa")
    close(model(**inputs).last_hidden_state[keep], expected[keep])
    # On CUDA SDPA adds a bias.
    assert len(calls) == (0 if device == "cuda" else 2) and all(call["key_mask"] is not None for call in calls)


def test_soft_caps_and_sinks(device):
    interface = transformers.AttentionInterface()["varlen_fa"]
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    sinks, module = torch.randn(4), torch.nn.Module()
    got, _ = interface(module, q, k, v, None, scaling=0.3, is_causal=False, softcap=2.0, s_aux=sinks)
    wide = [x.repeat_interleave(2, 1).float() for x in (k, v)]
    scores = 2.0 * torch.tanh(q.float() @ wide[0].transpose(2, 3) * 0.3 / 2.0)
    weights = torch.cat([scores, sinks.float()[:, None, None].expand(2, 4, 5, 1)], dim=-1).softmax(-1)[..., :-1]
    close(got, (weights @ wide[1]).transpose(1, 2).to(q.dtype))
    with pytest.raises(fa.NotApplicableError, match="s_aux.*dropout"):
        interface(module, q, k, v, None, dropout=0.1, s_aux=sinks)


def test_sinks_are_read_once_until_they_change():
    interface, listed = transformers.AttentionInterface()["varlen_fa"], varlen_fa.transformers._listed
    with torch.inference_mode(False), torch.no_grad():
        q, sinks = torch.randn(2, 4, 5, 8), torch.nn.Parameter(torch.randn(4))
        attend = lambda: interface(torch.nn.Module(), q, q, q, None, is_causal=False, s_aux=sinks)[0]  # noqa: E731
        first = attend()
        assert torch.equal(attend(), first) and listed(sinks) is listed(sinks)
        # Nothing goes to a sink any more.
        sinks.fill_(-1e4)
        close(attend(), torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2))
        assert listed(sinks) is listed(sinks)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_a_captured_graph(device, name):
    if device != "cuda":
        pytest.skip("graphs are captured on a CUDA device")
    varlen_fa.transformers.register(read_mask="never")
    model, stream = made(name), torch.cuda.Stream()
    inputs = {"input_ids": torch.randint(3, 60, (3, SEQ)), "attention_mask": torch.ones(3, SEQ, dtype=torch.long)}
    call = lambda: model(**inputs, use_cache=False).last_hidden_state  # noqa: E731
    with torch.cuda.stream(stream):
        model.set_attn_implementation("varlen_fa")
        inputs["attention_mask"].copy_(padding("right", 3, SEQ))
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = call()
        for form in ("left", "right", "joint"):
            keep = padding(form, 3, SEQ)
            inputs["attention_mask"].copy_(keep)
            graph.replay()
            stream.synchronize()
            model.set_attn_implementation("sdpa")
            close(got[keep], call()[keep])
            model.set_attn_implementation("varlen_fa")


def test_unknown_readings_are_refused():
    with pytest.raises(fa.InvalidValueError, match="`read_mask`.*first or never, got 'second'"):
        varlen_fa.transformers.register(read_mask="second")


@pytest.mark.parametrize("name", MODELS)
def test_gradients_go_to_sdpa(name, caplog, calls):
    _say_once.cache_clear()
    with torch.inference_mode(False), torch.no_grad():
        model = made(name)
    with torch.inference_mode(False), torch.enable_grad(), caplog.at_level(logging.WARNING, "varlen_fa"):
        keep = padding("left", 3, SEQ)
        inputs = {"input_ids": torch.randint(3, 60, (3, SEQ)), "attention_mask": keep.long()}
        expected = model(**inputs).last_hidden_state
        model.set_attn_implementation("varlen_fa")
        got = model(**inputs).last_hidden_state
        assert got.requires_grad
        close(got[keep], expected[keep])
    assert not calls
    assert ["SDPA" in record.message and "gradients are on" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("name", MODELS)
def test_packed_texts(name, calls):
    """Texts after one another in one row, as transformers has them for flash-attention."""
    model, lengths = made(name), [5, 1, 12]
    ids = torch.randint(3, 60, (1, sum(lengths)))
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    first = 1 if name == "XLM-R" else 0
    expected = [model(input_ids=text).last_hidden_state for text in ids.split(lengths, 1)]
    model.set_attn_implementation("varlen_fa")
    packed = {
        "position_ids": torch.cat([torch.arange(length) + first for length in lengths])[None],
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 12, "max_length_k": 12,
    }  # fmt: skip
    close(model(input_ids=ids, **packed).last_hidden_state, torch.cat(expected, dim=1))
    assert not calls
    with pytest.raises(fa.NotApplicableError, match="gradients"), torch.inference_mode(False), torch.enable_grad():
        tensor = torch.randn(1, 2, 18, 8, requires_grad=True)
        transformers.AttentionInterface()["varlen_fa"](torch.nn.Module(), tensor, tensor, tensor, None, **packed)
