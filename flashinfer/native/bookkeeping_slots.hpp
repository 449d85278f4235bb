// Records and slots, both ways; `flashinfer/cache/slotmap.py` has the plain twin and the words.
#pragma once

#include "bookkeeping.hpp"

namespace flashinfer {

struct Placed {
  Numbers insert_slots, move_from, move_to;
};

class SlotMap {
public:
  // `slot_of`, one for each record, stays the caller's; only this writes to it.
  SlotMap(Number records, Number slots, Number *slot_of);

  Number slots() const { return slots_; }
  Number used() const { return used_; }
  Number free() const { return static_cast<Number>(record_in_.size()) - used_; }
  bool holds(Number record) const { return slot_of_[record] >= 0; }

  Placed replace(View drop, View insert);

private:
  void close_holes(Placed &placed, const Numbers &holes, std::size_t filled, Number used);

  const Number slots_;
  Number used_ = 0;
  Number *slot_of_;
  Numbers record_in_;
};

} // namespace flashinfer
