"""Key masks of every element type, wherever and however they lie in memory, through every door."""

import math

import numpy as np
import pytest
from conftest import close

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import varlen_fa as fa  # noqa: E402
import varlen_fa.torch as fat  # noqa: E402
from varlen_fa import sglang  # noqa: E402
from varlen_fa._masks import key_mask_and_bias  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

HEADS, SEQ = 4, 6
KEEP = [[1, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 0]]
ROW = [[1, 0, 1, 1, 0, 0]] * 2
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES = [*INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x):
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 3)
    wide[..., 3::2] = x
    return wide[..., 3::2]


# Of rows [B, S]: what is kept, the mask as a model has it, and whether it says the same of every head
# and query.
TWO = {
    "dense": (KEEP, lambda rows: rows),
    "one row expanded": (ROW, lambda rows: rows[:1].clone().expand(2, SEQ)),
    "transposed": (KEEP, transposed),
    "sliced": (KEEP, sliced),
}
FOUR = {
    "[B, 1, 1, S]": (KEEP, lambda rows: rows[:, None, None]),
    "[B, 1, 1, S] transposed": (KEEP, lambda rows: transposed(rows[:, None, None])),
    "[B, 1, 1, S] sliced": (KEEP, lambda rows: sliced(rows[:, None, None])),
    "[1, 1, 1, S]": (ROW, lambda rows: rows[:1, None, None]),
    "expanded to heads": (KEEP, lambda rows: rows[:, None, None].expand(2, HEADS, 1, SEQ)),
    "expanded to queries": (KEEP, lambda rows: rows[:, None, None].expand(2, 1, SEQ, SEQ)),
    "expanded to all": (KEEP, lambda rows: rows[:, None, None].expand(2, HEADS, SEQ, SEQ)),
    "one row expanded to all": (ROW, lambda rows: rows[:1, None, None].expand(2, HEADS, SEQ, SEQ)),
    "sliced, expanded to all": (KEEP, lambda rows: sliced(rows)[:, None, None].expand(2, HEADS, SEQ, SEQ)),
    "copied to all": (KEEP, lambda rows: rows[:, None, None].repeat(1, HEADS, SEQ, 1)),
}


def values(keep, dtype):
    """A mask of this type: not 0 keeps, or added numbers."""
    keep = torch.tensor(keep, dtype=torch.bool)
    if dtype.is_floating_point:
        return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -math.inf)
    # No number but 0 drops, not even one whose low byte is 0.
    return keep if dtype == torch.bool else keep.to(dtype) * (256 if dtype.itemsize > 1 else 3)


@pytest.fixture
def qkv(device):
    """[B, H, S, D], as SDPA takes them."""
    torch.manual_seed(3)
    return tuple(torch.randn(2, HEADS, SEQ, 16) for _ in range(3))


def expected(qkv, keep):
    keep = torch.tensor(keep, dtype=torch.bool)[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", TWO | FOUR)
def test_sdpa(qkv, form, dtype):
    keep, lay = (TWO | FOUR)[form]
    mask = lay(values(keep, dtype))
    close(fat.scaled_dot_product_attention(*qkv, mask), expected(qkv, keep))
    key_mask, bias = key_mask_and_bias(mask, 2, SEQ, qkv[0].dtype)
    if not dtype.is_floating_point:
        # A mask that costs what it keeps, unless it is as large as any other.
        assert (bias is None) == (form != "copied to all") == (key_mask is not None)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("form", TWO)
def test_operators_and_metadata(qkv, form, dtype):
    keep, lay = TWO[form]
    mask, kept = lay(values(keep, dtype)), torch.tensor(keep, dtype=torch.bool)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    out = fat.attention(q, k, v, mask, zero_masked=True)
    close(out[kept], expected(qkv, keep).transpose(1, 2)[kept])
    assert (out[~kept] == 0).all()
    assert torch.equal(sglang.build_varlen_mask_meta(mask)["indices"], kept.flatten().nonzero().flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [*TWO, "[B, 1, 1, S]", "[B, 1, 1, S] transposed", "[B, 1, 1, S] sliced"])
def test_key_masks(form, dtype):
    keep, lay = (TWO | FOUR)[form]
    mask = lay(values(keep, dtype)).cpu()
    assert fa.KeyMask(mask) == fa.KeyMask(np.array(keep))
    if dtype != torch.bfloat16:
        assert fa.KeyMask(mask.numpy()) == fa.KeyMask(np.array(keep))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", TWO | FOUR)
def test_models_doors(qkv, form, dtype):
    """The attention backend of diffusers and the attention interface of transformers."""
    keep, lay = (TWO | FOUR)[form]
    mask = lay(values(keep, dtype))
    doors = {}
    try:
        import varlen_fa.diffusers as door
    except ImportError:
        pass
    else:
        tensors = [x.transpose(1, 2) for x in qkv]
        doors["diffusers"] = lambda: door._attention(*tensors, attn_mask=mask).transpose(1, 2)
    try:
        import varlen_fa.transformers as interface
    except ImportError:
        pass
    else:
        module = torch.nn.Module()
        doors["transformers"] = lambda: interface._attention(module, *qkv, mask, zero_masked=False)[0].transpose(1, 2)
    if not doors:
        pytest.skip("neither diffusers nor transformers is installed")
    for call in doors.values():
        close(call(), expected(qkv, keep))
