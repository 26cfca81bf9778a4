// Exact selection of the largest magnitudes. An entry's key is the bit pattern of |x - minus| in fp32 as an int32: it
// orders as the magnitude does, zeros of both signs share key 0, and NaN lies above kInfinityKey.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace lora_fuse {

constexpr int32_t kInfinityKey = 0x7f800000;
constexpr int kTopkChunk = 16384;  // entries that a kernel call takes at most

// How many keys of a run lie where, relative to a bracket low <= high.
struct Tally {
  int32_t above, at_high, between, at_low, max_key;
};

// Kernels on a run of n contiguous entries of one dtype; minus is null in one set of them and never in the other.
struct TopkRun {
  // found: the keys in between, in any order; room for n + 16. count: low < key <= high is between, the ends apart are
  // not counted; count_ties: low < key < high, and the ends are.
  Tally (*count)(const void* x, const void* minus, int n, int32_t low, int32_t high, int32_t* found);
  Tally (*count_ties)(const void* x, const void* minus, int n, int32_t low, int32_t high, int32_t* found);
  void (*keys)(const void* x, const void* minus, int n, int32_t* keys);
  void (*gather)(const void* x, const void* minus, const int64_t* at, int n, int32_t* keys);
  // ++bins[(high - key) >> shift] for keys up to high, where that is below num_bins; in any of four tables of
  // num_bins + 1, whose last bins mean nothing. num_bins << shift is at most 2^31.
  void (*histogram)(const void* x, const void* minus, int n, int32_t high, int shift, uint32_t num_bins, uint32_t* bins);
  void (*mask)(const void* x, const void* minus, int n, int32_t above, uint8_t* out);  // key > above
  void (*prune)(const void* x, const void* minus, int n, int32_t above, bool past, void* out);  // past: the caches
  // bit i of words: key[i] > above, or >= above where i < split
  void (*bits)(const void* x, const void* minus, int n, int32_t above, int split, uint64_t* words);
  // x - minus, or x itself, where the bits are set; returns how many. out: room for 16 more than those
  int (*take)(const void* x, const void* minus, int n, const uint64_t* words, bool own, void* out);
};

struct TopkKernels {
  TopkRun run[3][2];  // [fp32, bf16, fp16][without, with minus]
  // first + the places of the set bits among n; returns how many. out: room for 16 more than those
  int (*columns16)(const uint64_t* words, int n, int32_t first, uint16_t* out);
  int (*columns32)(const uint64_t* words, int n, int32_t first, int32_t* out);
};

struct TopkInput {
  const char *x, *minus;  // contiguous [rows, cols]; minus may be null
  int64_t rows, cols;
  int dtype;              // index into TopkKernels::run
  int itemsize;
};

struct SparseOutput {
  void* values;         // [nnz] of the input's dtype
  int64_t* row_starts;  // [rows + 1]
  void* columns;        // [nnz], or null
  bool wide;            // columns are int32, not uint16
  uint64_t* bitmap;     // [rows, ceil(cols / 64)], or null
};

enum class TopkScope { tensor, row, global };
enum class TopkMethod { bracket, histogram };

// Which entries to keep: for each chunk a threshold, and from which place on its ties are dropped.
class Selection {
 public:
  // ks: how many to keep of each tensor, of each row of each tensor, or (one number) of all.
  Selection(std::vector<TopkInput> inputs, TopkScope scope, const std::vector<int64_t>& ks);
  void select(int threads, TopkMethod method);
  int bad_input() const { return bad_; }  // the first input with a NaN key, or -1
  const std::vector<TopkInput>& inputs() const { return inputs_; }
  const std::vector<int64_t>& kept() const { return kept_; }  // per input

  void write_mask(const std::vector<uint8_t*>& out, int threads) const;
  void write_dense(const std::vector<char*>& out, int threads) const;  // out[i] may be inputs[i].x or its minus
  void write_sparse(const std::vector<SparseOutput>& out, bool own, int threads) const;

 private:
  struct Chunk {
    int32_t input, length;
    int64_t begin;           // first entry
    int32_t above, split;    // keep key > above, and key == above among the first `split`
    int64_t kept_before;     // entries of this input kept in earlier chunks
    int32_t kept;
    int32_t max_key;
  };
  struct Group {
    int64_t begin, end;  // chunks
    int64_t entries, k;
  };
  struct Scratch;

  void select_group(const TopkKernels& kernels, const Group& group, Scratch* scratch, int threads, TopkMethod method);
  void sample(const TopkKernels& kernels, const Group& group, int64_t count, int32_t* keys, int threads) const;
  static int32_t pick(const Scratch& scratch, int64_t num_chunks, int64_t size, int32_t low, int32_t high, int64_t* rank,
                      int threads);
  int32_t search(const TopkKernels& kernels, const Group& group, int32_t low, int32_t high, int64_t* rank, int threads) const;
  const TopkRun& run(const TopkKernels& kernels, const Chunk& c) const {
    const TopkInput& in = inputs_[c.input];
    return kernels.run[in.dtype][in.minus != nullptr];
  }
  const char* x(const Chunk& c, int64_t at = 0) const { return inputs_[c.input].x + (c.begin + at) * inputs_[c.input].itemsize; }
  const char* minus(const Chunk& c, int64_t at = 0) const {
    const TopkInput& in = inputs_[c.input];
    return in.minus ? in.minus + (c.begin + at) * in.itemsize : nullptr;
  }

  std::vector<TopkInput> inputs_;
  std::vector<Chunk> chunks_;
  std::vector<Group> groups_;
  std::vector<int64_t> kept_;
  int64_t entries_ = 0;
  int bad_ = -1;
};

}  // namespace lora_fuse
