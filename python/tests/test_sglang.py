"""The functions of sglang's pull request 26318, after its description."""

import inspect

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import varlen_fa as fa  # noqa: E402
from varlen_fa import sglang  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

MASKS = {
    "ragged": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
    "holes": [[1, 0, 1, 0, 1], [0, 0, 0, 1, 1]],
    "one empty row": [[0, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    "all": [[1] * 5] * 2,
    "none": [[0] * 5] * 2,
}


# Callers may name the arguments.
PARAMETERS = {
    "build_varlen_mask_meta": ["key_mask"],
    "build_inv_indices": ["indices", "total_rows"],
    "fused_pack_qkv": ["q", "k", "v", "indices"],
    "fused_scatter_to_padded": ["out_unpad", "inv_indices", "batch_size", "seqlen"],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_have_the_names_of_the_original(name):
    assert list(inspect.signature(getattr(sglang, name)).parameters) == PARAMETERS[name]


@pytest.fixture(params=MASKS.values(), ids=MASKS.keys())
def mask(request, device):
    return torch.tensor(request.param, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8])
def test_metadata(mask, dtype):
    meta = sglang.build_varlen_mask_meta(mask.to(dtype))
    flat = mask.flatten()
    assert torch.equal(meta["indices"], flat.nonzero().flatten())
    lengths = mask.sum(1)
    assert meta["cu_seqlens"].dtype == torch.int32 and meta["cu_seqlens"].tolist() == [0, *lengths.cumsum(0).tolist()]
    expected = torch.where(flat, flat.cumsum(0) - 1, -1).int()
    assert meta["inv_indices"].dtype == torch.int32 and torch.equal(meta["inv_indices"], expected)
    assert torch.equal(sglang.build_inv_indices(meta["indices"], flat.numel()), expected)
    assert meta["max_seqlen"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("known", [True, False])
def test_pack_and_scatter_are_bit_exact(mask, dtype, known):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 5, 4, 8).to(dtype), torch.randn(2, 5, 2, 8).to(dtype), torch.randn(2, 5, 2, 8).to(dtype)
    q[0, 0, 0, 0] = -0.0
    q[~mask] = float("nan")
    meta = sglang.build_varlen_mask_meta(mask)
    indices, inv = (meta["indices"], meta["inv_indices"])
    if not known:
        indices, inv = indices.clone(), inv.clone()
    packed = sglang.fused_pack_qkv(q, k, v, indices)
    for got, padded in zip(packed, (q, k, v)):
        expected = padded.flatten(0, 1)[indices]
        assert got.shape == expected.shape and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    out = sglang.fused_scatter_to_padded(packed[0], inv, 2, 5)
    assert torch.equal(out[mask].view(torch.uint8), packed[0].view(torch.uint8))
    assert (out[~mask].view(torch.uint8) == 0).all()


def test_strided_inputs():
    fused = torch.randn(2, 5, 12, 8)
    mask = torch.tensor(MASKS["holes"], dtype=torch.bool)
    meta = sglang.build_varlen_mask_meta(mask)
    for got, padded in zip(sglang.fused_pack_qkv(*fused.split(4, 2), meta["indices"]), fused.split(4, 2)):
        assert torch.equal(got, padded[mask])


def test_indices_changed_in_place():
    q = torch.randn(1, 4, 1, 8)
    indices = torch.tensor([0, 1])
    assert torch.equal(sglang.fused_pack_qkv(q, q, q, indices)[0], q[0, :2])
    indices += 2
    assert torch.equal(sglang.fused_pack_qkv(q, q, q, indices)[0], q[0, 2:])


@pytest.mark.parametrize("bad", [[0, 4], [-1, 1], [1, 1], [2, 1]])
def test_indices_are_checked(bad):
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(fa.InvalidValueError, match="`indices`"):
        sglang.fused_pack_qkv(q, q, q, torch.tensor(bad))


def test_inverse_indices_are_checked():
    with pytest.raises(fa.InvalidValueError, match="`inv_indices`"):
        sglang.fused_scatter_to_padded(torch.randn(2, 1, 8), torch.tensor([1, 0, -1, -1]), 1, 4)
    with pytest.raises(fa.ShapeError, match="`inv_indices`"):
        sglang.fused_scatter_to_padded(torch.randn(2, 1, 8), torch.tensor([0, 1]), 1, 4)
