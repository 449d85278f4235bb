#include "bookkeeping_heat.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace flashinfer {

Heat::Heat(Number records, Scale scale)
    : scale_(std::move(scale)), stamp_(records, -1), score_(records, -std::numeric_limits<float>::infinity()) {}

void Heat::use(View records, Number stamp) {
  const auto now = static_cast<float>(static_cast<double>(stamp) / scale_.half_life);
  const std::size_t last = scale_.added.size() - 1;
  for (const Number record : records) {
    const float high = std::max(score_[record], now), low = std::min(score_[record], now);
    const float step = (high - low) * scale_.steps;
    score_[record] = high + scale_.added[step < static_cast<float>(last) ? static_cast<std::size_t>(step) : last];
    stamp_[record] = stamp;
  }
}

Number Heat::pile(Number record) const {
  return static_cast<Number>(score_[record] * scale_.piles_per_halving);
}

void Heat::offer(const Numbers &records, Number stamp) {
  std::map<Number, Entry> parts;
  for (const Number record : records) {
    Entry &part = parts[pile(record)];
    part.stamp = stamp;
    part.records.push_back(record);
  }
  for (auto &[pile, part] : parts)
    piles_[pile].push_back(std::move(part));
  entries_ += records.size();
}

Numbers Heat::coldest(const Numbers &rivals, const SlotMap &slots) {
  Numbers taken;
  while (!piles_.empty()) {
    const auto first = piles_.begin();
    const auto end =
        std::partition_point(rivals.begin(), rivals.end(), [&](Number rival) { return rival > first->first; });
    const auto above = static_cast<std::size_t>(end - rivals.begin());
    if (above <= taken.size())
      break;
    const std::size_t wanted = above - taken.size();
    if (take(first->second, wanted, slots, taken) < wanted)
      piles_.erase(first);
  }
  return taken;
}

std::size_t Heat::take(Pile &entries, std::size_t count, const SlotMap &slots, Numbers &taken) const {
  const std::size_t before = taken.size();
  while (taken.size() - before < count && !entries.empty()) {
    Entry &entry = entries.front();
    while (taken.size() - before < count && entry.next < entry.records.size()) {
      const Number record = entry.records[entry.next++];
      if (alive(record, entry.stamp, slots))
        taken.push_back(record);
    }
    if (entry.next == entry.records.size())
      entries.pop_front();
  }
  return taken.size() - before;
}

void Heat::compact(const SlotMap &slots, std::size_t limit) {
  if (entries_ <= limit)
    return;
  entries_ = 0;
  for (auto at = piles_.begin(); at != piles_.end();) {
    keep_alive(at->second, slots);
    for (const Entry &entry : at->second)
      entries_ += entry.records.size();
    at = at->second.empty() ? piles_.erase(at) : std::next(at);
  }
}

void Heat::keep_alive(Pile &entries, const SlotMap &slots) const {
  Pile kept;
  for (const Entry &entry : entries) {
    Entry part{entry.stamp, {}};
    for (std::size_t i = entry.next; i < entry.records.size(); ++i)
      if (alive(entry.records[i], entry.stamp, slots))
        part.records.push_back(entry.records[i]);
    if (!part.records.empty())
      kept.push_back(std::move(part));
  }
  entries = std::move(kept);
}

} // namespace flashinfer
