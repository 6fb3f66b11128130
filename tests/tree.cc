#include "tests/tree.h"

namespace cambium {

const char* source_directory() { return TREE_SOURCE_DIRECTORY; }
const char* build_directory() { return TREE_BUILD_DIRECTORY; }
const char* cambium_binary() { return TREE_CAMBIUM_BINARY; }

}  // namespace cambium
