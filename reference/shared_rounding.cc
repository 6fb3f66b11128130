#include "reference/rounding.h"
