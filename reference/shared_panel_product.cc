// Whole registers of 16 columns go to the kernels of the processor at hand, what is left is here.
#include "reference/panel_product.h"

#include "reference/product_kernels.h"

namespace cambium::reference {

void panel_product(const PanelProduct& p) {
  int64_t column = p.columns / kTileColumns * kTileColumns;
  if (column > 0) product_kernels().panel_columns(p, column);
  if (column + kLanes <= p.columns) {
    panel_detail::half_columns(p, column);
    column += kLanes;
  }
  if (column < p.columns) panel_detail::scalar_columns(p, column);
}

}  // namespace cambium::reference
