// From missing records to reads; `flashinfer/io/plan.py` has the plain twin and the words.
#pragma once

#include "bookkeeping.hpp"

namespace flashinfer {

struct Knobs {
  Number record_bytes, offset, alignment, max_gap, max_extent;
};

struct Reads {
  Numbers places;                    // of each record
  Numbers offsets, lengths, targets; // of each read
};

// `records` are sorted and distinct, the knobs in their ranges.
Reads plan_reads(View records, const Knobs &knobs);

} // namespace flashinfer
