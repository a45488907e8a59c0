"""This library's calls on PyTorch's tensors, through the C library, without copies and on PyTorch's
stream.

The other benches import the Python binding from here, where its folder is known."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "capi" / "python"))
import varlen_fa  # noqa: E402

DTYPES = {torch.float16: varlen_fa.F16, torch.bfloat16: varlen_fa.BF16}


def view(tensor):
    """A PyTorch tensor's memory, shape and strides."""
    memory = varlen_fa.CUDA if tensor.is_cuda else varlen_fa.HOST
    return varlen_fa.tensor(tensor.data_ptr(), tensor.shape, tensor.stride(), DTYPES[tensor.dtype], memory)


def open_device(path, stream):
    """The library, and its device over the stream that everything runs on, or over the CPU."""
    library = varlen_fa.Library(None if path is None else str(path))
    return library, library.open("cpu") if stream is None else library.open_cuda(stream=stream.cuda_stream)


def meta_of(library, workload):
    """The metadata of a workload's mask."""
    valid = workload.valid.to(torch.uint8).contiguous()
    return library.meta(library.key_mask_from_integers(valid.data_ptr(), 1, workload.batch, workload.seq))


class OurCalls:
    """The calls of this library that are measured."""

    # Calls that do the whole job; the others are compared with the best of them.
    layer_names = {
        "ours",
        "ours, packed path",
        "ours, sm80",
        "ours, sm80 packed",
        "ours, metadata on device",
        "ours, sm80 metadata on device",
    }

    def __init__(self, path, stream):
        self.library, self.device = open_device(path, stream)

    def of(self, workload, padded, packed):
        return WorkloadCalls(self, workload, padded, packed)


class WorkloadCalls:
    """Calls on sets of padded and packed q, k and v; each takes the index of a set and returns its
    output."""

    def __init__(self, calls, workload, padded, packed):
        self.device, self.workload = calls.device, workload
        library = calls.library
        self.meta = meta_of(library, workload)
        self.cu_seqlens = self.meta.cu_seqlens()
        self.device_mask = workload.valid.to(torch.uint8).contiguous().cuda()
        self.device_meta = self.device.device_meta(workload.batch, workload.seq)
        self.keep = padded, packed
        self.views = [[view(tensor) for tensor in inputs] for inputs in padded]
        self.packed_views = [[view(tensor) for tensor in inputs] for inputs in packed]
        self.outs = [torch.empty_like(q) for q, _, _ in padded]
        self.packed_outs = [[torch.empty_like(tensor) for tensor in inputs] for inputs in packed]
        self.out_views = [view(out) for out in self.outs]
        self.packed_out_views = [[view(out) for out in outs] for outs in self.packed_outs]
        plan = varlen_fa.Plan()
        mask = varlen_fa.varlen(self.meta)
        self.device.forward(*self.views[0], self.out_views[0], mask, plan=plan)
        self.plan = str(plan)
        self.padded = {"ours": self.layer(mask)}
        if plan.path != library.paths["packed"]:
            self.padded["ours, packed path"] = self.layer(mask, library.options(path="packed"))
        if plan.kernel != library.kernels["sm80"]:
            self.padded["ours, sm80"] = self.layer(mask, library.options(kernel="sm80"))
            self.padded["ours, sm80 metadata on device"] = self.rebuilt(library.options(kernel="sm80"))
            self.padded["ours, sm80 packed"] = self.layer(mask, library.options(path="packed", kernel="sm80"))
        self.padded["ours, metadata on device"] = self.rebuilt()
        self.packed = {"ours: varlen_attention": self.varlen()}
        if plan.kernel != library.kernels["sm80"]:
            self.packed["ours: varlen_attention, sm80"] = self.varlen(library.options(kernel="sm80"))

    def poison(self):
        """Fills the outputs of the first set with NaN, so that elements that a call does not write
        are noticed."""
        for out in [self.outs[0], *self.packed_outs[0]]:
            out.fill_(float("nan"))

    def layer(self, mask, options=None):
        def call(at):
            self.device.forward(*self.views[at], self.out_views[at], mask, options=options)
            return self.outs[at]

        return call

    def rebuilt(self, options=None):
        """The layer, after its metadata is rebuilt from the mask on the device."""
        mask = self.device_mask

        def call(at):
            self.device_meta.rebuild(varlen_fa.mask_view(mask.data_ptr(), mask.shape, mask.stride(), 1, varlen_fa.CUDA))
            self.device.forward(*self.views[at], self.out_views[at], varlen_fa.varlen(self.device_meta), options=options)
            return self.outs[at]

        return call

    def varlen(self, options=None):
        def call(at):
            out, cu_seqlens = self.packed_out_views[at][0], self.cu_seqlens
            self.device.varlen_attention(*self.packed_views[at], cu_seqlens, cu_seqlens, out, options=options)
            return self.packed_outs[at][0]

        return call

    def pack(self, at):
        self.device.pack_qkv(*self.views[at], self.meta, *self.packed_out_views[at])

    def scatter(self, at):
        self.device.scatter_to_padded(self.packed_views[at][0], self.meta, self.out_views[at])

    def check_copy(self, name):
        """Checks our copies bit for bit; those of peers are not checked."""
        if not name.startswith("ours"):
            return "not checked"
        padded, packed = self.keep
        if "pack" in name:
            self.pack(0)
            good = all(torch.equal(got, expected) for got, expected in zip(self.packed_outs[0], packed[0]))
        else:
            self.scatter(0)
            masked = ~self.workload.valid.cuda()
            good = torch.equal(self.outs[0], padded[0][0].masked_fill(masked[:, :, None, None], 0))
        return "ok, bit for bit" if good else "WRONG"
