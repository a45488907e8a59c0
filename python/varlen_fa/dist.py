"""Attention over a sequence that is divided among ranks: threads, processes, or the ranks of a process group
of `torch.distributed`, each with a CPU or a GPU.

    comm = varlen_fa.dist.of_group()                                # once a program; every rank
    shards = varlen_fa.dist.Shards.equal(4096, comm.world_size, prefix=256)
    meta = varlen_fa.dist.ShardedMeta(mask, shards, comm.rank)      # once a request; every rank
    out = varlen_fa.dist.attention(q, k, v, meta=meta, communicator=comm)

The page docs/sequence-parallel.md says how the modes work and what they cost.
"""

import ipaddress
import socket
from datetime import timedelta

from ._errors import DeviceError, NotApplicableError, RankError
from ._native import (
    Communicator,
    MeetingPoint,
    ParallelPlan,
    ShardedMeta,
    Shards,
)
from ._native import parallel_attention as attention
from ._native import parallel_plan as plan

__all__ = [
    "Communicator",
    "MeetingPoint",
    "ParallelPlan",
    "RankError",
    "ShardedMeta",
    "Shards",
    "attention",
    "of_group",
    "plan",
]


def of_group(group=None, *, device=None, host=None, timeout=60.0):
    """A communicator of the ranks of a process group of `torch.distributed`; the default group if None. Every
    rank of the group calls it, and they meet by the group's store, whatever its backend.

    `device`: None moves rows through host memory, by TCP. A CUDA `torch.device`, each rank's own, moves them by
    NCCL: over the communicator that the group has for this GPU, which needs a group with the backend nccl and
    PyTorch 2.8 or later. It must outlive what is returned, and nobody else may use it during a call.
    `host`: the IP address at which the other ranks reach rank 0; by default that by which this machine reaches
    the store. `timeout`: how many seconds this call and later ones wait for other ranks.

    Raises RankError if a rank does not come, NotApplicableError where PyTorch does not give out its
    communicator."""
    import torch.distributed

    if group is None:
        group = torch.distributed.group.WORLD
    if group is None:
        raise DeviceError("`group`: expected a process group, got None before torch.distributed.init_process_group")
    rank, world_size = group.rank(), group.size()
    over_nccl = {} if device is None else _over_nccl(torch, group, torch.device(device))
    if world_size == 1:
        return Communicator.connect("127.0.0.1:0", 0, 1, timeout=timeout, **over_nccl)
    store = group.get_group_store()
    meeting = _meeting(store, rank, host, timeout)
    return Communicator.connect(meeting, rank, world_size, timeout=timeout, **over_nccl)


def _meeting(store, rank, host, timeout):
    """Where the ranks meet: rank 0 listens, and leaves the address in the store."""
    # Ranks make their communicators in the same order, so each one's n-th is of the same ranks.
    count = store.add(f"varlen_fa/count/{rank}", 1)
    key = f"varlen_fa/meeting/{count}"
    if rank == 0:
        point = MeetingPoint(host or _own_address(store))
        store.set(key, point.address)
        return point
    try:
        store.wait([key], timedelta(seconds=timeout))
        return store.get(key).decode()
    # Stores raise PyTorch's DistError, which is one, or a plain one.
    except RuntimeError as error:
        raise RankError(f"connecting the ranks: rank 0 left no address in the group's store: {error}") from error


def _own_address(store):
    """The address by which this machine reaches the host of the store; the loopback's if the store is a file or
    in this process."""
    while (under := getattr(store, "underlying_store", None)) is not None:
        store = under
    host = getattr(store, "host", None)
    if host is None:
        return "127.0.0.1"
    family, _, _, _, address = socket.getaddrinfo(host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Sends nothing: the system chooses the way.
        probe.connect(address)
        own = probe.getsockname()[0]
    return str(ipaddress.ip_address(own.split("%")[0]))


def _over_nccl(torch, group, device):
    """The CUDA device of the library, on PyTorch's stream, and the address of the group's communicator."""
    from ._native import Device

    if device.type != "cuda":
        raise NotApplicableError(f"`device`: expected a CUDA device or None, got {device}: NCCL moves GPUs' memory")
    backend = group._get_backend(torch.device("cuda"))
    # PyTorch 2.8 and later: the address of the communicator of the current GPU, 0 before its first use.
    comm_ptr = getattr(backend, "_comm_ptr", None)
    if comm_ptr is None:
        raise NotApplicableError(
            f"`group`: {type(backend).__name__} of PyTorch {torch.__version__} does not give out an NCCL communicator: "
            "expected the backend nccl and PyTorch 2.8 or later, or `device=None`"
        )
    with torch.cuda.device(device):
        if comm_ptr() == 0:
            torch.distributed.all_reduce(torch.zeros(1, device="cuda"), group=group)
            torch.cuda.current_stream().synchronize()
        address = comm_ptr()
        if address == 0:
            raise NotApplicableError(
                f"`group`: expected an NCCL communicator of {device}, got none after its first use"
            )
        return {"device": Device.of(torch.empty(1, dtype=torch.float16, device="cuda")), "nccl_comm": address}
