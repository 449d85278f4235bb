// Which instruction sets were compiled in, and which of them this processor has.
#include "table.hpp"

namespace flashinfer {

#define FLASHINFER_TABLE(isa) namespace isa { extern const Table table; }
#ifdef FLASHINFER_HAS_AVX512
FLASHINFER_TABLE(avx512)
#endif
#ifdef FLASHINFER_HAS_AVX2
FLASHINFER_TABLE(avx2)
#endif
#ifdef FLASHINFER_HAS_NEON
FLASHINFER_TABLE(neon)
#endif
FLASHINFER_TABLE(portable)

Variants variants() {
    static const Variant all[] = {
#ifdef FLASHINFER_HAS_AVX512
        {&avx512::table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c")},
#endif
#ifdef FLASHINFER_HAS_AVX2
        {&avx2::table,
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
#ifdef FLASHINFER_HAS_NEON
        {&neon::table, true},
#endif
        {&portable::table, true},
    };
    return {all, int(sizeof all / sizeof *all)};
}

}  // namespace flashinfer
