// Constants of the softmax.
#pragma once

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// The smallest bias that is still finite times log2(e). The smallest floats stand for -inf in many
// programs, and would become it.
constexpr float LOWEST_BIAS = -2.3e38f;

// With a key mask or a bias, scores of kept keys below this count as this, so that -inf is what is
// not kept: rows without keys are zeros, rows whose scores overflow are NaN.
constexpr float OVERFLOWED = -3.4028e38f;

// Products of a row's maximum and the scale beyond this are rounded by more than an exponent may be
// off, 2^-8. There, scores are subtracted before they are scaled.
constexpr float COARSE = 65536.0f;
