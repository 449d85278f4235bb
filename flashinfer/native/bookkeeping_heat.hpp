// How used a record is, and the least used of those that may go; `flashinfer/cache/heat.py` has the plain twin and the
// words. Both give the same scores to the last bit: what is added to one comes from a table that Python makes.
#pragma once

#include "bookkeeping_slots.hpp"

#include <deque>
#include <map>

namespace flashinfer {

struct Scale {
  double half_life;
  float piles_per_halving, steps;
  std::vector<float> added; // by the difference of two scores, in `steps` of a halving
};

class Heat {
public:
  Heat(Number records, Scale scale);

  void use(View records, Number stamp);
  Number stamp(Number record) const { return stamp_[record]; }
  float score(Number record) const { return score_[record]; }
  Number pile(Number record) const;
  bool alive(Number record, Number stamp, const SlotMap &slots) const {
    return stamp_[record] == stamp && slots.holds(record);
  }
  void offer(const Numbers &records, Number stamp);
  Numbers coldest(const Numbers &rivals, const SlotMap &slots); // rivals: the highest pile first
  void compact(const SlotMap &slots, std::size_t limit);

private:
  struct Entry {
    Number stamp;
    Numbers records;
    std::size_t next = 0; // those before it were taken, or found dead
  };
  using Pile = std::deque<Entry>;

  std::size_t take(Pile &entries, std::size_t count, const SlotMap &slots, Numbers &taken) const;
  void keep_alive(Pile &entries, const SlotMap &slots) const;

  const Scale scale_;
  Numbers stamp_;
  std::vector<float> score_;
  std::map<Number, Pile> piles_;
  std::size_t entries_ = 0;
};

} // namespace flashinfer
