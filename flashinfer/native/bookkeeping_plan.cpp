#include "bookkeeping_plan.hpp"

#include <algorithm>

namespace flashinfer {
namespace {

// Cut into pieces of `max_extent`; only the last one is shorter.
void add_run(Reads &reads, Number low, Number high, Number target, Number max_extent) {
  for (; low < high; low += max_extent, target += max_extent) {
    reads.offsets.push_back(low);
    reads.lengths.push_back(std::min(high - low, max_extent));
    reads.targets.push_back(target);
  }
}

} // namespace

Reads plan_reads(View records, const Knobs &knobs) {
  Reads reads;
  reads.places.reserve(records.count);
  Number run_low = 0, run_high = 0, target = 0; // the run that is being made, and where it goes
  for (const Number record : records) {
    const Number start = record * knobs.record_bytes + knobs.offset;
    const Number low = start & -knobs.alignment;
    if (reads.places.empty()) {
      run_low = low;
    } else if (low - run_high > knobs.max_gap) {
      add_run(reads, run_low, run_high, target, knobs.max_extent);
      target += run_high - run_low;
      run_low = low;
    }
    run_high = (start + knobs.record_bytes + knobs.alignment - 1) & -knobs.alignment;
    reads.places.push_back(target + start - run_low);
  }
  add_run(reads, run_low, run_high, target, knobs.max_extent);
  return reads;
}

} // namespace flashinfer
