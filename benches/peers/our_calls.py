"""This library's calls on PyTorch's tensors, through the C library, in place and on the caller's stream."""

import torch

import varlen_fa

DTYPES = {torch.float16: varlen_fa.F16, torch.bfloat16: varlen_fa.BF16}


def view(tensor):
    """A PyTorch tensor's memory, shape and strides."""
    memory = varlen_fa.CUDA if tensor.is_cuda else varlen_fa.HOST
    return varlen_fa.tensor(tensor.data_ptr(), tensor.shape, tensor.stride(), DTYPES[tensor.dtype], memory)


class OurCalls:
    """The library, with a device over the stream that everything runs on."""

    # Calls that do the whole job; the others are measured against the best of them.
    layer_names = {
        "ours",
        "ours, packed path",
        "ours, sm80",
        "ours, sm80 packed",
        "ours, metadata on device",
        "ours, sm80 metadata on device",
    }

    def __init__(self, path, stream):
        self.library = varlen_fa.Library(None if path is None else str(path))
        self.device = self.library.open_cuda(stream=stream.cuda_stream)
        info = self.device.info()
        self.device_name = info.name.decode()

    def of(self, workload, padded, packed):
        return WorkloadCalls(self, workload, padded, packed)


class WorkloadCalls:
    """Calls on sets of padded and packed q, k and v; each takes the index of a set and gives its output."""

    def __init__(self, calls, workload, padded, packed):
        self.device, self.workload = calls.device, workload
        valid = workload.valid.to(torch.uint8).contiguous()
        library = calls.library
        self.meta = library.meta(library.key_mask_from_integers(valid.data_ptr(), 1, workload.batch, workload.seq))
        self.cu_seqlens = self.meta.cu_seqlens()
        self.device_mask = valid.cuda()
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
        if plan.path != varlen_fa.PATHS["packed"]:
            self.padded["ours, packed path"] = self.layer(mask, varlen_fa.options(path="packed"))
        if plan.kernel != varlen_fa.KERNELS["sm80"]:
            self.padded["ours, sm80"] = self.layer(mask, varlen_fa.options(kernel="sm80"))
            self.padded["ours, sm80 metadata on device"] = self.rebuilt(varlen_fa.options(kernel="sm80"))
            self.padded["ours, sm80 packed"] = self.layer(mask, varlen_fa.options(path="packed", kernel="sm80"))
        self.padded["ours, metadata on device"] = self.rebuilt()
        self.packed = {"ours: varlen_attention": self.varlen()}
        if plan.kernel != varlen_fa.KERNELS["sm80"]:
            self.packed["ours: varlen_attention, sm80"] = self.varlen(varlen_fa.options(kernel="sm80"))

    def poison(self):
        """Fills the outputs of the first set, so that what a call does not write shows."""
        for out in [self.outs[0], *self.packed_outs[0]]:
            out.fill_(float("nan"))

    def layer(self, mask, options=None):
        def call(at):
            self.device.forward(*self.views[at], self.out_views[at], mask, options=options)
            return self.outs[at]

        return call

    def rebuilt(self, options=None):
        """Metadata from the mask on the device, and the layer."""
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
        """Bit for bit; the peers' copies are their own business."""
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
