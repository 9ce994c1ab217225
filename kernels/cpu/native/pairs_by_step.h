// A pair of steps as two single ones, where upper nibbles have to be moved down before they are multiplied. Included after
// StepSums, for instruction sets without anything better.

struct Halves { Bytes lower, upper; };
inline Halves split(Bytes v, uint8_t mask) { return {masked(v, mask), masked(shifted(v, 4), mask)}; }

using PairSums = StepSums;
inline PairSums zero_pair_sums() { return zero_step_sums(); }
inline void dot_pair(PairSums& sums, const Halves& codes, const int8_t* digits) {
    dot_step(sums, codes.lower, load_four(digits));
    dot_step(sums, codes.upper, load_four(digits + 4));
}
