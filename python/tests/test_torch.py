"""PyTorch: tensors in and out, operators, and functions with the signatures of others."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import varlen_fa as fa  # noqa: E402
import varlen_fa.torch as fat  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

sdpa = torch.nn.functional.scaled_dot_product_attention


def close(got, expected, tolerance=None):
    if tolerance is None:
        tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[expected.dtype]
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.fixture
def qkv(device):
    """[B, H, S, D], as SDPA takes them."""
    torch.manual_seed(3)
    return tuple(torch.randn(2, 4, 13, 24) for _ in range(3))


@pytest.fixture
def keep(device):
    return torch.arange(13) < torch.tensor([[13], [5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_without_a_copy(qkv, keep, device, dtype):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("CUDA kernels take f16 and bf16")
    keep = keep.cpu()
    q, k, v = (x.to(dtype).transpose(1, 2) for x in qkv)
    out, lse = fa.attention(q, k, v, keep, lse=True)
    assert type(out) is torch.Tensor and out.dtype == dtype and lse.dtype == torch.float32
    mask = keep[:, None, None].to(device)
    close(out, sdpa(*(x.to(dtype).float() for x in qkv), attn_mask=mask).transpose(1, 2).to(dtype))
    into = torch.empty_like(out)
    assert fa.attention(q, k, v, keep, out=into) is into
    assert torch.equal(into, out)


def test_gradients_are_refused(qkv):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    q.requires_grad_()
    calls = [
        lambda: fa.attention(q, k, v),
        lambda: fat.attention(q, k, v),
        lambda: torch.ops.varlen_fa.attention(q, k, v),
        lambda: fat.scaled_dot_product_attention(q, k, v),
        lambda: fat.flash_attn_varlen_func(q[0], k[0], v[0], torch.tensor([0, 13]), torch.tensor([0, 13])),
    ]
    for call in calls:
        with pytest.raises(fa.GradientError, match="no_grad"):
            call()
    with torch.no_grad():
        close(fa.attention(q, k, v), fa.attention(q.detach(), k, v))
        assert not fat.attention(q, k, v).requires_grad


def test_parameters_and_negated_views(qkv):
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv)
    parameter = torch.nn.Parameter(q, requires_grad=False)
    assert type(fa.attention(parameter, k, v)) is torch.Tensor
    negated = torch._neg_view(q)
    with pytest.raises(fa.LayoutError, match="resolve_neg"):
        fa.attention(negated, k, v)


@pytest.mark.parametrize("form", ["bool2", "bool4", "int2", "int4", "additive4", "full", "causal", "float"])
def test_sdpa(qkv, keep, form):
    q, k, v = qkv
    full = torch.randn(1, 4, 13, 13)
    four = keep[:, None, None]
    ours, theirs, causal = {
        "bool2": (keep, four, False),
        "bool4": (four, four, False),
        "int2": (keep.long(), four, False),
        "int4": (four.int(), four, False),
        "additive4": (torch.zeros(2, 1, 1, 13).masked_fill(~four, -math.inf),) * 2 + (False,),
        "full": (full > -1, full > -1, False),
        "causal": (None, None, True),
        "float": (full, full, False),
    }[form]
    got = fat.scaled_dot_product_attention(q, k, v, ours, is_causal=causal)
    close(got, sdpa(q, k, v, theirs, is_causal=causal))


def test_sdpa_of_other_sizes():
    torch.manual_seed(5)
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    close(fat.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), sdpa(q, *wide, is_causal=True))
    close(fat.scaled_dot_product_attention(q, k, v, scale=0.7, enable_gqa=True), sdpa(q, *wide, scale=0.7))
    with pytest.raises(fa.ShapeError, match="enable_gqa"):
        fat.scaled_dot_product_attention(q, k, v)
    with pytest.raises(fa.InvalidValueError, match="dropout"):
        fat.scaled_dot_product_attention(q, *wide, dropout_p=0.1)


def test_masked_queries_are_zeros_if_wanted(qkv, keep):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    out, lse = fat.attention(q, k, v, keep, zero_masked=True, return_lse=True)
    expected = sdpa(*qkv, attn_mask=keep[:, None, None]).transpose(1, 2)
    close(out[keep], expected[keep])
    assert (out[~keep] == 0).all() and torch.isneginf(lse.transpose(1, 2)[~keep]).all()


def test_sinks(qkv):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    sinks = torch.randn(4)
    scores = qkv[0].float() @ qkv[1].float().transpose(2, 3) / 24**0.5
    wide = torch.cat([scores, sinks.float()[:, None, None].expand(2, 4, 13, 1)], dim=-1)
    expected = wide.softmax(-1)[..., :-1] @ qkv[2].float()
    close(fat.attention(q, k, v, sinks=sinks.tolist()), expected.transpose(1, 2).to(q.dtype))
    with pytest.raises(fa.InvalidValueError, match="return_lse"):
        fat.attention(q, k, v, sinks=sinks.tolist(), return_lse=True)


def test_a_mask_changed_in_place(qkv, keep):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    mask = keep.clone()
    fat.attention(q, k, v, mask)
    mask[0, 3:] = False
    close(fat.attention(q, k, v, mask), sdpa(*qkv, attn_mask=mask[:, None, None]).transpose(1, 2))
    with torch.inference_mode():
        mask = keep.clone()
        fat.attention(q, k, v, mask)
        mask[0, 3:] = False
        close(fat.attention(q, k, v, mask), sdpa(*qkv, attn_mask=mask[:, None, None]).transpose(1, 2))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 1)}, {"softcap": 5.0}])
def test_flash_attention(options):
    torch.manual_seed(11)
    lengths_q, lengths_k = [3, 7, 0], [5, 7, 4]
    q = torch.randn(10, 4, 16)
    k, v = torch.randn(16, 2, 16), torch.randn(16, 2, 16)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    out, lse, _ = fat.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 7, return_attn_probs=True, **options)
    assert lse.shape == (4, 10)
    for at in range(2):
        rows, keys = slice(cu_q[at], cu_q[at + 1]), slice(cu_k[at], cu_k[at + 1])
        wide = [x[keys].repeat_interleave(2, 1).transpose(0, 1) for x in (k, v)]
        scores = q[rows].transpose(0, 1) @ wide[0].transpose(1, 2) / 4
        if "softcap" in options:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        place = torch.arange(lengths_q[at])[:, None] + lengths_k[at] - lengths_q[at]
        other = torch.arange(lengths_k[at])[None]
        left, right = options.get("window_size", (99, 0 if "causal" in options else 99))
        scores = scores.masked_fill((other < place - left) | (other > place + right), -math.inf)
        close(out[rows], (scores.softmax(-1) @ wide[1]).transpose(0, 1))
        close(lse[:, rows], scores.logsumexp(-1))


def test_operators_keep_their_promises(qkv, keep):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.varlen_fa.attention.default, (q, k, v, keep), {"causal": 2}, test_utils=checks)
    segments = [[x[:, :5].clone(), x[:, 5:].clone()] for x in (q, k, v, q)]
    of_segments = torch.ops.varlen_fa.attention_of_segments.default
    torch.library.opcheck(of_segments, (*segments, [keep]), {"zero_masked": True}, test_utils=checks)
    cu = torch.tensor([0, 4, 13], dtype=torch.int32)
    packed = (q[0].contiguous(), k[0].contiguous(), v[0].contiguous(), cu, cu)
    torch.library.opcheck(torch.ops.varlen_fa.varlen_attention.default, packed, test_utils=checks)


@pytest.mark.parametrize("masks", ["none", "whole", "of segments"])
@pytest.mark.parametrize("zero_masked", [False, True])
def test_segments(qkv, keep, compiled, masks, zero_masked):
    whole = [x.transpose(1, 2) for x in qkv]
    keep = torch.cat([keep[:, :5], torch.ones(2, 8, dtype=torch.bool)], dim=1)
    given = {"none": None, "whole": keep, "of segments": [keep[:, :5].int(), None]}[masks]
    zero_masked = zero_masked and given is not None
    expected, expected_lse = fat.attention(
        *whole, None if given is None else keep, zero_masked=zero_masked, return_lse=True
    )

    def model(q, k, v, given):
        made = fat.attention(q, k, v, given, zero_masked=zero_masked)
        out = [torch.empty_like(x) for x in q]
        into, lse = fat.attention(q, k, v, given, zero_masked=zero_masked, return_lse=True, out=out)
        assert into is out
        return made, torch.cat(out, dim=1), lse

    segments = [[x[:, :5].clone(), x[:, 5:]] for x in whole]
    with torch.no_grad():
        for call in (model, compiled(model)):
            for got in (made := call(*segments, given))[:2]:
                close(got, expected)
            close(made[2], expected_lse)


def test_an_output_that_is_given(qkv, keep):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    out = torch.full_like(q, 7)
    assert fat.attention(q, k, v, keep, out=out) is out
    close(out, fat.attention(q, k, v, keep))
    with torch.autocast(q.device.type, dtype=torch.bfloat16), torch.no_grad():
        assert fat.attention([q], k, v, keep).dtype == torch.bfloat16


def test_segments_that_are_refused(qkv, keep):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    two = lambda x: [x[:, :5], x[:, 5:]]  # noqa: E731
    for kind, match, call in [
        (fa.ShapeError, r"`key_mask`.* 2, one for each", lambda: fat.attention(q, two(k), v, [keep, None, None])),
        (fa.ShapeError, r"`key_mask\[1\]`.*\[2, 8\]", lambda: fat.attention(q, two(k), v, [None, keep])),
        (fa.ShapeError, r"`segments\[1\]\.k`", lambda: fat.attention(q, [k[:, :5], k[:1, 5:]], v, keep)),
        (fa.LayoutError, r"`segments\[1\]\.out`", lambda: fat.attention(
            q, k, v, out=[torch.empty_like(q[:, :5]), q[:, 5:]])),
        (fa.GradientError, "`v`", lambda: fat.attention(q, k, [v[:, :5], v[:, 5:].clone().requires_grad_()])),
    ]:  # fmt: skip
        with pytest.raises(kind, match=match):
            call()


def test_what_traces_calls_sees_the_operators(qkv, keep):
    """Calls about memory that is there need no operator; all others do."""
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = (x.transpose(1, 2) for x in qkv)
    traced = make_fx(lambda q: fat.attention(q, k, v, keep) + fat.attention([q], k, v, [keep]))(q)
    names = [str(node.target) for node in traced.graph.nodes]
    assert "varlen_fa.attention.default" in names and "varlen_fa.attention_of_segments.default" in names
    many = torch.vmap(lambda q: fat.attention(q, k, v, keep))(torch.stack([q, 2 * q]))
    close(many[1], fat.attention(2 * q, k, v, keep))
    assert fat.attention(*(x.to("meta") for x in (q, k, v))).shape == q.shape


def test_compile_in_one_graph(qkv, keep, compiled):
    def model(q, k, v, mask):
        a = fat.scaled_dot_product_attention(q * 2, k, v, mask)
        b = fat.attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, zero_masked=True, causal=True)
        return a + b.transpose(1, 2)

    fast = compiled(model)
    for mask in (keep, ~keep):
        with torch.no_grad():
            close(fast(*qkv, mask), model(*qkv, mask))


def test_export(qkv, keep):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return fat.scaled_dot_product_attention(q, k, v, mask)

    with torch.no_grad():
        exported = torch.export.export(Model(), (*qkv, keep))
        other = keep.flip(0)
        expected = sdpa(*qkv, attn_mask=other[:, None, None])
        close(exported.module()(*qkv, other), expected, 1e-4 if expected.dtype == torch.float32 else None)


def test_autocast(qkv, device):
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        got, expected = fat.scaled_dot_product_attention(*qkv), sdpa(*qkv)
    assert got.dtype == expected.dtype == torch.bfloat16
    close(got, expected, 3e-2)


def test_results_for_other_packages_become_tensors(qkv, device):
    class Foreign:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    q, k, v = (x.to(torch.bfloat16).transpose(1, 2) for x in qkv)
    foreign = [Foreign(x) for x in (q, k, v)]
    if device == "cuda":
        # There a tensor of neither PyTorch nor CuPy says no stream, and nothing is made for it.
        out = torch.empty_like(q)
        fa.attention(*foreign, device=fa.Device.of(q), out=out)
        assert torch.equal(out, fa.attention(q, k, v))
        return
    out = fa.attention(*foreign)
    assert out.dtype == "bf16"
    assert torch.equal(torch.from_dlpack(out), fa.attention(q, k, v))


def test_numpy_and_torch_agree(qkv, device):
    if device != "cpu":
        pytest.skip("NumPy's arrays are in host memory")
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv)
    np.testing.assert_array_equal(fa.attention(q.numpy(), k.numpy(), v.numpy()), fa.attention(q, k, v).numpy())


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
def test_prepare_qk(compiled, is_compiled, pairing):
    eps = 1e-5

    def prepared(x, weight, table):
        """After its definition, in f32; `table` is (cos, sin) or None."""
        x = x.float()
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.float()
        if table is None:
            return x
        cos, sin = (of[:, None] for of in table)
        a, b = (x[..., 0::2], x[..., 1::2]) if pairing == "interleaved" else x.chunk(2, -1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        return torch.stack(turned, -1).flatten(-2) if pairing == "interleaved" else torch.cat(turned, -1)

    def call(q, k, norm, rotary):
        q, k = ([x * 1 for x in given] for given in (q, k))
        fat.prepare_qk(q, k, norm=norm, rotary=rotary, pairing=pairing)
        return *q, *k

    q, k = ([torch.randn(2, seq, heads, 16) for seq in (5, 9)] for heads in (4, 2))
    angles = torch.rand(9, 8, dtype=torch.float32)
    norm, rotary = [(torch.rand(16), torch.rand(16), eps), None], [None, (angles.cos(), angles.sin())]
    with torch.no_grad():
        got = (compiled(call) if is_compiled else call)(q, k, norm, rotary)
        weights = [[of and of[at] for of in norm] for at in (0, 1)]
        expected = [prepared(*x) for side, of in zip((q, k), weights) for x in zip(side, of, rotary)]
        for one, other in zip(got, expected):
            close(one, other.to(one.dtype))
        # A tensor is one segment.
        one, other = q[0].clone(), k[0].clone()
        fat.prepare_qk(one, other, norm=norm[0], pairing=pairing)
        close(one, expected[0].to(one.dtype))
    with pytest.raises(fa.ShapeError, match="`rotary`: expected 2 of them.*got 1"):
        fat.prepare_qk(q, k, rotary=rotary[:1])
    with pytest.raises(fa.GradientError):
        fat.prepare_qk(q, [k[0], k[1].requires_grad_()])


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("read_mask", ["never", "second", "first"])
@pytest.mark.parametrize("beside", ["nothing", "causal", "bias"])
def test_a_captured_graph_follows_the_mask(qkv, keep, device, read_mask, segments, beside):
    if device != "cuda":
        pytest.skip("graphs are captured on a CUDA device")
    seq = keep.shape[1]
    seen, bias = torch.ones(seq, seq, dtype=torch.bool, device=device), None
    if beside == "causal":
        seen = seen.tril()
    elif beside == "bias":
        bias = torch.randn(1, 1, seq, seq, dtype=torch.float32, device=device)
    q, k, v = (x.to(torch.bfloat16).transpose(1, 2) for x in qkv)
    mask, stream = keep.clone(), torch.cuda.Stream()
    options = {"zero_masked": True, "read_mask": read_mask, "bias": bias, "causal": beside == "causal"}
    with torch.no_grad(), torch.cuda.stream(stream):
        if segments:
            parts = [[x[:, :5].clone(), x[:, 5:].clone()] for x in (q, k, v)]
            out = [torch.empty_like(x) for x in parts[0]]
            call = lambda: fat.attention(*parts, mask, out=out, **options)  # noqa: E731
        else:
            call = lambda: [fat.attention(q, k, v, mask, **options)]  # noqa: E731
        for _ in range(2):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = call()
        for other in (keep, ~keep, torch.ones_like(keep), torch.zeros_like(keep), keep):
            mask.copy_(other)
            for part in out:
                part.fill_(float("nan"))
            graph.replay()
            stream.synchronize()
            added = torch.zeros(seen.shape, dtype=torch.float32) if bias is None else bias
            added = added.masked_fill(~(seen & other[:, None, None]), float("-inf"))
            expected = sdpa(*(x.to(torch.bfloat16).float() for x in qkv), attn_mask=added)
            got = torch.cat(out, dim=1)
            close(got[other], expected.transpose(1, 2)[other], 2e-2)
            assert (got[~other] == 0).all()
            # Outside of the graph too.
            eager = torch.cat(list(call()), dim=1)
            close(eager[other], expected.transpose(1, 2)[other], 2e-2)
            assert (eager[~other] == 0).all()


def test_segments_stay_where_they_lie(keep, device):
    # Of a head dimension that sm90 is chosen for.
    x = torch.zeros(2, 13, 4, 64, dtype=torch.bfloat16, device=device)
    if device != "cuda" or "sm90" not in fa.Device.of(x).kernels:
        pytest.skip("sm90 takes segments where they lie")
    parts = [[x[:, :5].clone(), x[:, 5:].clone()]] * 3
    plan = fa.plan(*parts, meta=fa.Meta(keep.cpu()))
    assert (plan.path, plan.kernel, plan.copies_segments) == ("fused", "sm90", False)
    every = fa.plan(*parts, meta=fa.Meta(fa.KeyMask.all(2, 13)))
    assert (every.path, every.copies_segments) == ("fused", False)


def test_calls_follow_the_current_stream(qkv, keep, device):
    if device != "cuda":
        pytest.skip("streams belong to a CUDA device")
    q, k, v = (x.to(torch.bfloat16).transpose(1, 2).contiguous() for x in qkv)
    keep = keep.cpu()
    expected, stream = fa.attention(q, k, v, keep), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = fa.attention(late, k, v, keep)
    stream.synchronize()
    assert torch.equal(out, expected)
