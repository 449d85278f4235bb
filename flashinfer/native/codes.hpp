// Rows of codes: their scales, and what their codes stand for. Part of codes.cpp, inside its namespace.

constexpr long CHUNK = 32;          // columns of 16 bytes of nibbles; columns of x that are rounded together
constexpr long LINE = 64;           // bytes of a cache line
constexpr long MOST_COLUMNS = 4096; // columns whose scales are decoded together
constexpr long MOST_SCALES = MOST_COLUMNS / CHUNK + 2 * LANES;

constexpr long least(long a, long b) { return a < b ? a : b; }
constexpr long rounded(long a, long b) { return (a + b - 1) / b * b; }

// Where things lie in a row: what is worth working out once.
struct Place {
    const Codec& codec;
    long width, groups, zeros, codes, stored, nested;  // columns; groups; bytes; bytes; columns with codes; bytes
    int shift;                                         // a column's group is its number shifted by this
    float unit;  // what every scale is multiplied by: e4m3 is read as a half, which is its 256th

    Place(const Codec& c, long columns)
        : codec(c), width(columns), groups(c.groups(columns)), zeros(c.zeros_at(columns)), codes(c.codes_at(columns)),
          stored(c.stored(columns)), nested(4 + (groups + 255) / 256 * 4), shift(__builtin_ctzl(c.group)),
          unit(c.form == Form::e4m3 ? c.unit * 256 : c.unit) {}
    long group(long column) const { return column >> shift; }
};

// Up to sixteen stored scales from group g on, of the same 256. Two roundings there, as the codec says.
FLASHINFER_INLINE Lanes stored_scales(const Place& p, Raw row, long g, int n) {
    const Codec& c = p.codec;
    if (c.scale == Scale::f16) return n < LANES ? load_part<Type::f16>(row + 2 * g, n) : load<Type::f16>(row + 2 * g);
    if (c.scale == Scale::f32) return load_part<Type::f32>(row + 4 * g, n);
    if (c.scale == Scale::e8m0) return powers(row + g);
    float mean, largest;
    std::memcpy(&mean, row, 4);
    std::memcpy(&largest, row + 4 + g / 256 * 4, 4);
    return add(mul(look_up(c.map.data(), row + p.nested + g), broadcast(largest)), broadcast(mean));
}

// Up to sixteen zero-points from group g on, as they are added: exact.
FLASHINFER_INLINE Lanes zero_points(const Place& p, Raw row, long g, int n) {
    if (p.codec.zero == Zero::f16) return load_part<Type::f16>(row + p.zeros + 2 * g, n);
    return mul(sub(broadcast(0), load_part<Type::int8>(row + p.zeros + g, n)), load_part<Type::f16>(row + 2 * g, n));
}

// Scales of the groups of columns [from, to) times the unit, then times `factor`; zeros behind them. Returns how many.
FLASHINFER_INLINE long load_scales(const Place& p, Raw row, long from, long to, float factor, float* out) {
    const long first = p.group(from), count = p.group(to - 1) + 1 - first;
    const Lanes unit = broadcast(p.unit), times = broadcast(factor);
    long i = 0;
    if (p.codec.scale == Scale::f16)  // as far as whole loads stay within the row: codes lie behind the scales
        for (; i < count && 2 * (first + i + LANES) <= p.codes + p.stored / 2; i += LANES)
            store(out + i, mul(mul(load<Type::f16>(row + 2 * (first + i)), unit), times));
    for (long n; i < count; i += n) {
        n = least(LANES, least(count - i, 256 - ((first + i) & 255)));
        const Lanes scales = mul(mul(stored_scales(p, row, first + i, int(n)), unit), times);
        n < LANES ? store_part(out + i, scales, int(n)) : store(out + i, scales);
    }
    store(out + count, broadcast(0));
    return count;
}

// Which scale each lane of a block has, of those from the block's first column k on; a lane has N columns of its own
// of every 32.
template <int N> FLASHINFER_INLINE const std::int32_t* groups_of_lanes(const Place& p, long k, std::int32_t* lanes) {
    for (int j = 0; j < LANES; j++) lanes[j] = std::int32_t(p.group(k + j / (CHUNK / N) * CHUNK) - p.group(k));
    return lanes;
}

// The values of sixteen columns from k on, before their scale; HALF is 1 where k is no multiple of 32.
template <Form F> struct Values {
    Sixteen sixteen;
    const float* table;

    FLASHINFER_METHOD explicit Values(const Codec& c) : sixteen(load_sixteen(c.table.data())), table(c.table.data()) {}
    template <int HALF> FLASHINFER_METHOD Lanes at(Raw codes, long k) const {
        if constexpr (F == Form::nibbles) return nibbles<HALF>(sixteen, codes + (k - HALF * LANES) / 2);
        else if constexpr (F == Form::integers) return load<Type::int8>(codes + k);
        else if constexpr (F == Form::e4m3) return e4m3(codes + k);
        else return look_up(table, codes + k);
    }
};

// Asks for the cache lines of R rows that begin with the codes of column k, where lines do.
template <bool NIBBLES, int R> FLASHINFER_INLINE void prefetch(const Raw* codes, long k) {
    const long at = NIBBLES ? k / 2 : k;
    if (at % LINE) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) __builtin_prefetch(codes[r] + at, 0, 2);
}
// Asks for the scales of a row that will be read from column `from` on.
FLASHINFER_INLINE void prefetch_scales(const Place& p, Raw row, long from, long to) {
    const long size = p.codec.scale == Scale::f16 ? 2 : p.codec.scale == Scale::f32 ? 4 : 1;
    for (long at = size * p.group(from); at < size * (p.group(to - 1) + 1); at += LINE)
        __builtin_prefetch(row + at, 0, 2);
}
