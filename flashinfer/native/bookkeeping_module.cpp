// Python's door to the bookkeeping. It keeps the GIL: a call takes microseconds.
#include "bookkeeping_plan.hpp"
#include "bookkeeping_tiers.hpp"

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

// A policy and the table of slots, which Python sees too.
template <class Policy> struct Cache {
  Table slot_of;
  Policy policy;
};

Scale scale_of(double half_life, float piles_per_halving, float steps, std::vector<float> &&added) {
  if (added.empty())
    throw nb::value_error("no such cache");
  return {half_life, piles_per_halving, steps, std::move(added)};
}

void make_window(Cache<Window> *place, Table slot_of, Number slots, Number window, bool keeps, double half_life,
                 float piles_per_halving, float steps, std::vector<float> added) {
  if (slots < 0 || window < 0)
    throw nb::value_error("no such cache");
  Scale scale = scale_of(half_life, piles_per_halving, steps, std::move(added));
  const auto records = static_cast<Number>(slot_of.size());
  new (place) Cache<Window>{slot_of, Window(records, slots, window, keeps, std::move(scale), slot_of.data())};
}

void make_tiers(Cache<Tiers> *place, Table slot_of, Number near, Number far, Number window, bool keeps,
                double half_life, float piles_per_halving, float steps, std::vector<float> added) {
  if (near < 0 || far < 0 || window < 0)
    throw nb::value_error("no such cache");
  Scale scale = scale_of(half_life, piles_per_halving, steps, std::move(added));
  const auto records = static_cast<Number>(slot_of.size());
  new (place) Cache<Tiers>{slot_of, Tiers(records, near, far, window, keeps, std::move(scale), slot_of.data())};
}

template <class Policy> View checked(const Cache<Policy> &cache, const Column &records) {
  const View all{records.data(), records.size()};
  for (const Number record : all)
    if (record < 0 || record >= cache.policy.records())
      throw nb::index_error("no such record");
  return all;
}

template <class Policy>
nb::tuple step(Cache<Policy> &cache, const Column &needed, const std::vector<Column> &recent) {
  std::vector<View> sets;
  for (const Column &active : recent)
    sets.push_back(checked(cache, active));
  Change change = cache.policy.step(checked(cache, needed), sets);
  return nb::make_tuple(result(std::move(change.misses)), result(std::move(change.insert_records)),
                        result(std::move(change.placed.insert_slots)), result(std::move(change.placed.move_from)),
                        result(std::move(change.placed.move_to)));
}

template <class Policy> Result preload(Cache<Policy> &cache, const Column &records) {
  return result(cache.policy.preload(checked(cache, records)));
}

template <class Policy> nb::list active(const Cache<Policy> &cache) {
  nb::list all;
  for (Numbers &records : cache.policy.active())
    all.append(result(std::move(records)));
  return all;
}

// What all policies have.
template <class Policy> void shared(nb::class_<Cache<Policy>> &type) {
  type.def("step", &step<Policy>, "needed"_a, "recent"_a)
      .def("preload", &preload<Policy>, "records"_a)
      .def("active", &active<Policy>)
      .def("effective", [](const Cache<Policy> &cache) { return cache.policy.effective(); });
}

} // namespace
} // namespace flashinfer

NB_MODULE(_bookkeeping, m) {
  using namespace flashinfer;
  m.def("plan", &plan, "records"_a, "record_bytes"_a, "offset"_a, "alignment"_a, "max_gap"_a, "max_extent"_a);
  nb::class_<Cache<Window>> window(m, "Window");
  window
      .def("__init__", &make_window, "slot_of"_a.noconvert(), "slots"_a, "window"_a, "keeps"_a, "half_life"_a,
           "piles_per_halving"_a, "steps"_a, "added"_a)
      .def_prop_ro("used", [](const Cache<Window> &cache) { return cache.policy.map().used(); })
      .def("free", [](const Cache<Window> &cache) { return cache.policy.map().free(); });
  shared(window);
  nb::class_<Cache<Tiers>> tiers(m, "Tiers");
  tiers
      .def("__init__", &make_tiers, "slot_of"_a.noconvert(), "near"_a, "far"_a, "window"_a, "keeps"_a, "half_life"_a,
           "piles_per_halving"_a, "steps"_a, "added"_a)
      .def_prop_ro("used", [](const Cache<Tiers> &cache) { return cache.policy.used(); })
      .def("free", [](const Cache<Tiers> &cache) { return cache.policy.free(); });
  shared(tiers);
}
