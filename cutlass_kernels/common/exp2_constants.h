// What 2^x is made of without the special-function unit, shared by the kernels and the emulator.
#pragma once

namespace hopper_fa {

// Coefficients of 2^r on [-1/2, 1/2], minimax in relative error (7.5e-5, a thirtieth of a BF16 half-ulp; mean
// error 2e-8): found by Lawson's algorithm.
constexpr float kExp2Polynomial[4] = {0.99992807f, 0.69326099f, 0.24261112f, 0.05517167f};

// The bits of a float are almost its logarithm: x 2^23 read as a float is 2^n (1 + f), with x = n + f, the
// chords of 2^x between integers. Chords from halves to halves are L(x) + 2^-1/2 L(x + 1/2) in those L, times
// a constant: at most 0.75% off, where P is about to be rounded to 4 bits (6%). kExp2ChordShift is added to x
// first: 1.5 * 2^15, so that the bits of the float hold x in 256ths, less log2 of that constant, 1 + 1.5 *
// 2^-1/2, and of 1.0075, so that the error has both signs.
constexpr float kExp2ChordShift = 49150.947f;
constexpr float kExp2ChordFactor = 0.70710678f;
constexpr float kExp2ChordFloor = 49152.f - 120.f;  // of the shifted x: less is 0 all the same

}  // namespace hopper_fa
