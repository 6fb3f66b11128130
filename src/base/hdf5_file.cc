// The HDF5 C API behind hdf5_file.h: handles closed by RAII, error stack turned into Error.
#include "src/base/hdf5_file.h"

#include <hdf5.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "src/base/check.h"

namespace cambium {
namespace {

constexpr uint64_t kChunkBytes = 1 << 20;  // HDF5's default chunk cache holds one such chunk
constexpr uint64_t kMaxChunkBytes = 64 << 20;
constexpr uint64_t kMaxDeflateRatio = 200;  // elements' bytes over stored bytes, as for zstd text
constexpr size_t kMaxStringBytes = 32 << 10;
constexpr int kMaxAxes = 4;
static_assert(kChunkBytes <= kMaxChunkBytes);

// Closes any HDF5 handle but a file's when it goes out of scope.
class Handle {
 public:
  Handle(hid_t handle, herr_t (*close)(hid_t)) : handle_(handle), close_(close) {}
  ~Handle() {
    if (handle_ >= 0) close_(handle_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return handle_; }

 private:
  hid_t handle_;
  herr_t (*close_)(hid_t);
};

herr_t take_description(unsigned, const H5E_error2_t* error, void* text) {
  if (error->desc != nullptr) *static_cast<std::string*>(text) = error->desc;
  return 0;
}

// The innermost message of this thread's HDF5 error stack, which names errno where there is one.
std::string last_error() {
  std::string text = "unknown HDF5 error";
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_DOWNWARD, take_description, &text);
  const size_t end = text.find(", file descriptor");
  if (text.find("errno = ") == std::string::npos && end != std::string::npos) text.resize(end);
  return text;
}

// The error stack belongs to a thread, so every entry point silences it for its own.
void enter() {
  H5open();
  H5PLset_loading_state(0);  // an unknown filter must not load a shared library
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

[[noreturn]] void write_failed(const std::string& path, std::string_view what) {
  fail(ExitCode::io, "{}: cannot write {}: {}; check the free space and permissions", path, what,
       last_error());
}

// Damage unless the operating system reported an error.
[[noreturn]] void read_failed(const std::string& path, std::string_view what) {
  const std::string reason = last_error();
  const bool is_io = reason.find("errno = ") != std::string::npos;
  fail(is_io ? ExitCode::io : ExitCode::corrupt_file, "{}: cannot read {}: {}", path, what, reason);
}

[[noreturn]] void refuse(const std::string& path, std::string_view what) {
  fail(ExitCode::unsafe_file, "{}: refused: {}; Cambium does not read such files", path, what);
}

[[noreturn]] void damaged(const std::string& path, std::string_view what) {
  fail(ExitCode::corrupt_file, "{}: damaged: {}", path, what);
}

constexpr Hdf5Type kAllTypes[] = {Hdf5Type::u8,  Hdf5Type::u16, Hdf5Type::u32, Hdf5Type::u64,
                                  Hdf5Type::i32, Hdf5Type::f32, Hdf5Type::f64};

hid_t native(Hdf5Type type) {
  switch (type) {
    case Hdf5Type::u8:
      return H5T_STD_U8LE;
    case Hdf5Type::u16:
      return H5T_STD_U16LE;
    case Hdf5Type::u32:
      return H5T_STD_U32LE;
    case Hdf5Type::u64:
      return H5T_STD_U64LE;
    case Hdf5Type::i32:
      return H5T_STD_I32LE;
    case Hdf5Type::f32:
      return H5T_IEEE_F32LE;
    case Hdf5Type::f64:
      return H5T_IEEE_F64LE;
  }
  CHECK(false);
}

// Names never hold a path: a component could be a link.
void check_name(const std::string& name) {
  CHECK(!name.empty() && name != "." && name.find('/') == std::string::npos);
  CHECK(name.find('\0') == std::string::npos);
}

std::string quoted(const std::string& name) { return "dataset '" + name + "'"; }

hid_t latest_format() {
  const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  CHECK(access >= 0);
  CHECK(H5Pset_libver_bounds(access, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST) >= 0);
  return access;
}

}  // namespace

int64_t hdf5_type_bytes(Hdf5Type type) {
  switch (type) {
    case Hdf5Type::u8:
      return 1;
    case Hdf5Type::u16:
      return 2;
    case Hdf5Type::u32:
    case Hdf5Type::i32:
    case Hdf5Type::f32:
      return 4;
    case Hdf5Type::u64:
    case Hdf5Type::f64:
      return 8;
  }
  CHECK(false);
}

const char* hdf5_type_name(Hdf5Type type) {
  constexpr const char* kNames[] = {"u8", "u16", "u32", "u64", "i32", "f32", "f64"};
  return kNames[static_cast<int>(type)];
}

// ---- Writing.

Hdf5Writer::Hdf5Writer(const std::string& path) : path_(path) {
  enter();
  const Handle access(latest_format(), H5Pclose);
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  CHECK(creation >= 0);
  CHECK(H5Pset_obj_track_times(creation, 0) >= 0);  // the same content gives the same bytes
  file_ = H5Fcreate(path.c_str(), H5F_ACC_EXCL, creation, access);
  if (file_ < 0) write_failed(path_, "the new file");
}

namespace {

// The memory functions of an image in the library's core driver. The library frees the block when
// it closes the file; the image keeps it instead.
void* image_resize(void*, size_t bytes, H5FD_file_image_op_t, void* image) {
  return static_cast<Hdf5Image*>(image)->resize(bytes);
}
void* image_allocate(size_t bytes, H5FD_file_image_op_t, void* image) {
  return static_cast<Hdf5Image*>(image)->resize(bytes);
}
void* image_copy(void* destination, const void* source, size_t bytes, H5FD_file_image_op_t, void*) {
  return std::memcpy(destination, source, bytes);
}
herr_t image_keep(void*, H5FD_file_image_op_t, void*) { return 0; }
void* image_share(void* image) { return image; }
herr_t image_unshare(void*) { return 0; }

}  // namespace

Hdf5Image::~Hdf5Image() { std::free(data_); }

void* Hdf5Image::resize(size_t bytes) {
  void* moved = std::realloc(data_, bytes);
  if (moved == nullptr) return nullptr;
  data_ = moved;
  capacity_bytes_ = bytes;
  return moved;
}

Hdf5Writer::Hdf5Writer(Hdf5Image& image, int64_t expected_bytes) : path_("memory") {
  CHECK_GT(expected_bytes, 0);
  enter();
  const Handle access(latest_format(), H5Pclose);
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  CHECK(creation >= 0);
  CHECK(H5Pset_obj_track_times(creation, 0) >= 0);
  CHECK(H5Pset_fapl_core(access, static_cast<size_t>(expected_bytes), 0) >= 0);
  H5FD_file_image_callbacks_t memory = {image_allocate, image_copy,    image_resize, image_keep,
                                        image_share,    image_unshare, &image};
  CHECK(H5Pset_file_image_callbacks(access, &memory) >= 0);
  // The library tells open files in memory apart by their names.
  const std::string name = fmt::format("cambium-image-{}", static_cast<const void*>(&image));
  file_ = H5Fcreate(name.c_str(), H5F_ACC_TRUNC, creation, access);
  if (file_ < 0) write_failed(path_, "the new file");
}

std::span<const std::byte> Hdf5Image::bytes() const {
  // Superblock version 3: byte 8 is the version, bytes 28 to 35 are the file's end.
  constexpr size_t kVersionOffset = 8, kEndOffset = 28;
  CHECK_GE(capacity_bytes_, kEndOffset + 8);
  const auto* data = static_cast<const std::byte*>(data_);
  CHECK(data[kVersionOffset] == std::byte{3});
  uint64_t end = 0;
  std::memcpy(&end, data + kEndOffset, 8);
  CHECK_LE(end, capacity_bytes_);
  return {data, static_cast<size_t>(end)};
}

Hdf5Writer::~Hdf5Writer() {
  if (file_ >= 0) H5Fclose(file_);
}

void Hdf5Writer::close() {
  CHECK(file_ >= 0);
  enter();
  if (H5Fflush(file_, H5F_SCOPE_GLOBAL) < 0) write_failed(path_, "the file's end");
  const hid_t file = file_;
  file_ = -1;
  if (H5Fclose(file) < 0) write_failed(path_, "the file's end");
}

namespace {

void write_scalar(const std::string& path, hid_t file, const char* name, hid_t type,
                  const void* value) {
  enter();
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  const Handle attribute(H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  if (space < 0 || attribute < 0 || H5Awrite(attribute, type, value) < 0) write_failed(path, name);
}

}  // namespace

void Hdf5Writer::write_attribute(const char* name, std::string_view text) {
  enter();
  CHECK_LE(text.size(), kMaxStringBytes);
  CHECK(text.find('\0') == std::string_view::npos);
  const std::string padded = text.empty() ? std::string(1, '\0') : std::string(text);
  const Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  CHECK(H5Tset_size(type, padded.size()) >= 0 && H5Tset_strpad(type, H5T_STR_NULLPAD) >= 0);
  write_scalar(path_, file_, name, type, padded.data());
}

void Hdf5Writer::write_attribute(const char* name, uint64_t value) {
  write_scalar(path_, file_, name, native(Hdf5Type::u64), &value);
}

void Hdf5Writer::write_attribute(const char* name, double value) {
  write_scalar(path_, file_, name, native(Hdf5Type::f64), &value);
}

void Hdf5Writer::create_dataset(const std::string& name, Hdf5Type type, Hdf5Storage storage,
                                std::span<const uint64_t> extents) {
  check_name(name);
  const int axes = static_cast<int>(extents.size());
  CHECK(axes >= 1 && axes <= kMaxAxes);
  enter();
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  CHECK(creation >= 0);
  CHECK(H5Pset_obj_track_times(creation, 0) >= 0);
  CHECK(H5Pset_fill_time(creation, H5D_FILL_TIME_NEVER) >= 0);
  const std::vector<hsize_t> extent(extents.begin(), extents.end());
  if (storage == Hdf5Storage::checked && std::ranges::count(extent, hsize_t{0}) == 0) {
    // Whole inner axes while they fit.
    std::vector<hsize_t> chunk(extent.size());
    uint64_t room = kChunkBytes / hdf5_type_bytes(type);
    for (size_t axis = extent.size(); axis-- > 0; room /= chunk[axis]) {
      chunk[axis] = std::clamp<uint64_t>(room, 1, extent[axis]);
    }
    CHECK(H5Pset_chunk(creation, axes, chunk.data()) >= 0 && H5Pset_fletcher32(creation) >= 0);
  }
  const Handle space(H5Screate_simple(axes, extent.data(), nullptr), H5Sclose);
  const Handle dataset(
      H5Dcreate2(file_, name.c_str(), native(type), space, H5P_DEFAULT, creation, H5P_DEFAULT),
      H5Dclose);
  if (space < 0 || dataset < 0) write_failed(path_, quoted(name));
}

namespace {

// Selects `range`: rows of the outermost axis whose rows make it up.
void select_range(hid_t space, Hdf5Range range) {
  hsize_t extent[kMaxAxes] = {}, start[kMaxAxes] = {}, count[kMaxAxes] = {};
  int axis = H5Sget_simple_extent_dims(space, extent, nullptr) - 1;
  CHECK_GE(axis, 0);
  uint64_t row = 1;
  for (; axis > 0; --axis) {
    const uint64_t outer = row * extent[axis];
    if (range.first_index % outer != 0 || range.element_count % outer != 0) break;
    count[axis] = extent[axis];
    row = outer;
  }
  uint64_t first = range.first_index / row;
  count[axis] = range.element_count / row;
  start[axis] = first % extent[axis];
  CHECK_LE(start[axis] + count[axis], extent[axis]);
  while (axis > 0) {
    first /= extent[axis--];
    start[axis] = first % extent[axis];
    count[axis] = 1;
  }
  CHECK(H5Sselect_hyperslab(space, H5S_SELECT_SET, start, nullptr, count, nullptr) >= 0);
}

}  // namespace

void Hdf5Writer::write_range(const std::string& name, Hdf5Type type, Hdf5Range range,
                             const void* data) {
  check_name(name);
  if (range.element_count == 0) return;
  enter();
  Handle dataset(H5Dopen2(file_, name.c_str(), H5P_DEFAULT), H5Dclose);
  if (dataset < 0) write_failed(path_, quoted(name));
  const Handle space(H5Dget_space(dataset), H5Sclose);
  select_range(space, range);
  const hsize_t count = range.element_count;
  const Handle memory(H5Screate_simple(1, &count, nullptr), H5Sclose);
  if (H5Dwrite(dataset, native(type), memory, space, H5P_DEFAULT, data) < 0)
    write_failed(path_, quoted(name));
  // A chunk's last write may wait in the cache: closing the dataset reports it.
  if (H5Dflush(dataset) < 0) write_failed(path_, quoted(name));
}

// ---- Reading.

Hdf5Reader::Hdf5Reader(const std::string& path) : path_(path) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0)
    fail(ExitCode::io, "{}: cannot open: {}", path, std::strerror(errno));
  if (!S_ISREG(status.st_mode)) refuse(path, "not a regular file");
  file_bytes_ = static_cast<uint64_t>(status.st_size);
  enter();
  const Handle access(latest_format(), H5Pclose);
  file_ = H5Fopen(path.c_str(), H5F_ACC_RDONLY, access);
  if (file_ >= 0) return;
  const std::string reason = last_error();
  if (reason.find("unable to lock") != std::string::npos)
    fail(ExitCode::io,
         "{}: cannot lock: {}; another process is writing it, or the file system has no locks: "
         "then set the environment variable HDF5_USE_FILE_LOCKING=FALSE",
         path, reason);
  read_failed(path, "it as an HDF5 file");
}

Hdf5Reader::~Hdf5Reader() {
  if (file_ >= 0) H5Fclose(file_);
}

Hdf5Reader::Presence Hdf5Reader::dataset_presence(const std::string& name) const {
  check_name(name);
  enter();
  const htri_t exists = H5Lexists(file_, name.c_str(), H5P_DEFAULT);
  if (exists < 0) read_failed(path_, quoted(name));
  return exists > 0 ? Presence::present : Presence::absent;
}

namespace {

// Only a hard link stays inside the file.
void check_link(const std::string& path, hid_t file, const std::string& name) {
  const htri_t exists = H5Lexists(file, name.c_str(), H5P_DEFAULT);
  if (exists < 0) read_failed(path, quoted(name));
  if (exists == 0) damaged(path, quoted(name) + " is missing");
  H5L_info_t link;
  if (H5Lget_info(file, name.c_str(), &link, H5P_DEFAULT) < 0) read_failed(path, quoted(name));
  if (link.type != H5L_TYPE_HARD) refuse(path, quoted(name) + " is a soft or external link");
}

Hdf5Type dataset_type(const std::string& path, hid_t dataset, const std::string& name) {
  const Handle type(H5Dget_type(dataset), H5Tclose);
  if (type < 0) read_failed(path, quoted(name));
  for (Hdf5Type candidate : kAllTypes)
    if (H5Tequal(type, native(candidate)) > 0) return candidate;
  refuse(path, quoted(name) + " has a type other than u8 u16 u32 u64 i32 f32 f64");
}

// Refuses every filter but fletcher32, shuffle and deflate; returns the largest plausible ratio of
// the elements' bytes to the stored bytes.
uint64_t check_filters(const std::string& path, hid_t creation, const std::string& name) {
  const int filters = H5Pget_nfilters(creation);
  if (filters < 0) read_failed(path, quoted(name));
  uint64_t ratio = 1;
  for (int i = 0; i < filters; ++i) {
    unsigned flags = 0, config = 0;
    size_t values = 0;
    const H5Z_filter_t filter = H5Pget_filter2(creation, static_cast<unsigned>(i), &flags, &values,
                                               nullptr, 0, nullptr, &config);
    if (filter < 0) read_failed(path, quoted(name));
    if (filter == H5Z_FILTER_DEFLATE) ratio = kMaxDeflateRatio;
    if (filter != H5Z_FILTER_DEFLATE && filter != H5Z_FILTER_SHUFFLE &&
        filter != H5Z_FILTER_FLETCHER32)
      refuse(path, fmt::format("{} uses filter {}", quoted(name), static_cast<int>(filter)));
  }
  return ratio;
}

void read_extents(const std::string& path, hid_t dataset, const std::string& name,
                  Hdf5DatasetInfo& info) {
  const Handle space(H5Dget_space(dataset), H5Sclose);
  if (space < 0) read_failed(path, quoted(name));
  const int axes = H5Sget_simple_extent_ndims(space);
  if (H5Sget_simple_extent_type(space) != H5S_SIMPLE || axes < 1 || axes > kMaxAxes)
    refuse(path, quoted(name) + " is not an array of one to four axes");
  hsize_t extent[kMaxAxes] = {};
  if (H5Sget_simple_extent_dims(space, extent, nullptr) != axes) read_failed(path, quoted(name));
  info.extents.assign(extent, extent + axes);
  info.element_count = 1;
  for (const uint64_t count : info.extents) {
    if (__builtin_mul_overflow(info.element_count, count, &info.element_count))
      damaged(path, quoted(name) + " has an impossible size");
  }
}

// The layout, checked against the file's size before anything is allocated for the elements.
void check_storage(const Hdf5Reader& reader, hid_t dataset, const std::string& name,
                   Hdf5DatasetInfo& info) {
  const std::string& path = reader.path();
  const Handle creation(H5Dget_create_plist(dataset), H5Pclose);
  if (creation < 0) read_failed(path, quoted(name));
  const H5D_layout_t layout = H5Pget_layout(creation);
  if (layout == H5D_VIRTUAL) refuse(path, quoted(name) + " is a virtual dataset");
  if (layout != H5D_CONTIGUOUS && layout != H5D_CHUNKED)
    refuse(path, quoted(name) + " is neither contiguous nor chunked");
  if (H5Pget_external_count(creation) != 0)
    refuse(path, quoted(name) + " keeps its elements in another file");
  const uint64_t ratio = check_filters(path, creation, name);
  const uint64_t type_bytes = static_cast<uint64_t>(hdf5_type_bytes(info.type));
  uint64_t bytes = 0, allowed = 0;
  if (__builtin_mul_overflow(info.element_count, type_bytes, &bytes))
    damaged(path, quoted(name) + " has an impossible size");
  const uint64_t stored = H5Dget_storage_size(dataset);
  if (stored > reader.file_bytes() || __builtin_mul_overflow(stored, ratio, &allowed) ||
      bytes > allowed)
    damaged(path, fmt::format("{} declares {} bytes, the file holds {} for it", quoted(name), bytes,
                              stored));
  if (layout == H5D_CHUNKED) {
    info.storage = Hdf5Storage::checked;
    const int axes = static_cast<int>(info.extents.size());
    hsize_t sides[kMaxAxes] = {};
    if (H5Pget_chunk(creation, kMaxAxes, sides) != axes) read_failed(path, quoted(name));
    uint64_t chunk = 1;
    for (int axis = 0; axis < axes; ++axis) {
      if (__builtin_mul_overflow(chunk, sides[axis], &chunk)) chunk = 0;
    }
    if (chunk == 0 || chunk > kMaxChunkBytes / type_bytes)
      damaged(path, fmt::format("{} has chunks of {} elements", quoted(name), chunk));
    return;
  }
  if (bytes == 0) return;
  const haddr_t offset = H5Dget_offset(dataset);
  if (offset == HADDR_UNDEF || offset > reader.file_bytes() - bytes)
    damaged(path, quoted(name) + " lies outside the file");
  info.file_offset_bytes = offset;
}

}  // namespace

Hdf5DatasetInfo Hdf5Reader::dataset_info(const std::string& name, int axes) const {
  check_name(name);
  enter();
  check_link(path_, file_, name);
  const Handle object(H5Oopen(file_, name.c_str(), H5P_DEFAULT), H5Oclose);
  if (object < 0) read_failed(path_, quoted(name));
  if (H5Iget_type(object) != H5I_DATASET) refuse(path_, quoted(name) + " is not a dataset");
  Hdf5DatasetInfo info;
  info.type = dataset_type(path_, object, name);
  read_extents(path_, object, name, info);
  if (axes != 0 && std::ssize(info.extents) != axes)
    refuse(path_, fmt::format("{} has {} axes, not {}", quoted(name), info.extents.size(), axes));
  check_storage(*this, object, name, info);
  return info;
}

Hdf5DatasetInfo Hdf5Reader::expect_type(const Hdf5DatasetInfo& info, const std::string& name,
                                        Hdf5Type type) const {
  if (info.type != type)
    damaged(path_, fmt::format("{} holds {}, not {}", quoted(name), hdf5_type_name(info.type),
                               hdf5_type_name(type)));
  return info;
}

void Hdf5Reader::read_range(const std::string& name, Hdf5Type type, Hdf5Range range,
                            void* out) const {
  const Hdf5DatasetInfo info = expect_type(dataset_info(name, 0), name, type);
  if (range.first_index > info.element_count ||
      range.element_count > info.element_count - range.first_index)
    damaged(path_, fmt::format("{} has {} elements, fewer than expected", quoted(name),
                               info.element_count));
  if (range.element_count == 0) return;
  const Handle dataset(H5Dopen2(file_, name.c_str(), H5P_DEFAULT), H5Dclose);
  if (dataset < 0) read_failed(path_, quoted(name));
  const Handle space(H5Dget_space(dataset), H5Sclose);
  select_range(space, range);
  const hsize_t count = range.element_count;
  const Handle memory(H5Screate_simple(1, &count, nullptr), H5Sclose);
  if (H5Dread(dataset, native(type), memory, space, H5P_DEFAULT, out) < 0)
    read_failed(path_, quoted(name));
}

Hdf5Reader::Presence Hdf5Reader::attribute_presence(const char* name) const {
  enter();
  const htri_t exists = H5Aexists(file_, name);
  if (exists < 0) read_failed(path_, name);
  return exists > 0 ? Presence::present : Presence::absent;
}

namespace {

// Opens a root attribute and checks that it is one scalar.
hid_t open_attribute(const std::string& path, hid_t file, const char* name) {
  enter();
  const htri_t exists = H5Aexists(file, name);
  if (exists < 0) read_failed(path, name);
  if (exists == 0) damaged(path, fmt::format("attribute '{}' is missing", name));
  const hid_t attribute = H5Aopen(file, name, H5P_DEFAULT);
  if (attribute < 0) read_failed(path, name);
  const Handle space(H5Aget_space(attribute), H5Sclose);
  if (space >= 0 && H5Sget_simple_extent_type(space) == H5S_SCALAR) return attribute;
  H5Aclose(attribute);
  refuse(path, fmt::format("attribute '{}' is not a scalar", name));
}

void read_scalar(const std::string& path, hid_t file, const char* name, hid_t type, void* value) {
  const Handle attribute(open_attribute(path, file, name), H5Aclose);
  const Handle stored(H5Aget_type(attribute), H5Tclose);
  if (stored < 0) read_failed(path, name);
  if (H5Tequal(stored, type) <= 0)
    refuse(path, fmt::format("attribute '{}' has another type than expected", name));
  if (H5Aread(attribute, type, value) < 0) read_failed(path, name);
}

}  // namespace

std::string Hdf5Reader::string_attribute(const char* name) const {
  const Handle attribute(open_attribute(path_, file_, name), H5Aclose);
  const Handle type(H5Aget_type(attribute), H5Tclose);
  if (type < 0) read_failed(path_, name);
  if (H5Tget_class(type) != H5T_STRING || H5Tis_variable_str(type) != 0)
    refuse(path_, fmt::format("attribute '{}' is not a string of fixed length", name));
  const size_t bytes = H5Tget_size(type);
  if (bytes == 0 || bytes > kMaxStringBytes)
    damaged(path_, fmt::format("attribute '{}' has {} bytes", name, bytes));
  std::string text(bytes, '\0');
  if (H5Aread(attribute, type, text.data()) < 0) read_failed(path_, name);
  text.resize(std::min(bytes, text.find('\0')));
  return text;
}

uint64_t Hdf5Reader::u64_attribute(const char* name) const {
  uint64_t value = 0;
  read_scalar(path_, file_, name, native(Hdf5Type::u64), &value);
  return value;
}

double Hdf5Reader::f64_attribute(const char* name) const {
  double value = 0;
  read_scalar(path_, file_, name, native(Hdf5Type::f64), &value);
  return value;
}

}  // namespace cambium
