# The CPU kernels, once for every instruction set the compiler can make; which one runs is chosen at run time.
# -ffp-contract=off: only what says fma is one, so that all of them give the same bits.
include(CheckCXXSourceCompiles)
if(FLASHINFER_ASAN) # with -O3 it takes the compiler more than ten minutes
  set(kernel_flags -O1)
else()
  set(kernel_flags -O3)
endif()
list(APPEND kernel_flags -ffp-contract=off -fno-math-errno -Wall -Wextra)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU") # its own header of intrinsics sets it off
  list(APPEND kernel_flags -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set(kernel_objects "")
set(kernel_defines "")

function(flashinfer_kernels isa condition)
  string(TOUPPER ${isa} upper)
  string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${ARGN}")
  check_cxx_source_compiles("#if !(${condition})\n#error not for this processor\n#endif\nint main() {}" FLASHINFER_HAS_${upper})
  if(NOT FLASHINFER_HAS_${upper})
    return()
  endif()
  add_library(kernels_${isa} OBJECT kernels.cpp codes.cpp)
  target_compile_options(kernels_${isa} PRIVATE ${kernel_flags} ${ARGN})
  target_compile_definitions(kernels_${isa} PRIVATE
    FLASHINFER_ISA=${isa} FLASHINFER_NAME="${isa}" FLASHINFER_${upper})
  if(FLASHINFER_ASAN)
    target_compile_options(kernels_${isa} PRIVATE -fsanitize=address -fno-omit-frame-pointer -g)
  endif()
  set(kernel_objects ${kernel_objects} $<TARGET_OBJECTS:kernels_${isa}> PARENT_SCOPE)
  set(kernel_defines ${kernel_defines} FLASHINFER_HAS_${upper} PARENT_SCOPE)
endfunction()

flashinfer_kernels(avx512 "defined(__x86_64__)" -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c)
flashinfer_kernels(avx2 "defined(__x86_64__)" -mavx2 -mfma -mf16c)
flashinfer_kernels(neon "defined(__aarch64__)")
flashinfer_kernels(portable "1")

flashinfer_module(_kernels kernels_module.cpp codec.cpp engine.cpp feedforward.cpp pool.cpp variants.cpp ${kernel_objects})
target_compile_definitions(_kernels PRIVATE ${kernel_defines})
