#include "bookkeeping_slots.hpp"

#include <algorithm>
#include <utility>

namespace flashinfer {

SlotMap::SlotMap(Number records, Number slots, Number *slot_of)
    : slots_(slots), slot_of_(slot_of), record_in_(std::min(slots, records), -1) {
  std::fill_n(slot_of, records, -1);
}

Placed SlotMap::replace(View drop, View insert) {
  Placed placed;
  for (const Number record : drop)
    record_in_[std::exchange(slot_of_[record], -1)] = -1;
  Numbers holes; // in order: looking at every slot takes less time than sorting
  for (Number slot = 0; drop.count && slot < used_; ++slot)
    if (record_in_[slot] < 0)
      holes.push_back(slot);
  const std::size_t filled = std::min(holes.size(), insert.count);
  const Number used = used_ + static_cast<Number>(insert.count) - static_cast<Number>(holes.size());
  placed.insert_slots.assign(holes.begin(), holes.begin() + static_cast<std::ptrdiff_t>(filled));
  for (Number slot = used_; placed.insert_slots.size() < insert.count; ++slot)
    placed.insert_slots.push_back(slot);
  if (used < used_)
    close_holes(placed, holes, filled, used);
  for (std::size_t i = 0; i < insert.count; ++i) {
    record_in_[placed.insert_slots[i]] = insert.data[i];
    slot_of_[insert.data[i]] = placed.insert_slots[i];
  }
  used_ = used;
  return placed;
}

void SlotMap::close_holes(Placed &placed, const Numbers &holes, std::size_t filled, Number used) {
  for (Number slot = used; slot < used_; ++slot) {
    const Number record = std::exchange(record_in_[slot], -1);
    if (record < 0)
      continue;
    const Number hole = holes[filled + placed.move_from.size()];
    placed.move_from.push_back(slot);
    placed.move_to.push_back(hole);
    record_in_[hole] = record;
    slot_of_[record] = hole;
  }
}

} // namespace flashinfer
