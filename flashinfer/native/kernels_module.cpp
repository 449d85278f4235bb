// What Python sees of the kernels: arrays are checked here, computed with in engine.cpp, the GIL released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "engine.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace flashinfer;

namespace {

template <class T, int N> using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Floats = Array<float, 2>;
using ConstFloats = Array<const float, 2>;
using Vector = Array<const float, 1>;
using Bytes = Array<const std::uint8_t, 1>;
using OpenBytes = Array<std::uint8_t, 1>;
using Index = Array<const std::int64_t, 2>;
using IndexRow = Array<const std::int64_t, 1>;
using Cache = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using OpenCache = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* what) {
    if (!holds) throw nb::value_error(what);
}

void plain_codec(Codec* self, int type) {
    require(type >= 0 && type < int(Type::codes), "no such codec");
    new (self) Codec();
    self->type = Type(type);
}

void require_outliers(const Codec& codec, long columns) {
    require(codec.outliers.empty() || codec.outliers.back() < columns, "an outlier beyond the columns");
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (int i = 0; i < variants().count; i++)
        if (variants().at[i].supported) names.emplace_back(variants().at[i].table->name);
    return names;
}

const Table& table_named(const std::string& name) {
    for (int i = 0; i < variants().count; i++) {
        const Variant& variant = variants().at[i];
        if (variant.supported && (name.empty() || name == variant.table->name)) return *variant.table;
    }
    throw nb::value_error("no such instruction set on this processor");
}

void construct(Engine* self, int threads, const std::string& name) {
    require(threads >= 1 && threads < 1024, "threads must lie in 1..1023");
    new (self) Engine(threads, table_named(name));
}

void linear(Engine& self, Floats out, long first, ConstFloats x, Bytes weights, const Codec& codec, long rows,
            long cols) {
    require_outliers(codec, cols);
    require(rows >= 0 && cols >= 1 && long(weights.size()) >= rows * codec.bytes(cols), "weights: too few bytes");
    require(long(x.shape(1)) == cols && x.shape(0) == out.shape(0), "x does not fit the weights or out");
    require(first >= 0 && first + rows <= long(out.shape(1)), "out has no place for these rows");
    nb::gil_scoped_release free;
    self.linear(out.data() + first, out.shape(1), x.data(), x.shape(0), weights.data(), codec, rows, cols);
}

void require_row(const Part& part, long values, long bundle) {
    require(part.offset < 0 || part.codec, "a part needs its codec");
    require(part.offset < 0 || part.offset + part.codec->bytes(values) <= bundle, "a part ends behind its bundle");
    if (part.offset >= 0) require_outliers(*part.codec, values);
}

void require_bias(const Part& part, long bundle) {
    require(part.offset < 0 || !part.codec || part.codec->type < Type::int8, "a bias is f32, f16 or bf16");
    require_row(part, 1, bundle);
}

void require_bundles(const Bytes& memory, const Index& offsets, long bundle) {
    const std::int64_t last = std::int64_t(memory.size()) - bundle;
    for (size_t i = 0; i < offsets.size(); i++)
        require(offsets.data()[i] >= 0 && offsets.data()[i] <= last, "a bundle lies outside of the memory");
}

void decide(Engine& self, Floats out, ConstFloats x, Index index, Bytes memory, Index offsets, long bundle, const Codec* rows,
            long rows_at, const Codec* bias, long bias_at) {
    const long width = x.shape(1), neurons = out.shape(1);
    const Part parts[] = {{rows, rows_at}, {bias, bias_at}};
    require(rows_at >= 0, "a bundle needs its decision row");
    require_row(parts[0], width, bundle);
    require_bias(parts[1], bundle);
    require(x.shape(0) == out.shape(0), "out and x differ in tokens");
    require(index.shape(0) == offsets.shape(0) && index.shape(1) == offsets.shape(1),
            "index and offsets differ in shape");
    for (size_t i = 0; i < index.size(); i++) require(index.data()[i] < neurons, "an index beyond the neurons");
    require_bundles(memory, offsets, bundle);
    nb::gil_scoped_release free;
    self.decide(out.data(), neurons, x.data(), x.shape(0), width,
                {memory.data(), index.data(), offsets.data(), long(index.size()), parts[0], parts[1]});
}

// Parts are (codec, byte offset in the bundle), the offset below 0 where there is none.
void ffn(Engine& self, Floats acc, ConstFloats x, Array<const float, 3> fired, Bytes memory, Index offsets, long bundle,
         const Codec* up, long up_at, const Codec* bias, long bias_at, const Codec* down, long down_at,
         int up_activation) {
    const long tokens = x.shape(0), width = x.shape(1);
    const Part parts[] = {{up, up_at}, {bias, bias_at}, {down, down_at}};
    require_row(parts[0], width, bundle);
    require_bias(parts[1], bundle);
    require_row(parts[2], width, bundle);
    require(down_at >= 0, "a bundle needs its down row");
    require(up_activation >= -1 && up_activation <= int(LAST_ACTIVATION), "no such activation");
    require(long(acc.shape(0)) == tokens && long(acc.shape(1)) == width, "acc and x differ in shape");
    require(fired.shape(0) == offsets.shape(0) && long(fired.shape(1)) == tokens && fired.shape(2) == offsets.shape(1) &&
                fired.shape(2) <= 64, "fired does not fit x and offsets");
    require_bundles(memory, offsets, bundle);
    nb::gil_scoped_release free;
    self.ffn(acc.data(), x.data(), tokens, width,
             {fired.data(), memory.data(), offsets.data(), long(fired.shape(0)), long(fired.shape(2)), parts[0],
              parts[1], parts[2], up_activation});
}

Type cache_type(nb::dlpack::dtype type) {
    if (type == nb::dtype<std::uint8_t>()) return Type::int8;
    require(type == nb::dtype<std::uint16_t>() || type == nb::dtype<float>(),
            "a cache is float32, float16 seen as uint16, or rows of int8g32 as uint8");
    return type == nb::dtype<float>() ? Type::f32 : Type::f16;
}

// Values of a head, of `width` values in `heads` heads, whose rows have the cache's last dimension.
long head_dim(Type type, long width, long heads, long last) {
    require(heads > 0 && width % heads == 0, "x does not fit the heads");
    const long dim = width / heads;
    require(last == (type == Type::int8 ? row_bytes(type, dim) : dim), "x does not fit the cache");
    return dim;
}

void append(Engine& self, OpenCache cache, long at, ConstFloats x, long skip, long count) {
    const Type type = cache_type(cache.dtype());
    const long heads = cache.shape(0), capacity = cache.shape(1), dim = head_dim(type, x.shape(1), heads, cache.shape(2));
    require(skip >= 0 && count >= 0 && skip + count <= long(x.shape(0)), "x has no such rows");
    require(at >= 0 && at + count <= capacity, "positions beyond the cache");
    nb::gil_scoped_release free;
    self.append(static_cast<std::uint8_t*>(cache.data()), type, x.data() + skip * heads * dim, count, heads, capacity,
                dim, at);
}

void attend(Engine& self, Floats out, ConstFloats q, Cache k, Cache v, long first, long heads, long window, float cap,
            std::optional<Vector> slopes, std::optional<Vector> sinks) {
    for (int i = 0; i < 2; i++) require(k.dtype() == v.dtype() && k.shape(i) == v.shape(i), "keys and values differ");
    const KeyValues kv{static_cast<const std::uint8_t*>(k.data()), static_cast<const std::uint8_t*>(v.data()),
                       cache_type(k.dtype()), long(k.shape(0)), long(k.shape(1)),
                       head_dim(cache_type(k.dtype()), q.shape(1), heads, k.shape(2)),
                       head_dim(cache_type(k.dtype()), out.shape(1), heads, v.shape(2))};
    const long tokens = q.shape(0);
    require(out.shape(0) == q.shape(0), "q and out differ in tokens");
    require(kv.heads > 0 && heads % kv.heads == 0, "heads are no multiple of the heads in the cache");
    require(first >= 0 && first + tokens <= kv.capacity, "positions beyond the cache");
    require(window > 0 && cap >= 0, "a window or a cap below what it can be");
    for (const auto& each : {slopes, sinks}) require(!each || long(each->size()) == heads, "slopes or sinks do not fit the heads");
    const Scoring scoring{window, cap, slopes ? slopes->data() : nullptr, sinks ? sinks->data() : nullptr};
    nb::gil_scoped_release free;
    self.attend(out.data(), q.data(), tokens, kv, first, heads, scoring);
}

void norm(Engine& self, Floats out, ConstFloats x, std::optional<Vector> weight, std::optional<Vector> bias, bool center,
          float eps) {
    require(out.shape(0) == x.shape(0) && out.shape(1) == x.shape(1), "out and x differ in shape");
    require(!weight || weight->size() == x.shape(1), "weight does not fit x");
    require(!bias || bias->size() == x.shape(1), "bias does not fit x");
    nb::gil_scoped_release free;
    self.norm(out.data(), x.data(), x.shape(0), x.shape(1), weight ? weight->data() : nullptr,
              bias ? bias->data() : nullptr, center, eps);
}

void rotate(Engine& self, Floats out, ConstFloats x, long dim, ConstFloats cos, ConstFloats sin) {
    const long tokens = x.shape(0), width = x.shape(1), half = cos.shape(1);
    require(long(out.shape(0)) == tokens && long(out.shape(1)) == width, "out and x differ in shape");
    require(dim > 0 && width % dim == 0 && 2 * half <= dim, "the width is no multiple of the head, or the head too small");
    require(long(cos.shape(0)) == tokens && long(sin.shape(0)) == tokens && long(sin.shape(1)) == half,
            "cos and sin do not fit x");
    nb::gil_scoped_release free;
    self.rotate(out.data(), x.data(), tokens, width / dim, dim, cos.data(), sin.data(), half);
}

void copy(Engine& self, OpenBytes memory, IndexRow targets, IndexRow sources, long size) {
    require(size >= 0 && targets.size() == sources.size(), "targets and sources differ in number");
    const std::int64_t last = std::int64_t(memory.size()) - size;
    for (size_t i = 0; i < targets.size(); i++)
        require(targets.data()[i] >= 0 && targets.data()[i] <= last && sources.data()[i] >= 0 && sources.data()[i] <= last,
                "a record lies outside of the memory");
    nb::gil_scoped_release free;
    self.copy(memory.data(), targets.data(), sources.data(), long(targets.size()), size);
}

void fire(Engine& self, Array<float, 3> out, ConstFloats gate, int activation, float threshold, Index index) {
    const long tokens = gate.shape(0), neurons = gate.shape(1);
    require(activation >= 0 && activation <= int(LAST_ACTIVATION), "no such activation");
    require(out.shape(0) == index.shape(0) && long(out.shape(1)) == tokens && out.shape(2) == index.shape(1),
            "out does not fit gate and index");
    for (size_t i = 0; i < index.size(); i++) require(index.data()[i] < neurons, "an index beyond the neurons");
    nb::gil_scoped_release free;
    self.fire(out.data(), gate.data(), tokens, neurons, Activation(activation), threshold, index.data(),
              index.shape(0), index.shape(1));
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.def("available", available);
    nb::class_<Codec>(m, "Codec")
        .def("__init__", plain_codec, "type"_a)
        .def_static("codes", code_codec, "bits"_a, "group"_a, "table"_a, "scale"_a, "unit"_a, "zero"_a, "map"_a,
                    "outliers"_a)
        .def_ro("integers", &Codec::fixed);
    nb::class_<Engine>(m, "Engine")
        .def("__init__", construct, "threads"_a, "instructions"_a = "")
        .def_prop_ro("name", &Engine::name)
        .def_prop_ro("scratch_bytes", &Engine::scratch_bytes)
        // noconvert: a converted copy of an output would swallow the result
        .def("linear", linear, "out"_a.noconvert(), "first"_a, "x"_a.noconvert(), "weights"_a.noconvert(), "codec"_a,
             "rows"_a, "cols"_a)
        .def("decide", decide, "out"_a.noconvert(), "x"_a.noconvert(), "index"_a.noconvert(), "memory"_a.noconvert(),
             "offsets"_a.noconvert(), "bundle"_a, "rows"_a.none(), "rows_at"_a, "bias"_a.none(), "bias_at"_a)
        .def("ffn", ffn, "acc"_a.noconvert(), "x"_a.noconvert(), "fired"_a.noconvert(), "memory"_a.noconvert(),
             "offsets"_a.noconvert(), "bundle"_a, "up"_a.none(), "up_at"_a, "bias"_a.none(), "bias_at"_a, "down"_a.none(), "down_at"_a,
             "up_activation"_a)
        .def("append", append, "cache"_a.noconvert(), "at"_a, "x"_a.noconvert(), "skip"_a, "count"_a)
        .def("attend", attend, "out"_a.noconvert(), "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "first"_a,
             "heads"_a, "window"_a, "cap"_a, "slopes"_a.noconvert().none(), "sinks"_a.noconvert().none())
        .def("norm", norm, "out"_a.noconvert(), "x"_a.noconvert(), "weight"_a.noconvert().none(),
             "bias"_a.noconvert().none(), "center"_a, "eps"_a)
        .def("rotate", rotate, "out"_a.noconvert(), "x"_a.noconvert(), "dim"_a, "cos"_a.noconvert(), "sin"_a.noconvert())
        .def("fire", fire, "out"_a.noconvert(), "gate"_a.noconvert(), "activation"_a, "threshold"_a, "index"_a.noconvert())
        .def("copy", copy, "memory"_a.noconvert(), "targets"_a.noconvert(), "sources"_a.noconvert(), "size"_a)
        .def("close", &Engine::close, nb::call_guard<nb::gil_scoped_release>());
}
