// The windowed cache; `flashinfer/cache/window.py` has the plain twin and the words. Both decide the same.
#pragma once

#include "bookkeeping_heat.hpp"

#include <deque>

namespace flashinfer {

struct Change {
  Numbers misses, insert_records;
  Placed placed;
};

class Window {
public:
  Window(Number records, Number slots, Number window, bool keeps, Scale scale, Number *slot_of);

  Number records() const { return records_; }
  const SlotMap &map() const { return map_; }
  Change step(View needed, const std::vector<View> &recent);
  Numbers preload(View records); // which fit, distinct and not resident
  std::vector<Numbers> active() const;
  Number effective() const;

private:
  struct Token {
    Number stamp;
    Numbers active, left;
  };

  std::vector<Token> use(View needed, const std::vector<View> &recent);
  Numbers leave(std::size_t arriving);
  std::size_t split_by_window(Numbers &misses, const std::vector<Token> &news) const;
  void rank(Numbers &claims, std::size_t within) const;
  void sort_by_use(Numbers::iterator first, Numbers::iterator last) const;
  Numbers make_room(const Numbers &claims, std::size_t within, std::size_t room);
  Numbers held_by(const Token &token) const;

  const Number records_, window_;
  const bool keeps_;
  SlotMap map_;
  Heat heat_;
  std::deque<Token> tokens_;
  Number clock_ = 0;
};

} // namespace flashinfer
