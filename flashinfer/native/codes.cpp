// The kernels of rows of codes, for one instruction set: compiled once for each, as kernels.cpp.
#include <algorithm>
#include <type_traits>

#include "simd_codes.hpp"
#include "work.hpp"

namespace flashinfer::FLASHINFER_ISA {

extern const Table table;

namespace {

#include "codes.hpp"
#include "prepare.hpp"
#include "code_dots.hpp"
#include "code_sums.hpp"

}  // namespace

extern const CodeTable code_table;
const CodeTable code_table = {prepared_bytes, prepare, code_dots, code_sums};

}  // namespace flashinfer::FLASHINFER_ISA
