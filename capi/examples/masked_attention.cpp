/* Masked attention on a padded batch, from C++, with varlen_fa.hpp: values that are the same for every
 * token come out as they are where a token is valid, and as zeros elsewhere.
 *
 *     c++ -std=c++11 masked_attention.cpp $(pkg-config --cflags --libs varlen_fa) -o masked_attention
 *
 * The argument is the device: auto (the default), cpu, wgpu or cuda. Exits with 77 if the device is
 * not available.
 */
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "varlen_fa.hpp"

namespace {

const uint64_t kSeq = 37, kHeads = 4, kDim = 16;
const int kNotAvailable = 77;

varlen_fa_device_kind kind_of(const char *name) {
  const struct {
    const char *name;
    varlen_fa_device_kind kind;
  } kinds[] = {
      {"cpu", VARLEN_FA_DEVICE_KIND_CPU}, {"wgpu", VARLEN_FA_DEVICE_KIND_WGPU}, {"cuda", VARLEN_FA_DEVICE_KIND_CUDA}};
  for (const auto &known : kinds) {
    if (std::strcmp(name, known.name) == 0) {
      return known.kind;
    }
  }
  return VARLEN_FA_DEVICE_KIND_AUTO;
}

int run(const char *device_name) {
  const std::vector<uint64_t> lengths = {29, 11};
  varlen_fa::Device opened(kind_of(device_name));
  varlen_fa::Device device = std::move(opened);
  varlen_fa::Meta meta = varlen_fa::Meta::from_lengths(lengths, kSeq);
  if (meta.describe().total_valid != 40) {
    std::fprintf(stderr, "expected 40 valid tokens\n");
    return EXIT_FAILURE;
  }

  const size_t row = kHeads * kDim, size = lengths.size() * kSeq * row;
  std::vector<float> x(size), out(size, std::numeric_limits<float>::quiet_NaN());
  for (size_t at = 0; at < size; at++) {
    x[at] = static_cast<float>(at % row) / 64.0f;
  }
  varlen_fa_tensor in = varlen_fa::tensor(x, {lengths.size(), kSeq, kHeads, kDim});
  varlen_fa_tensor to = varlen_fa::tensor(out, {lengths.size(), kSeq, kHeads, kDim});
  varlen_fa::Plan plan = varlen_fa::forward(device, in, in, in, varlen_fa::varlen(meta), to);
  std::printf("varlen-fa %s on %s\ntaken: %s\n", varlen_fa_version_string(), device.describe().name, plan.text);

  for (size_t at = 0; at < size; at++) {
    const bool is_valid = at / row % kSeq < lengths[at / row / kSeq];
    if (!(std::fabs(out[at] - (is_valid ? x[at] : 0.0f)) < 1e-5f)) {
      std::fprintf(stderr, "element %zu is %g\n", at, static_cast<double>(out[at]));
      return EXIT_FAILURE;
    }
  }
  // Errors are exceptions with a status and a message.
  try {
    varlen_fa::forward(device, in, in, in, varlen_fa::varlen(meta), in);
  } catch (const varlen_fa::Error &error) {
    std::printf("refused: %s\n", error.what());
    return error.status() == VARLEN_FA_STATUS_OVERLAP ? EXIT_SUCCESS : EXIT_FAILURE;
  }
  std::fprintf(stderr, "an output over an input was not refused\n");
  return EXIT_FAILURE;
}

}  // namespace

int main(int argc, char **argv) {
  try {
    return run(argc > 1 ? argv[1] : "auto");
  } catch (const varlen_fa::Error &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return error.status() == VARLEN_FA_STATUS_DEVICE_UNAVAILABLE ? kNotAvailable : EXIT_FAILURE;
  }
}
