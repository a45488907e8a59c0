"""Sequence parallelism: threads of one process, and processes that are a process group of PyTorch with gloo."""

import multiprocessing
import os
import socket
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
import varlen_fa as fa
from conftest import reference
from varlen_fa import dist

HEADS, KV_HEADS, DIM = 8, 4, 16
# A case is (shards, prefix, suffix, valid tokens of the text in each batch row); holes are in all of them.
CASES = {
    2: ([9, 14], 6, 3, [6, 2]),
    4: ([7, 0, 12, 5], 8, 0, [3, 8]),
}
MODES = {
    2: ["gather", "ulysses", "ring", None],
    4: ["gather", "ulysses", "ring", "ulysses-gather:2", "ulysses-ring:2", None],
}


def problem(world):
    """q, k, v of the whole sequence, f32, and which of its tokens count."""
    lengths, prefix, suffix, text = CASES[world]
    rng = np.random.default_rng(world)
    seq = prefix + sum(lengths) + suffix
    q = rng.standard_normal((2, seq, HEADS, DIM), dtype=np.float32)
    k, v = (rng.standard_normal((2, seq, KV_HEADS, DIM), dtype=np.float32) for _ in range(2))
    place = np.arange(seq)
    keep = (place < np.array(text)[:, None]) | (place >= prefix)
    keep &= (place + np.array([[0], [2]])) % 7 != 5
    return q, k, v, keep


def shards_of(world):
    lengths, prefix, suffix, _ = CASES[world]
    return dist.Shards(lengths, prefix=prefix, suffix=suffix)


def positions(shards, rank):
    """Which tokens of the whole sequence a rank has."""
    start, end = shards.shard(rank)
    place = np.arange(shards.seq)
    return place[(place < shards.prefix) | ((place >= start) & (place < end)) | (place >= shards.seq - shards.suffix)]


def of_rank(communicator, keep, shards, tensors):
    """A rank's metadata, and its tokens of tensors of the whole sequence."""
    at = positions(shards, communicator.rank)
    return dist.ShardedMeta(keep, shards, communicator.rank), [x[:, at] for x in tensors]


def poisoned(x, keep):
    """NaN in the rows of masked tokens."""
    return np.where(keep[:, :, None, None], x, np.float32(np.nan))


def on_ranks(world, run, **options):
    """What `run(communicator)` returned or raised in a thread of each rank."""
    results = [None] * world

    def started(communicator):
        try:
            results[communicator.rank] = run(communicator)
        except Exception as error:  # noqa: BLE001
            results[communicator.rank] = error

    threads = [
        threading.Thread(target=started, args=(communicator,), daemon=True)
        for communicator in dist.Communicator.threads(world, **options)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return results


def judge(world, mode, outputs):
    """Against one device, and against the oracle."""
    q, k, v, keep = problem(world)
    shards = shards_of(world)
    alone = fa.attention(q, k, v, meta=fa.Meta(keep))
    expected, _ = reference(q, k, v, keep)
    expected = np.where(keep[:, :, None, None], expected, 0.0)
    for rank, out in enumerate(outputs):
        if isinstance(out, Exception):
            raise out
        at = positions(shards, rank)
        assert out.shape == (2, len(at), HEADS, DIM)
        np.testing.assert_allclose(out, expected[:, at], rtol=2e-5, atol=2e-5)
        assert (out[~keep[:, at]] == 0).all()
        if mode in ("gather", "ulysses", "ulysses-gather:2"):
            assert (out == alone[:, at]).all(), f"rank {rank}, {mode}: the bits are not those of one device"


@pytest.mark.parametrize("world", [2, 4])
def test_threads_of_numpy(world):
    q, k, v, keep = problem(world)
    shards = shards_of(world)
    for mode in MODES[world]:

        def run(communicator):
            at = positions(shards, communicator.rank)
            meta = dist.ShardedMeta(keep, shards, communicator.rank)
            local = [poisoned(x, keep)[:, at] for x in (q, k, v)]
            options = {"meta": meta, "communicator": communicator, "mode": mode}
            first = dist.attention(*local, **options)
            # The second call has the first one's request.
            out = np.full_like(local[0], np.nan)
            assert dist.attention(*local, out=out, **options) is out
            assert (first == out).all() and type(first) is np.ndarray
            return out

        judge(world, mode, on_ranks(world, run))


def test_scale_ranges_and_chunks():
    q, k, v, keep = problem(2)
    shards = shards_of(2)
    seq = shards.seq
    causal = fa.KeyRanges.causal((2, seq, seq))

    def run(communicator):
        at = positions(shards, communicator.rank)
        meta = dist.ShardedMeta(keep, shards, communicator.rank, ranges=causal)
        local = [x[:, at] for x in (q, k, v)]
        return dist.attention(*local, meta=meta, communicator=communicator, mode="gather", chunks=2, scale=0.5)

    place = np.arange(seq)
    expected, _ = reference(q, k, v, keep, scale=0.5, sees=np.broadcast_to(place <= place[:, None], (2, seq, seq)))
    for rank, out in enumerate(on_ranks(2, run)):
        at = positions(shards, rank)
        np.testing.assert_allclose(out, np.where(keep[:, :, None, None], expected, 0.0)[:, at], rtol=2e-5, atol=2e-5)


def test_segments_bias_modifiers_and_lse():
    q, k, v, keep = problem(2)
    shards = shards_of(2)
    seq, (prefix, suffix) = shards.seq, (shards.prefix, shards.suffix)
    bias = np.random.default_rng(5).standard_normal((1, HEADS, seq, seq), dtype=np.float32)
    slopes = fa.ScoreModifiers(alibi=[0.05 * head for head in range(HEADS)])

    def run(communicator):
        at = positions(shards, communicator.rank)
        meta = dist.ShardedMeta(keep, shards, communicator.rank)
        options = {"meta": meta, "communicator": communicator}
        cut = [prefix, len(at) - suffix]
        local = [[np.ascontiguousarray(part) for part in np.split(x[:, at], cut, axis=1)] for x in (q, k, v)]
        out = [np.empty_like(part) for part in local[0]]
        given, lse = dist.attention(*local, bias=bias, lse=True, mode="gather", out=out, **options)
        assert given is out
        by_heads = dist.attention(*local, modifiers=slopes, mode="ulysses", **options)
        return np.concatenate(out, axis=1), lse, by_heads

    expected, expected_lse = reference(q, k, v, keep, bias=bias)
    place = np.arange(seq)
    distance = np.abs(place[:, None] - place)
    with_slopes, _ = reference(q, k, v, keep, bias=-0.05 * np.arange(HEADS)[:, None, None] * distance)
    valid = keep[:, :, None, None]
    for rank, results in enumerate(on_ranks(2, run)):
        if isinstance(results, Exception):
            raise results
        out, lse, by_heads = results
        at = positions(shards, rank)
        np.testing.assert_allclose(out, np.where(valid, expected, 0.0)[:, at], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(by_heads, np.where(valid, with_slopes, 0.0)[:, at], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(lse, np.where(keep[:, None], expected_lse, -np.inf)[:, :, at], rtol=2e-5, atol=2e-5)


def test_what_a_mode_cannot_says_why():
    q, k, v, keep = problem(2)
    shards = shards_of(2)

    def run(communicator):
        meta, local = of_rank(communicator, keep, shards, (q, k, v))
        return dist.attention(*local, meta=meta, communicator=communicator, mode="ring", lse=True)

    for error in on_ranks(2, run):
        assert isinstance(error, fa.NotApplicableError) and "as in gather" in str(error), error


def test_plans_say_why():
    q, k, v, keep = problem(4)
    meta = dist.ShardedMeta(keep, shards_of(4), 1)
    at = positions(shards_of(4), 1)
    local = [x[:, at] for x in (q, k, v)]
    plan = dist.plan(*local, meta=meta)
    assert plan.mode in {mode for mode, _, _ in plan.candidates} and plan.mode in str(plan) and plan.reason in str(plan)
    assert {mode for mode, _, _ in plan.candidates} == {
        "gather",
        "ulysses",
        "ring",
        "ulysses-gather:2",
        "ulysses-ring:2",
    }
    # What a call carries: named, and a mode is taken that computes it.
    told = dist.plan(*local, meta=meta, bias=True, lse=True)
    assert told.mode == "gather" and {mode: why for mode, _, why in told.candidates}["ring"].startswith("a log-sum-exp")
    alibi = fa.ScoreModifiers(alibi=fa.alibi_slopes(q.shape[2]))
    assert dist.plan(*local, meta=meta, modifiers=alibi).mode == "ulysses"
    forced = dist.plan(*local, meta=meta, mode="ring")
    assert (forced.mode, forced.reason, forced.chunks) == ("ring", "the caller forced this mode", 1)
    odd = dist.plan(local[0][:, :, :6], local[1][:, :, :3], local[2][:, :, :3], meta=meta)
    refused = {mode: why for mode, _, why in odd.candidates if why}
    assert refused["ulysses"] == "4 ranks do not divide 6 heads"
    with pytest.raises(fa.NotApplicableError, match="4 ranks do not divide 6 heads"):
        dist.plan(local[0][:, :, :6], local[1][:, :, :3], local[2][:, :, :3], meta=meta, mode="ulysses")


def test_metadata_of_a_rank():
    _, _, _, keep = problem(4)
    shards = shards_of(4)
    assert shards == dist.Shards([7, 0, 12, 5], prefix=8) and shards != dist.Shards.equal(24, 4, prefix=8)
    assert (shards.ranks, shards.seq, shards.prefix, shards.suffix) == (4, 32, 8, 0)
    assert [shards.local_len(rank) for rank in range(4)] == [15, 8, 20, 13]
    meta = dist.ShardedMeta(keep, shards, 2)
    at = positions(shards, 2)
    assert (meta.rank, meta.batch, meta.shards) == (2, 2, shards)
    assert (meta.query.seq, meta.query.total_valid) == (20, keep[:, at].sum())
    assert (meta.keys.seq, meta.keys.total_valid) == (32, keep.sum())


def test_masks_that_differ_are_an_error_on_every_rank():
    q, k, v, keep = problem(2)
    shards = shards_of(2)

    def run(communicator):
        own = keep.copy()
        own[0, -1] ^= communicator.rank == 1
        meta, local = of_rank(communicator, own, shards, (q, k, v))
        return dist.attention(*local, meta=meta, communicator=communicator)

    for error in on_ranks(2, run):
        assert isinstance(error, fa.RankError) and "masks or key ranges" in str(error), error


def test_a_call_that_is_refused_is_an_error_on_every_rank():
    q, k, v, keep = problem(2)
    shards = shards_of(2)

    def run(communicator):
        meta, local = of_rank(communicator, keep, shards, (q, k, v))
        dist.attention(*local, meta=meta, communicator=communicator)
        if communicator.rank == 0:
            local[0] = local[0].astype(np.float64)
        return dist.attention(*local, meta=meta, communicator=communicator)

    refused, lost = on_ranks(2, run)
    assert isinstance(refused, fa.DTypeError), refused
    assert isinstance(lost, fa.RankError) and "rank 0" in str(lost) and "`q`" in str(lost), lost


def test_refusals():
    q, k, v, keep = problem(2)
    shards = shards_of(2)
    [alone] = dist.Communicator.threads(1)
    assert (alone.rank, alone.world_size, alone.kind) == (0, 1, "host")
    with pytest.raises(fa.ShapeError, match="mask"):
        dist.ShardedMeta(keep[:, 1:], shards, 0)
    with pytest.raises(fa.InvalidValueError, match="rank"):
        dist.ShardedMeta(keep, shards, 2)
    with pytest.raises(fa.InvalidValueError, match="gather, ulysses, ring"):
        dist.plan(q, k, v, meta=dist.ShardedMeta(keep, shards, 0), mode="Ring")
    for timeout in (0, -1, float("nan"), 1e30):
        with pytest.raises(fa.InvalidValueError, match="timeout"):
            dist.Communicator.threads(1, timeout=timeout)
    with pytest.raises(fa.InvalidValueError, match="meeting"):
        dist.Communicator.connect("nowhere", 0, 2)
    with pytest.raises(fa.InvalidValueError, match="host"):
        dist.MeetingPoint("nowhere")
    with pytest.raises(fa.InvalidValueError, match="MeetingPoint"):
        dist.Communicator.connect(dist.MeetingPoint("127.0.0.1"), 1, 2)
    with pytest.raises(fa.InvalidValueError, match="nccl_comm"):
        dist.Communicator.connect("127.0.0.1:0", 0, 1, nccl_comm=4096)
    with pytest.raises(fa.RankError, match="rank 1"):
        dist.Communicator.connect(dist.MeetingPoint("127.0.0.1"), 0, 2, timeout=0.2)
    # Metadata of another world, and a communicator that was closed.
    with pytest.raises(fa.InvalidValueError, match="rank 0 of 2"):
        dist.attention(q, k, v, meta=dist.ShardedMeta(keep, shards, 0), communicator=alone)
    alone.close()
    with pytest.raises(fa.RankError, match="closed"):
        alone.barrier()


# Process groups of PyTorch.


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes(world, run, init_method, limit=240, backend="gloo"):
    """What `run(communicator, torch)` gave, or the error's class and text, in a process of each rank; None of one
    that ended without a word."""
    pytest.importorskip("torch.distributed", reason="PyTorch is not installed")
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe(duplex=False) for _ in range(world)]
    children = [
        context.Process(target=_in_process, args=(rank, world, run, init_method, backend, ends[rank][1]), daemon=True)
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for _, sends in ends:
        sends.close()
    results, until = [], time.monotonic() + limit
    for receives, _ in ends:
        try:
            assert receives.poll(max(0.0, until - time.monotonic())), "a rank hangs"
            results.append(receives.recv())
        except EOFError:
            results.append(None)
    for child in children:
        child.join(30)
        if child.is_alive():
            child.kill()
    return results


def _in_process(rank, world, run, init_method, backend, sends):
    import torch

    # PyTorch's own ranks must not wait either for one that ended.
    limit = timedelta(seconds=60)
    torch.distributed.init_process_group(backend, init_method=init_method, rank=rank, world_size=world, timeout=limit)
    try:
        sends.send(run(torch))
    except fa.VarlenFaError as error:
        sends.send((type(error).__name__, str(error)))
    finally:
        sends.close()


def _all_modes(torch):
    world = torch.distributed.get_world_size()
    q, k, v, keep = problem(world)
    shards = shards_of(world)
    communicator = dist.of_group()
    assert (communicator.rank, communicator.world_size) == (torch.distributed.get_rank(), world)
    # A second one of the same ranks has a meeting of its own.
    communicator.close()
    communicator = dist.of_group()
    at = positions(shards, communicator.rank)
    meta = dist.ShardedMeta(torch.from_numpy(keep), shards, communicator.rank)
    local = [torch.from_numpy(poisoned(x, keep)[:, at]) for x in (q, k, v)]
    outputs = {}
    for mode in MODES[world]:
        out = dist.attention(*local, meta=meta, communicator=communicator, mode=mode)
        assert isinstance(out, torch.Tensor)
        outputs[mode] = out.numpy()
    # No rank ends while another one still waits for it.
    communicator.barrier()
    return outputs


@pytest.mark.parametrize("world, store", [(2, "file"), (4, "tcp")])
def test_a_process_group(world, store, tmp_path):
    init_method = f"file://{tmp_path}/store" if store == "file" else f"tcp://127.0.0.1:{free_port()}"
    results = processes(world, _all_modes, init_method)
    assert all(isinstance(result, dict) for result in results), results
    for mode in MODES[world]:
        judge(world, mode, [result[mode] for result in results])


def _one_dies(torch):
    q, k, v, keep = problem(2)
    communicator = dist.of_group(timeout=40)
    shards = dist.Shards.equal(keep.shape[1], 3)
    at = positions(shards, communicator.rank)
    meta = dist.ShardedMeta(keep, shards, communicator.rank)
    local = [torch.from_numpy(x[:, at]) for x in (q, k, v)]
    dist.attention(*local, meta=meta, communicator=communicator, mode="gather")
    if communicator.rank == 1:
        os._exit(3)
    started = time.monotonic()
    try:
        dist.attention(*local, meta=meta, communicator=communicator, mode="gather")
    except fa.RankError as error:
        # It stays one.
        with pytest.raises(fa.RankError):
            communicator.barrier()
        return str(error), time.monotonic() - started
    return "no error", 0.0


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path):
    results = processes(3, _one_dies, f"file://{tmp_path}/store")
    assert results[1] is None, results
    for rank in (0, 2):
        why, took = results[rank]
        assert "rank 1" in why and took < 40, results


def _one_does_not_come(torch):
    if torch.distributed.get_rank() == 0:
        return None
    dist.of_group(timeout=0.5)


def test_a_rank_that_does_not_come_is_timed_out(tmp_path):
    results = processes(2, _one_does_not_come, f"file://{tmp_path}/store")
    assert results[1] is not None and results[1][0] == "RankError" and "store" in results[1][1], results


def _modes_of_gpus(torch):
    q, k, v, keep = problem(2)
    shards = shards_of(2)
    device = torch.device("cuda", torch.distributed.get_rank())
    torch.cuda.set_device(device)
    # PyTorch makes its communicator for the first collective.
    torch.distributed.all_reduce(torch.zeros(1, device=device))
    communicator = dist.of_group(device=device)
    at = positions(shards, communicator.rank)
    meta = dist.ShardedMeta(keep, shards, communicator.rank)
    local = [torch.from_numpy(poisoned(x, keep)[:, at]).to(device, torch.float16) for x in (q, k, v)]
    outputs = {}
    for mode in MODES[2]:
        out = dist.attention(*local, meta=meta, communicator=communicator, mode=mode)
        assert out.device == device
        outputs[mode] = out.float().cpu().numpy()
    communicator.barrier()
    return outputs


def test_a_process_group_of_gpus(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"it takes two GPUs, and there are {torch.cuda.device_count()}")
    results = processes(2, _modes_of_gpus, f"file://{tmp_path}/store", backend="nccl")
    assert all(isinstance(result, dict) for result in results), results
    q, k, v, keep = problem(2)
    expected = np.where(keep[:, :, None, None], reference(q, k, v, keep)[0], 0.0)
    for rank, outputs in enumerate(results):
        at = positions(shards_of(2), rank)
        for mode, out in outputs.items():
            np.testing.assert_allclose(out, expected[:, at], rtol=4e-3, atol=4e-3, err_msg=f"rank {rank}, {mode}")
            assert (out[~keep[:, at]] == 0).all()


def _over_nccl(torch):
    return dist.of_group(device="cuda")


def test_a_group_without_nccl_is_refused(tmp_path):
    [result] = processes(1, _over_nccl, f"file://{tmp_path}/store")
    assert result[0] == "NotApplicableError" and "PyTorch 2.8" in result[1], result
