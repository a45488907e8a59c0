"""JAX's arrays in, JAX's arrays out; and that none is written.

JAX has threads, which do not get along with a fork: it is imported when the first of these tests runs,
after those of the other files."""

import numpy as np
import pytest
from conftest import reference

import varlen_fa as fa


@pytest.fixture
def jax():
    return pytest.importorskip("jax", reason="jax is not installed")


@pytest.fixture
def jnp(jax):
    return jax.numpy


@pytest.fixture
def arrays(jnp, qkv):
    return tuple(map(jnp.asarray, qkv))


def test_results_are_arrays_of_jax(jax, jnp, arrays, qkv):
    keep = np.arange(13) < [[13], [5]]
    out, lse = fa.attention(*arrays, jnp.asarray(keep), lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array) and lse.shape == (2, 4, 13)
    expected, expected_lse = reference(*qkv, keep)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-5, atol=2e-5)
    # As any array of JAX's, also in a compiled function.
    np.testing.assert_array_equal(jax.jit(lambda x: 2 * x)(out), 2 * np.asarray(out))


def test_bf16(jnp, arrays):
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays)
    out = fa.attention(q, k, v, meta=fa.Meta.from_lengths([13, 5], 13))
    assert out.dtype == jnp.bfloat16 and not np.asarray(out[1, 5:], np.float32).any()


def test_packed_rows(jax, arrays):
    meta = fa.Meta.from_lengths([13, 5], 13)
    packed = fa.pack_qkv(*arrays, meta)
    assert all(isinstance(x, jax.Array) and x.shape == (18, 4, 24) for x in packed)
    np.testing.assert_array_equal(packed[0], fa.pack(arrays[0], meta))
    out = fa.varlen_attention(*packed, meta.cu_seqlens, meta.cu_seqlens)
    padded = fa.scatter_to_padded(out, meta)
    assert isinstance(out, jax.Array) and isinstance(padded, jax.Array)
    np.testing.assert_allclose(padded, fa.attention(*arrays, meta=meta), rtol=2e-5, atol=2e-5)


def test_what_was_given_is_returned(arrays):
    out = np.empty(arrays[0].shape, np.float32)
    assert fa.attention(*arrays, out=out) is out


def test_arrays_are_never_written(jnp, arrays):
    zeros = jnp.zeros_like(arrays[0])
    with pytest.raises(fa.LayoutError, match="`out`: expected memory that may be written"):
        fa.attention(*arrays, out=zeros)
    assert not zeros.any()


def test_tracers_are_refused(jax, arrays):
    with pytest.raises(fa.VarlenFaError, match="`q`: expected an array, outside of jax.jit.*, got a tracer"):
        jax.jit(lambda q: fa.attention(q, *arrays[1:]))(arrays[0])


def test_a_callback_in_a_compiled_function(jax, arrays):
    def attend(*qkv):
        return fa.attention(*map(np.asarray, qkv))

    q, k, v = arrays
    compiled = jax.jit(lambda *qkv: jax.pure_callback(attend, jax.ShapeDtypeStruct(q.shape, q.dtype), *qkv))
    np.testing.assert_allclose(compiled(q, k, v), fa.attention(q, k, v), rtol=1e-6, atol=1e-6)
