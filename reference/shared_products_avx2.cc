// The product loops for every x86-64-v3 processor.
#include "reference/product_loops.h"
#include "reference/tile_row_avx2.h"

namespace cambium::reference {

constinit const ProductKernels kAvx2Products = ProductLoops<RowAvx2>::kernels();

}  // namespace cambium::reference
