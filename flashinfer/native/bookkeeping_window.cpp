#include "bookkeeping_window.hpp"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

namespace flashinfer {
namespace {

constexpr Number UNBEATABLE = std::numeric_limits<Number>::max();
constexpr std::size_t FEW_ENTRIES = 1024;

void append(Numbers &to, const Numbers &more) { to.insert(to.end(), more.begin(), more.end()); }

} // namespace

Window::Window(Number records, Number slots, Number window, bool keeps, Scale scale, Number *slot_of)
    : records_(records), window_(window), keeps_(keeps), map_(records, slots, slot_of),
      heat_(records, std::move(scale)) {}

Change Window::step(View needed, const std::vector<View> &recent) {
  Change change;
  for (const Number record : needed)
    if (!map_.holds(record))
      change.misses.push_back(record);
  std::vector<Token> news = use(needed, recent);
  Numbers drop = leave(news.size());
  change.insert_records = change.misses;
  const std::size_t room = static_cast<std::size_t>(map_.free()) + drop.size();
  if (change.misses.size() > room) {
    Numbers &claims = change.insert_records;
    const std::size_t within = split_by_window(claims, news);
    if (within < claims.size()) // else they all claim a place alike, and mostly all get one
      rank(claims, within);
    const Numbers evicted = make_room(claims, within, room);
    if (room + evicted.size() < within)
      rank(claims, within);
    claims.resize(room + evicted.size());
    std::sort(claims.begin(), claims.end());
    append(drop, evicted);
  }
  change.placed = map_.replace(view(drop), view(change.insert_records));
  std::move(news.begin(), news.end(), std::back_inserter(tokens_));
  heat_.compact(map_, std::max(FEW_ENTRIES, 2 * static_cast<std::size_t>(map_.slots())));
  return change;
}

Numbers Window::preload(View records) {
  heat_.use(records, ++clock_);
  heat_.offer(Numbers(records.begin(), records.end()), clock_);
  return map_.replace({nullptr, 0}, records).insert_slots;
}

std::vector<Numbers> Window::active() const {
  std::vector<Numbers> all;
  for (const Token &token : tokens_)
    all.push_back(token.active);
  return all;
}

Number Window::effective() const {
  Number whole = 0;
  for (auto token = tokens_.rbegin(); token != tokens_.rend() && whole != window_; ++token, ++whole)
    for (const Number record : token->active)
      if (!map_.holds(record))
        return whole;
  return whole;
}

std::vector<Window::Token> Window::use(View needed, const std::vector<View> &recent) {
  std::vector<Token> news;
  auto add = [&](View active) {
    heat_.use(active, ++clock_);
    news.push_back({clock_, Numbers(active.begin(), active.end()), {}});
  };
  add(needed);
  const std::size_t last = std::min(recent.size(), static_cast<std::size_t>(window_));
  std::for_each(recent.end() - static_cast<std::ptrdiff_t>(last), recent.end(), add);
  if (last) { // what none of the last tokens used belongs to an earlier one
    Numbers &earlier = news.front().active;
    const Number stamp = news.front().stamp;
    earlier.erase(std::remove_if(earlier.begin(), earlier.end(),
                                 [&](Number record) { return heat_.stamp(record) != stamp; }),
                  earlier.end());
    if (earlier.empty())
      news.erase(news.begin());
  }
  for (Token &token : news)
    token.left = token.active;
  return news;
}

Numbers Window::leave(std::size_t arriving) {
  Numbers gone;
  while (!tokens_.empty() && tokens_.size() + arriving > static_cast<std::size_t>(window_)) {
    const Numbers records = held_by(tokens_.front());
    if (keeps_)
      heat_.offer(records, tokens_.front().stamp);
    else
      append(gone, records);
    tokens_.pop_front();
  }
  return gone;
}

// Puts the misses that are in the window first; returns how many they are.
std::size_t Window::split_by_window(Numbers &misses, const std::vector<Token> &news) const {
  const std::size_t fresh = std::min(news.size(), static_cast<std::size_t>(window_));
  const Number first = fresh ? news[news.size() - fresh].stamp : clock_ + 1;
  const auto within = std::stable_partition(misses.begin(), misses.end(),
                                            [&](Number record) { return heat_.stamp(record) >= first; });
  return static_cast<std::size_t>(within - misses.begin());
}

void Window::rank(Numbers &claims, std::size_t within) const {
  const auto middle = claims.begin() + static_cast<std::ptrdiff_t>(within);
  sort_by_use(claims.begin(), middle);
  sort_by_use(middle, claims.end());
}

// The most used first, and of equals the lower number: the scores are fetched once, not at each comparison.
void Window::sort_by_use(Numbers::iterator first, Numbers::iterator last) const {
  std::vector<std::pair<float, Number>> keys;
  keys.reserve(static_cast<std::size_t>(last - first));
  std::transform(first, last, std::back_inserter(keys),
                 [&](Number record) { return std::pair(-heat_.score(record), record); });
  std::sort(keys.begin(), keys.end());
  std::transform(keys.begin(), keys.end(), first, [](const auto &key) { return key.second; });
}

Numbers Window::make_room(const Numbers &claims, std::size_t within, std::size_t room) {
  Numbers rivals;
  for (std::size_t i = room; i < claims.size(); ++i)
    rivals.push_back(i < within ? UNBEATABLE : heat_.pile(claims[i]));
  Numbers taken = heat_.coldest(rivals, map_);
  for (Token &token : tokens_) {
    if (room + taken.size() >= within)
      break;
    const Numbers records = held_by(token);
    const auto cut = records.begin() + static_cast<std::ptrdiff_t>(std::min(records.size(), within - room - taken.size()));
    taken.insert(taken.end(), records.begin(), cut);
    token.left.assign(cut, records.end());
  }
  return taken;
}

Numbers Window::held_by(const Token &token) const {
  Numbers held;
  for (const Number record : token.left)
    if (heat_.alive(record, token.stamp, map_))
      held.push_back(record);
  return held;
}

} // namespace flashinfer
