// The compiled half of fmt, once: Debian ships no static libfmt, and header-only use costs every
// file of this tree six seconds of compile time. fmt's templates stay in its headers; what they
// call is instantiated here.
#include "fmt/format-inl.h"

static_assert(FMT_VERSION / 10000 == 9,
              "the list below is that of fmt 9 (Debian 12, Ubuntu 24.04)");

namespace fmt::detail {

template dragonbox::decimal_fp<float> dragonbox::to_decimal(float x) noexcept;
template dragonbox::decimal_fp<double> dragonbox::to_decimal(double x) noexcept;
template locale_ref::locale_ref(const std::locale& locale);
template std::locale locale_ref::get<std::locale>() const;
template thousands_sep_result<char> thousands_sep_impl(locale_ref);
template char decimal_point_impl(locale_ref);
template void buffer<char>::append(const char*, const char*);
template void vformat_to(buffer<char>&, string_view, basic_format_args<buffer_context<char>>,
                         locale_ref);

}  // namespace fmt::detail
