// Which instruction sets this build and this CPU have, and the kernels chosen among them.
#pragma once

#include <string>
#include <vector>

#include "normals.h"
#include "sparse.h"
#include "topk.h"
#include "views.h"

namespace lora_fuse {

struct KernelTable {
  const char* name;
  // calls and their number, at most kMaxSlices, that share x, routing and threads and write different columns
  void (*multi_lora_f32)(const MultiLora<float>*, int);
  void (*multi_lora_bf16)(const MultiLora<bf16>*, int);
  void (*multi_lora_fp16)(const MultiLora<fp16>*, int);
  TopkKernels topk;
  SparseKernels sparse;
  NormalsKernel normals;
};

// One per instruction set, defined in targets.cpp; worst first.
std::vector<const KernelTable*> compiled_tables();

std::vector<std::string> available_isas();   // worst first
const KernelTable& kernels();                // the chosen table
void choose_isa(const std::string& name);    // "" = best; throws std::invalid_argument, listing what there is

}  // namespace lora_fuse
