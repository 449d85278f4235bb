#include "bookkeeping_tiers.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

namespace flashinfer {
namespace {

constexpr Number MOST_RECORDS = Number(1) << 22, MOST_PILES = Number(1) << 26;

// Those of the records of which it is true, sorted.
template <class Which> Numbers chosen(const Numbers &records, Which which) {
  Numbers found;
  std::copy_if(records.begin(), records.end(), std::back_inserter(found), which);
  std::sort(found.begin(), found.end());
  return found;
}

} // namespace

Tiers::Tiers(Number records, Number near, Number far, Number window, bool keeps, Scale scale, Number *slot_of)
    : near_(near), window_(window), keeps_(keeps), slot_of_(slot_of), record_in_(near + far, -1), wanted_(records),
      fresh_(records), heat_(records, std::move(scale)) {}

Number Tiers::used() const {
  return std::count_if(record_in_.begin(), record_in_.end(), [](Number record) { return record >= 0; });
}

Change Tiers::step(View needed, const std::vector<View> &recent) {
  Change change;
  Numbers pool, others, gone;
  use(needed, recent);
  for (Number slot = 0; slot < near_; ++slot)
    if (record_in_[slot] >= 0)
      pool.push_back(record_in_[slot]);
  for (const Number record : needed) {
    wanted_[record] = true;
    fresh_[record] = false;
    if (slot_of_[record] < 0)
      change.misses.push_back(record);
    if (!is_near(record))
      pool.push_back(record);
  }
  others = keep_best(pool, near_, gone);
  for (std::size_t slot = near_; slot < record_in_.size(); ++slot)
    if (record_in_[slot] >= 0 && !wanted_[record_in_[slot]])
      others.push_back(record_in_[slot]);
  const Numbers last = keep_best(others, static_cast<Number>(record_in_.size()) - near_, gone);
  gone.insert(gone.end(), last.begin(), last.end());
  for (const Number record : needed)
    wanted_[record] = false;
  arrange(std::move(pool), std::move(others), gone, change);
  return change;
}

Numbers Tiers::preload(View records) {
  heat_.use(records, ++clock_);
  Numbers slots;
  Number slot = 0;
  for (const Number record : records) {
    while (record_in_[slot] >= 0)
      ++slot;
    fresh_[record] = true;
    place(record, slot);
    slots.push_back(slot);
  }
  return slots;
}

std::vector<Numbers> Tiers::active() const {
  std::vector<Numbers> all;
  for (const Token &token : tokens_)
    all.push_back(token.active);
  return all;
}

Number Tiers::effective() const {
  Number whole = 0;
  for (auto token = tokens_.rbegin(); token != tokens_.rend(); ++token, ++whole)
    for (const Number record : token->active)
      if (slot_of_[record] < 0)
        return whole;
  return whole;
}

void Tiers::use(View needed, const std::vector<View> &recent) {
  const std::size_t last = std::min(recent.size(), static_cast<std::size_t>(window_));
  heat_.use(needed, ++clock_);
  if (!last)
    tokens_.push_back({clock_, Numbers(needed.begin(), needed.end())});
  for (auto active = recent.end() - static_cast<std::ptrdiff_t>(last); active != recent.end(); ++active) {
    heat_.use(*active, ++clock_);
    tokens_.push_back({clock_, Numbers(active->begin(), active->end())});
  }
  while (tokens_.size() > static_cast<std::size_t>(window_))
    tokens_.pop_front();
}

bool Tiers::may_stay(Number record) const {
  return wanted_[record] || fresh_[record] || heat_.stamp(record) >= first();
}

Number Tiers::claim(Number record) const {
  const Number tier = is_near(record) ? 2 : is_far(record) ? 1 : 0;
  Number age = std::max(Number(0), heat_.stamp(record) - first() + 1);
  if (wanted_[record] && tier)
    age = clock_ - first() + 1 + tier;
  const Number warm = std::clamp(heat_.pile(record) + 1, Number(0), MOST_PILES - 1);
  return ((age * MOST_PILES + warm) * 4 + tier) * MOST_RECORDS + (MOST_RECORDS - 1 - record);
}

// Leaves the `count` best of the records that may stay, and returns the others of these; who may not is gone.
Numbers Tiers::keep_best(Numbers &records, Number count, Numbers &gone) const {
  if (!keeps_) {
    const auto end =
        std::stable_partition(records.begin(), records.end(), [&](Number record) { return may_stay(record); });
    gone.insert(gone.end(), end, records.end());
    records.erase(end, records.end());
  }
  if (records.size() <= static_cast<std::size_t>(count))
    return {};
  Numbers claims; // a claim says whose it is
  claims.reserve(records.size());
  for (const Number record : records)
    claims.push_back(claim(record));
  const auto kept = claims.end() - static_cast<std::ptrdiff_t>(count);
  std::nth_element(claims.begin(), kept, claims.end());
  const auto whose = [](Number claim) { return MOST_RECORDS - 1 - (claim & (MOST_RECORDS - 1)); };
  records.resize(count);
  std::transform(kept, claims.end(), records.begin(), whose);
  std::transform(claims.begin(), kept, claims.begin(), whose);
  claims.erase(kept, claims.end());
  return claims;
}

void Tiers::arrange(Numbers &&near, Numbers &&far, const Numbers &gone, Change &change) {
  const Numbers rises = chosen(near, [&](Number record) { return is_far(record); });
  const Numbers up = chosen(near, [&](Number record) { return slot_of_[record] < 0; });
  const Numbers falls = chosen(far, [&](Number record) { return is_near(record); });
  const Numbers down = chosen(far, [&](Number record) { return slot_of_[record] < 0; });
  for (const Number record : gone)
    if (slot_of_[record] >= 0) {
      record_in_[slot_of_[record]] = -1;
      slot_of_[record] = -1;
    }
  Numbers of_near, of_far;
  for (std::size_t slot = 0; slot < record_in_.size(); ++slot)
    if (record_in_[slot] < 0)
      (static_cast<Number>(slot) < near_ ? of_near : of_far).push_back(static_cast<Number>(slot));
  for (const Number record : rises)
    of_far.push_back(slot_of_[record]);
  for (const Number record : falls)
    of_near.push_back(slot_of_[record]);
  for (const Numbers *moved : {&rises, &falls})
    for (const Number record : *moved) {
      change.placed.move_from.push_back(slot_of_[record]);
      record_in_[slot_of_[record]] = -1;
    }
  auto near_slot = of_near.begin(), far_slot = of_far.begin();
  for (const Number record : rises)
    change.placed.move_to.push_back(*near_slot), place(record, *near_slot++);
  for (const Number record : falls)
    change.placed.move_to.push_back(*far_slot), place(record, *far_slot++);
  for (const Number record : up)
    change.placed.insert_slots.push_back(*near_slot), place(record, *near_slot++);
  for (const Number record : down)
    change.placed.insert_slots.push_back(*far_slot), place(record, *far_slot++);
  change.insert_records = up;
  change.insert_records.insert(change.insert_records.end(), down.begin(), down.end());
}

void Tiers::place(Number record, Number slot) {
  slot_of_[record] = slot;
  record_in_[slot] = record;
}

} // namespace flashinfer
