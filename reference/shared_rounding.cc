// Compiles reference/rounding.h by itself.
#include "reference/rounding.h"
