// The plan around the kernels: sample a bracket for the threshold, count and collect what lies in it in one pass over the
// entries, pick the threshold among the collected keys, share out the ties by index. Where the bracket misses the
// threshold or too much lies inside it, histograms of the keys over all entries find it instead: slower, as exact.
#include "topk.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <functional>
#include <new>
#include <stdexcept>

#include "dispatch.h"
#include "topk_teams.h"

namespace lora_fuse {
namespace {

constexpr int64_t kFew = 4096;                 // collected keys that fit on the stack
constexpr int64_t kCollect = 1024;             // entries of a group that are all collected, without a sample
// Sampled or collected keys below which no team is called: it would save a fraction of a millisecond, and where others
// use the cores too, each wait for it costs several.
constexpr int64_t kSerial = 1 << 20;
constexpr int64_t kBlock = 1 << 16;            // keys of a block of the arena
constexpr int64_t kMaxFound = 1 << 23;         // keys collected at once by all threads: 32 MB
constexpr int kBinBits = 12;
constexpr int64_t kMaxChunks = (int64_t(1) << 32) / kTopkChunk - 1;

uint64_t mix(uint64_t z) {  // SplitMix64's finaliser
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The rank-th largest (from 1) of the keys in [low, high], by histograms of ever smaller ranges; rank becomes its
// rank among its equals. count(high, shift, bins) fills bins[(high - key) >> shift] as far as there are bins.
template <class F>
int32_t narrow(int32_t low, int32_t high, int64_t* rank, const F& count) {
  std::vector<int64_t> bins;
  for (;;) {
    const auto range = uint32_t(high - low);
    int shift = 0;
    while (range >> shift >> kBinBits) ++shift;
    bins.assign((range >> shift) + 1, 0);
    count(high, shift, &bins);
    size_t b = 0;
    while (b < bins.size() && *rank > bins[b]) *rank -= bins[b++];
    if (b == bins.size()) throw std::runtime_error("the tensors changed while they were read");
    high -= int32_t(b << shift);
    if (shift == 0) return high;
    low = std::max(low, high - int32_t((1u << shift) - 1));
  }
}

// Adds up what f(i, num_bins, table) puts into tables as TopkRun::histogram's, for chunks begin <= i < end.
template <class F>
void fill(std::vector<int64_t>* bins, int threads, int64_t begin, int64_t end, const F& f) {
  const size_t n = bins->size();
  std::vector<std::vector<uint32_t>> tables(threads, std::vector<uint32_t>(4 * (n + 1)));
  for (; begin < end; begin += kMaxChunks) {  // as many as cannot overflow a bin
    each(threads, begin, std::min(end, begin + kMaxChunks), 4, [&](int t, int64_t i) { f(i, uint32_t(n), tables[t].data()); });
    for (auto& table : tables) {
      for (size_t b = 0; b < 4 * (n + 1); ++b)
        if (b % (n + 1) < n) (*bins)[b % (n + 1)] += table[b];
      std::fill(table.begin(), table.end(), 0);
    }
  }
}

// The rank-th largest (from 1) of n keys in [low, high]; scratch has room for n.
int32_t nth_largest(const int32_t* keys, int64_t n, int64_t rank, int32_t low, int32_t high, int32_t* scratch) {
  constexpr int kBins = 512;
  while (n > 32) {
    int shift = 0;
    while (uint32_t(high - low) >> shift >= kBins) ++shift;
    uint32_t bins[kBins] = {};
    for (int64_t i = 0; i < n; ++i) ++bins[uint32_t(high - keys[i]) >> shift];
    int b = 0;
    while (rank > bins[b]) rank -= bins[b++];
    high -= b << shift;
    if (shift == 0) return high;
    low = std::max(low, high - int32_t((1u << shift) - 1));
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t key = keys[i];
      scratch[kept] = key;
      kept += key >= low && key <= high;
    }
    n = kept, keys = scratch;
  }
  if (keys != scratch) std::copy_n(keys, n, scratch);
  std::nth_element(scratch, scratch + rank - 1, scratch + n, std::greater<>());
  return scratch[rank - 1];
}

}  // namespace

// Keys that a thread collects, chunk after chunk; no chunk's lie in two blocks.
class Arena {
 public:
  explicit Arena(int64_t max_keys) : blocks_(std::max<int64_t>(1, max_keys / kBlock)) {}
  int32_t* room() {  // for a chunk's; null: no more
    if (used_ == 0 || kBlock - fill_ < kTopkChunk + 16) {
      if (used_ == blocks_.size()) return nullptr;
      if (!blocks_[used_]) blocks_[used_].reset(new (std::nothrow) int32_t[kBlock]);
      if (!blocks_[used_]) return nullptr;
      ++used_, fill_ = 0;
    }
    return blocks_[used_ - 1].get() + fill_;
  }
  void keep(int64_t n) { fill_ += n; }
  void clear() { used_ = 0, fill_ = 0; }

 private:
  std::vector<std::unique_ptr<int32_t[]>> blocks_;
  size_t used_ = 0;
  int64_t fill_ = 0;
};

struct Selection::Scratch {
  struct Found {
    Tally tally;
    const int32_t* keys;
  };
  std::vector<Arena> arenas;
  std::vector<Found> found;  // a chunk of the group each
  std::vector<int32_t> keys;
  Scratch(int team, int64_t max_keys) {
    for (int t = 0; t < team; ++t) arenas.emplace_back(max_keys);
  }
};

Selection::Selection(std::vector<TopkInput> inputs, TopkScope scope, const std::vector<int64_t>& ks)
    : inputs_(std::move(inputs)), kept_(inputs_.size(), 0) {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const TopkInput& in = inputs_[i];
    const int64_t n = in.rows * in.cols;
    entries_ += n;
    if (n == 0) continue;
    const auto add = [&](int64_t begin, int64_t length) {
      chunks_.push_back({int32_t(i), int32_t(length), begin, INT_MAX, 0, 0, 0, 0});
    };
    const auto first = int64_t(chunks_.size());
    const bool by_row = scope == TopkScope::row;
    if (in.cols > kTopkChunk || by_row) {
      for (int64_t r = 0; r < in.rows; ++r) {
        const auto row_first = int64_t(chunks_.size());
        for (int64_t c = 0; c < in.cols; c += kTopkChunk) add(r * in.cols + c, std::min<int64_t>(kTopkChunk, in.cols - c));
        if (by_row) groups_.push_back({row_first, int64_t(chunks_.size()), in.cols, ks[i]});
      }
    } else {
      const int64_t step = kTopkChunk / in.cols * in.cols;
      for (int64_t at = 0; at < n; at += step) add(at, std::min(step, n - at));
    }
    if (scope == TopkScope::tensor) groups_.push_back({first, int64_t(chunks_.size()), n, ks[i]});
  }
  if (scope == TopkScope::global && entries_) groups_.push_back({0, int64_t(chunks_.size()), entries_, ks[0]});
}

void Selection::select(int threads, TopkMethod method) {
  const TopkKernels& kernels = lora_fuse::kernels().topk;
  threads = size_of_team(entries_, threads);
  // Groups that are small beside the whole go to a thread each, the others to the team one by one.
  const auto is_small = [&](const Group& g) { return threads == 1 || g.entries * 4 * threads <= entries_; };
  std::vector<Scratch> scratch;
  for (int t = 0; t < threads; ++t) scratch.emplace_back(t == 0 ? threads : 1, kMaxFound / threads);
  std::atomic<bool> failed{false};
  each(threads, 0, int64_t(groups_.size()), 1, [&](int thread, int64_t g) {
    if (!is_small(groups_[g])) return;
    try {
      select_group(kernels, groups_[g], &scratch[thread], 1, method);
    } catch (...) {
      failed = true;
    }
  });
  if (failed) throw std::runtime_error("selection: out of memory, or the tensors changed while they were read");
  for (const Group& g : groups_)
    if (!is_small(g)) select_group(kernels, g, &scratch[0], threads, method);

  for (Chunk& c : chunks_) {
    if (c.max_key > kInfinityKey) {
      bad_ = c.input;
      return;
    }
    c.kept_before = kept_[c.input];
    kept_[c.input] += c.kept;
  }
}

// `count` keys, one from each of as many equal stretches of the group.
void Selection::sample(const TopkKernels& kernels, const Group& group, int64_t count, int32_t* keys, int threads) const {
  std::vector<int64_t> starts;  // of the chunks, in entries of the group
  int64_t total = 0;
  for (int64_t c = group.begin; c < group.end; ++c) starts.push_back(total), total += chunks_[c].length;
  constexpr int BATCH = 256;
  const double stretch = double(group.entries) / double(count);
  const auto place = [&](int64_t i) {
    const double u = double(mix(uint64_t(i)) >> 11) * 0x1p-53;
    return std::min(group.entries - 1, int64_t((double(i) + u) * stretch));
  };
  each(threads, 0, (count + BATCH - 1) / BATCH, 4, [&](int, int64_t batch) {
    int64_t at[BATCH];
    const int64_t first = batch * BATCH, stop = std::min(count, first + BATCH);
    for (int64_t i = first; i < stop;) {  // the places rise: all of a chunk in one go
      const int64_t from = place(i);
      const auto c = int64_t(std::upper_bound(starts.begin(), starts.end(), from) - starts.begin()) - 1;
      const Chunk& chunk = chunks_[group.begin + c];
      int n = 0;
      for (int64_t p = from; p < starts[c] + chunk.length; p = place(i + n)) {
        at[n++] = p - starts[c];
        if (i + n == stop) break;
      }
      run(kernels, chunk).gather(x(chunk), minus(chunk), at, n, keys + i);
      i += n;
    }
  });
}

// The rank-th largest of the keys that were found; rank becomes its rank among its equals.
int32_t Selection::pick(const Scratch& scratch, int64_t num_chunks, int64_t size, int32_t low, int32_t high, int64_t* rank, int threads) {
  if (size <= kFew) {
    int32_t keys[kFew], room[kFew];
    int64_t n = 0;
    for (int64_t i = 0; i < num_chunks; ++i) n = std::copy_n(scratch.found[i].keys, scratch.found[i].tally.between, keys + n) - keys;
    const int32_t key = nth_largest(keys, n, *rank, low, high, room);
    for (int64_t i = 0; i < n; ++i) *rank -= keys[i] > key;
    return key;
  }
  return narrow(low, high, rank, [&](int32_t top, int shift, std::vector<int64_t>* bins) {
    fill(bins, threads, 0, num_chunks, [&](int64_t i, uint32_t num_bins, uint32_t* table) {
      const Scratch::Found& f = scratch.found[i];
      for (int32_t j = 0; j < f.tally.between; ++j) {
        const uint32_t bin = uint32_t(top - f.keys[j]) >> shift;
        ++table[(j & 3) * (num_bins + 1) + (bin < num_bins ? bin : num_bins)];
      }
    });
  });
}

int32_t Selection::search(const TopkKernels& kernels, const Group& group, int32_t low, int32_t high, int64_t* rank, int threads) const {
  return narrow(low, high, rank, [&](int32_t top, int shift, std::vector<int64_t>* bins) {
    fill(bins, threads, group.begin, group.end, [&](int64_t i, uint32_t num_bins, uint32_t* table) {
      const Chunk& c = chunks_[i];
      run(kernels, c).histogram(x(c), minus(c), c.length, top, shift, num_bins, table);
    });
  });
}

void Selection::select_group(const TopkKernels& kernels, const Group& group, Scratch* scratch, int threads, TopkMethod method) {
  const int64_t k = group.k;
  int32_t low = kInfinityKey, high = kInfinityKey;
  const bool trivial = k == 0 || k == group.entries;  // still looked through for NaN
  bool count_ends = false;  // so many equals at the bracket's ends that they are counted, not collected
  if (!trivial && group.entries <= kCollect) {
    low = -1, high = kInfinityKey + 1;  // collect all
  } else if (!trivial && method == TopkMethod::bracket) {
    const int64_t n = group.entries, size = n < (1 << 25) ? std::clamp<int64_t>(n / 32, 256, 1 << 15) : std::min<int64_t>(n / 1024, 1 << 20);
    std::vector<int32_t>& keys = scratch->keys;
    keys.resize(2 * size);
    sample(kernels, group, size, keys.data(), size < kSerial ? 1 : threads);
    const double p = double(k) / double(group.entries), rank = p * double(size);
    const double margin = 4 * std::sqrt(rank * (1 - p)) + 2;
    const auto from_top = [&](double r) { return nth_largest(keys.data(), size, int64_t(r), 0, INT_MAX, keys.data() + size); };
    low = rank + margin < double(size) ? from_top(std::ceil(rank + margin)) : -1;
    high = rank - margin >= 1 ? std::min(from_top(std::floor(rank - margin)), kInfinityKey) : kInfinityKey;
    int64_t equal = 0;
    for (int64_t i = 0; i < size; ++i) equal += (keys[i] == std::max(low, 0)) + (keys[i] == high);
    count_ends = low >= high || equal > size / 64 + 8;
    if (count_ends) low = std::clamp(low, 0, high);
  }

  // One pass: counts, and the keys between low and high. Where the ends are not counted, high is among them.
  const int64_t num_chunks = group.end - group.begin;
  auto& found = scratch->found;
  found.resize(std::max<size_t>(found.size(), num_chunks));
  std::atomic<bool> overflow{false};
  const auto count = [&] {
    for (Arena& a : scratch->arenas) a.clear();
    each(threads, group.begin, group.end, 4, [&](int thread, int64_t i) {
      Chunk& c = chunks_[i];
      Arena& arena = scratch->arenas[thread];
      int32_t spare[kTopkChunk + 16];
      int32_t* const room = arena.room();
      auto& f = found[i - group.begin];
      const TopkRun& r = run(kernels, c);
      f.tally = (count_ends ? r.count_ties : r.count)(x(c), minus(c), c.length, low, high, room ? room : spare);
      f.keys = room;
      if (room) arena.keep(f.tally.between);
      else if (f.tally.between) overflow = true;
      c.max_key = f.tally.max_key;
    });
  };
  count();
  int64_t above = 0, at_high = 0, between = 0, at_low = 0;
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Tally& t = found[i].tally;
    if (t.max_key > kInfinityKey) return;  // reported by select()
    above += t.above, at_high += t.at_high, between += t.between, at_low += t.at_low;
  }
  if (trivial) {
    for (int64_t i = group.begin; i < group.end; ++i) {
      Chunk& c = chunks_[i];
      c.above = k ? 0 : INT_MAX, c.split = k ? c.length : 0, c.kept = c.split;
    }
    return;
  }

  // The threshold, and how many of its equals are kept.
  int32_t threshold;
  int64_t ties = k;
  bool recount = false;
  if (k <= above) {
    threshold = search(kernels, group, high + 1, kInfinityKey, &ties, threads), recount = true;
  } else if ((ties = k - above) <= at_high) {
    threshold = high;
  } else if ((ties -= at_high) <= between) {
    if (overflow) {
      threshold = search(kernels, group, low + 1, high - count_ends, &ties, threads), recount = true;
    } else {
      threshold = pick(*scratch, num_chunks, between, low + 1, high - count_ends, &ties, between < kSerial ? 1 : threads);
    }
  } else if ((ties -= between) <= at_low) {
    threshold = low;
  } else {
    ties -= at_low;
    threshold = search(kernels, group, 0, low - count_ends, &ties, threads), recount = true;
  }
  if (recount) {
    low = high = threshold, count_ends = true;
    count();
  }

  for (int64_t i = 0; i < num_chunks; ++i) {
    Chunk& c = chunks_[group.begin + i];
    const Tally& t = found[i].tally;
    int32_t more = t.above, equal = threshold == high ? t.at_high : threshold == low ? t.at_low : 0;
    if (threshold < high) more += t.at_high;
    for (int32_t j = 0; j < t.between; ++j) more += found[i].keys[j] > threshold, equal += found[i].keys[j] == threshold;
    c.above = threshold;
    const auto taken = int32_t(std::min<int64_t>(equal, ties));
    ties -= taken;
    c.kept = more + taken;
    c.split = taken == equal ? c.length : 0;
    if (taken && taken < equal) {  // the one chunk that the last tie to be kept lies in
      std::vector<int32_t> keys(c.length);
      run(kernels, c).keys(x(c), minus(c), c.length, keys.data());
      for (int32_t seen = 0; c.split < c.length && seen < taken; ++c.split) seen += keys[c.split] == threshold;
    }
  }
}

}  // namespace lora_fuse
