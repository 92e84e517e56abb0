// 2^x straight to an e4m3 code, shared by the kernels and the emulator.
//
// An e4m3 number 2^e (1 + m / 8) has the code 8 (e + 7) + m, so 8 (x + 7), rounded, is the code of the number
// that interpolates linearly between the powers of two around 2^x: up to 6.1% too large, and 4.1% on average
// (Schraudolph, "A Fast, Compact Approximation of the Exponential Function", 1999).
#pragma once

namespace hopper_fa {

// Taken off before rounding, so that the mean is right: 8 log2 of the mean of (1 + f) / 2^f, 1.04069.
constexpr float kExp2LinearMean = 0.46f;

}  // namespace hopper_fa
