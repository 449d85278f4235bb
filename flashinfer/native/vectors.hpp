// Kernels over one vector: part of kernels.cpp, inside its namespace.

// Applies `f` to every sixteen values, the last ones filled up with zeros.
template <class F> FLASHINFER_INLINE void transform(float* out, const float* x, long count, F f) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, f(load(x + i), i));
    if (i < count) store_part(out + i, f(load_part(x + i, int(count - i)), i), int(count - i));
}

float maximum(const float* values, long count) {
    float most = values[0];
    long i = 0;
    if (count >= LANES) {
        Lanes lanes = load(values);
        for (i = LANES; i + LANES <= count; i += LANES) lanes = max(lanes, load(values + i));
        float all[LANES];
        store(all, lanes);
        most = all[0];
        for (int j = 1; j < LANES; j++) most = most > all[j] ? most : all[j];
    }
    for (; i < count; i++) most = most > values[i] ? most : values[i];
    return most;
}

// tanh(y) = 1 - 2 / (1 + e^2y): off by one rounding of 1, so that a softened value is off by one of its cap.
void soften(float* values, long count, float cap) {
    const Lanes one = broadcast(1), two = broadcast(2), limit = broadcast(cap);
    transform(values, values, count, [=](Lanes v, long) {
        return mul(limit, sub(one, div(two, add(one, exp(mul(two, div(v, limit)))))));
    });
}

void lean(float* values, long count, float slope, long first) {
    for (long i = 0; i < count; i++) values[i] += slope * float(first + i);
}

float softmax(float* values, long count, const float* sink) {
    float largest = maximum(values, count);
    if (sink && *sink > largest) largest = *sink;
    Lanes most = broadcast(largest), sum = broadcast(0);
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        Lanes e = exp(sub(load(values + i), most));
        store(values + i, e);
        sum = add(sum, e);
    }
    if (i < count) {
        store_part(values + i, exp(sub(load_part(values + i, int(count - i)), most)), int(count - i));
        sum = add(sum, load_part(values + i, int(count - i)));
    }
    if (!sink) return reduce(sum);
    float rest[LANES] = {*sink};
    store(rest, exp(sub(load(rest), most)));
    return reduce(sum) + rest[0];
}

void scale(float* out, const float* values, long count, float factor) {
    transform(out, values, count, [=](Lanes v, long) { return mul(v, broadcast(factor)); });
}

void divide(float* out, const float* values, long count, float divisor) {
    transform(out, values, count, [=](Lanes v, long) { return div(v, broadcast(divisor)); });
}

void norm(float* out, const float* x, long count, const float* weight, const float* bias, bool center, float eps) {
    Lanes sum = broadcast(0), squares = broadcast(0);
    long whole = count / LANES * LANES;
    int rest = int(count - whole);
    float mean = 0;
    if (center) {
        for (long i = 0; i < whole; i += LANES) sum = add(sum, load(x + i));
        if (rest) sum = add(sum, load_part(x + whole, rest));
        mean = reduce(sum) / float(count);
    }
    transform(out, x, count, [&](Lanes v, long i) {
        Lanes d = sub(v, broadcast(mean));
        if (i == whole) {  // what fills up the last lanes is no deviation
            float part[LANES] = {};
            store_part(part, d, rest);
            d = load(part);
        }
        squares = fma(d, d, squares);
        return d;
    });
    Lanes factor = broadcast(1.0f / __builtin_sqrtf(reduce(squares) / float(count) + eps));
    auto at = [=](const float* p, long i) { return i == whole ? load_part(p + i, rest) : load(p + i); };
    transform(out, out, count, [&](Lanes d, long i) {
        d = mul(d, factor);
        if (weight) d = mul(d, at(weight, i));
        return bias ? add(d, at(bias, i)) : d;
    });
}

void rotate(float* __restrict out, const float* x, long dim, long half, const float* cos, const float* sin) {
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i] + a * sin[i];
    }
    for (long i = 2 * half; i < dim; i++) out[i] = x[i];
}

void halve(std::uint8_t* out, const float* x, long count) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store_half(out + 2 * i, load(x + i));
    if (i == count) return;
    std::uint8_t last[2 * LANES];
    store_half(last, load_part(x + i, int(count - i)));
    std::memcpy(out + 2 * i, last, 2 * (count - i));
}

// Beyond it gate and up of gpt-oss are cut off.
constexpr float SWIGLU_LIMIT = 7;

// 1 / (1 + e^-x) times y.
FLASHINFER_INLINE Lanes gated(Lanes y, Lanes x) {
    return div(y, add(broadcast(1), exp(sub(broadcast(0), x))));
}

void activate(Activation kind, float threshold, float* v, long count) {
    const Lanes zero = broadcast(0);
    switch (kind) {
        case Activation::relu: return transform(v, v, count, [=](Lanes x, long) { return max(zero, x); });
        case Activation::relu2:
            return transform(v, v, count, [=](Lanes x, long) { return mul(max(zero, x), max(zero, x)); });
        case Activation::fatrelu:
            for (long i = 0; i < count; i++) v[i] = v[i] <= threshold ? 0.0f : v[i];
            return;
        case Activation::shifted_relu:
            return transform(v, v, count, [=](Lanes x, long) { return max(zero, sub(x, broadcast(threshold))); });
        case Activation::silu: return transform(v, v, count, [](Lanes x, long) { return gated(x, x); });
        case Activation::gelu_quick:
            return transform(v, v, count, [](Lanes x, long) { return gated(x, mul(x, broadcast(1.702f))); });
        case Activation::swiglu_oai:
            return transform(v, v, count, [](Lanes x, long) {
                const Lanes cut = min(broadcast(SWIGLU_LIMIT), x);
                return gated(cut, mul(cut, broadcast(1.702f)));
            });
        case Activation::clamped:
            return transform(v, v, count, [](Lanes x, long) {
                return add(max(broadcast(-SWIGLU_LIMIT), min(broadcast(SWIGLU_LIMIT), x)), broadcast(1));
            });
        case Activation::gelu:
            for (long i = 0; i < count; i++) v[i] = 0.5f * v[i] * (1.0f + erff(v[i] * 0.70710678f));
            return;
        case Activation::gelu_tanh:
            for (long i = 0; i < count; i++)
                v[i] = 0.5f * v[i] * (1.0f + tanhf(0.79788456f * (v[i] + 0.044715f * v[i] * v[i] * v[i])));
            return;
    }
}
