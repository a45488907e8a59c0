"""When the host reads a mask on a GPU, and for how long it keeps what it made."""

import gc
import weakref

import pytest
from conftest import close

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import varlen_fa as fa  # noqa: E402
import varlen_fa.torch as fat  # noqa: E402
from varlen_fa import _metadata  # noqa: E402
from varlen_fa._by_tensor import ByTensor  # noqa: E402

KEEP = [[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]]


@pytest.fixture
def qkv():
    torch.manual_seed(2)
    with torch.no_grad():
        yield tuple(torch.randn(2, 6, 4, 16) for _ in range(3))


def mask():
    return torch.tensor(KEEP, dtype=torch.bool)


def expected(qkv, keep, *, causal=False):
    heads_first = [x.transpose(1, 2) for x in qkv]
    seen = keep.bool()[:, None, None]
    if causal:
        seen = seen & torch.ones(6, 6, dtype=torch.bool).tril()
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen)
    return out.transpose(1, 2)


def right(qkv, keep, **options):
    close(fat.attention(*qkv, keep, **options), expected(qkv, keep))
    zeros = fat.attention(*qkv, keep, zero_masked=True, **options)
    close(zeros[keep.bool()], expected(qkv, keep)[keep.bool()])
    assert (zeros[~keep.bool()] == 0).all()


def test_a_mask_is_read_at_first(qkv, gpu):
    keep = mask()
    for layer in range(3):
        right(qkv, keep, read_mask="first")
        assert gpu.told() == ((1, 0) if layer == 0 else (0, 0))
    # A view of the same mask is another thing; the same view again is not.
    row = keep[:, None, None]
    for layer in range(3):
        right(qkv, row[:, 0, 0].expand(2, 6), read_mask="first")
        assert gpu.told() == ((1, 0) if layer == 0 else (0, 0))


def test_a_mask_is_read_when_it_comes_again(qkv, gpu):
    keep = mask()
    fat.attention(*qkv, keep, read_mask="second")
    assert gpu.told() == (0, 1)
    for layer in range(3):
        right(qkv, keep, read_mask="second")
        assert gpu.told() == ((1, 0) if layer == 0 else (0, 0))
    for _ in range(3):
        close(fat.attention(*qkv, mask(), read_mask="second"), expected(qkv, keep))
        assert gpu.told() == (0, 1)


@pytest.mark.parametrize("reading", ["first", "second"])
def test_a_mask_changed_in_place(qkv, gpu, reading):
    keep = mask().int()
    for _ in range(3):
        right(qkv, keep, read_mask=reading)
    gpu.told()
    keep[1, 2:] = 0
    right(qkv, keep, read_mask=reading)
    right(qkv, keep, read_mask=reading)
    assert gpu.told() == ((1, 0) if reading == "first" else (1, 1))
    keep[:, None, None].fill_(1)
    right(qkv, keep, read_mask=reading)
    right(qkv, keep, read_mask=reading)
    assert gpu.told() == ((1, 0) if reading == "first" else (1, 1))


def test_captured_graphs_follow_the_mask(qkv, gpu):
    keep = mask()
    right(qkv, keep, read_mask="first")
    gpu.captured = True
    gpu.told()
    for reading in ("first", "second", "never"):
        right(qkv, keep, read_mask=reading)
        assert gpu.told() == (0, 2)
    # What the host has read before is not looked at beside `causal` or a bias either.
    for reading in ("first", "second", "never"):
        close(fat.attention(*qkv, keep, causal=True, read_mask=reading), expected(qkv, keep, causal=True))
        close(fat.attention(*qkv, keep, torch.zeros(1, 1, 6, 6), read_mask=reading), expected(qkv, keep))
        assert gpu.told() == (0, 2)


def test_streams_have_rooms_of_their_own(qkv, gpu):
    keep = mask()
    for gpu.stream in (0, 1):
        right(qkv, keep)
        right(qkv, keep, read_mask="first")
    kept = {(role, stream) for role, _device, stream, _size in _metadata._rooms._kept}
    assert kept == {(role, stream) for role in ("keys", "queries") for stream in (0, 1)}
    gpu.stream, gpu.captured = 2, True
    with pytest.raises(fa.InvalidValueError, match="before its capture"):
        fat.attention(*qkv, keep)


def test_rooms_are_bounded_but_for_those_of_graphs(qkv, gpu):
    short = lambda seq: [x[:, :seq] for x in qkv]  # noqa: E731
    keep = mask()
    for seq in range(1, 7):
        fat.attention(*short(seq), keep[:, :seq])
    assert {size for _role, _device, _stream, size in _metadata._rooms._kept} == {(2, 5), (2, 6)}
    gpu.captured = True
    right(qkv, keep)
    gpu.captured = False
    for seq in range(1, 6):
        fat.attention(*short(seq), keep[:, :seq])
    assert (2, 6) not in {size for _role, _device, _stream, size in _metadata._rooms._kept}
    gpu.captured = True
    right(qkv, keep)


def test_nothing_has_to_be_read(qkv, gpu):
    keep, bias = mask(), torch.zeros(1, 1, 6, 6)
    right(qkv, keep, read_mask="never")
    assert gpu.told() == (0, 2)
    for call in range(2):
        close(fat.attention(*qkv, keep, bias, read_mask="never"), expected(qkv, keep))
        close(fat.attention(*qkv, keep, causal=True, read_mask="never"), expected(qkv, keep, causal=True))
        close(fat.attention(*qkv, keep, bias, window=(9, 0), read_mask="never"), expected(qkv, keep, causal=True))
        assert gpu.told() == (0, 3)
    for call in range(2):
        close(fat.attention(*qkv, keep, bias, causal=True, read_mask="first"), expected(qkv, keep, causal=True))
        assert gpu.told() == ((1, 0) if call == 0 else (0, 0))
    # Unless the caller says so, the host reads nothing, since not every change of a mask is counted.
    keep, heads_first = mask(), [x.transpose(1, 2) for x in qkv]
    for _ in range(3):
        close(fat.attention(*qkv, keep, causal=True), expected(qkv, keep, causal=True))
        out = fat.scaled_dot_product_attention(*heads_first, keep[:, None, None])
        close(out.transpose(1, 2), expected(qkv, keep))
        assert gpu.told() == (0, 2)


def test_inference_tensors_are_not_kept(qkv, gpu):
    with torch.inference_mode():
        keep = mask()
        for reading in ("first", "second"):
            right(qkv, keep, read_mask=reading)
            assert gpu.told() == (0, 2)
        keep[1, 2:] = False
        right(qkv, keep, read_mask="first")
        for _ in range(2):
            fat.attention(*qkv, keep, causal=True, read_mask="first")
        assert gpu.told() == (0, 4)


def test_compiled_graphs_keep_nothing(qkv, gpu, monkeypatch):
    """A compiler writes into its tensors again without a count."""
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
    keep = mask()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for reading in ("first", "second", "never"):
        right(qkv, keep, read_mask=reading)
        assert gpu.told() == (0, 2)
    for _ in range(2):
        close(fat.attention(*qkv, keep, causal=True, read_mask="first"), expected(qkv, keep, causal=True))
        assert gpu.told() == (0, 1)


def test_masks_of_segments(qkv, gpu):
    text = mask()[:, :4].clone()
    keep = torch.cat([text, torch.ones(2, 2, dtype=torch.bool)], dim=1)
    q, k, v = ([x[:, :4], x[:, 4:]] for x in qkv)
    for layer in range(3):
        out = fat.attention(q, k, v, [text, None], zero_masked=True, read_mask="first")
        assert gpu.told() == ((1, 0) if layer == 0 else (0, 0))
        close(out[keep], expected(qkv, keep)[keep])
    text[0, 1] = False
    keep[0, 1] = False
    close(fat.attention(q, k, v, [text, None], read_mask="first"), expected(qkv, keep))
    assert gpu.told() == (1, 0)
    # A change of any of them counts.
    other = torch.ones(2, 2, dtype=torch.int64)
    for change in (False, True):
        if change:
            other[1, 1] = 0
            keep[1, 5] = False
        for _ in range(2):
            close(fat.attention(q, k, v, [text, other], read_mask="first"), expected(qkv, keep))
        assert gpu.told() == (1, 0)
    gpu.captured = True
    close(fat.attention(q, k, v, [text, other], read_mask="first"), expected(qkv, keep))
    assert gpu.told() == (0, 1)


def test_unknown_readings_are_refused(qkv):
    with pytest.raises(fa.InvalidValueError, match="`read_mask`.*never, second, first, got 'always'"):
        fat.attention(*qkv, mask(), read_mask="always")


def test_things_go_with_their_tensors():
    class Thing:
        pass

    kept, tensor = ByTensor(), torch.zeros(4)
    made = kept.get((tensor,), Thing)
    assert kept.get((tensor,), Thing) is made and kept.get((tensor,), Thing, "other") is not made
    assert kept.get((tensor[1:],), Thing) is not made
    gone = weakref.ref(made)
    del made, tensor
    gc.collect()
    assert gone() is None


def test_things_of_many_views_are_bounded():
    kept, tensor, made = ByTensor(), torch.zeros(100), []
    for _ in range(2):
        for at in range(40):
            kept.get((tensor[at:],), lambda: made.append(at))
    assert len(made) == 80
    kept.get((tensor[39:],), lambda: made.append(39))
    assert len(made) == 80


def test_things_of_inference_tensors():
    with torch.inference_mode():
        tensor = torch.zeros(4)
    made = []
    for kept in (ByTensor(), ByTensor(of_inference=True)):
        made.append([kept.get((tensor,), object) for _ in range(2)])
    assert made[0][0] is not made[0][1] and made[1][0] is made[1][1]


def test_things_that_were_made_elsewhere():
    kept, tensor = ByTensor(), torch.zeros(4)
    kept.put((tensor,), "thing", 3)
    assert kept.get((tensor,), lambda: "other", 3) == "thing" and kept.get((tensor,), lambda: "other", 4) == "other"
    tensor += 1
    assert kept.get((tensor,), lambda: "other", 3) == "other"
