// Products of rows of codes with tokens. Part of codes.cpp, inside its namespace.
//
// A row's sum with a token has sixteen lanes. Of integers, every block adds to a lane the exact sum of its products,
// rounded to float32, times the product of both scales; of floats of four bits, the sum of its products times the
// scale; of those of eight bits, every PIECE of columns of a group does so. The sum over the lanes comes last, then what is in float16.

constexpr long PIECE = 512;
constexpr long PANEL_COLUMNS = 1024;  // columns of x that stay in the first cache while a panel of rows passes
constexpr int PANEL_ROWS = 32;

// Some rows: where their codes begin, and those of the rows after them; their scales from the first of a span on.
template <int R> struct Codes {
    const Place& place;
    Raw at[R], next[R];
    float scales[R][MOST_SCALES];

    FLASHINFER_METHOD Codes(const Place& p, const Raw* rows, const Raw* after) : place(p) {
        for (int r = 0; r < R; r++) at[r] = rows[r] + p.codes, next[r] = after[r] + p.codes;
    }
    FLASHINFER_METHOD void load_span(const Raw* rows, long from, long to) {
        for (int r = 0; r < R; r++) load_scales(place, rows[r], from, to, 1, scales[r]);
    }
};

// -- blocks of 64 bytes

template <Form F, bool FIXED>
using BlockOf = std::conditional_t<!FIXED, FloatBlock, std::conditional_t<F == Form::nibbles, NibbleBlock, ByteBlock>>;
FLASHINFER_INLINE Bytes bytes_of(const std::int8_t* p) { return load_bytes(reinterpret_cast<Raw>(p)); }

// What the tables of a codec are for a block: bytes for products of integers, else floats.
struct Tables {
    Bytes bytes;
    Sixteen floats;
};

// The sums of a block's products times the scale, before they are added.
FLASHINFER_INLINE Lanes plus_products(const NibbleBlock& x, Bytes raw, const Tables& tables, Lanes scale, Lanes acc) {
    const Bytes low = look_up(tables.bytes, low_nibbles(raw)), high = look_up(tables.bytes, high_nibbles(raw));
    Ints sum = dot(dot(no_ints(), low, bytes_of(x.high[0])), high, bytes_of(x.high[1]));
    sum = add(times_255(sum), load_ints(reinterpret_cast<Raw>(x.start)));
    sum = dot(dot(sum, low, bytes_of(x.low[0])), high, bytes_of(x.low[1]));
    return fma(floats(sum), mul(scale, load(x.scale)), acc);
}
FLASHINFER_INLINE Lanes plus_products(const ByteBlock& x, Bytes raw, const Tables&, Lanes scale, Lanes acc) {
    const Ints high = times_255(dot_signed(no_ints(), raw, bytes_of(x.high[0])));
    const Ints sum = dot_signed(add(high, load_ints(reinterpret_cast<Raw>(x.start))), raw, bytes_of(x.low[0]));
    return fma(floats(sum), mul(scale, load(x.scale)), acc);
}
FLASHINFER_INLINE Lanes plus_products(const FloatBlock& x, Bytes raw, const Tables& tables, Lanes scale, Lanes acc) {
    Lanes sum = mul(nibbles_of<0>(tables.floats, raw), load(x.x[0]));
    sum = fma(nibbles_of<1>(tables.floats, raw), load(x.x[1]), sum);
    sum = fma(nibbles_of<2>(tables.floats, raw), load(x.x[2]), sum);
    sum = fma(nibbles_of<3>(tables.floats, raw), load(x.x[3]), sum);
    sum = fma(nibbles_of<4>(tables.floats, raw), load(x.x[4]), sum);
    sum = fma(nibbles_of<5>(tables.floats, raw), load(x.x[5]), sum);
    sum = fma(nibbles_of<6>(tables.floats, raw), load(x.x[6]), sum);
    sum = fma(nibbles_of<7>(tables.floats, raw), load(x.x[7]), sum);
    return fma(sum, scale, acc);
}

// One block of columns, from k on, of which the row may have only the first n bytes; its scales begin `group` behind
// the span's.
template <Form F, bool FIXED, int R, int T, bool PART>
FLASHINFER_INLINE void add_block(const Codes<R>& w, const std::uint8_t* x, long x_stride, long k, int n, long group,
                                 const Tables& tables, Picks picks, Lanes (&acc)[R][T]) {
    using Block = BlockOf<F, FIXED>;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        const Raw at = w.at[r] + (F == Form::nibbles ? k / 2 : k);
        const Bytes raw = PART ? load_bytes_part(at, n) : load_bytes(at);
        const Lanes scale = pick(w.scales[r] + group, picks);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
            acc[r][t] = plus_products(reinterpret_cast<const Block*>(x + t * x_stride)[k / Block::COLUMNS], raw, tables,
                                      scale, acc[r][t]);
    }
}

template <Form F, bool FIXED, int R, int T, bool AHEAD>
FLASHINFER_INLINE void add_blocks(const Codes<R>& w, const std::uint8_t* x, long x_stride, long from, long to,
                                  Lanes (&acc)[R][T]) {
    constexpr bool NIBBLES = F == Form::nibbles;
    constexpr long COLUMNS = BlockOf<F, FIXED>::COLUMNS;
    const Place& p = w.place;
    alignas(64) std::int32_t lanes[LANES];
    const Picks picks = load_picks(groups_of_lanes<NIBBLES ? 8 : 4>(p, 0, lanes));
    const Tables tables{every_sixteen(p.codec.nibbles.data()), load_sixteen(p.codec.table.data())};
    const long whole = least(to, p.stored / COLUMNS * COLUMNS), first = p.group(from);
    long k = from;
    for (; k < whole; k += COLUMNS) {
        if constexpr (AHEAD) prefetch<NIBBLES, R>(w.next, k);
        add_block<F, FIXED, R, T, false>(w, x, x_stride, k, BYTES, p.group(k) - first, tables, picks, acc);
    }
    if (k >= to) return;
    const int n = int(NIBBLES ? (p.stored - k) / 2 : p.stored - k);
    add_block<F, FIXED, R, T, true>(w, x, x_stride, k, n, p.group(k) - first, tables, picks, acc);
}

// -- floats of eight bits

template <Form F, int HALF, int R, int T>
FLASHINFER_INLINE void add_sixteen(const Codes<R>& w, const Values<F>& values, const std::uint8_t* x, long x_stride,
                                   long k, Lanes (&part)[R][T]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        const Lanes row = values.template at<HALF>(w.at[r], k);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
            part[r][t] = fma(row, load(reinterpret_cast<const float*>(x + t * x_stride) + k), part[r][t]);
    }
}

template <Form F, int R, int T, bool AHEAD>
FLASHINFER_INLINE void add_floats(const Codes<R>& w, const std::uint8_t* x, long x_stride, long from, long to,
                                  Lanes (&acc)[R][T]) {
    const Values<F> values(w.place.codec);
    const long piece = least(w.place.codec.group, PIECE);
    for (long begin = from; begin < to; begin += piece) {
        const long end = least(to, begin + piece);
        Lanes part[R][T];
        for (int i = 0; i < R * T; i++) part[i / T][i % T] = broadcast(0);
        long k = begin;
        for (; k + CHUNK <= end; k += CHUNK) {
            if constexpr (AHEAD) prefetch<false, R>(w.next, k);
            add_sixteen<F, 0, R, T>(w, values, x, x_stride, k, part);
            add_sixteen<F, 1, R, T>(w, values, x, x_stride, k + LANES, part);
        }
        if (k < end) {
            add_sixteen<F, 0, R, T>(w, values, x, x_stride, k, part);
            if (k + LANES < end) add_sixteen<F, 1, R, T>(w, values, x, x_stride, k + LANES, part);
        }
        const long g = w.place.group(begin) - w.place.group(from);
#pragma GCC unroll 16
        for (int i = 0; i < R * T; i++)
            acc[i / T][i % T] = fma(part[i / T][i % T], broadcast(w.scales[i / T][g]), acc[i / T][i % T]);
    }
}

// -- rows and tokens

template <Form F, bool FIXED, int R, int T, bool AHEAD>
FLASHINFER_INLINE void accumulate(Codes<R>& w, const Raw* rows, const std::uint8_t* x, long x_stride, long from, long to,
                                  Lanes (&acc)[R][T]) {
    w.load_span(rows, from, to);
    if constexpr (FIXED || F == Form::nibbles) add_blocks<F, FIXED, R, T, AHEAD>(w, x, x_stride, from, to, acc);
    else add_floats<F, R, T, AHEAD>(w, x, x_stride, from, to, acc);
}

template <Form F, bool FIXED, int R, bool AHEAD>
FLASHINFER_INLINE void decode_rows(const Place& p, const Raw* rows, const std::uint8_t* x, float* out) {
    Codes<R> w(p, rows, AHEAD ? rows + R : rows);
    Lanes acc[R][1];
    for (int r = 0; r < R; r++) acc[r][0] = broadcast(0);
    for (long from = 0; from < p.width; from += MOST_COLUMNS) {
        const long to = least(p.width, from + MOST_COLUMNS);
        if constexpr (AHEAD)
            for (int r = 0; r < R; r++) prefetch_scales(p, rows[R + r], from, to);
        accumulate<F, FIXED, R, 1, AHEAD>(w, rows, x, 0, from, to, acc);
    }
    for (int r = 0; r < R; r++) out[r] = reduce(acc[r][0]);
}

template <Form F, bool FIXED>
void decode_dots(const Place& p, Rows rows, const std::uint8_t* x, float* out) {
    constexpr int R = CODE_ROWS;
    int r = 0;
    for (; r + R <= rows.count; r += R) {
        if (r + 2 * R <= rows.count + rows.ahead) decode_rows<F, FIXED, R, true>(p, rows.at + r, x, out + r);
        else decode_rows<F, FIXED, R, false>(p, rows.at + r, x, out + r);
    }
    for (; r < rows.count; r++) decode_rows<F, FIXED, 1, false>(p, rows.at + r, x, out + r);
}

template <Form F, bool FIXED, int R, int T>
FLASHINFER_INLINE void add_panel(const Place& p, const Raw* rows, const std::uint8_t* x, long x_stride, long from,
                                 long to, Lanes* lanes) {
    Codes<R> w(p, rows, rows);
    Lanes acc[R][T];
#pragma GCC unroll 16
    for (int i = 0; i < R * T; i++) acc[i / T][i % T] = lanes[i];
    accumulate<F, FIXED, R, T, false>(w, rows, x, x_stride, from, to, acc);
#pragma GCC unroll 16
    for (int i = 0; i < R * T; i++) lanes[i] = acc[i / T][i % T];
}

// T tokens and a panel of rows, PANEL_COLUMNS at a time: the lanes wait in memory in between.
template <Form F, bool FIXED, int T>
void panel_dots(const Place& p, const Raw* rows, int count, const std::uint8_t* x, long x_stride, float* out,
                long out_stride) {
    constexpr int R = CODE_WIDE_ROWS;
    Lanes lanes[PANEL_ROWS * T];
    for (int i = 0; i < count * T; i++) lanes[i] = broadcast(0);
    for (long from = 0; from < p.width; from += PANEL_COLUMNS) {
        const long to = least(p.width, from + PANEL_COLUMNS);
        int r = 0;
        for (; r + R <= count; r += R)
            add_panel<F, FIXED, R, T>(p, rows + r, x, x_stride, from, to, lanes + r * T);
        for (; r < count; r++) add_panel<F, FIXED, 1, T>(p, rows + r, x, x_stride, from, to, lanes + r * T);
    }
    for (int r = 0; r < count; r++)
        for (int t = 0; t < T; t++) out[t * out_stride + r] = reduce(lanes[r * T + t]);
}

template <Form F, bool FIXED>
void dots_of(const Codec& c, Rows rows, const std::uint8_t* x, long x_stride, int tokens, long width, float* out,
             long out_stride) {
    constexpr int T = CODE_WIDE_TOKENS;
    const Place p(c, width);
    int t = 0;
    for (; t + T <= tokens; t += T)
        for (int r = 0; r < rows.count; r += PANEL_ROWS)
            panel_dots<F, FIXED, T>(p, rows.at + r, int(least(PANEL_ROWS, rows.count - r)), x + t * x_stride, x_stride,
                                    out + t * out_stride + r, out_stride);
    for (; t < tokens; t++) decode_dots<F, FIXED>(p, rows, x + t * x_stride, out + t * out_stride);
}

// out += float16 values of the rows, `count` of them from byte `at` on, times floats of each token.
void add_halves(Rows rows, long at, long count, const std::uint8_t* x, long x_stride, int tokens, float* out,
                long out_stride) {
    for (int r = 0; r < rows.count; r++) {
        const Raw row = rows.at[r] + at;
        for (int t = 0; t < tokens; t++) {
            float product;
            table.dots(Type::f16, {&row, 1, 0}, reinterpret_cast<const float*>(x + t * x_stride), count, 1, count,
                       &product, 1);
            out[t * out_stride + r] += product;
        }
    }
}

// out += (centre - z) * scale of every group times the sums of x over it, which are floats of each token.
void add_centred(const Codec& c, Rows rows, long width, const std::uint8_t* x, long x_stride, int tokens, float* out,
                 long out_stride) {
    const long groups = c.groups(width), zeros = c.zeros_at(width);
    const Lanes centre = broadcast(float(c.centre));
    for (int r = 0; r < rows.count; r++)
        for (int t = 0; t < tokens; t++) {
            const float* sums = reinterpret_cast<const float*>(x + t * x_stride);
            Lanes sum = broadcast(0);
            for (long g = 0; g < groups; g += LANES) {
                const int n = int(least(LANES, groups - g));
                const Lanes z = sub(centre, load_part<Type::int8>(rows.at[r] + zeros + g, n));
                sum = fma(mul(z, load_part<Type::f16>(rows.at[r] + 2 * g, n)), load_part(sums + g, n), sum);
            }
            out[t * out_stride + r] += reduce(sum);
        }
}

void code_dots(const Codec& c, Rows rows, const std::uint8_t* x, long x_stride, int tokens, long width, float* out,
               long out_stride) {
    constexpr decltype(&dots_of<Form::nibbles, true>) of[] = {
        dots_of<Form::nibbles, false>, dots_of<Form::integers, true>, dots_of<Form::e4m3, false>,
        dots_of<Form::bytes, false>, dots_of<Form::nibbles, true>};
    of[c.fixed && c.form == Form::nibbles ? 4 : int(c.form)](c, rows, x, x_stride, tokens, width, out, out_stride);
    const long sums = main_bytes(c, width), outliers = sums + sums_bytes(c, width);
    const long groups = c.groups(width);
    if (sums_twice(c)) add_halves(rows, 0, 2 * groups, x + sums, x_stride, tokens, out, out_stride);
    else if (c.zero == Zero::u8) add_centred(c, rows, width, x + sums, x_stride, tokens, out, out_stride);
    else if (c.zeros()) add_halves(rows, c.zeros_at(width), groups, x + sums, x_stride, tokens, out, out_stride);
    if (!c.outliers.empty())
        add_halves(rows, c.outliers_at(width), long(c.outliers.size()), x + outliers, x_stride, tokens, out, out_stride);
}
