// The product loops for processors with AVX-512; compiled for x86-64-v4 (CMakeLists.txt), so
// nothing else may be defined here.
#include "reference/product_loops.h"
#include "reference/tile_row_avx512.h"

namespace cambium::reference {

constinit const ProductKernels kAvx512Products = ProductLoops<RowAvx512>::kernels();

}  // namespace cambium::reference
