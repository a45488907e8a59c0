"""The C library of varlen-fa for Python, through ctypes: raw addresses in, errors as exceptions.
Needs nothing but Python.

A tensor is an address with a shape, strides in elements and an element type. NumPy's
`array.ctypes.data`, PyTorch's `tensor.data_ptr()` and the address of any buffer will do:

    import torch, varlen_fa

    library = varlen_fa.Library()
    device = library.open_cuda(stream=torch.cuda.current_stream().cuda_stream)
    meta = library.meta_from_lengths([37, 512], seq=512)

    def view(x):
        dtype = {torch.float16: varlen_fa.F16, torch.bfloat16: varlen_fa.BF16}[x.dtype]
        memory = varlen_fa.CUDA if x.is_cuda else varlen_fa.HOST
        return varlen_fa.tensor(x.data_ptr(), x.shape, x.stride(), dtype, memory)

    device.forward(view(q), view(k), view(v), view(out), varlen_fa.varlen(meta))

A descriptor holds only an address: keep the memory alive while it is used. Everything else is
documented in capi/include/varlen_fa.h.
"""

import array
import ctypes
import os
import sys
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

# Numbers that descriptors and masks hold. They are fixed in the header; the names of statuses,
# device kinds, paths, kernels and reasons come from the loaded library.

# varlen_fa_dtype, and the size of one element in bytes.
F32, F16, BF16 = 1, 2, 3
ELEMENT_BYTES = {F32: 4, F16: 2, BF16: 2}
# The types of numbers by their letters in Python's buffers.
_FLOATS = {"f": F32, "e": F16}
# varlen_fa_memory.
HOST, CUDA = 0, 1
# varlen_fa_mask_kind.
NONE, KEY, BIAS, VARLEN, VARLEN_CROSS, DEVICE_VARLEN, DEVICE_VARLEN_CROSS = range(7)
# varlen_fa_rotary_pairing.
INTERLEAVED, HALVES = 1, 2


class Error(Exception):
    """A call was refused or failed; `status` is the constant's name, e.g. "BAD_HANDLE"."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Tensor(Structure):
    """varlen_fa_tensor"""

    _fields_ = [
        ("data", c_void_p),
        ("bytes", c_uint64),
        ("dtype", c_uint32),
        ("memory", c_uint32),
        ("rank", c_uint32),
        ("reserved_word", c_uint32),
        ("shape", c_uint64 * 4),
        ("strides", c_int64 * 4),
        ("reserved", c_uint64 * 2),
    ]


class MaskView(Structure):
    """varlen_fa_mask_view"""

    _fields_ = [
        ("data", c_void_p),
        ("bytes", c_uint64),
        ("dtype", c_uint32),
        ("memory", c_uint32),
        ("shape", c_uint64 * 2),
        ("strides", c_int64 * 2),
        ("reserved", c_uint64 * 2),
    ]


class Segments(Structure):
    """varlen_fa_segments"""

    _fields_ = [("tensors", POINTER(Tensor)), ("count", c_uint64), ("reserved", c_uint64 * 2)]


class Run(Structure):
    """varlen_fa_run"""

    _fields_ = [("row", c_uint64), ("start", c_uint64), ("end", c_uint64)]


class KeyRange(Structure):
    """varlen_fa_key_range"""

    _fields_ = [("first", c_uint64), ("end", c_uint64)]


class RangesOf(Structure):
    """varlen_fa_ranges_of"""

    _fields_ = [
        ("batch", c_uint64),
        ("seq_q", c_uint64),
        ("seq_k", c_uint64),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("reserved", c_uint64 * 4),
    ]


class AttentionMask(Structure):
    """varlen_fa_attention_mask"""

    _fields_ = [
        ("kind", c_uint32),
        ("reserved_word", c_uint32),
        ("key_mask", c_void_p),
        ("bias", POINTER(Tensor)),
        ("query_meta", c_void_p),
        ("key_meta", c_void_p),
        ("query_device_meta", c_void_p),
        ("key_device_meta", c_void_p),
        ("ranges", c_void_p),
        ("modifiers", c_void_p),
        ("reserved", c_uint64 * 2),
    ]


class QkSegment(Structure):
    """varlen_fa_qk_segment"""

    _fields_ = [
        ("q", POINTER(Tensor)),
        ("k", POINTER(Tensor)),
        ("q_out", POINTER(Tensor)),
        ("k_out", POINTER(Tensor)),
        ("q_weight", POINTER(Tensor)),
        ("k_weight", POINTER(Tensor)),
        ("cos", POINTER(Tensor)),
        ("sin", POINTER(Tensor)),
        ("eps", c_float),
        ("pairing", c_uint32),
        ("reserved", c_uint64 * 4),
    ]


class Options(Structure):
    """varlen_fa_attention_options"""

    _fields_ = [
        ("has_softmax_scale", c_uint32),
        ("softmax_scale", c_float),
        ("path", c_uint32),
        ("kernel", c_uint32),
        ("ranges", c_void_p),
        ("modifiers", c_void_p),
        ("reserved", c_uint64 * 2),
    ]


class Plan(Structure):
    """varlen_fa_plan"""

    _fields_ = [
        ("path", c_uint32),
        ("kernel", c_uint32),
        ("reason", c_uint32),
        ("reserved_word", c_uint32),
        ("text", c_char * 240),
        ("reserved", c_uint64 * 2),
    ]

    def __str__(self):
        return self.text.decode()


class DeviceInfo(Structure):
    """varlen_fa_device_info"""

    _fields_ = [
        ("kind", c_uint32),
        ("is_software", c_uint32),
        ("dtypes", c_uint32),
        ("kernels", c_uint32),
        ("max_buffer_bytes", c_uint64),
        ("name", c_char * 192),
        ("adapter", c_char * 192),
        ("reserved", c_uint64 * 4),
    ]


class Shards(Structure):
    """varlen_fa_shards"""

    _fields_ = [
        ("prefix", c_uint64),
        ("suffix", c_uint64),
        ("lengths", POINTER(c_uint64)),
        ("ranks", c_uint64),
        ("reserved", c_uint64 * 4),
    ]


class ParallelOptions(Structure):
    """varlen_fa_parallel_options"""

    _fields_ = [
        ("num_heads", c_uint64),
        ("num_kv_heads", c_uint64),
        ("head_dim", c_uint64),
        ("ulysses", c_uint64),
        ("dtype", c_uint32),
        ("mode", c_uint32),
        ("has_softmax_scale", c_uint32),
        ("softmax_scale", c_float),
        ("modifiers", c_void_p),
        ("has_bias", c_uint32),
        ("has_lse", c_uint32),
        ("reserved", c_uint64 * 2),
    ]


class ParallelScores(Structure):
    """varlen_fa_parallel_scores"""

    _fields_ = [("bias", POINTER(Tensor)), ("modifiers", c_void_p), ("reserved", c_uint64 * 4)]


class ParallelPlan(Structure):
    """varlen_fa_parallel_plan"""

    _fields_ = [
        ("mode", c_uint32),
        ("reserved_word", c_uint32),
        ("ulysses", c_uint64),
        ("text", c_char * 496),
        ("reserved", c_uint64 * 2),
    ]

    def __str__(self):
        return self.text.decode()


# varlen_fa_parallel_mode
PARALLEL_MODES = {"auto": 0, "gather": 1, "ulysses": 2, "ring": 3, "ulysses-gather": 4, "ulysses-ring": 5}


class MetaInfo(Structure):
    """varlen_fa_meta_info"""

    _fields_ = [
        ("batch", c_uint64),
        ("seq", c_uint64),
        ("total_valid", c_uint64),
        ("max_seqlen", c_uint64),
        ("reserved", c_uint64 * 4),
    ]


def row_major(shape):
    """Strides of a row-major tensor, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return strides


def _reach(shape, strides):
    """One past the position of the last element."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))


def tensor(address, shape, strides, dtype, memory=HOST, size=None):
    """A tensor at an address. `strides` are in elements; None means row-major. `size` is that of
    the memory in bytes; None means up to the last element."""
    shape = list(shape)
    strides = row_major(shape) if strides is None else list(strides)
    made = Tensor(data=address, dtype=dtype, memory=memory, rank=len(shape))
    made.bytes = max(_reach(shape, strides), 0) * ELEMENT_BYTES.get(dtype, 0) if size is None else size
    made.shape[: len(shape)] = shape
    made.strides[: len(strides)] = strides
    return made


def mask_view(address, shape, strides, element_bytes, memory=HOST, size=None):
    """A [B, S] mask of integers of 1, 2, 4 or 8 bytes at an address."""
    strides = row_major(shape) if strides is None else list(strides)
    made = MaskView(data=address, dtype=element_bytes, memory=memory)
    made.bytes = max(_reach(shape, strides), 0) * element_bytes if size is None else size
    made.shape[:] = list(shape)
    made.strides[:] = strides
    return made


def _mask(kind, keeps, ranges, added, modifiers, **fields):
    """A mask with ranges of keys, a tensor that is added to the scores, and score modifiers, or None
    of each."""
    made = AttentionMask(kind=kind, **fields)
    if modifiers is not None:
        made.modifiers = modifiers.handle
    if ranges is not None:
        made.ranges = ranges.handle
    if added is not None:
        made.bias = ctypes.pointer(added)
    # Keeps handles and descriptors alive as long as the mask.
    made.keeps = [*keeps, ranges, added, modifiers]
    return made


def none(ranges=None, bias=None, modifiers=None):
    """Every key counts."""
    return _mask(NONE, [], ranges, bias, modifiers)


def key(key_mask, ranges=None, bias=None, modifiers=None):
    """Every query attends to the kept keys; rows of dropped queries are computed like any other."""
    return _mask(KEY, [key_mask], ranges, bias, modifiers, key_mask=key_mask.handle)


def bias(descriptor, ranges=None, modifiers=None):
    """The tensor is added to the scaled scores."""
    return _mask(BIAS, [], ranges, descriptor, modifiers)


def varlen(meta, key_meta=None, ranges=None, bias=None, modifiers=None):
    """Attention among the valid tokens, or of valid queries to valid keys; other rows are zero.
    Both are Meta, or both DeviceMeta. `ranges` says which keys each query sees, and the tensor
    `bias` is added to the scaled scores. `modifiers` say what else happens to the scores."""
    keys = None if key_meta is None else key_meta.handle
    if isinstance(meta, DeviceMeta):
        kind = DEVICE_VARLEN if key_meta is None else DEVICE_VARLEN_CROSS
        return _mask(
            kind, [meta, key_meta], ranges, bias, modifiers, query_device_meta=meta.handle, key_device_meta=keys
        )
    kind = VARLEN if key_meta is None else VARLEN_CROSS
    return _mask(kind, [meta, key_meta], ranges, bias, modifiers, query_meta=meta.handle, key_meta=keys)


def qk_segment(q, k, q_out=None, k_out=None, norm=None, rotary=None):
    """q and k of a text or an image, to be replaced or with outputs. `norm` is a weight for q, one
    for k and epsilon; `rotary` cosines, sines and INTERLEAVED or HALVES."""
    made = QkSegment(q=ctypes.pointer(q), k=ctypes.pointer(k))
    if q_out is not None:
        made.q_out = ctypes.pointer(q_out)
    if k_out is not None:
        made.k_out = ctypes.pointer(k_out)
    if norm is not None:
        q_weight, k_weight, made.eps = norm
        made.q_weight, made.k_weight = ctypes.pointer(q_weight), ctypes.pointer(k_weight)
    if rotary is not None:
        cos, sin, made.pairing = rotary
        made.cos, made.sin = ctypes.pointer(cos), ctypes.pointer(sin)
    return made


def _segments(tensors):
    """A list of tensors, or one of them, as segments."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    return Segments(tensors=(Tensor * len(tensors))(*tensors), count=len(tensors))


def _ranges_of(of):
    """Sizes (B, Sq, Sk) of padded tensors, or the CuSeqlens of packed queries and keys."""
    if len(of) == 2:
        return RangesOf(cu_seqlens_q=of[0].handle, cu_seqlens_k=of[1].handle)
    batch, seq_q, seq_k = of
    return RangesOf(batch=batch, seq_q=seq_q, seq_k=seq_k)


def default_path():
    """The library that VARLEN_FA_LIBRARY names, or the one of the archive that this file lies in, or
    the one in target/release of the repository."""
    name = {"darwin": "libvarlen_fa.dylib", "win32": "varlen_fa.dll"}.get(sys.platform, "libvarlen_fa.so")
    beside = Path(__file__).resolve().parents[1] / ("bin" if sys.platform == "win32" else "lib") / name
    if "VARLEN_FA_LIBRARY" not in os.environ and beside.exists():
        return str(beside)
    target = os.environ.get("CARGO_TARGET_DIR", Path(__file__).resolve().parents[2] / "target")
    return os.environ.get("VARLEN_FA_LIBRARY", str(Path(target) / "release" / name))


# The enums with names, and the arguments of all functions that return a status, as in the header.
_ENUMS = ["status", "device_kind", "dtype", "path", "kernel", "reason"]
_HANDLE = c_void_p
_NEW = POINTER(c_void_p)
_TENSOR = POINTER(Tensor)
_SEGMENTS = POINTER(Segments)
_FUNCTIONS = {
    "device_open": [c_uint32, c_uint32, _NEW],
    "device_open_cpu": [c_uint32, _NEW],
    "device_open_cuda": [c_void_p, c_void_p, _NEW],
    "device_describe": [_HANDLE, POINTER(DeviceInfo)],
    "device_synchronize": [_HANDLE],
    "device_free": [_HANDLE],
    "key_mask_from_integers": [c_void_p, c_uint32, c_uint64, c_uint64, _NEW],
    "key_mask_from_integers_strict": [c_void_p, c_uint32, c_uint64, c_uint64, _NEW],
    "key_mask_from_additive": [c_void_p, c_uint32, c_uint64, c_uint64, _NEW],
    "key_mask_broadcast": [_HANDLE, c_uint64, _NEW],
    "key_mask_from_lengths": [POINTER(c_uint64), c_uint64, c_uint64, _NEW],
    "key_mask_from_runs": [POINTER(Run), c_uint64, c_uint64, c_uint64, _NEW],
    "key_mask_free": [_HANDLE],
    "meta_create": [_HANDLE, _NEW],
    "meta_from_document_ids": [POINTER(c_uint32), c_uint64, c_uint64, _NEW],
    "meta_describe": [_HANDLE, POINTER(MetaInfo)],
    "meta_upload": [_HANDLE, _HANDLE],
    "meta_copy_indices": [_HANDLE, POINTER(c_uint32), c_uint64],
    "meta_copy_inv_indices": [_HANDLE, POINTER(c_int32), c_uint64],
    "meta_copy_cu_seqlens": [_HANDLE, POINTER(c_int32), c_uint64],
    "meta_free": [_HANDLE],
    "device_meta_create": [_HANDLE, c_uint64, c_uint64, _NEW],
    "device_meta_rebuild": [_HANDLE, POINTER(MaskView)],
    "device_meta_free": [_HANDLE],
    "cu_seqlens_create": [POINTER(c_int32), c_uint64, _NEW],
    "cu_seqlens_from_meta": [_HANDLE, _NEW],
    "cu_seqlens_free": [_HANDLE],
    "key_ranges_window": [POINTER(RangesOf), c_int64, c_int64, _NEW],
    "key_ranges_prefix": [POINTER(RangesOf), c_uint64, _NEW],
    "key_ranges_from_values": [POINTER(RangesOf), POINTER(KeyRange), c_uint64, _NEW],
    "key_ranges_intersect": [_HANDLE, _HANDLE, _NEW],
    "key_ranges_free": [_HANDLE],
    "score_modifiers_create": [c_float, POINTER(c_float), POINTER(c_float), c_uint64, _NEW],
    "score_modifiers_free": [_HANDLE],
    "forward": [_HANDLE, POINTER(Options), _TENSOR, _TENSOR, _TENSOR, POINTER(AttentionMask), _TENSOR, POINTER(Plan)],
    "forward_with_lse": [
        _HANDLE, POINTER(Options), _TENSOR, _TENSOR, _TENSOR, POINTER(AttentionMask), _TENSOR, _TENSOR, POINTER(Plan),
    ],
    "forward_segments": [
        _HANDLE, POINTER(Options), _SEGMENTS, _SEGMENTS, _SEGMENTS, POINTER(AttentionMask), _SEGMENTS, _TENSOR,
        POINTER(Plan),
    ],
    "communicator_threads": [c_uint64, c_uint64, _NEW],
    "communicator_peers": [POINTER(c_void_p), c_uint64, c_uint64, _NEW],
    "communicator_nccl": [_HANDLE, c_char_p, c_uint64, c_uint64, c_uint64, c_void_p, _NEW],
    "communicator_connect": [c_char_p, c_uint64, c_uint64, c_uint64, _NEW],
    "communicator_free": [_HANDLE],
    "sharded_meta_create": [_HANDLE, POINTER(Shards), c_uint64, _HANDLE, _NEW],
    "sharded_meta_free": [_HANDLE],
    "parallel_prepare": [_HANDLE, _HANDLE, _HANDLE, POINTER(ParallelOptions), _NEW, POINTER(ParallelPlan)],
    "parallel_request_free": [_HANDLE],
    "parallel_forward": [_HANDLE, _HANDLE, _TENSOR, _TENSOR, _TENSOR, _TENSOR],
    "parallel_forward_segments": [_HANDLE, _HANDLE, *[_SEGMENTS] * 3, POINTER(ParallelScores), _SEGMENTS, _TENSOR],
    "merge_attention": [_HANDLE, _TENSOR, _TENSOR, _TENSOR, _TENSOR, _TENSOR, _TENSOR],
    "prepare_qk": [_HANDLE, POINTER(QkSegment), c_uint64, _HANDLE, _HANDLE],
    "warm_up": [
        _HANDLE, POINTER(Options), c_uint32, POINTER(c_uint64), POINTER(c_uint64), POINTER(AttentionMask), POINTER(Plan),
    ],
    "pipeline_cache_load": [_HANDLE, c_char_p, c_uint64],
    "pipeline_cache_copy": [_HANDLE, c_void_p, c_uint64, POINTER(c_uint64)],
    "pack_qkv": [_HANDLE, _TENSOR, _TENSOR, _TENSOR, _HANDLE, _TENSOR, _TENSOR, _TENSOR],
    "varlen_attention": [
        _HANDLE, POINTER(Options), _TENSOR, _TENSOR, _TENSOR, _HANDLE, _HANDLE, _TENSOR, _TENSOR, POINTER(Plan),
    ],
    "scatter_to_padded": [_HANDLE, _TENSOR, _HANDLE, _TENSOR],
}  # fmt: skip


def _number(names, what, value):
    """The number of a name; numbers stay as they are, and the library checks them."""
    if not isinstance(value, str):
        return value
    if value not in names:
        raise ValueError(f"expected a {what} ({', '.join(names)}), got {value!r}")
    return names[value]


class Library:
    """The loaded library. `statuses`, `device_kinds`, `dtypes`, `paths`, `kernels` and `reasons`
    give the number of each name of an enum."""

    def __init__(self, path=None):
        self.c = ctypes.CDLL(path or default_path())
        self.c.varlen_fa_last_error.restype = c_char_p
        self.c.varlen_fa_last_error.argtypes = []
        self.c.varlen_fa_version.restype = c_uint32
        self.c.varlen_fa_version_string.restype = c_char_p
        self.statuses, self.device_kinds, self.dtypes, self.paths, self.kernels, self.reasons = map(self._names, _ENUMS)
        self._status_names = {number: name for name, number in self.statuses.items()}
        for name, arguments in _FUNCTIONS.items():
            function = getattr(self.c, f"varlen_fa_{name}")
            function.argtypes, function.restype = arguments, c_uint32

    @property
    def version(self):
        return self.c.varlen_fa_version_string().decode()

    def _names(self, enum):
        """The number of each name of an enum."""
        function = getattr(self.c, f"varlen_fa_{enum}_name")
        function.argtypes, function.restype = [c_uint32], c_char_p
        # Every number with a name is less than 255.
        names = {number: function(number) for number in range(255)}
        return {name.decode(): number for number, name in names.items() if name is not None}

    def call(self, name, *arguments):
        """Calls a function of the library; raises an Error if it fails."""
        status = getattr(self.c, f"varlen_fa_{name}")(*arguments)
        if status != 0:
            raise Error(self._status_names.get(status, str(status)), self.c.varlen_fa_last_error().decode())

    def make(self, kind, name, *arguments):
        """Calls a function whose last argument receives a handle."""
        handle = c_void_p()
        self.call(name, *arguments, byref(handle))
        return kind(self, handle)

    def open(self, kind="auto", ordinal=0):
        """Opens a device; the kind by name or number."""
        return self.make(Device, "device_open", _number(self.device_kinds, "device kind", kind), ordinal)

    def open_cpu(self, threads=0):
        """Opens the CPU device with so many threads, at most; 0 means VARLEN_FA_THREADS or one for
        each processor. It works in a child made by `fork` too."""
        return self.make(Device, "device_open_cpu", threads)

    def open_cuda(self, stream, context=None):
        """Opens a CUDA device over an external stream and context, both raw handles. None is the
        stream's context."""
        return self.make(Device, "device_open_cuda", context, stream)

    def options(self, softmax_scale=None, path="auto", kernel="auto", ranges=None, modifiers=None):
        """Options of an attention call; path and kernel by name or number. `ranges` and `modifiers`
        are for `varlen_attention`: masks of other calls have their own."""
        made = Options(
            has_softmax_scale=softmax_scale is not None,
            softmax_scale=0.0 if softmax_scale is None else softmax_scale,
            path=_number(self.paths, "path", path),
            kernel=_number(self.kernels, "kernel", kernel),
            ranges=None if ranges is None else ranges.handle,
            modifiers=None if modifiers is None else modifiers.handle,
        )
        # Keeps the handles alive as long as the options.
        made.keeps = [ranges, modifiers]
        return made

    def key_mask_from_integers(self, address, element_bytes, batch, seq):
        return self.make(KeyMask, "key_mask_from_integers", address, element_bytes, batch, seq)

    def key_mask_from_array(self, values, batch=None, strict=False):
        """A key mask from an array of any shape that masks have: [S], [B, S] or [B, 1, 1, S], a
        NumPy array or any other object with a buffer. Booleans and integers keep what is not 0;
        `strict` refuses integers other than 0 and 1. Floating-point numbers are those of an
        additive mask: 0 keeps, and anything from -1000 down drops. One row is broadcast over
        `batch` rows."""
        view = memoryview(values)
        shape = view.shape
        if view.ndim == 0 or any(size != 1 for size in shape[1:-1]):
            raise ValueError(f"expected a mask [S], [B, S] or [B, 1, 1, S], got {list(shape)}")
        rows, seq = (shape[0] if view.ndim > 1 else 1), shape[-1]
        # Without the mark of the byte order, and row-major whatever the strides are.
        kind, data, bytes_of_one = view.format.lstrip("@=<"), view.tobytes(), view.itemsize
        if kind == "d":
            # What is lower than the numbers of f32 becomes -infinity.
            data, kind = array.array("f", array.array("d", data)).tobytes(), "f"
        memory = ctypes.create_string_buffer(data, max(len(data), 1))
        if kind in _FLOATS:
            made = self.make(KeyMask, "key_mask_from_additive", memory, _FLOATS[kind], rows, seq)
        elif kind in "?bBhHiIlLqQ":
            name = "key_mask_from_integers_strict" if strict else "key_mask_from_integers"
            made = self.make(KeyMask, name, memory, bytes_of_one, rows, seq)
        else:
            raise ValueError(f"expected booleans, integers or floating-point numbers, got the format {view.format!r}")
        return made if batch is None else made.broadcast(batch)

    def key_mask_from_lengths(self, lengths, seq):
        return self.make(KeyMask, "key_mask_from_lengths", (c_uint64 * len(lengths))(*lengths), len(lengths), seq)

    def key_mask_from_runs(self, runs, batch, seq):
        """Runs are (row, start, end)."""
        return self.make(KeyMask, "key_mask_from_runs", (Run * len(runs))(*runs), len(runs), batch, seq)

    def meta(self, key_mask):
        return self.make(Meta, "meta_create", key_mask.handle)

    def meta_from_lengths(self, lengths, seq):
        return self.meta(self.key_mask_from_lengths(lengths, seq))

    def meta_from_document_ids(self, rows, seq=None):
        """Metadata of several documents in each row: rows of `seq` numbers each, of which equal
        ones see one another and 0 is a masked token. None is the length of the first row."""
        rows = [list(row) for row in rows]
        if seq is None:
            seq = len(rows[0]) if rows else 0
        if any(len(row) != seq for row in rows):
            raise ValueError(f"expected rows of {seq} numbers, got {[len(row) for row in rows]}")
        ids = [number for row in rows for number in row]
        return self.make(Meta, "meta_from_document_ids", (c_uint32 * len(ids))(*ids), len(rows), seq)

    # In these, `of` is what ranges are made for: (B, Sq, Sk), or the CuSeqlens of packed queries
    # and keys.

    def key_ranges_window(self, of, left=None, right=None):
        """Query i sees `left` keys before its own place and `right` keys after it; None is no
        limit."""
        sides = [-1 if side is None else side for side in (left, right)]
        return self.make(KeyRanges, "key_ranges_window", byref(_ranges_of(of)), *sides)

    def key_ranges_causal(self, of):
        """Query i sees the keys up to its own place."""
        return self.key_ranges_window(of, None, 0)

    def key_ranges_prefix(self, of, count):
        """Every query sees the first `count` keys, and the others up to its own place."""
        return self.make(KeyRanges, "key_ranges_prefix", byref(_ranges_of(of)), count)

    def key_ranges_from_values(self, of, values):
        """A (first, end) for each query."""
        values = [tuple(value) for value in values]
        array = (KeyRange * len(values))(*values)
        return self.make(KeyRanges, "key_ranges_from_values", byref(_ranges_of(of)), array, len(values))

    def score_modifiers(self, softcap=0.0, alibi=None, sinks=None):
        """A soft cap, 0 for none, and for each query head an ALiBi slope and a sink, None for none."""
        lists = [None if values is None else list(values) for values in (alibi, sinks)]
        counts = {len(values) for values in lists if values is not None}
        if len(counts) > 1:
            raise ValueError(f"expected as many slopes as sinks, got {sorted(counts)}")
        count = max(counts, default=0)
        arrays = [None if values is None else (c_float * max(count, 1))(*values) for values in lists]
        return self.make(ScoreModifiers, "score_modifiers_create", softcap, *arrays, count)

    def communicators(self, world_size, time_out_ms=0):
        """The ranks of this process, one for each of its threads. A call waits for the others as long
        as the time-out says; 0 is a minute."""
        handles = (c_void_p * max(world_size, 1))()
        self.call("communicator_threads", world_size, time_out_ms, handles)
        return [Communicator(self, c_void_p(handle)) for handle in handles]

    def connect(self, meeting, rank, world_size, time_out_ms=0):
        """Joins processes: `meeting` is an address on which rank 0 listens, "127.0.0.1:4321", or
        "file:" and the path of a file that rank 0 writes."""
        return self.make(Communicator, "communicator_connect", meeting.encode(), rank, world_size, time_out_ms)

    def peers(self, devices, time_out_ms=0):
        """The ranks of this process whose CUDA devices copy from one another: one for each device and
        thread. Several may share a device."""
        given = (c_void_p * max(len(devices), 1))(*[device.handle for device in devices])
        handles = (c_void_p * max(len(devices), 1))()
        self.call("communicator_peers", given, len(devices), time_out_ms, handles)
        return [Communicator(self, c_void_p(handle)) for handle in handles]

    def nccl(self, device, meeting, rank, world_size, time_out_ms=0, comm=None):
        """Joins processes whose CUDA devices send and receive by NCCL; `meeting` as of `connect`.
        `comm` is the address of an ncclComm_t of the caller's, such as that of a process group of
        torch.distributed; None makes one."""
        before = [device.handle, meeting.encode(), rank, world_size, time_out_ms, c_void_p(comm)]
        return self.make(Communicator, "communicator_nccl", *before)

    def sharded_meta(self, key_mask, lengths, rank, prefix=0, suffix=0, ranges=None):
        """What rank `rank` knows of a sequence of which each rank has a shard of `lengths`, and all
        have prefix and suffix. Mask and ranges are of the whole sequence."""
        shards = Shards(prefix, suffix, (c_uint64 * len(lengths))(*lengths), len(lengths))
        ranges = None if ranges is None else ranges.handle
        return self.make(ShardedMeta, "sharded_meta_create", key_mask.handle, byref(shards), rank, ranges)

    def cu_seqlens(self, values):
        return self.make(CuSeqlens, "cu_seqlens_create", (c_int32 * len(values))(*values), len(values))


class Handle:
    """A handle; freed by `free`, by `with`, or when it is no longer referenced."""

    _free = ""

    def __init__(self, library, handle):
        self.library, self.handle = library, handle

    def free(self):
        """Frees the handle. Its number stays: using it again is an error that the library
        reports."""
        self.library.call(self._free, self.handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.free()
        self.handle = c_void_p()

    def __del__(self):
        # The status is ignored: freeing NULL succeeds, and a handle that was freed before is
        # refused.
        getattr(self.library.c, f"varlen_fa_{self._free}")(self.handle)


class KeyMask(Handle):
    _free = "key_mask_free"

    def broadcast(self, batch):
        """The mask of `batch` rows that are all like the one row of this mask."""
        return self.library.make(KeyMask, "key_mask_broadcast", self.handle, batch)


class CuSeqlens(Handle):
    _free = "cu_seqlens_free"


class KeyRanges(Handle):
    """Which keys each query sees."""

    _free = "key_ranges_free"

    def intersect(self, other):
        """The keys that both allow."""
        return self.library.make(KeyRanges, "key_ranges_intersect", self.handle, other.handle)


class ScoreModifiers(Handle):
    """What happens to scores: a soft cap, ALiBi, attention sinks."""

    _free = "score_modifiers_free"


class Meta(Handle):
    _free = "meta_free"

    def info(self):
        info = MetaInfo()
        self.library.call("meta_describe", self.handle, byref(info))
        return info

    def cu_seqlens(self):
        return self.library.make(CuSeqlens, "cu_seqlens_from_meta", self.handle)

    def upload(self, device):
        self.library.call("meta_upload", self.handle, device.handle)

    def _copy(self, what, element, count):
        values = (element * count)()
        self.library.call(f"meta_copy_{what}", self.handle, values, count)
        return list(values)

    def indices(self):
        return self._copy("indices", c_uint32, self.info().total_valid)

    def inv_indices(self):
        info = self.info()
        return self._copy("inv_indices", c_int32, info.batch * info.seq)

    def cu_seqlens_values(self):
        return self._copy("cu_seqlens", c_int32, self.info().batch + 1)


class DeviceMeta(Handle):
    _free = "device_meta_free"

    def rebuild(self, mask):
        self.library.call("device_meta_rebuild", self.handle, byref(mask))


class Communicator(Handle):
    """A rank of several that share a sequence."""

    _free = "communicator_free"


class ShardedMeta(Handle):
    _free = "sharded_meta_free"


class ParallelRequest(Handle):
    """A request that all ranks have agreed on; `plan` is a ParallelPlan."""

    _free = "parallel_request_free"

    def forward(self, communicator, q, k, v, out, bias=None, modifiers=None, lse=None):
        """Attention of this rank's tokens to those of all ranks, which all call it. `q`, `k`, `v` and
        `out` are tensors, or lists of segments that meet where prefix, shard and suffix do. `bias` is
        that of the whole sequence, `modifiers` a ScoreModifiers of all heads, and `lse`,
        `[B, H, prefix + shard + suffix]` f32, receives the log-sum-exp of this rank's rows."""
        tensors = [q, k, v, out]
        if bias is None and modifiers is None and lse is None and all(isinstance(one, Tensor) for one in tensors):
            self.library.call("parallel_forward", communicator.handle, self.handle, *map(byref, tensors))
            return
        q, k, v, out = map(_segments, tensors)
        scores = ParallelScores()
        if bias is not None:
            scores.bias = ctypes.pointer(bias)
        if modifiers is not None:
            scores.modifiers = modifiers.handle
        before = [communicator.handle, self.handle, byref(q), byref(k), byref(v), byref(scores)]
        self.library.call("parallel_forward_segments", *before, byref(out), _at(lse))


def _at(structure):
    return None if structure is None else byref(structure)


class Device(Handle):
    """A device. Tensors are descriptors made by `tensor`. A Plan, if one is given, is filled in."""

    _free = "device_free"

    def info(self):
        info = DeviceInfo()
        self.library.call("device_describe", self.handle, byref(info))
        return info

    def synchronize(self):
        self.library.call("device_synchronize", self.handle)

    def device_meta(self, batch, seq):
        return self.library.make(DeviceMeta, "device_meta_create", self.handle, batch, seq)

    def forward(self, q, k, v, out, mask=None, options=None, plan=None, lse=None):
        """`q`, `k`, `v` and `out` are tensors, or lists of 1 to 8 segments that follow one another
        along S, each cut as it likes. `lse`, `[B, H, Sq]` f32, receives the log-sum-exp of every
        row."""
        if not all(tensor is None or isinstance(tensor, Tensor) for tensor in [q, k, v, out]):
            q, k, v, out = map(_segments, [q, k, v, out])
            before = [self.handle, _at(options), byref(q), byref(k), byref(v), _at(mask), byref(out)]
            self.library.call("forward_segments", *before, _at(lse), _at(plan))
            return
        before = [self.handle, _at(options), _at(q), _at(k), _at(v), _at(mask), _at(out)]
        if lse is None:
            self.library.call("forward", *before, _at(plan))
        else:
            self.library.call("forward_with_lse", *before, _at(lse), _at(plan))

    def parallel_prepare(
        self, communicator, meta, dtype, heads, kv_heads, head_dim, mode="auto", ulysses=0, softmax_scale=None,
        modifiers=None, bias=False, lse=False
    ):
        """Prepares a request on this rank; all ranks do. The mode by name or number. `modifiers`,
        `bias` and `lse`: what calls will carry, so that the plan takes a mode that computes it."""
        options = ParallelOptions(heads, kv_heads, head_dim, ulysses, dtype)
        options.mode = _number(PARALLEL_MODES, "mode", mode)
        options.modifiers = None if modifiers is None else modifiers.handle
        options.has_bias, options.has_lse = int(bias), int(lse)
        if softmax_scale is not None:
            options.has_softmax_scale, options.softmax_scale = 1, softmax_scale
        handle, plan = c_void_p(), ParallelPlan()
        arguments = [self.handle, communicator.handle, meta.handle, byref(options), byref(handle), byref(plan)]
        self.library.call("parallel_prepare", *arguments)
        request = ParallelRequest(self.library, handle)
        request.plan = plan
        return request

    def merge_attention(self, out1, lse1, out2, lse2, out, lse=None):
        """Attention over all keys from attention over two parts of them and its log-sum-exps."""
        parts = [byref(out1), byref(lse1), byref(out2), byref(lse2)]
        self.library.call("merge_attention", self.handle, *parts, byref(out), _at(lse))

    def prepare_qk(self, segments, key_mask=None, meta=None):
        """Norm and rotary embedding of q and k, of 1 to 8 of `qk_segment`. Rows of tokens that the
        key mask or the metadata does not keep stay as they are."""
        mask = [None if handle is None else handle.handle for handle in [key_mask, meta]]
        self.library.call("prepare_qk", self.handle, (QkSegment * len(segments))(*segments), len(segments), *mask)

    def warm_up(self, dtype, q_shape, kv_shape, mask=None, options=None, plan=None):
        """Makes the device ready for calls of `forward` with such tensors and such a mask."""
        shapes = [(c_uint64 * 4)(*shape) for shape in [q_shape, kv_shape]]
        self.library.call("warm_up", self.handle, _at(options), dtype, *shapes, _at(mask), _at(plan))

    def load_pipeline_cache(self, data=b""):
        """Compiles shaders with a cache from now on, which starts from what `pipeline_cache` gave
        in an earlier run; wgpu devices alone."""
        self.library.call("pipeline_cache_load", self.handle, data, len(data))

    def pipeline_cache(self):
        """What the cache holds, as bytes."""
        count = c_uint64()
        self.library.call("pipeline_cache_copy", self.handle, None, 0, byref(count))
        while True:
            # It may grow meanwhile.
            data = ctypes.create_string_buffer(max(count.value, 1))
            room = count.value
            try:
                self.library.call("pipeline_cache_copy", self.handle, data, room, byref(count))
                return data.raw[: count.value]
            except Error as error:
                if error.status != "LENGTH" or count.value <= room:
                    raise

    def pack_qkv(self, q, k, v, meta, packed_q, packed_k, packed_v):
        outputs = [byref(packed_q), byref(packed_k), byref(packed_v)]
        self.library.call("pack_qkv", self.handle, byref(q), byref(k), byref(v), meta.handle, *outputs)

    def varlen_attention(self, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse=None, options=None, plan=None):
        sequences = [cu_seqlens_q.handle, cu_seqlens_k.handle]
        inputs = [byref(q), byref(k), byref(v)]
        self.library.call(
            "varlen_attention", self.handle, _at(options), *inputs, *sequences, byref(out), _at(lse), _at(plan)
        )

    def scatter_to_padded(self, packed, meta, padded):
        self.library.call("scatter_to_padded", self.handle, byref(packed), meta.handle, byref(padded))
