"""q, k, v and out in segments along S: the same bits as the call on whole tensors."""

import numpy as np
import pytest
from conftest import reference

import varlen_fa as fa

CUTS = {
    "alike": ([5, 8],) * 4,
    "q alone": ([5, 8], [13], [13], [13]),
    "each otherwise": ([5, 8], [4, 0, 9], [13], [1, 12]),
    "eight": ([2, 2, 2, 2, 2, 1, 1, 1],) * 4,
    "empty ones": ([0, 13, 0], [13, 0], [0, 13], [0, 6, 7]),
}
KEEP = (np.arange(13) < [[4], [5]]) | (np.arange(13) >= [[7], [5]])


def cut(x, lengths):
    """Copies, each with memory and strides of its own."""
    parts = np.split(x, np.cumsum(lengths)[:-1], axis=1)
    heads_first = lambda part: np.ascontiguousarray(part.swapaxes(1, 2)).swapaxes(1, 2)  # noqa: E731
    return [heads_first(part) if at % 2 else part.copy() for at, part in enumerate(parts)]


def kinds(rows):
    """NumPy, and PyTorch where it is installed."""
    yield rows, lambda x: x
    try:
        import torch
    except ImportError:
        return
    yield [[torch.from_numpy(x) for x in parts] for parts in rows], lambda x: x.numpy()


@pytest.mark.parametrize("form", ["none", "mask", "meta", "meta, causal"])
@pytest.mark.parametrize("cuts", CUTS)
def test_the_bits_of_whole_tensors(qkv, cuts, form):
    options = {
        "none": {}, "mask": {"mask": fa.KeyMask(KEEP)}, "meta": {"meta": fa.Meta(KEEP)},
        "meta, causal": {"meta": fa.Meta(KEEP), "ranges": fa.KeyRanges.causal((2, 13, 13))},
    }[form]  # fmt: skip
    expected, expected_lse = fa.attention(*qkv, lse=True, **options)
    of_q, of_k, of_v, of_out = CUTS[cuts]
    rows = [cut(x, lengths) for x, lengths in zip((*qkv, np.full_like(qkv[0], 7)), (of_q, of_k, of_v, of_out))]
    for (q, k, v, out), array in kinds(rows):
        got, lse = fa.attention(q, k, v, lse=True, **options)
        assert type(got) is type(q[0]) and type(lse) is type(q[0])
        np.testing.assert_array_equal(array(got), expected)
        np.testing.assert_array_equal(array(lse), expected_lse)
        assert fa.attention(tuple(q), k, v, out=out, **options) is out
        np.testing.assert_array_equal(np.concatenate([array(x) for x in out], axis=1), expected)
    if form == "mask":
        np.testing.assert_allclose(expected, reference(*qkv, KEEP)[0], rtol=2e-5, atol=2e-5)


def test_a_list_of_one_is_the_tensor(qkv):
    q, k, v = qkv
    np.testing.assert_array_equal(fa.attention([q], (k,), [v]), fa.attention(q, k, v))


def refusals(q, k, v):
    a, b = q[:, :5], q[:, 5:]
    ok, whole = [np.zeros_like(a), np.zeros_like(b)], np.zeros_like(q)
    return [
        (fa.ShapeError, "`q`: expected a tensor, or a list of 1 to 8 segments, got 0", lambda: fa.attention([], k, v)),
        (fa.ShapeError, "`k`.* got 9 segments", lambda: fa.attention(q, [k] * 9, v)),
        (fa.ShapeError, r"`segments\[1\]\.q`", lambda: fa.attention([a, b[0]], k, v)),
        (fa.ShapeError, r"`segments\[1\]\.k`", lambda: fa.attention(q, [a, b[:, :, :2]], v)),
        (fa.ShapeError, r"`segments\[0\]\.v`|`segments\[1\]\.v`", lambda: fa.attention(q, k, [a, b[..., :8]])),
        (fa.ShapeError, "`v`", lambda: fa.attention(q, k, [a, b[:, 1:]])),
        (fa.ShapeError, "`out`", lambda: fa.attention(q, k, v, out=[ok[0], ok[1][:, 1:]])),
        (fa.DTypeError, r"`segments\[1\]\.q`", lambda: fa.attention([a, b.astype(np.float16)], k, v)),
        (fa.DTypeError, r"`segments\[0\]\.out`", lambda: fa.attention(q, k, v, out=[ok[0].astype(int), ok[1]])),
        (fa.LayoutError, r"`segments\[1\]\.v`", lambda: fa.attention(q, k, [a, b[..., ::-1]])),
        (fa.LayoutError, r"`segments\[1\]\.out`.*`q`", lambda: fa.attention(q, k, v, out=[ok[0], b])),
        (fa.LayoutError, r"segments\[0\]\.out.*segments\[1\]\.out", lambda: fa.attention(
            q, k, v, out=[whole[:, :5], whole[:, 5:]])),
        (TypeError, r"`segments\[1\]\.q`", lambda: fa.attention([a, "b"], k, v)),
        (TypeError, r"`segments\[0\]\.k`", lambda: fa.attention(q, [1.0, 2.0], v)),
        (fa.ShapeError, "`out`: expected one tensor, got 2", lambda: fa.varlen_attention(
            q[0], k[0], v[0], [0, 13], [0, 13], out=[q[0, :5].copy(), q[0, 5:].copy()])),
    ]  # fmt: skip


@pytest.mark.parametrize("at", range(15))
def test_refusals_name_segment_and_argument(qkv, at):
    kind, match, call = refusals(*qkv)[at]
    with pytest.raises(kind, match=match):
        call()


def test_every_refusal_is_tried(qkv):
    assert len(refusals(*qkv)) == 15


def test_nothing_is_written_where_a_segment_does_not_fit(qkv):
    q, k, v = qkv
    out = [np.full_like(q[:, :5], 7), np.full_like(q[:, 5:], 7)]
    with pytest.raises(fa.ShapeError):
        fa.attention(q, k, [v[:, :5], v[:, 5:, :2]], out=out)
    assert all((x == 7).all() for x in out)


def test_plans(qkv):
    q, k, v = qkv
    plan = fa.plan(q, k, v)
    assert (plan.path, plan.kernel, plan.copies_segments, plan.estimate) == ("dense", "cpu-tiled", False, None)
    assert plan.reason == "no mask was given" and plan.reason in str(plan) and str(plan) in repr(plan)
    meta = fa.Meta(KEEP)
    fused = fa.plan([q[:, :5], q[:, 5:]], k, v, meta=meta, lse=True)
    assert fused.path == "fused" and not fused.copies_segments and fused != plan
    assert fused == fa.plan(q, k, v, meta=meta)
    assert fa.plan(q, k, v, meta=meta, path="packed").path == "packed"
    nothing = fa.plan(q, k, v, meta=fa.Meta(KEEP & False))
    assert (nothing.path, nothing.kernel) == ("zero", None)
    with pytest.raises(fa.ShapeError, match="`v`"):
        fa.plan(q, k, v[:1])
    with pytest.raises(fa.NotApplicableError, match="sm90"):
        fa.plan(q, k, v, kernel="sm90")


class OnCuda:
    """What the interface for CUDA memory says of an array, without a GPU: nothing may follow the address."""

    def __init__(self, array, **changes):
        address = array.__array_interface__["data"][0]
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": array.shape, "strides": array.strides, "typestr": array.dtype.str,
            "version": 3, "stream": 1,
        } | changes  # fmt: skip


def test_cuda_array_interface(qkv):
    q, k, v = qkv
    with pytest.raises(fa.DeviceMismatchError, match="`device`.*Device.from_cuda"):
        fa.attention(OnCuda(q), k, v)
    cpu = fa.Device("cpu")
    with pytest.raises(fa.DeviceMismatchError, match="`k`.*host memory.*CUDA memory"):
        fa.attention(q, OnCuda(k), v, device=cpu)
    with pytest.raises(fa.DeviceMismatchError, match="`mask`.*host memory"):
        fa.KeyMask(OnCuda(KEEP))
    for kind, what, changes in [
        (fa.DTypeError, "c16", {"typestr": "<c16"}),
        (fa.DTypeError, ">f4", {"typestr": ">f4"}),
        (fa.LayoutError, "strides of whole elements", {"strides": (1250, 96, 24, 4)[:3] + (2,)}),
        (fa.LayoutError, "4 strides", {"strides": (4,)}),
        (fa.LayoutError, "without a mask", {"mask": KEEP}),
        (fa.ShapeError, "1 to 4 dimensions", {"shape": (1, 1, 1, 1, 1)}),
        (fa.LayoutError, "null", {"data": (0, False)}),
        (fa.LayoutError, "read-only", {"data": (64, True)}),
    ]:
        with pytest.raises(kind, match=what):
            fa.attention(q, k, v, out=OnCuda(q, **changes), device=cpu)
