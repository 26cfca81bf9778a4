#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "parallel.h"

namespace lora_fuse {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// AMX: the CPU's word, then the kernel's leave to use tile data (granted once per process).
bool amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 24)) || !(d & (1u << 22))) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool cpu_has(const std::string& isa) {
  if (isa == "baseline") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512_bf16") return avx512_bf16;
#if defined(__linux__)
  if (isa == "amx_bf16") return avx512_bf16 && amx_bf16();
#endif
#endif
  return false;
}

const KernelTable* find(const std::string& isa) {
  for (const KernelTable* table : compiled_tables())
    if (isa == table->name && cpu_has(isa)) return table;
  return nullptr;
}

std::atomic<const KernelTable*> chosen{nullptr};
std::atomic<bool> in_forked_child{false};

#if !defined(_WIN32)
[[maybe_unused]] const int fork_hook = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

}  // namespace

bool forked() { return in_forked_child.load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : compiled_tables())
    if (cpu_has(table->name)) names.push_back(table->name);
  return names;
}

void choose_isa(const std::string& name) {
  const std::vector<std::string> names = available_isas();
  const KernelTable* table = find(name.empty() ? names.back() : name);
  if (!table) {
    std::string list;
    for (const std::string& n : names) list += (list.empty() ? "" : ", ") + n;
    throw std::invalid_argument("LORA_FUSE_ISA: '" + name + "' is not an instruction set of this CPU and build; there are: " + list);
  }
  chosen.store(table, std::memory_order_release);
}

const KernelTable& kernels() { return *chosen.load(std::memory_order_acquire); }

}  // namespace lora_fuse
