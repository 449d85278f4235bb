// Activations as products with codes want them. Part of codes.cpp, inside its namespace.
//
// Where a codec's table is integers, x is rounded to integers of 16 bits, 32 columns sharing a scale: x is near
// scale * (255 high + low), high and low within -127 .. 127. The error is at most half a scale, 2^-16 of the largest of
// the 32. Products of integers are exact, and so the same everywhere.
//
// Else x is as it is, filled up with zeros, against nibbles in an order of its own. Behind that lie, in float32: of a codec with zero-points, the sums of x over
// its groups, where they are float16 and it has a `centre` after as many times it; x at the outliers, which is 0 in all the rest. Rows have
// float16 there (scales and zero-points; outliers), and `dots` adds these products.

constexpr int MOST_INTEGER = 127 * 255 + 127;

// 128 columns against nibbles, or 64 against bytes. Lane j of an array of sixteen belongs to lane j of `Ints`.
struct NibbleBlock {
    std::int8_t high[2][BYTES], low[2][BYTES];  // columns whose codes lie in low halves, and in high halves
    float scale[LANES];
    std::int32_t start[LANES];  // what sums begin with: -offset times the sums of x
    static constexpr long COLUMNS = 128;
};
struct ByteBlock {
    std::int8_t high[1][BYTES], low[1][BYTES];
    float scale[LANES];
    std::int32_t start[LANES];
    static constexpr long COLUMNS = 64;
};

// Floats against nibbles: lane j of part i belongs to nibble i of bytes 4 j .. 4 j + 3.
struct FloatBlock {
    float x[8][LANES];
    static constexpr long COLUMNS = 128;
};

template <class Block> FLASHINFER_INLINE long blocks_bytes(long width) {
    return (width + Block::COLUMNS - 1) / Block::COLUMNS * long(sizeof(Block));
}
FLASHINFER_INLINE long main_bytes(const Codec& c, long width) {
    if (c.form == Form::nibbles) return c.fixed ? blocks_bytes<NibbleBlock>(width) : blocks_bytes<FloatBlock>(width);
    return c.fixed ? blocks_bytes<ByteBlock>(width) : rounded(width, CHUNK) * 4;
}
// Whether sums come `centre` times, too: zero-points of a byte are centred themselves.
FLASHINFER_INLINE bool sums_twice(const Codec& c) { return c.centre && c.zero == Zero::f16; }
FLASHINFER_INLINE long sums_bytes(const Codec& c, long width) {
    return c.zeros() ? rounded((sums_twice(c) ? 8 : 4) * c.groups(width), LINE) : 0;
}

long prepared_bytes(const Codec& c, long width) {
    return main_bytes(c, width) + sums_bytes(c, width) + rounded(4 * long(c.outliers.size()), LINE) + LINE;  // one to spare: no stride of a power of two
}

// Rounds 32 values; returns their scale. Where one is not finite that is NaN, and so is every product with them; where
// none reaches 1e-30 they are zeros.
FLASHINFER_INLINE float round_chunk(const float* x, std::int32_t* out) {
    const Lanes a = load(x), b = load(x + LANES), zero = broadcast(0);
    float sizes[LANES], largest = 0;
    store(sizes, max(max(a, sub(zero, a)), max(b, sub(zero, b))));
    for (float size : sizes) largest = size > largest ? size : largest;
    const float strange = reduce(add(mul(a, zero), mul(b, zero)));
    const float inverse = largest >= 1e-30f ? MOST_INTEGER / largest : 0;
    const Lanes magic = broadcast(12582912.0f), most = broadcast(MOST_INTEGER);  // 1.5 * 2^23: rounds to an integer
    for (int i = 0; i < 2; i++) {
        Lanes v = sub(fma(i ? b : a, broadcast(inverse), magic), magic);
        v = max(min(v, most), sub(zero, most));
        float integers[LANES];
        store(integers, v);
        for (int j = 0; j < LANES; j++) out[i * LANES + j] = std::int32_t(integers[j]);
    }
    return (largest >= 1e-30f ? largest / MOST_INTEGER : 0) + strange;
}

template <class Block> FLASHINFER_INLINE void put(Block& block, int half, int at, std::int32_t v) {
    const std::int32_t high = (v + 127 + 255 * 128) / 255 - 128;  // to nearest
    block.high[half][at] = std::int8_t(high);
    block.low[half][at] = std::int8_t(v - 255 * high);
}

// The chunk of 32 columns number `chunk` of a block.
void put_chunk(NibbleBlock& block, int chunk, const std::int32_t* v, float scale, int offset) {
    for (int i = 0; i < 16; i++) put(block, 0, 16 * chunk + i, v[i]);
    for (int i = 0; i < 16; i++) put(block, 1, 16 * chunk + i, v[16 + i]);
    for (int j = 0; j < 4; j++) {
        std::int32_t sum = 0;
        for (int i = 4 * j; i < 4 * j + 4; i++) sum += v[i] + v[16 + i];
        block.scale[4 * chunk + j] = scale;
        block.start[4 * chunk + j] = -offset * sum;
    }
}
void put_chunk(ByteBlock& block, int chunk, const std::int32_t* v, float scale, int) {
    for (int i = 0; i < 32; i++) put(block, 0, 32 * chunk + i, v[i]);
    for (int j = 0; j < 8; j++) {
        block.scale[8 * chunk + j] = scale;
        block.start[8 * chunk + j] = -SIGNED_OFFSET * (v[4 * j] + v[4 * j + 1] + v[4 * j + 2] + v[4 * j + 3]);
    }
}

void put_floats(std::uint8_t* out, long chunk, const float* x) {
    FloatBlock& block = reinterpret_cast<FloatBlock*>(out)[chunk / 4];
    if (chunk % 4 == 0) std::memset(&block, 0, sizeof block);
    for (int i = 0; i < CHUNK; i++) block.x[i % 4 * 2 + i / 16][chunk % 4 * 4 + i % 16 / 4] = x[i];
}

template <class Block> void round_into(std::uint8_t* out, long chunk, const float* x, float step, int offset) {
    constexpr long CHUNKS = Block::COLUMNS / CHUNK;
    Block& block = reinterpret_cast<Block*>(out)[chunk / CHUNKS];
    if (chunk % CHUNKS == 0) std::memset(&block, 0, sizeof block);
    std::int32_t v[CHUNK];
    const float scale = round_chunk(x, v) * step;
    put_chunk(block, int(chunk % CHUNKS), v, scale, offset);
}

void prepare(const Codec& c, const float* x, long width, std::uint8_t* out) {
    const long groups = c.groups(width);
    float* centres = reinterpret_cast<float*>(out + main_bytes(c, width));
    float* sums = sums_twice(c) ? centres + groups : centres;
    float* outliers = reinterpret_cast<float*>(out + main_bytes(c, width) + sums_bytes(c, width));
    std::memset(centres, 0, sums_bytes(c, width));
    size_t next = 0;
    for (long k = 0; k < width; k += CHUNK) {
        alignas(64) float some[CHUNK] = {};
        std::memcpy(some, x + k, 4 * least(CHUNK, width - k));
        for (; next < c.outliers.size() && c.outliers[next] < k + CHUNK; next++) {
            outliers[next] = some[c.outliers[next] - k];
            some[c.outliers[next] - k] = 0;
        }
        if (c.zeros()) sums[k / c.group] += reduce(add(load(some), load(some + LANES)));
        if (!c.fixed && c.form == Form::nibbles) put_floats(out, k / CHUNK, some);
        else if (!c.fixed) std::memcpy(out + 4 * k, some, sizeof some);
        else if (c.form == Form::nibbles) round_into<NibbleBlock>(out, k / CHUNK, some, c.step, c.offset);
        else round_into<ByteBlock>(out, k / CHUNK, some, c.step, c.offset);
    }
    for (long g = 0; sums_twice(c) && g < groups; g++) centres[g] = float(c.centre) * sums[g];
}
