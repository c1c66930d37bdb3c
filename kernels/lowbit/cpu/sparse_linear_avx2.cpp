// The sparse linear in AVX2 with fused multiply-add, compiled for it whatever the compiler's default; has_avx2() says who may run it.
#if defined(__x86_64__)
#include "avx2.h"
#include "sparse_linear_panel.h"

const SparsePath avx2_sparse_path = {sparse_panel, VECTORS * LANES};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
