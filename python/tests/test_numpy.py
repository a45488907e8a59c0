"""NumPy arrays in, NumPy arrays out."""

import array
import gc
import threading

import numpy as np
import pytest
from conftest import reference

import varlen_fa as fa


def close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def keep_of(lengths, seq):
    return np.arange(seq) < np.asarray(lengths)[:, None]


def test_metadata_makes_masked_rows_zeros(qkv):
    keep = keep_of([13, 5], 13)
    out, lse = fa.attention(*qkv, meta=fa.Meta(keep), lse=True)
    assert type(out) is np.ndarray and out.dtype == np.float32 and lse.shape == (2, 4, 13)
    expected, expected_lse = reference(*qkv, keep)
    close(out[keep], expected[keep])
    assert (out[~keep] == 0).all() and not np.signbit(out[~keep]).any()
    close(lse.transpose(0, 2, 1)[keep], expected_lse.transpose(0, 2, 1)[keep])
    assert np.isneginf(lse.transpose(0, 2, 1)[~keep]).all()


def test_key_mask_computes_every_query(qkv):
    keep = keep_of([9, 1], 13)
    expected, _ = reference(*qkv, keep)
    close(fa.attention(*qkv, keep), expected)
    close(fa.attention(*qkv, fa.KeyMask(keep)), expected)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 1, 5)])
def test_masks_of_every_form(dtype, shape):
    keep = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).astype(dtype)
    mask = fa.KeyMask(keep.reshape(shape))
    assert mask == fa.KeyMask.from_runs([[(0, 1), (2, 4)], [(2, 3)]], 5) and mask.total_kept == 4
    assert mask == fa.KeyMask(np.asfortranarray(keep))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_additive_masks(dtype):
    low = np.finfo(dtype).min
    mask = fa.KeyMask(np.array([[0, low, 0], [-np.inf, 0, -10000]], dtype))
    assert mask == fa.KeyMask(np.array([[1, 0, 1], [0, 1, 0]]))
    with pytest.raises(fa.InvalidValueError, match="row 0"):
        fa.KeyMask(np.array([[-2.5, 0]], dtype))


def test_masks_that_are_refused():
    with pytest.raises(fa.ShapeError, match="`mask`"):
        fa.KeyMask(np.ones((2, 3, 4), bool))
    with pytest.raises(fa.InvalidValueError):
        fa.KeyMask(np.array([[2, 1]]), strict=True)
    with pytest.raises(fa.ShapeError):
        fa.KeyMask(np.ones((2, 3), bool), batch=3)
    assert fa.KeyMask(np.array([1, 0]), batch=3).batch == 3


def test_ranges_bias_modifiers(qkv, rng):
    q, k, v = qkv
    place = np.arange(13)
    sees = np.broadcast_to(place[None, :] <= place[:, None], (2, 13, 13))
    close(fa.attention(q, k, v, ranges=fa.KeyRanges.causal((2, 13, 13))), reference(q, k, v, sees=sees)[0])
    window = sees & (place[None, :] >= place[:, None] - 3)
    keep = keep_of([13, 6], 13)
    got = fa.attention(q, k, v, meta=fa.Meta(keep), ranges=fa.KeyRanges.window((2, 13, 13), 3, 0))
    close(got[keep], reference(q, k, v, keep, sees=window)[0][keep])
    bias = rng.standard_normal((1, 4, 13, 13), dtype=np.float32)
    close(fa.attention(q, k, v, bias=bias, scale=0.3), reference(q, k, v, bias=bias, scale=0.3)[0])
    slopes = fa.alibi_slopes(4)
    alibi = -np.array(slopes)[None, :, None, None] * np.abs(place[:, None] - place[None, :])
    modifiers = fa.ScoreModifiers(alibi=slopes)
    close(fa.attention(q, k, v, modifiers=modifiers), reference(q, k, v, bias=alibi)[0])


def test_documents(qkv):
    ids = np.array([[1] * 6 + [2] * 5 + [0] * 2, [3] * 13])
    out = fa.attention(*qkv, meta=fa.Meta.from_document_ids(ids))
    sees = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]
    close(out[ids != 0], reference(*qkv, sees=sees)[0][ids != 0])
    assert (out[ids == 0] == 0).all()


def test_cross_attention(rng):
    q = rng.standard_normal((2, 7, 4, 16), dtype=np.float32)
    k, v = (rng.standard_normal((2, 11, 2, 16), dtype=np.float32) for _ in range(2))
    query, key = keep_of([7, 2], 7), keep_of([4, 11], 11)
    out = fa.attention(q, k, v, meta=(fa.Meta(query), fa.Meta(key)))
    close(out[query], reference(q, k, v, key)[0][query])
    assert (out[~query] == 0).all()


def test_strided_views_and_out(rng):
    fused = rng.standard_normal((2, 9, 12, 8), dtype=np.float32)
    q, k, v = fused[:, :, :4], fused[:, :, 4:8], fused[:, :, 8:]
    storage = np.full((2, 4, 9, 8), 7, np.float32)
    out = storage.transpose(0, 2, 1, 3)
    assert fa.attention(q, k, v, out=out) is out
    close(out, reference(q, k, v)[0])


@pytest.mark.parametrize("path", ["dense", "fused", "packed"])
def test_paths_agree(qkv, path):
    keep = keep_of([13, 5], 13)
    out = fa.attention(*qkv, meta=fa.Meta(keep), path=path)
    close(out[keep], reference(*qkv, keep)[0][keep])
    assert (out[~keep] == 0).all()


def test_low_precision(rng):
    q, k, v = (rng.standard_normal((2, 13, 4, 24)).astype(np.float16) for _ in range(3))
    out = fa.attention(q, k, v)
    assert out.dtype == np.float16
    close(out, reference(q, k, v)[0], 2e-3)


def test_packed_primitives(qkv):
    q, k, v = qkv
    keep = keep_of([13, 5], 13)
    meta = fa.Meta(keep)
    packed = fa.pack_qkv(q, k, v, meta)
    for got, padded in zip(packed, qkv):
        np.testing.assert_array_equal(got, padded[keep])
    np.testing.assert_array_equal(fa.pack(q, meta), q[keep])
    out, lse = fa.varlen_attention(*packed, meta.cu_seqlens, [0, 13, 18], lse=True)
    close(out, reference(*qkv, keep)[0][keep])
    assert lse.shape == (4, 18)
    padded = fa.scatter_to_padded(out, meta)
    np.testing.assert_array_equal(padded[keep], out)
    assert (padded[~keep] == 0).all()
    causal = fa.KeyRanges.causal(([0, 13, 18], [0, 13, 18]))
    sees = np.tril(np.ones((13, 13), bool))[None].repeat(2, 0)
    got = fa.varlen_attention(*packed, [0, 13, 18], [0, 13, 18], ranges=causal)
    close(got, reference(*qkv, keep, sees=sees)[0][keep])


def test_merge(qkv):
    q, k, v = qkv
    parts = [fa.attention(q, k[:, part], v[:, part], lse=True) for part in (slice(0, 4), slice(4, 13))]
    out, lse = fa.merge_attention(*parts[0], *parts[1])
    expected, expected_lse = reference(q, k, v)
    close(out, expected)
    close(lse, expected_lse)


@pytest.mark.parametrize("in_place", [True, False])
def test_prepare_qk(rng, in_place):
    q, k = (rng.standard_normal((2, 5, heads, 8), dtype=np.float32) for heads in (4, 2))
    weights = [rng.standard_normal(8, dtype=np.float32) for _ in range(2)]
    angle = rng.standard_normal((5, 4)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    keep = keep_of([5, 3], 5)

    def expected(x, weight):
        x = x.astype(np.float64)
        x = x * weight / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        even, odd = x[..., 0::2], x[..., 1::2]
        c, s = cos[None, :, None], sin[None, :, None]
        return np.stack([even * c - odd * s, odd * c + even * s], axis=-1).reshape(x.shape)

    outs = (q.copy(), k.copy()) if in_place else (np.full_like(q, 9), np.full_like(k, 9))
    before = [out.copy() for out in outs]
    tables = {"norm": (*weights, 1e-6), "rotary": (cos, sin)}
    if in_place:
        segment = fa.QkSegment(*outs, **tables)
    else:
        segment = fa.QkSegment(q, k, q_out=outs[0], k_out=outs[1], **tables)
    fa.prepare_qk([segment], meta=fa.Meta(keep))
    for got, was, x, weight in zip(outs, before, (q, k), weights):
        close(got[keep], expected(x, weight)[keep])
        np.testing.assert_array_equal(got[~keep], was[~keep])


def test_device_metadata(qkv):
    device = fa.Device("cpu")
    meta = fa.DeviceMeta(device, 2, 13)
    for lengths in ([13, 5], [0, 7]):
        keep = keep_of(lengths, 13)
        meta.rebuild(keep)
        out = fa.attention(*qkv, meta=meta, device=device)
        close(out[keep], reference(*qkv, keep)[0][keep])
        assert (out[~keep] == 0).all()
    with pytest.raises(fa.ShapeError, match="`mask`"):
        meta.rebuild(np.ones((2, 12), bool))


def test_read_only_inputs_but_no_read_only_output(qkv):
    q, k, v = qkv
    expected = fa.attention(q, k, v)
    fixed = q.copy()
    fixed.flags.writeable = False
    np.testing.assert_array_equal(fa.attention(fixed, k, v), expected)
    with pytest.raises(fa.LayoutError, match="`out`.*read-only"):
        fa.attention(q, k, v, out=fixed)


class Foreign:
    """A tensor of some package that speaks DLPack alone, and an old one."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_other_packages_get_a_dlpack_tensor(qkv):
    expected = fa.attention(*qkv)
    out = fa.attention(*(Foreign(x) for x in qkv))
    assert isinstance(out, fa.Tensor) and out.shape == expected.shape and out.dtype == "f32"
    view = np.from_dlpack(out)
    del out
    gc.collect()
    np.testing.assert_array_equal(view, expected)


def test_array_interface_alone(qkv):
    class Described:
        def __init__(self, array):
            self.kept, self.__array_interface__ = array, array.__array_interface__

    out = fa.attention(*(Described(x) for x in qkv))
    np.testing.assert_array_equal(np.from_dlpack(out), fa.attention(*qkv))


def test_memory_is_given_back(qkv):
    import sys

    count = [sys.getrefcount(x) for x in qkv]
    for _ in range(100):
        fa.attention(*qkv)
        with pytest.raises(fa.ShapeError):
            fa.attention(qkv[0], qkv[1], qkv[2][:1])
    assert [sys.getrefcount(x) for x in qkv] == count


def refusals(q, k, v):
    half = q.astype(np.float16)
    return [
        (fa.ShapeError, "`q`", lambda: fa.attention(q[0], k, v)),
        (fa.ShapeError, "`v`", lambda: fa.attention(q, k, v[:1])),
        (fa.ShapeError, "num_kv_heads", lambda: fa.attention(q, k[:, :, :3], v[:, :, :3])),
        (fa.ShapeError, "`mask`", lambda: fa.attention(q, k, v, np.ones((2, 12), bool))),
        (fa.ShapeError, "`q`", lambda: fa.attention(np.ones((1, 1, 1, 2, 8), np.float32), k, v)),
        (fa.DTypeError, "`k`", lambda: fa.attention(q, half, v)),
        (fa.DTypeError, "`q`", lambda: fa.attention(q.astype(np.float64), k, v)),
        (fa.DTypeError, "`q`", lambda: fa.attention(q.astype(complex), k, v)),
        (fa.LayoutError, "`q`", lambda: fa.attention(q[..., ::-1], k, v)),
        (fa.LayoutError, "`k`", lambda: fa.attention(q, np.asfortranarray(k), v)),
        (fa.LayoutError, "`out`.*`q`", lambda: fa.attention(q, k, v, out=q)),
        (fa.LayoutError, "`out`", lambda: fa.attention(q, k, v, out=np.broadcast_to(q[:1], q.shape))),
        (fa.InvalidValueError, "softmax_scale", lambda: fa.attention(q, k, v, scale=float("nan"))),
        (fa.InvalidValueError, "`path`", lambda: fa.attention(q, k, v, path="fast")),
        (fa.InvalidValueError, "`kernel`", lambda: fa.attention(q, k, v, kernel="sm75")),
        (fa.NotApplicableError, "sm80", lambda: fa.attention(q, k, v, kernel="sm80")),
        (fa.InvalidValueError, "`mask`", lambda: fa.attention(q, k, v, np.ones((2, 13)), meta=fa.Meta.from_lengths([1], 2))),
        (fa.ShapeError, "lengths|meta|mask", lambda: fa.attention(q, k, v, meta=fa.Meta.from_lengths([1, 2], 12))),
        (fa.InvalidValueError, "cu_seqlens_q", lambda: fa.varlen_attention(q[0], k[0], v[0], [0, 9, 4], [0, 13])),
        (fa.InvalidValueError, "softcap", lambda: fa.attention(q, k, v, modifiers=fa.ScoreModifiers(softcap=-1))),
        (fa.InvalidValueError, "`device`", lambda: fa.Device("gpu")),
        (fa.InvalidValueError, "`threads`", lambda: fa.Device("wgpu", threads=2)),
        (fa.InvalidValueError, "`lengths`", lambda: fa.KeyMask.from_lengths([3], 2)),
        (fa.ShapeError, "`segments`", lambda: fa.prepare_qk([])),
        (fa.ShapeError, r"segments\[0\]", lambda: fa.prepare_qk([fa.QkSegment(q, k[:1])])),
        (TypeError, "`k`", lambda: fa.attention(q, None, v)),
        (TypeError, "`meta`", lambda: fa.attention(q, k, v, meta=3)),
    ]


@pytest.mark.parametrize("at", range(27))
def test_refusals_name_the_argument(qkv, at):
    kind, match, call = refusals(*qkv)[at]
    with pytest.raises(kind, match=match):
        call()


def test_every_refusal_is_tried(qkv):
    assert len(refusals(*qkv)) == 27


def test_exceptions_are_pythons_own_too():
    assert issubclass(fa.ShapeError, ValueError) and issubclass(fa.DTypeError, TypeError)
    assert issubclass(fa.OutOfMemoryError, MemoryError) and issubclass(fa.DeviceError, RuntimeError)
    classes = [value for value in vars(fa).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) > 8 and all(issubclass(value, fa.VarlenFaError) for value in classes)


def test_threads(qkv):
    keep = keep_of([13, 5], 13)
    expected, meta, results = fa.attention(*qkv, meta=fa.Meta(keep)), fa.Meta(keep), []
    rebuilt = fa.DeviceMeta(fa.Device("cpu"), 2, 13)

    def work():
        for _ in range(50):
            rebuilt.rebuild(keep)
            same = np.array_equal(fa.attention(*qkv, meta=rebuilt), expected)
            results.append(same and np.array_equal(fa.attention(*qkv, meta=meta), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and len(results) == 200 and all(results)


def _in_child(arguments, queue):
    queue.put(fa.attention(*arguments))


def test_fork(qkv):
    import multiprocessing

    expected = fa.attention(*qkv)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(qkv, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), expected)
    child.join(60)
    assert child.exitcode == 0


def test_empty_tensors():
    q = np.zeros((0, 4, 2, 8), np.float32)
    assert fa.attention(q, q, q).shape == q.shape
    meta = fa.Meta.from_lengths([0, 0], 4)
    x = np.ones((2, 4, 2, 8), np.float32)
    assert fa.pack(x, meta).shape == (0, 2, 8)
    assert (fa.scatter_to_padded(fa.pack(x, meta), meta) == 0).all() and (fa.attention(x, x, x, meta=meta) == 0).all()


def test_doctor(capsys):
    from varlen_fa.__main__ import doctor

    assert doctor() == 0
    printed = capsys.readouterr().out
    assert fa.__version__ in printed and "cpu:" in printed and "self-check: right" in printed


def test_buffers(qkv):
    q, k, v = qkv
    out = fa.attention(memoryview(q), memoryview(k), memoryview(v))
    assert type(out) is fa.Tensor
    np.testing.assert_array_equal(np.from_dlpack(out), fa.attention(q, k, v))
    into = np.empty_like(q)
    fa.attention(q, k, v, out=memoryview(into))
    np.testing.assert_array_equal(into, fa.attention(q, k, v))
    read_only = memoryview(into).toreadonly()
    with pytest.raises(fa.LayoutError, match="`out`: expected memory that may be written"):
        fa.attention(q, k, v, out=read_only)
    flat = array.array("f", q.ravel())
    shaped = memoryview(flat).cast("B").cast("f", shape=q.shape)
    np.testing.assert_array_equal(np.from_dlpack(fa.attention(shaped, k, v)), fa.attention(q, k, v))
    with pytest.raises(fa.ShapeError, match="`q`"):
        fa.attention(b"no tensor", k, v)
    with pytest.raises(TypeError, match="`q`: expected a tensor"):
        fa.attention([1.0], k, v)
