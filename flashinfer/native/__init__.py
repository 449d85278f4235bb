"""The native core: CPU kernels and the io_uring reader, in C++. Absent where no compiler was at installation."""
