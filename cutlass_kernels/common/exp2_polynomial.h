// Coefficients of 2^r on [-1/2, 1/2], shared by the kernels and the emulator.
#pragma once

namespace hopper_fa {

// Minimax in relative error (7.5e-5, a thirtieth of a BF16 half-ulp; mean error 2e-8): found by Lawson's
// algorithm.
constexpr float kExp2Polynomial[4] = {0.99992807f, 0.69326099f, 0.24261112f, 0.05517167f};

}  // namespace hopper_fa
