// The sparse linear in vectors of four.
#include "portable.h"
#include "sparse_linear_panel.h"

const SparsePath portable_sparse_path = {sparse_panel, VECTORS * LANES};
