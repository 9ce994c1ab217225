// Four numbers as `dot_levels` takes them, where bytes are multiplied with bytes: their high digits, then their low ones.

inline void store_four(const int8_t* high, const int8_t* low, uint8_t* to) {
    __builtin_memcpy(to, high, 4);
    __builtin_memcpy(to + 4, low, 4);
}
