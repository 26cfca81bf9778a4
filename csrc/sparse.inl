inline void fill_sparse(SparseKernels&) {}
