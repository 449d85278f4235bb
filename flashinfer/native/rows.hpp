// Columns of a row of weights, whatever its codec: part of kernels.cpp, inside its namespace.
//
// An int8 row is its scales, then, `integers` bytes behind its start, its integers. A value is an integer times the
// scale of its group, which is exact in float32: so sums have the bits that the decoded row would give.

constexpr long LINE = 64;             // bytes of a cache line
constexpr long SPAN = GROUP * LANES;  // columns whose scales are converted together

// The scales of R rows over a span of columns, where each is then one broadcast. Plain codecs have none.
template <Type C, int R> struct Scales {
    float of[C == Type::int8 ? R : 1][LANES];

    // Those of the span that column k is in. Behind the last scale are integers: only bytes of the row are read.
    FLASHINFER_METHOD void load_span(const Raw* rows, long k) {
        if constexpr (C == Type::int8)
            for (int r = 0; r < R; r++) store(of[r], load<Type::f16>(rows[r] + k / SPAN * SPAN / GROUP * 2));
    }
    // The same when a span begins; with AHEAD the scales of the next R rows are asked for.
    template <bool AHEAD> FLASHINFER_METHOD void reach(const Raw* rows, const Raw* next, long k) {
        if (C != Type::int8 || k % SPAN) return;
        load_span(rows, k);
        if constexpr (AHEAD)
            for (int r = 0; r < R; r++) __builtin_prefetch(next[r] + k / GROUP * 2, 0, 2);
    }
    FLASHINFER_METHOD Lanes at(int r, long k) const {
        return broadcast(C == Type::int8 ? of[r][k / GROUP % LANES] : 0.0f);
    }
};

// Sixteen columns from k on, a multiple of LANES, or the first n of them; `values` is where the row's values begin, or
// its integers.
template <Type C> FLASHINFER_INLINE Lanes columns(Raw values, long k, Lanes scale) {
    Lanes found = load<C>(values + k * SIZE<C>);
    return C == Type::int8 ? mul(found, scale) : found;
}
template <Type C> FLASHINFER_INLINE Lanes columns_part(Raw values, long k, int n, Lanes scale) {
    Lanes found = load_part<C>(values + k * SIZE<C>, n);
    return C == Type::int8 ? mul(found, scale) : found;
}

// Asks for the cache lines of R rows that begin with column k, where lines do.
template <Type C, int R> FLASHINFER_INLINE void prefetch(const Raw* rows, long integers, long k) {
    if (k * SIZE<C> % LINE) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) __builtin_prefetch(rows[r] + integers + k * SIZE<C>, 0, 2);
}
