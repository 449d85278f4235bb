// Words that all bookkeeping shares. Knows nothing of Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace flashinfer {

using Number = std::int64_t; // of a record, a slot, a byte or a token
using Numbers = std::vector<Number>;

// Numbers that belong to somebody else.
struct View {
  const Number *data;
  std::size_t count;

  const Number *begin() const { return data; }
  const Number *end() const { return data + count; }
};

inline View view(const Numbers &numbers) { return {numbers.data(), numbers.size()}; }

} // namespace flashinfer
