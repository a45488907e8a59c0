"""What tests share: the oracle, attention in f64 by NumPy after its definition; tolerances; devices."""

import numpy as np
import pytest


def reference(q, k, v, keep=None, *, scale=None, bias=None, sees=None):
    """q [B, Sq, H, D], k and v [B, Sk, Hkv, D]; keep [B, Sk] and sees [B, Sq, Sk] booleans. Returns out
    and the log-sum-exp [B, H, Sq]; a query that sees no key gives zeros and -inf."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    allowed = np.ones((q.shape[0], q.shape[1], k.shape[1]), bool)
    if keep is not None:
        allowed &= keep[:, None, :]
    if sees is not None:
        allowed &= sees
    scores = np.where(allowed[:, None], scores, -np.inf)
    peak = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(peak), peak, 0.0))[..., 0]
    weights = weights / np.where(total > 0, total, 1.0)
    return np.einsum("bhqk,bkhd->bqhd", weights, v), np.where(total[..., 0] > 0, lse, -np.inf)


def close(got, expected, of_largest=None):
    """Whether tensors of PyTorch agree: how far each number may be off, of the largest one."""
    import torch

    if of_largest is None:
        of_largest = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 2e-2}[expected.dtype]
    assert got.dtype == expected.dtype and got.shape == expected.shape and torch.isfinite(got).all()
    assert expected.numel() == 0 or (got - expected).abs().max() <= of_largest * expected.abs().max()


def padding(form, batch, seq):
    """Which of [batch, seq] tokens are no padding, as a tensor of PyTorch."""
    import torch

    lengths = torch.tensor([(7 * row) % seq + 1 for row in range(1, batch + 1)])[:, None]
    place = torch.arange(seq)
    return {
        "none": torch.ones(batch, seq, dtype=torch.bool),
        "right": place < lengths,
        "left": place >= seq - lengths,
        "holes": (place + lengths) % 3 > 0,
        # As text and image after one another, each with padding of its own.
        "joint": (place < (lengths + 1) // 2) | ((place >= 12) & (place < 13 + lengths // 3)),
    }[form]


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach the operators of PyTorch, and what they say of masks."""
    import varlen_fa.torch as operators

    calls, attention = [], operators.attention

    def counted(q, k, v, key_mask=None, bias=None, **options):
        calls.append({"key_mask": key_mask, "bias": bias, **options})
        return attention(q, k, v, key_mask, bias, **options)

    monkeypatch.setattr(operators, "attention", counted)
    return calls


class Watched:
    """How often the host read a mask of a GPU, and a GPU built metadata of one."""

    def __init__(self):
        self.read, self.built, self.captured, self.stream = 0, 0, False, 0

    def told(self):
        told, self.read, self.built = (self.read, self.built), 0, 0
        return told


@pytest.fixture
def gpu(monkeypatch):
    """Takes tensors in host memory for a GPU's, and the CPU device's metadata for what a GPU builds."""
    import varlen_fa as fa
    from varlen_fa import _metadata

    watched = Watched()
    of_host, built, device_meta = _metadata.of_host, _metadata._built_by_gpu, fa.DeviceMeta

    def reads(mask):
        watched.read += 1
        return of_host(mask)

    def builds(mask):
        watched.built += 1
        return built(mask)

    class Room:
        """Metadata in a GPU's memory, which none can be made of during a capture."""

        def __new__(cls, *arguments):
            assert not watched.captured
            return device_meta(*arguments)

    monkeypatch.setattr(_metadata, "of_host", reads)
    monkeypatch.setattr(_metadata, "_built_by_gpu", builds)
    monkeypatch.setattr(_metadata, "_is_on_gpu", lambda mask: True)
    monkeypatch.setattr(_metadata, "_is_captured", lambda: watched.captured)
    monkeypatch.setattr(_metadata, "_stream", lambda device: watched.stream)
    monkeypatch.setattr(_metadata, "_rooms", _metadata.ByContent(4))
    monkeypatch.setattr(_metadata, "_rooms_of_graphs", {})
    monkeypatch.setattr(fa, "DeviceMeta", Room)
    return watched


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def qkv(rng):
    """q, k, v [2, 13, 4, 24] f32."""
    return tuple(rng.standard_normal((2, 13, 4, 24), dtype=np.float32) for _ in range(3))


def _devices():
    try:
        import torch
    except ImportError:
        return ["cpu"]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture
def compiled(device):
    """Compiles a model. The graph of the compiler is run by PyTorch itself, which needs no C++ compiler."""
    import torch

    def compile_model(model, *, fullgraph=True):
        # What other tests have compiled counts towards a limit, and the default device is a mode that
        # a compiler must look through.
        torch._dynamo.reset()
        torch.set_default_device(None)
        return torch.compile(model, fullgraph=fullgraph, backend="aot_eager")

    return compile_model


@pytest.fixture(params=_devices())
def device(request):
    """Where PyTorch makes tensors in this test: f32 ones on the CPU, f16 ones on a GPU."""
    import torch

    torch.set_default_device(request.param)
    torch.set_default_dtype(torch.float16 if request.param == "cuda" else torch.float32)
    yield request.param
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
