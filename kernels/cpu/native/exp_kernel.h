// The exponential function, over the same vector type as linear_kernel.h.

// e^x to about 1e-7 for x <= 88; 0 below -87 (Cody and Waite's reduction, a polynomial of degree 6).
static inline Floats exp_floats(Floats x) {
    x = max(x, broadcast(-87.0f));
    const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding and taking it away rounds to a whole number
    const Floats n = add(fma(x, broadcast(1.44269504f), magic), broadcast(-12582912.0f));
    Floats r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Floats p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(mul(p, r), r, add(r, broadcast(1.0f)));
    return scaled_by_power(p, n);
}
