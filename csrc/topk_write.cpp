// What a selection writes: masks, pruned tensors, sparse forms.
#include <atomic>
#include <functional>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "topk.h"
#include "topk_teams.h"

namespace lora_fuse {

constexpr int64_t kPastCaches = 8 << 20;  // bytes of output that are not worth a place in the caches

void Selection::write_mask(const std::vector<uint8_t*>& out, int threads) const {
  const TopkKernels& kernels = lora_fuse::kernels().topk;
  threads = size_of_team(entries_, threads);
  each(threads, 0, int64_t(chunks_.size()), 4, [&](int, int64_t i) {
    const Chunk& c = chunks_[i];
    uint8_t* const y = out[c.input] + c.begin;
    const TopkRun& r = run(kernels, c);
    if (c.split) r.mask(x(c), minus(c), c.split, c.above - 1, y);
    if (c.split < c.length) r.mask(x(c, c.split), minus(c, c.split), c.length - c.split, c.above, y + c.split);
  });
}

void Selection::write_dense(const std::vector<char*>& out, int threads) const {
  const TopkKernels& kernels = lora_fuse::kernels().topk;
  threads = size_of_team(entries_, threads);
  int64_t bytes = 0;
  for (const TopkInput& in : inputs_) bytes += in.rows * in.cols * in.itemsize;
  const bool past = bytes >= kPastCaches;
  each(threads, 0, int64_t(chunks_.size()), 4, [&](int, int64_t i) {
    const Chunk& c = chunks_[i];
    const int size = inputs_[c.input].itemsize;
    char* const y = out[c.input] + c.begin * size;
    const TopkRun& r = run(kernels, c);
    if (c.split) r.prune(x(c), minus(c), c.split, c.above - 1, past, y);
    if (c.split < c.length) r.prune(x(c, c.split), minus(c, c.split), c.length - c.split, c.above, past, y + int64_t(c.split) * size);
  });
}

void Selection::write_sparse(const std::vector<SparseOutput>& out, bool own, int threads) const {
  const TopkKernels& kernels = lora_fuse::kernels().topk;
  threads = size_of_team(entries_, threads);
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].cols == 0) std::fill_n(out[i].row_starts, inputs_[i].rows, 0);
    out[i].row_starts[inputs_[i].rows] = kept_[i];
  }
  std::atomic<bool> changed{false};
  each(threads, 0, int64_t(chunks_.size()), 4, [&](int, int64_t i) {
    const Chunk& c = chunks_[i];
    const TopkInput& in = inputs_[c.input];
    const SparseOutput& y = out[c.input];
    const TopkRun& r = run(kernels, c);
    uint64_t words[kTopkChunk / 64];
    // A chunk's entries are put together here, then copied: kernels write a little beyond what they say.
    alignas(64) char values[(kTopkChunk + 16) * 4], columns[(kTopkChunk + 16) * 4];
    const int64_t row_words = (in.cols + 63) / 64;
    const int column_size = y.wide ? 4 : 2;
    int64_t count = 0;
    for (int32_t at = 0; at < c.length;) {  // row by row, or a piece of a row
      const int64_t row = (c.begin + at) / in.cols, column = (c.begin + at) % in.cols;
      const auto n = int32_t(std::min<int64_t>(c.length - at, in.cols - column));
      if (column == 0) y.row_starts[row] = c.kept_before + count;
      r.bits(x(c, at), minus(c, at), n, c.above, c.split - at, words);
      if (y.bitmap) std::copy_n(words, (n + 63) / 64, y.bitmap + row * row_words + column / 64);
      else if (y.wide) kernels.columns32(words, n, int32_t(column), reinterpret_cast<int32_t*>(columns) + count);
      else kernels.columns16(words, n, int32_t(column), reinterpret_cast<uint16_t*>(columns) + count);
      count += r.take(x(c, at), minus(c, at), n, words, own, values + count * in.itemsize);
      at += n;
    }
    if (count != c.kept) {  // another thread wrote into the input meanwhile
      changed = true;
      return;
    }
    std::copy_n(values, count * in.itemsize, static_cast<char*>(y.values) + c.kept_before * in.itemsize);
    if (!y.bitmap) std::copy_n(columns, count * column_size, static_cast<char*>(y.columns) + c.kept_before * column_size);
  });
  if (changed) throw std::runtime_error("the tensors changed while they were read");
}

}  // namespace lora_fuse
