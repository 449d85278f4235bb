// The windowed cache over two tiers of slots; `flashinfer/cache/tiers.py` has the plain twin and the words. Both decide
// the same.
#pragma once

#include "bookkeeping_window.hpp"

namespace flashinfer {

class Tiers {
public:
  Tiers(Number records, Number near, Number far, Number window, bool keeps, Scale scale, Number *slot_of);

  Number records() const { return static_cast<Number>(wanted_.size()); }
  Number used() const;
  Number free() const { return static_cast<Number>(record_in_.size()) - used(); }
  Change step(View needed, const std::vector<View> &recent);
  Numbers preload(View records); // which fit, distinct and not resident
  std::vector<Numbers> active() const;
  Number effective() const;

private:
  struct Token {
    Number stamp;
    Numbers active;
  };

  bool is_near(Number record) const { return slot_of_[record] >= 0 && slot_of_[record] < near_; }
  bool is_far(Number record) const { return slot_of_[record] >= near_; }
  Number first() const { return tokens_.empty() ? clock_ + 1 : tokens_.front().stamp; }
  void use(View needed, const std::vector<View> &recent);
  bool may_stay(Number record) const;
  Number claim(Number record) const;
  Numbers keep_best(Numbers &records, Number count, Numbers &gone) const;
  void arrange(Numbers &&near, Numbers &&far, const Numbers &gone, Change &change);
  void place(Number record, Number slot);

  const Number near_, window_;
  const bool keeps_;
  Number *const slot_of_;
  Numbers record_in_;
  std::vector<char> wanted_, fresh_;
  Heat heat_;
  std::deque<Token> tokens_;
  Number clock_ = 0;
};

} // namespace flashinfer
