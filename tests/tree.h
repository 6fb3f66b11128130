// Where the tests find the tree and its binaries. tests/tree.cc alone is compiled with absolute
// paths, so that clones at other places share every other compilation (ccache).
#pragma once

namespace cambium {

const char* source_directory();
const char* build_directory();  // the preset's, with compile_commands.json
const char* cambium_binary();

}  // namespace cambium
