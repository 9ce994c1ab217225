// Four numbers as `dot_levels` takes them, where numbers of 16 bits are multiplied: both digits as one number, numbers 0, 2, 1, 3.

inline void store_four(const int8_t* high, const int8_t* low, uint8_t* to) {
    int16_t numbers[4];
    for (int i = 0; i < 4; ++i) numbers[i % 2 * 2 + i / 2] = (int16_t)(high[i] * 128 + low[i]);
    __builtin_memcpy(to, numbers, 8);
}
