"""Models of diffusers with random weights, unchanged but for the backend or the processor."""

import copy
import logging
import math
import types

import pytest
from conftest import close, padding

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.models.attention_dispatch import dispatch_attention_fn  # noqa: E402

import varlen_fa as fa  # noqa: E402
import varlen_fa.diffusers  # noqa: E402
import varlen_fa.torch  # noqa: E402
from varlen_fa._fallback import _say_once  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")

TEXT = 9


@pytest.fixture
def registered(device):
    torch.manual_seed(6)
    varlen_fa.diffusers.register()
    _say_once.cache_clear()
    with torch.no_grad(), diffusers.attention_backend("native"):
        yield


def ready(model, dtype=None):
    return model.eval().to(dtype or torch.get_default_dtype())


def qwen_image(dtype=None):
    sizes = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 24, "axes_dims_rope": (8, 4, 4)}
    heads = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 3}
    model = ready(diffusers.QwenImageTransformer2DModel(**sizes, **heads), dtype)
    for name, weight in model.named_parameters():
        if "norm_" in name and "attn" in name:
            weight.uniform_(1.0, 3.0)
    return model


def of_qwen_image(form, batch, dtype=None):
    dtype = dtype or torch.get_default_dtype()
    return {
        "hidden_states": torch.randn(batch, 24, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT, 24, dtype=dtype),
        "encoder_hidden_states_mask": None if form is None else padding(form, batch, TEXT).long(),
        "timestep": torch.rand(batch, dtype=dtype),
        "img_shapes": [[(1, 4, 6)]] * batch,
    }


@pytest.mark.parametrize("form", [None, "none", "right", "left", "holes"])
@pytest.mark.parametrize("way", ["backend", "backend, zero_masked", "processor"])
def test_qwen_image(form, way, calls):
    model = qwen_image()
    inputs = [of_qwen_image(form, batch) for batch in (1, 2, 8)]
    expected = [model(**x).sample for x in inputs]
    if way == "processor":
        model.set_attn_processor(varlen_fa.diffusers.QwenImageAttnProcessor())
    else:
        varlen_fa.diffusers.register(zero_masked="zero" in way)
        model.set_attention_backend("varlen_fa")
    for x, sample in zip(inputs, expected):
        close(model(**x).sample, sample)
    assert len(calls) == 9 and all(call["bias"] is None for call in calls)
    assert all((call["key_mask"] is None) == (form is None) for call in calls)
    assert all(call["zero_masked"] == (way != "backend") for call in calls)
    assert all(call["read_mask"] == ("first" if way == "processor" else "second") for call in calls)


@pytest.mark.parametrize("way", ["backend", "processor"])
def test_qwen_image_bf16(way, calls):
    model, inputs = qwen_image(torch.bfloat16), of_qwen_image("right", 3, torch.bfloat16)
    expected = model(**inputs).sample
    if way == "backend":
        model.set_attention_backend("varlen_fa")
    else:
        model.set_attn_processor(varlen_fa.diffusers.QwenImageAttnProcessor())
    close(model(**inputs).sample, expected)
    assert len(calls) == 3


@pytest.mark.parametrize("way", ["backend", "processor", "processor outside"])
def test_qwen_image_compiled(compiled, way):
    model, inputs = qwen_image(), of_qwen_image("right", 2)
    expected = model(**inputs).sample
    if way == "backend":
        model.set_attention_backend("varlen_fa")
    else:
        model.set_attn_processor(varlen_fa.diffusers.QwenImageAttnProcessor(in_graph=way == "processor"))
    close(compiled(model, fullgraph=way != "processor outside")(**inputs).sample, expected)


def test_one_line_enables_a_model(calls):
    """Qwen-Image's layers have our processor, a model of another kind the backend, and what was registered stays."""
    model, inputs = qwen_image(), of_qwen_image("right", 3)
    expected = model(**inputs).sample
    kept = model.transformer_blocks[1].attn
    other = type("Other", (type(kept.processor),), {})()
    kept.set_processor(other)
    varlen_fa.diffusers.register(read_mask="never")
    varlen_fa.diffusers.enable(model)
    processors = [block.attn.processor for block in model.transformer_blocks]
    ours = varlen_fa.diffusers.QwenImageAttnProcessor
    assert [type(processor) is ours for processor in processors] == [True, False, True] and processors[1] is other
    close(model(**inputs).sample, expected)
    assert [call["read_mask"] for call in calls] == ["first", "never", "first"]
    model.set_attention_backend("native")


def test_the_processor_leaves_other_norms_to_diffusers(calls, caplog):
    model, inputs = qwen_image(), of_qwen_image("right", 2)
    for block in model.transformer_blocks:
        block.attn.norm_q = torch.nn.Identity()
    expected = model(**inputs).sample
    model.set_attn_processor(varlen_fa.diffusers.QwenImageAttnProcessor())
    close(model(**inputs).sample, expected)
    assert not calls
    assert ["RMSNorm" in record.message for record in caplog.records if record.name == "varlen_fa"] == [True]


def test_the_processor_concatenates_and_splits_nothing(calls):
    """Text and image stay where their projections put them, and the mask is the model's own."""
    from torch.utils._python_dispatch import TorchDispatchMode

    operators = []

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            operators.append(operator._schema.name)
            return operator(*arguments, **(options or {}))

    model, inputs = qwen_image(), of_qwen_image("right", 2)
    inputs["encoder_hidden_states_mask"] = mask = inputs["encoder_hidden_states_mask"].bool()
    attn = model.transformer_blocks[0].attn
    attn.set_processor(varlen_fa.diffusers.QwenImageAttnProcessor())
    text, image = torch.randn(2, TEXT, 48), torch.randn(2, 24, 48)
    rotary = tuple(torch.polar(*torch.randn(2, n, 8).float()) for n in (24, TEXT))
    layer = lambda: attn(  # noqa: E731
        hidden_states=image, encoder_hidden_states=text, encoder_hidden_states_mask=mask, image_rotary_emb=rotary
    )
    # The tables of cosines and sines are made in the first layer.
    layer()
    with Listed():
        layer()
    assert calls[0]["key_mask"] == [mask, None] and calls[0]["key_mask"][0] is mask and len(calls[0]["out"]) == 2
    # One concatenation, of the key masks in host memory.
    assert operators.count("aten::cat") <= 1 and "varlen_fa::attention_of_segments" in operators
    assert not {"aten::slice", "aten::split", "aten::clone", "aten::copy_"} & set(operators), operators


def test_the_processor_leaves_its_inputs_alone():
    model, inputs = qwen_image(), of_qwen_image("right", 2)
    for block in model.transformer_blocks:
        block.attn.to_q = block.attn.add_k_proj = torch.nn.Identity()
    expected = model(**inputs).sample
    model.set_attn_processor(varlen_fa.diffusers.QwenImageAttnProcessor())
    close(model(**inputs).sample, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_the_processor_reads_a_mask_once(gpu, dtype, device):
    if device != "cpu":
        pytest.skip("the CPU device stands for a GPU here")
    model, inputs = qwen_image(), of_qwen_image("right", 2)
    inputs["encoder_hidden_states_mask"] = mask = inputs["encoder_hidden_states_mask"].to(dtype)
    expected = model(**inputs).sample
    model.set_attn_processor(varlen_fa.diffusers.QwenImageAttnProcessor())
    for step in range(3):
        close(model(**inputs).sample, expected)
        # Masks of integers the model makes booleans of, in each step.
        assert gpu.told() == (int(dtype == torch.long or step == 0), 0)
    mask.fill_(1)
    model(**inputs)
    assert gpu.told() == (1, 0)
    gpu.captured = True
    mask[1, 3:] = 0
    got = model(**inputs).sample
    assert gpu.told() == (0, 3)
    gpu.captured = False
    close(got, model(**inputs).sample)


def test_a_compiled_processor_follows_the_mask(gpu, compiled, device):
    if device != "cpu":
        pytest.skip("the CPU device stands for a GPU here")
    model, inputs = qwen_image(), of_qwen_image("right", 2)
    mask = inputs["encoder_hidden_states_mask"]
    for in_graph in (True, False):
        model.set_attn_processor(varlen_fa.diffusers.QwenImageAttnProcessor(in_graph=in_graph))
        call = compiled(model, fullgraph=in_graph)
        call(**inputs)
        gpu.told()
        for form in ("right", "left", "holes"):
            mask.copy_(padding(form, 2, TEXT))
            got = call(**inputs).sample
            # Outside of the graph it is read, once a pass.
            assert gpu.told() == ((0, 3) if in_graph else (1, 0))
            close(got, model(**inputs).sample)
            gpu.told()


def test_the_backend_reads_masks_that_come_again(gpu, device):
    if device != "cpu":
        pytest.skip("the CPU device stands for a GPU here")
    q, k, v = (torch.randn(2, 6, 4, 16) for _ in range(3))
    mask = torch.tensor(KEEP)[:, None, None]
    attend = lambda mask: dispatch_attention_fn(q, k, v, attn_mask=mask, backend="varlen_fa")  # noqa: E731
    for layer in range(4):
        close(attend(mask), dispatch_attention_fn(q, k, v, attn_mask=mask.bool(), backend="native"))
        assert gpu.told() == ((0, 1), (1, 0), (0, 0), (0, 0))[layer]
    for _ in range(3):
        attend(mask.clone())
        assert gpu.told() == (0, 1)
    mask[1] = 1
    for layer in range(3):
        close(attend(mask), dispatch_attention_fn(q, k, v, attn_mask=mask.bool(), backend="native"))
        assert gpu.told() == ((0, 1), (1, 0), (0, 0))[layer]


@pytest.mark.parametrize("way", ["backend", "processor"])
def test_a_mask_changed_in_place(way):
    model, inputs = qwen_image(), of_qwen_image("right", 2)
    mask = inputs["encoder_hidden_states_mask"] = inputs["encoder_hidden_states_mask"].bool()
    own = dict(model.attn_processors)
    for _ in range(2):
        model.set_attn_processor(dict(own))
        model.set_attention_backend("native")
        expected = model(**inputs).sample
        if way == "backend":
            model.set_attention_backend("varlen_fa")
        else:
            model.set_attn_processor(varlen_fa.diffusers.QwenImageAttnProcessor())
        for _ in range(2):
            close(model(**inputs).sample, expected)
        mask[0, 1:4] = False


def test_the_processor_is_copied_with_its_model():
    model, inputs = qwen_image(), of_qwen_image("right", 2)
    model.set_attn_processor(varlen_fa.diffusers.QwenImageAttnProcessor())
    expected = model(**inputs).sample
    close(copy.deepcopy(model)(**inputs).sample, expected)


def test_hunyuan_video(calls):
    """Masks [B, 1, 1, S] in joint layers."""
    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1}
    more = {"num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16}
    last = {"pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)}
    model = ready(diffusers.HunyuanVideoTransformer3DModel(**sizes, **more, **last))
    inputs = {
        "hidden_states": torch.randn(3, 4, 2, 3, 4), "encoder_hidden_states": torch.randn(3, TEXT, 16),
        "encoder_attention_mask": padding("right", 3, TEXT).long(), "pooled_projections": torch.randn(3, 8),
        "timestep": torch.tensor([1, 2, 3]), "guidance": 1000 * torch.rand(3),
    }  # fmt: skip
    expected = model(**inputs).sample
    varlen_fa.diffusers.register(zero_masked=True)
    model.set_attention_backend("varlen_fa")
    close(model(**inputs).sample, expected)
    assert [call["key_mask"] is not None for call in calls] == [True, True]


def test_ltx_video(calls, device):
    """Cross-attention with additive masks [B, H, 1, S]."""
    sizes = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    model = ready(diffusers.LTXVideoTransformer3DModel(**sizes, cross_attention_dim=32, caption_channels=12))
    inputs = {
        "hidden_states": torch.randn(2, 24, 8), "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "encoder_attention_mask": padding("right", 2, TEXT).long(), "timestep": torch.rand(2),
        "num_frames": 2, "height": 3, "width": 4,
    }  # fmt: skip
    expected = model(**inputs).sample
    model.set_attention_backend("varlen_fa")
    close(model(**inputs).sample, expected)
    # On CUDA native attention adds a bias.
    assert [call["bias"] is not None for call in calls] == ([False] * 2 if device == "cuda" else [False, True] * 2)


def test_flux(calls):
    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    more = {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]}
    model = ready(diffusers.FluxTransformer2DModel(**sizes, **more))
    inputs = {
        "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, TEXT, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.rand(2), "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(TEXT, 3),
    }  # fmt: skip
    expected = model(**inputs).sample
    model.set_attention_backend("varlen_fa")
    close(model(**inputs).sample, expected)
    assert len(calls) == 2


KEEP = [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]]
FORMS = {
    "none": lambda keep: None,
    "bool [B, S]": lambda keep: keep,
    "bool [B, 1, 1, S]": lambda keep: keep[:, None, None],
    "bool, expanded": lambda keep: keep[:, None, None].expand(2, 4, 6, 6),
    "additive [B, S]": lambda keep: (~keep).to(torch.get_default_dtype()) * -10000.0,
    "additive [B, 1, 1, S]": lambda keep: torch.zeros(2, 6).masked_fill(~keep, -math.inf)[:, None, None],
    "a bias of keys": lambda keep: torch.randn(2, 1, 1, 6).masked_fill(~keep[:, None, None], -math.inf),
    "bool [B, 1, S, S]": lambda keep: (keep[:, None, None] & keep[:, None, :, None]) | torch.eye(6, dtype=torch.bool),
    "bias [B, H, S, S]": lambda keep: torch.randn(2, 4, 6, 6).masked_fill(~keep[:, None, None], -math.inf),
}


@pytest.mark.parametrize("zero_masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_masks(form, zero_masked, calls, device):
    varlen_fa.diffusers.register(zero_masked=zero_masked)
    keep = torch.tensor(KEEP, dtype=torch.bool)
    mask, qkv = FORMS[form](keep), [torch.randn(2, 6, 4, 16) for _ in range(3)]
    expected = dispatch_attention_fn(*qkv, attn_mask=mask, backend="native")
    got = dispatch_attention_fn(*qkv, attn_mask=mask, backend="varlen_fa")
    if device == "cuda" and form not in ("none", "bool [B, S]", "bool [B, 1, 1, S]", "bool, expanded"):
        assert not calls and torch.equal(got, expected)
        return
    assert len(calls) == 1
    key_mask = calls[0]["key_mask"]
    reads = "bool" in form or device == "cpu"
    assert (key_mask is not None) == (reads and form not in ("none", "bool [B, 1, S, S]", "bias [B, H, S, S]"))
    if zero_masked and key_mask is not None:
        assert torch.equal(key_mask, keep) and (got[~keep] == 0).all()
        got, expected = got[keep], expected[keep]
    close(got, expected)


def test_cross_attention_is_computed_for_all_queries():
    varlen_fa.diffusers.register(zero_masked=True)
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 6, 4, 16), torch.randn(2, 6, 4, 16)
    options = {"attn_mask": torch.tensor(KEEP, dtype=torch.bool), "scale": 0.4}
    close(
        dispatch_attention_fn(q, k, v, **options, backend="varlen_fa"),
        dispatch_attention_fn(q, k, v, **options, backend="native"),
    )


@pytest.mark.parametrize("lack", ["dropout", "gradients", "f64", "mixed causal"])
def test_what_is_lacking_goes_to_the_native_backend(lack, caplog):
    q, k, v = (torch.randn(2, 6, 4, 16) for _ in range(3))
    options, said = {}, lack
    if lack == "dropout":
        options = {"dropout_p": 0.5}
    elif lack == "f64":
        q, k, v, said = q.double(), k.double(), v.double(), "f64|float64|Double"
    elif lack == "mixed causal":
        k, v, options, said = k[:, :4], v[:, :4], {"is_causal": True}, "is_causal"
    with torch.set_grad_enabled(lack == "gradients"), caplog.at_level(logging.WARNING, "varlen_fa"):
        q.requires_grad_(lack == "gradients")
        for _ in range(2):
            torch.manual_seed(1)
            got = dispatch_attention_fn(q, k, v, **options, backend="varlen_fa")
    torch.manual_seed(1)
    expected = dispatch_attention_fn(q, k, v, **options, backend="native")
    assert torch.equal(got, expected) and got.requires_grad == (lack == "gradients")
    assert len(caplog.records) == 1 and caplog.records[0].name == "varlen_fa"
    assert any(word in caplog.records[0].getMessage() for word in said.split("|"))


def test_a_slow_bias_goes_to_the_native_backend(monkeypatch, caplog, calls):
    """As on CUDA."""
    slow = varlen_fa.diffusers.slow_bias
    monkeypatch.setattr(varlen_fa.diffusers, "slow_bias", lambda _, bias: slow(types.SimpleNamespace(is_cuda=True), bias))
    q, k, v = (torch.randn(2, 6, 4, 16) for _ in range(3))
    mask = torch.randn(2, 1, 1, 6)
    with caplog.at_level(logging.WARNING, "varlen_fa"):
        got = dispatch_attention_fn(q, k, v, attn_mask=mask, backend="varlen_fa")
    assert torch.equal(got, dispatch_attention_fn(q, k, v, attn_mask=mask, backend="native")) and not calls
    assert [True] == ["a bias" in record.getMessage() for record in caplog.records]
    dispatch_attention_fn(q, k, v, attn_mask=mask > 0, backend="varlen_fa")
    assert len(calls) == 1


def test_log_sum_exp():
    q, k, v = (torch.randn(2, 6, 4, 16) for _ in range(3))
    out, lse = dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True}, backend="varlen_fa")
    close(out, dispatch_attention_fn(q, k, v, backend="native"))
    scores = torch.einsum("bqhd,bkhd->bqhk", q.float(), k.float()) / 4
    close(lse, scores.logsumexp(-1))


def test_the_name_is_known_everywhere():
    names = diffusers.models.attention_dispatch.AttentionBackendName
    assert names("varlen_fa") is names.VARLEN_FA and "varlen_fa" in names.__members__.values()
    assert names.VARLEN_FA.name == "VARLEN_FA" and names.VARLEN_FA.value == "varlen_fa"
    assert names.VARLEN_FA in list(names) and len(set(names)) == len(names)
    assert copy.deepcopy(names.VARLEN_FA) is names.VARLEN_FA
    with diffusers.attention_backend("varlen_fa"):
        active, _ = diffusers.models.attention_dispatch._AttentionBackendRegistry.get_active_backend()
        assert active is names.VARLEN_FA
    with pytest.raises(ValueError, match="must be one of"):
        qwen_image().set_attention_backend("varlen")
