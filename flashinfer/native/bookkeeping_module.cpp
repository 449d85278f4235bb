// Python's door to the bookkeeping. It keeps the GIL: a call takes microseconds.
#include "bookkeeping_plan.hpp"
#include "bookkeeping_window.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <utility>

namespace nb = nanobind;
using namespace nb::literals;

namespace flashinfer {
namespace {

using Column = nb::ndarray<const Number, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<Number, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, Number, nb::ndim<1>>;

Result result(Numbers &&numbers) {
  auto kept = std::make_unique<Numbers>(std::move(numbers));
  Numbers &values = *kept;
  nb::capsule owner(kept.get(), [](void *object) noexcept { delete static_cast<Numbers *>(object); });
  kept.release();
  return Result(values.data(), {values.size()}, owner);
}

nb::tuple plan(const Column &records, Number record_bytes, Number offset, Number alignment, Number max_gap,
               Number max_extent) {
  Reads reads = plan_reads({records.data(), records.size()}, {record_bytes, offset, alignment, max_gap, max_extent});
  return nb::make_tuple(result(std::move(reads.places)), result(std::move(reads.offsets)),
                        result(std::move(reads.lengths)), result(std::move(reads.targets)));
}

// The policy and the table of slots, which Python sees too.
struct Cache {
  Table slot_of;
  Window window;
};

void make(Cache *place, Table slot_of, Number slots, Number window, bool keeps, double half_life,
          float piles_per_halving, float steps, std::vector<float> added) {
  if (slots < 0 || window < 0 || added.empty())
    throw nb::value_error("no such cache");
  Scale scale{half_life, piles_per_halving, steps, std::move(added)};
  const auto records = static_cast<Number>(slot_of.size());
  new (place) Cache{slot_of, Window(records, slots, window, keeps, std::move(scale), slot_of.data())};
}

View checked(const Cache &cache, const Column &records) {
  const View all{records.data(), records.size()};
  for (const Number record : all)
    if (record < 0 || record >= cache.window.records())
      throw nb::index_error("no such record");
  return all;
}

nb::tuple step(Cache &cache, const Column &needed, const std::vector<Column> &recent) {
  std::vector<View> sets;
  for (const Column &active : recent)
    sets.push_back(checked(cache, active));
  Change change = cache.window.step(checked(cache, needed), sets);
  return nb::make_tuple(result(std::move(change.misses)), result(std::move(change.insert_records)),
                        result(std::move(change.placed.insert_slots)), result(std::move(change.placed.move_from)),
                        result(std::move(change.placed.move_to)));
}

Result preload(Cache &cache, const Column &records) { return result(cache.window.preload(checked(cache, records))); }

nb::list active(const Cache &cache) {
  nb::list all;
  for (Numbers &records : cache.window.active())
    all.append(result(std::move(records)));
  return all;
}

} // namespace
} // namespace flashinfer

NB_MODULE(_bookkeeping, m) {
  using namespace flashinfer;
  m.def("plan", &plan, "records"_a, "record_bytes"_a, "offset"_a, "alignment"_a, "max_gap"_a, "max_extent"_a);
  nb::class_<Cache>(m, "Window")
      .def("__init__", &make, "slot_of"_a.noconvert(), "slots"_a, "window"_a, "keeps"_a, "half_life"_a,
           "piles_per_halving"_a, "steps"_a, "added"_a)
      .def_prop_ro("used", [](const Cache &cache) { return cache.window.map().used(); })
      .def("free", [](const Cache &cache) { return cache.window.map().free(); })
      .def("step", &step, "needed"_a, "recent"_a)
      .def("preload", &preload, "records"_a)
      .def("active", &active)
      .def("effective", [](const Cache &cache) { return cache.window.effective(); });
}
