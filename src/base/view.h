// Views: non-owning, trivially copyable tensor arguments with shape, dtype and direction.
//
// `In<T>`, `Out<T>`, `InOut<T>` are the only fields through which an op touches memory, so one
// visitor over them yields every access (poisoning, race detection, traces). `Real` is the element
// tag of tensors stored as fp32 or bf16, chosen at run time by `numerics.compute`.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "src/base/check.h"

namespace cambium {

enum class DType : uint8_t { f32, bf16, i32, i64, u8 };

constexpr int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
      return 2;
    case DType::i64:
      return 8;
    case DType::u8:
      return 1;
  }
  return 0;
}

const char* dtype_name(DType dtype);

// Element tag: fp32 or bf16, known at run time.
struct Real {};

// Up to four extents, outermost first. `row_stride` is the distance in elements between
// consecutive first indices; the inner dimensions are contiguous.
struct Shape {
  std::array<int64_t, 4> extent{1, 1, 1, 1};
  int rank = 0;

  Shape() = default;
  template <class... Extents>
  requires(sizeof...(Extents) >= 1 && sizeof...(Extents) <= 4) explicit Shape(Extents... extents)
      : extent{static_cast<int64_t>(extents)...}, rank(sizeof...(Extents)) {
    for (int i = rank; i < 4; ++i) extent[i] = 1;
  }
  int64_t operator[](int i) const { return extent[i]; }
  int64_t elements() const { return extent[0] * extent[1] * extent[2] * extent[3]; }
  int64_t row_elements() const { return extent[1] * extent[2] * extent[3]; }
  bool operator==(const Shape&) const = default;
};

enum class Access : uint8_t { read, write, read_write };

template <class T>
constexpr DType static_dtype() {
  if constexpr (std::is_same_v<T, float>) return DType::f32;
  if constexpr (std::is_same_v<T, int32_t>) return DType::i32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::i64;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::u8;
  return DType::f32;
}

// The untyped core of a view, what the visitors see.
struct RawView {
  void* data = nullptr;
  DType dtype = DType::f32;
  Access access = Access::read;
  Shape shape;
  int64_t row_stride = 0;  // elements

  bool empty() const { return data == nullptr; }
  int64_t operator[](int i) const { return shape[i]; }
  int64_t elements() const { return shape.elements(); }
  bool is_contiguous() const { return row_stride == shape.row_elements(); }
};

// View of elements `T` with direction `kAccess`. An absent optional argument is a default view.
template <class T, Access kAccess>
struct View : RawView {
  static constexpr bool kReadOnly = kAccess == Access::read;
  using Element = std::conditional_t<std::is_same_v<T, Real>, void, T>;
  using Pointer = std::conditional_t<kReadOnly, const Element*, Element*>;

  View() { access = kAccess; }
  // Typed storage.
  View(Pointer pointer, Shape view_shape, int64_t stride = -1) requires(!std::is_same_v<T, Real>) {
    set(pointer, static_dtype<T>(), view_shape, stride);
  }
  // fp32 or bf16 storage.
  View(Pointer pointer, DType real_dtype, Shape view_shape,
       int64_t stride = -1) requires(std::is_same_v<T, Real>) {
    set(pointer, real_dtype, view_shape, stride);
  }
  // Any view of the same element converts to any direction's read view.
  template <Access kOther>
  requires(kReadOnly || kOther != Access::read) View(const View<T, kOther>& other)
      : RawView(other) {  // NOLINT: implicit by design
    access = kAccess;
  }
  // A float view is a Real view of fp32.
  template <Access kOther>
  requires(std::is_same_v<T, Real> && (kReadOnly || kOther != Access::read))
      View(const View<float, kOther>& other)
      : RawView(other) {  // NOLINT: implicit by design
    access = kAccess;
  }

  Pointer pointer() const { return static_cast<Pointer>(data); }
  // fp32 elements of a `Real` view; the dtype is checked.
  auto f32() const {
    CHECK(dtype == DType::f32);
    return static_cast<std::conditional_t<kReadOnly, const float*, float*>>(data);
  }

 private:
  void set(const void* pointer, DType view_dtype, Shape view_shape, int64_t stride) {
    data = const_cast<void*>(pointer);
    dtype = view_dtype;
    access = kAccess;
    shape = view_shape;
    row_stride = stride < 0 ? view_shape.row_elements() : stride;
  }
};

template <class T>
using In = View<T, Access::read>;
template <class T>
using Out = View<T, Access::write>;
template <class T>
using InOut = View<T, Access::read_write>;

static_assert(std::is_trivially_copyable_v<In<float>>, "args structs are copied into streams");

}  // namespace cambium
