// varlen-fa for C++11 and newer: handles that free themselves, and errors as exceptions. Everything
// else is varlen_fa.h, whose functions take what `get()` gives.
//
//     varlen_fa::Device device;                                    // the best one
//     auto meta = varlen_fa::Meta::from_lengths({29, 11}, 37);     // once a request
//     varlen_fa::Plan plan = varlen_fa::forward(device, q, k, v, varlen_fa::varlen(meta), out);

#ifndef VARLEN_FA_HPP
#define VARLEN_FA_HPP

#include <cstddef>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "varlen_fa.h"

namespace varlen_fa {

// A call that failed: its status, and a message that names the argument, what was expected and what
// came.
class Error : public std::runtime_error {
 public:
  Error(varlen_fa_status status, const std::string &message) : std::runtime_error(message), status_(status) {}

  varlen_fa_status status() const noexcept { return status_; }

 private:
  varlen_fa_status status_;
};

// Throws unless a call succeeded. For functions of varlen_fa.h.
inline void check(varlen_fa_status status) {
  if (status != VARLEN_FA_STATUS_OK) {
    throw Error(status, varlen_fa_last_error());
  }
}

// A handle of varlen_fa.h, freed with its function. Moves, and does not copy. An object that was moved
// from is empty, and calls refuse it.
template <typename T, varlen_fa_status (*Free)(T *)>
class Handle {
 public:
  // Takes over a handle; null for none.
  explicit Handle(T *handle = nullptr) noexcept : handle_(handle) {}
  Handle(const Handle &) = delete;
  Handle &operator=(const Handle &) = delete;
  Handle(Handle &&other) noexcept : handle_(other.release()) {}
  Handle &operator=(Handle &&other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_ != nullptr) {
      Free(handle_);
    }
  }

  T *get() const noexcept { return handle_; }

  // Gives the handle away; the caller frees it.
  T *release() noexcept {
    T *handle = handle_;
    handle_ = nullptr;
    return handle;
  }

  // Where functions of varlen_fa.h store a new handle. The old one must have been released.
  T **put() noexcept { return &handle_; }

 private:
  T *handle_;
};

// Where to compute.
class Device : public Handle<varlen_fa_device, varlen_fa_device_free> {
 public:
  // The device that VARLEN_FA_DEVICE names, or the best one present; or one of a kind.
  explicit Device(varlen_fa_device_kind kind = VARLEN_FA_DEVICE_KIND_AUTO, uint32_t ordinal = 0) {
    check(varlen_fa_device_open(kind, ordinal, put()));
  }

  // The CPU with a number of threads; 0 for one each processor.
  static Device cpu(uint32_t threads) {
    varlen_fa_device *device = nullptr;
    check(varlen_fa_device_open_cpu(threads, &device));
    return Device(device);
  }

  // A CUcontext and a CUstream of the application, which outlive the device.
  static Device cuda(void *context, void *stream) {
    varlen_fa_device *device = nullptr;
    check(varlen_fa_device_open_cuda(context, stream, &device));
    return Device(device);
  }

  varlen_fa_device_info describe() const {
    varlen_fa_device_info info = {};
    check(varlen_fa_device_describe(get(), &info));
    return info;
  }

  // Waits for all work launched so far.
  void synchronize() const { check(varlen_fa_device_synchronize(get())); }

 private:
  explicit Device(varlen_fa_device *device) noexcept : Handle(device) {}
};

// Which keys count, `[B, S]`.
class KeyMask : public Handle<varlen_fa_key_mask, varlen_fa_key_mask_free> {
 public:
  // The first `lengths[b]` tokens of row b.
  static KeyMask from_lengths(const std::vector<uint64_t> &lengths, uint64_t seq) {
    KeyMask mask;
    check(varlen_fa_key_mask_from_lengths(lengths.data(), lengths.size(), seq, mask.put()));
    return mask;
  }

  // Bytes of `[batch, seq]`, row after row: those that are not 0 are kept.
  static KeyMask from_bytes(const std::vector<uint8_t> &keep, uint64_t batch, uint64_t seq) {
    if (keep.size() != static_cast<size_t>(batch * seq)) {
      throw Error(VARLEN_FA_STATUS_LENGTH, "`keep`: expected batch * seq bytes, got " + std::to_string(keep.size()));
    }
    KeyMask mask;
    check(varlen_fa_key_mask_from_integers(keep.data(), VARLEN_FA_MASK_DTYPE_U8, batch, seq, mask.put()));
    return mask;
  }

 private:
  KeyMask() noexcept {}
};

// Which tokens count, made once a request.
class Meta : public Handle<varlen_fa_meta, varlen_fa_meta_free> {
 public:
  explicit Meta(const KeyMask &mask) { check(varlen_fa_meta_create(mask.get(), put())); }

  static Meta from_lengths(const std::vector<uint64_t> &lengths, uint64_t seq) {
    return Meta(KeyMask::from_lengths(lengths, seq));
  }

  varlen_fa_meta_info describe() const {
    varlen_fa_meta_info info = {};
    check(varlen_fa_meta_describe(get(), &info));
    return info;
  }
};

// Which keys each query sees.
class KeyRanges : public Handle<varlen_fa_key_ranges, varlen_fa_key_ranges_free> {
 public:
  using Handle::Handle;
};

// A soft cap, ALiBi slopes, attention sinks.
class ScoreModifiers : public Handle<varlen_fa_score_modifiers, varlen_fa_score_modifiers_free> {
 public:
  using Handle::Handle;
};

// Lengths of packed sequences.
class CuSeqlens : public Handle<varlen_fa_cu_seqlens, varlen_fa_cu_seqlens_free> {
 public:
  explicit CuSeqlens(const Meta &meta) { check(varlen_fa_cu_seqlens_from_meta(meta.get(), put())); }
};

// A contiguous tensor in host or CUDA memory. `bytes` is the size of the memory.
inline varlen_fa_tensor tensor(void *data, uint64_t bytes, varlen_fa_dtype dtype, std::initializer_list<uint64_t> shape,
                               varlen_fa_memory memory = VARLEN_FA_MEMORY_HOST) {
  if (shape.size() == 0 || shape.size() > 4) {
    throw Error(VARLEN_FA_STATUS_RANK, "`shape`: expected 1 to 4 dimensions, got " + std::to_string(shape.size()));
  }
  varlen_fa_tensor tensor = {};
  tensor.data = data;
  tensor.bytes = bytes;
  tensor.dtype = dtype;
  tensor.memory = memory;
  int64_t stride = 1;
  for (size_t dimension = shape.size(); dimension-- > 0;) {
    tensor.shape[dimension] = shape.begin()[dimension];
    tensor.strides[dimension] = stride;
    stride *= static_cast<int64_t>(shape.begin()[dimension]);
  }
  tensor.rank = static_cast<uint32_t>(shape.size());
  return tensor;
}

// A contiguous f32 tensor over a vector, which must outlive its use.
inline varlen_fa_tensor tensor(std::vector<float> &values, std::initializer_list<uint64_t> shape) {
  return tensor(values.data(), values.size() * sizeof(float), VARLEN_FA_DTYPE_F32, shape);
}

// Masks; what they are made of must outlive the call.
inline varlen_fa_attention_mask none() { return varlen_fa_attention_mask(); }

inline varlen_fa_attention_mask key(const KeyMask &mask) {
  varlen_fa_attention_mask of = {};
  of.kind = VARLEN_FA_MASK_KIND_KEY;
  of.key_mask = mask.get();
  return of;
}

inline varlen_fa_attention_mask varlen(const Meta &meta) {
  varlen_fa_attention_mask of = {};
  of.kind = VARLEN_FA_MASK_KIND_VARLEN;
  of.query_meta = meta.get();
  return of;
}

inline varlen_fa_attention_mask varlen_cross(const Meta &query, const Meta &key) {
  varlen_fa_attention_mask of = {};
  of.kind = VARLEN_FA_MASK_KIND_VARLEN_CROSS;
  of.query_meta = query.get();
  of.key_meta = key.get();
  return of;
}

using Plan = varlen_fa_plan;

// varlen_fa_forward.
inline Plan forward(const Device &device, const varlen_fa_tensor &q, const varlen_fa_tensor &k, const varlen_fa_tensor &v,
                    const varlen_fa_attention_mask &mask, const varlen_fa_tensor &out,
                    const varlen_fa_attention_options *options = nullptr) {
  Plan plan = {};
  check(varlen_fa_forward(device.get(), options, &q, &k, &v, &mask, &out, &plan));
  return plan;
}

}  // namespace varlen_fa

#endif  // VARLEN_FA_HPP
